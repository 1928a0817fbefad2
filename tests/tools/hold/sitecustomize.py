"""Put on PYTHONPATH by the batch's tests: the first process that has an output complete is held before its rename.

HOLD_MARKER names a file: who creates it is the one that is held, and writes to it its own and its parent's process id
and the name of the part file.
HOLD_HOW: `kill` ends that process by SIGKILL, `wait` leaves it where it is until a signal ends it.
"""

import os
import signal
from pathlib import Path

from streamconv.output.sink import Sink

_publish = Sink.publish


def _held(self: Sink) -> None:
    marker = Path(os.environ["HOLD_MARKER"])
    try:
        with marker.open("x") as file:
            file.write(f"{os.getpid()} {os.getppid()} {self.readable_path.name}\n")
    except FileExistsError:
        _publish(self)
        return
    if os.environ["HOLD_HOW"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        signal.pause()


if "HOLD_MARKER" in os.environ:
    Sink.publish = _held  # type: ignore[method-assign]
