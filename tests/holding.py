"""Jobs that are held at a known point, for tests that kill what is around them (tests/tools/hold)."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil

HOOK = Path(__file__).parent / "tools" / "hold"
PATIENCE_SECONDS = 60


def hold(folder: Path, how: str) -> dict[str, str]:
    """The environment in which the first complete output is held before its rename; `how` is kill or wait."""
    return {"PYTHONPATH": str(HOOK), "HOLD_MARKER": str(folder / "held"), "HOLD_HOW": how}


def held_processes(folder: Path) -> list[psutil.Process]:
    """The process that is held, and its parent, once there is one; those that are gone by now are left out."""
    marker = folder / "held"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (marker.exists() and marker.read_text().endswith("\n")):
        assert time.monotonic() < deadline, "no output was ever complete"
        time.sleep(0.005)
    pids = [int(word) for word in marker.read_text().split()[:2]]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def await_end(process: psutil.Process) -> None:
    """Returns once it has ended: an orphan may stay a zombie, where process 1 is no init that takes it (containers)."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {process.pid} did not end"
            time.sleep(0.005)


def held_output(folder: Path) -> str:
    """The name of the output that is held, or was."""
    return (folder / "held").read_text().split()[2].removesuffix(".gguf.part")
