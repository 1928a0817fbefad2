"""Power cuts after every call, with every kind of loss that a disk may cause; and chains of runs, each cut short."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest

from streamconv.errors import SourceError
from tests.fault.calls import syncs_skipped, watched
from tests.fault.power import Disk, PowerCut
from tests.fault.trial import CHUNK_NBYTES, OLD, Trial

NEVER = 10**9
SURVIVALS = (0.0, 0.25, 0.5, 0.75, 1.0)  # chances that an unsynced change is on the disk


def make(tmp_path: Path, seed: int, **sizes: int) -> tuple[Trial, Disk]:
    directory = tmp_path / "disk"
    directory.mkdir()
    trial = Trial(directory / "out.gguf", **sizes)  # type: ignore[arg-type]
    trial.dst.write_bytes(OLD)
    return trial, Disk(directory, tmp_path / "keepers", random.Random(seed))


def run_until_cut(trial: Trial, disk: Disk, n_calls: int, *, restart: bool = False) -> bool:
    """True where the run came to its end first."""
    disk.cut_after(n_calls)
    with watched(disk.handle):
        try:
            trial.run(restart=restart)
        except PowerCut:
            return False
    return True


@pytest.mark.parametrize("survival", SURVIVALS)
def test_cut_after_every_call(tmp_path: Path, survival: float) -> None:
    resumed = set()
    n_calls = 0
    while True:
        (tmp_path / str(n_calls)).mkdir()
        trial, disk = make(tmp_path / str(n_calls), n_calls)
        if run_until_cut(trial, disk, n_calls):
            break
        disk.lose(survival)
        trial.assert_old_or_new()
        with syncs_skipped():
            trial.run()
        resumed.add(trial.resumed_nbytes)
        trial.assert_done()
        n_calls += 1
    assert n_calls > 30
    assert len(resumed) > 3


def test_what_was_sealed_stays(tmp_path: Path) -> None:
    trial, disk = make(tmp_path, 1)
    assert run_until_cut(trial, disk, NEVER)
    disk.lose(0.0)
    assert trial.dst.read_bytes() == trial.expected.tobytes()


def test_what_was_recorded_stays(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    trial, disk = make(tmp_path / "whole", 1)
    records: list[int] = []
    trial.progress = lambda: records.append(disk.n_calls)
    assert run_until_cut(trial, disk, NEVER)
    step = trial.chunks_per_record
    for number, n_calls in enumerate(records[step :: step + 1], 1):  # each record follows the reports of its chunks
        (tmp_path / str(number)).mkdir()
        trial, disk = make(tmp_path / str(number), number)
        assert not run_until_cut(trial, disk, n_calls)
        disk.lose(0.0)
        trial.run()
        assert trial.resumed_nbytes == number * step * CHUNK_NBYTES


@pytest.mark.parametrize("n_calls", range(2, 11))
def test_cut_while_discarding(tmp_path: Path, n_calls: int) -> None:
    """The journal of a discarded run must never be found beside the part file of the next."""
    for attempt in range(25):
        (tmp_path / str(attempt)).mkdir()
        trial, disk = make(
            tmp_path / str(attempt), 100 * n_calls + attempt, nbytes=3 * CHUNK_NBYTES, chunks_per_record=1
        )
        run_until_cut(trial, disk, 11)
        assert (trial.dst.parent / "out.gguf.part.journal").read_bytes().count(b"\n") > 1  # it has a record
        disk.adopt()
        trial.seed = 8
        run_until_cut(trial, disk, n_calls, restart=True)
        disk.lose(0.5)
        trial.seed = 7
        with suppress(SourceError), syncs_skipped():
            trial.run()
            trial.assert_done()


MANY = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 300)]


@pytest.mark.parametrize("seed", [*range(8), *MANY])
def test_chains_of_cuts(tmp_path: Path, seed: int) -> None:
    """Runs of two conversions to one destination, resumed or begun again, each cut, until one gets through."""
    chance = random.Random(seed)
    trial, disk = make(tmp_path, seed)
    contents = [OLD]
    for _ in range(40):
        trial.seed = chance.choice([7, 8])
        contents.append(trial.expected.tobytes())
        with suppress(SourceError):  # another conversion's: refused, and nothing changed
            run_until_cut(trial, disk, chance.randrange(45), restart=chance.random() < 0.3)
        disk.lose(chance.choice(SURVIVALS))
        assert trial.dst.read_bytes() in contents
    for seed_of_last in (7, 8):
        trial.seed = seed_of_last
        with suppress(SourceError):
            trial.run()
            trial.assert_done()
    trial.run()
    trial.assert_done()
