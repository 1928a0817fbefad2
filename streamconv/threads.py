"""Start threads in a process that signals may stop at any moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable


def start_threads(threads: Iterable[threading.Thread]) -> None:
    """Start all of `threads` with SIGINT and SIGTERM blocked, so that other threads handle these signals.

    The signals are also blocked in the calling thread meanwhile, since an exception from a handler inside
    `Thread.start` would leave a thread half started. A pending signal is handled once the last thread has started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        for thread in threads:
            thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
