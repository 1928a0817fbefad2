"""Run one command in a fresh process, and measure its time and its memory over time.

The peak is the kernel's own high-water mark (VmHWM, summed over the processes that are alive together), not the highest
sample; the samples show the course. They are read from /proc, which distinguishes anonymous from mapped memory (psutil
does not), at about 1% of one core for every command alike.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

INTERVAL_SECONDS: Final = 0.02
N_SAMPLES_A_SEARCH: Final = 10  # for new processes
# An installed package has its bytecode; where this is set, a checkout compiles its source in every process (0.1 s).
_UNLIKE_INSTALLED: Final = frozenset({"PYTHONDONTWRITEBYTECODE"})
_LAUNCHER: Final = Path(__file__).with_name("launch.py")


class Point(NamedTuple):
    """Resident memory of a process tree; anon has no file behind it, file is mapped from files."""

    seconds: float
    anon_nbytes: int
    file_nbytes: int


@dataclass(slots=True)
class Measured:
    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_rss_nbytes: int
    exit_code: int
    timeline: list[Point] = field(default_factory=list)


def measure(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, timeout_seconds: float = 1800
) -> Measured:
    """What `command` cost. Its output goes to `log`; beyond the timeout it is killed (exit code -9).

    Raises OSError where it cannot be started or measured.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _UNLIKE_INSTALLED}
    launcher = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_LAUNCHER), str(log), *command],
        env={**inherited, **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    first = launcher.stdout.readline()
    if not first:
        raise FileNotFoundError(f"cannot start {command[0]}")
    tree = _Tree(int(first))
    try:
        while launcher.poll() is None:
            tree.sample()
            if tree.seconds > timeout_seconds:
                tree.kill()
            time.sleep(INTERVAL_SECONDS)
    except BaseException:  # an interrupt too: nothing may write on when its folder is removed
        tree.kill()
        launcher.wait()
        raise
    finally:
        tree.close()
    told = launcher.stdout.read().split()
    if not told:
        raise ChildProcessError(
            f"the launcher of {command[0]} was ended ({launcher.returncode}), and its figures with it"
        )
    wall, user, system, child_kib, own_kib, exit_code = map(float, told)
    exact_nbytes = int(child_kib) * 1024 if child_kib > own_kib else 0
    return Measured(wall, user, system, max(tree.peak_rss_nbytes, exact_nbytes), int(exit_code), tree.timeline)


class _Tree:
    """A process and its descendants, looked at again and again: their files in /proc stay open, at half the cost."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_rss_nbytes = 0
        self.timeline: list[Point] = []
        self._started = time.monotonic()
        self._descriptors: dict[int, int] = {}
        self._n_samples = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def sample(self) -> None:
        seconds = self.seconds
        if self._n_samples % N_SAMPLES_A_SEARCH == 0:
            self._search(self.pid)
        self._n_samples += 1
        states = [state for pid in [*self._descriptors] if (state := self._status(pid))]
        if not states:
            return
        anon_nbytes = sum(state[b"RssAnon"] + state[b"RssShmem"] for state in states)
        self.timeline.append(Point(seconds, anon_nbytes, sum(state[b"RssFile"] for state in states)))
        self.peak_rss_nbytes = max(self.peak_rss_nbytes, sum(state[b"VmHWM"] for state in states))

    def kill(self) -> None:
        for pid in {self.pid, *self._descriptors}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _search(self, pid: int) -> None:
        with suppress(OSError):
            if pid not in self._descriptors:
                self._descriptors[pid] = os.open(f"/proc/{pid}/status", os.O_RDONLY)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                for child in children.read_text().split():
                    self._search(int(child))

    def _status(self, pid: int) -> dict[bytes, int]:
        """The memory lines of /proc/PID/status in bytes; empty once the process has gone (or is a zombie)."""
        try:
            lines = os.pread(self._descriptors[pid], 4096, 0).splitlines()
        except ProcessLookupError:
            os.close(self._descriptors.pop(pid))
            return {}
        fields = [line.split() for line in lines if line.startswith((b"VmHWM", b"Rss"))]
        return {name[:-1]: int(kib) * 1024 for name, kib, _ in fields}
