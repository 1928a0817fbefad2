"""One command in a fresh process: how long it took and how much memory it held, over time.

Owns: measuring. Does not own: what is run (converters.py) and in which order (bench.py).
Invariant: the peak is the kernel's own high-water mark (VmHWM, summed over the processes alive together), not the
highest of the samples; the samples show its course. Sampling costs under 1% of one core, the same for every command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import psutil

INTERVAL_SECONDS: Final = 0.02
N_SAMPLES_PER_TREE: Final = 10  # looking for new processes costs more than reading one, so it is done less often
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
    """What `command` cost. Its output goes to `log`; beyond the timeout it is killed (exit code -9)."""
    launcher = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_LAUNCHER), str(log), *command],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    first = launcher.stdout.readline()
    if not first:
        raise FileNotFoundError(f"cannot start {command[0]}")
    tree = _Tree(int(first))
    while launcher.poll() is None:
        tree.sample()
        if tree.seconds > timeout_seconds:
            os.kill(tree.pid, signal.SIGKILL)
        time.sleep(INTERVAL_SECONDS)
    wall, user, system, child_kib, own_kib, exit_code = map(float, launcher.stdout.read().split())
    exact_nbytes = int(child_kib) * 1024 if child_kib > own_kib else 0
    return Measured(wall, user, system, max(tree.peak_rss_nbytes, exact_nbytes), int(exit_code), tree.timeline)


class _Tree:
    """A process and its descendants, looked at again and again."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_rss_nbytes = 0
        self.timeline: list[Point] = []
        self._started = time.monotonic()
        self._pids = [pid]
        self._n_samples = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def sample(self) -> None:
        if self._n_samples % N_SAMPLES_PER_TREE == 0:
            self._pids = [self.pid, *_descendants(self.pid)]
        self._n_samples += 1
        seconds = self.seconds
        states = [state for state in map(_status, self._pids) if state]
        if not states:
            return
        anon_nbytes = sum(state["RssAnon"] + state["RssShmem"] for state in states)
        self.timeline.append(Point(seconds, anon_nbytes, sum(state["RssFile"] for state in states)))
        self.peak_rss_nbytes = max(self.peak_rss_nbytes, sum(state["VmHWM"] for state in states))


def _descendants(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _status(pid: int) -> dict[str, int]:
    """The memory lines of /proc/PID/status in bytes; empty once the process has gone (or is a zombie)."""
    try:
        with Path(f"/proc/{pid}/status").open(encoding="ascii") as file:
            lines = [line.split() for line in file if line.startswith(("VmHWM", "Rss"))]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in lines}
