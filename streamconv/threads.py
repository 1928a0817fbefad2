"""Start threads in a process that signals may stop at any moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable


def start_threads(threads: Iterable[threading.Thread]) -> None:
    """Begins all of `threads`, which from then on leave SIGINT and SIGTERM to others.

    Signals wait meanwhile, since what a handler raises inside of `Thread.start` leaves a thread half begun. It is
    raised here, once the last one has begun.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        for thread in threads:
            thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
