"""SIGKILL before and after every system call that changes a file, and at moments that nobody chose.

After each the destination is the old file or the new one, and the next run ends in the new one.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.fault.calls import Call, syncs_skipped, watched
from tests.fault.kills import kill_writer
from tests.fault.program import empty
from tests.fault.trial import OLD, Trial, in_child, kill_self

# The states of a run that a kill must have met, by the call that leads out of each.
STATES = {
    "nothing there": "open out.gguf.part.journal",
    "journal there": "flock out.gguf.part.journal",
    "locked": "pwrite out.gguf.part.journal",
    "header written": "fdatasync out.gguf.part.journal",
    "journal durable": "open out.gguf.part",
    "part file there": "fallocate out.gguf.part",
    "writing": "pwrite out.gguf.part",
    "chunks written": "fdatasync out.gguf.part",
    "all written": "fsync out.gguf.part",
    "finished": "renameat2 out.gguf.part",
    "renamed": "fsync .",
    "directory synced": "unlink out.gguf.part.journal",
}


def short(call: Call, directory: Path) -> str:
    path = Path(call.path)
    return f"{call.name} {path.name if path != directory else '.'}"


def trace(trial: Trial) -> list[str]:
    """Every call of an undisturbed run."""
    calls: list[str] = []

    def note(call: Call) -> Any:
        if call.changes_something:
            calls.append(short(call, trial.dst.parent))
        return call.do()

    with watched(note):
        trial.run()
    return calls


def killed_at(trial: Trial, number: int, *, after: bool) -> int:
    """Run the trial in a process that is killed at its call of this number."""
    seen = 0

    def handle(call: Call) -> Any:
        nonlocal seen
        if not call.changes_something:
            return call.do()
        seen += 1
        if seen == number and not after:
            kill_self()
        result = None if call.name in ("fsync", "fdatasync") else call.do()  # a kill loses nothing of the page cache
        if seen == number:
            kill_self()
        return result

    def work() -> None:
        with watched(handle):
            trial.run()

    return in_child(work)


def test_every_state_is_met(tmp_path: Path) -> None:
    assert set(STATES.values()) <= set(trace(Trial(tmp_path / "out.gguf", force=False)))


@pytest.mark.parametrize("old", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_call(tmp_path: Path, after: bool, old: bool) -> None:
    n_calls = len(trace(Trial(empty(tmp_path / "count") / "out.gguf", force=old)))
    resumed = []
    for number in range(1, n_calls + 1):
        trial = Trial(empty(tmp_path / str(number)) / "out.gguf", force=old)
        if old:
            trial.dst.write_bytes(OLD)
        assert killed_at(trial, number, after=after) == signal.SIGKILL
        trial.assert_old_or_new()
        if trial.left_behind() or not trial.is_done():
            with syncs_skipped():
                trial.run()
            resumed.append(trial.resumed_nbytes)
        trial.assert_done()
    assert resumed == sorted(resumed)  # the later the kill, the less was lost
    assert len(set(resumed)) > 3


def test_killed_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(20)
    with syncs_skipped():
        results = [kill_writer(tmp_path / str(number), chance) for number in range(40)]
    assert any(resumed_nbytes > 0 for _, resumed_nbytes in results)
    assert sum(n_kills for n_kills, _ in results) >= 30
