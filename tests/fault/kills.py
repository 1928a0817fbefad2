"""Kill the writer of an output at random moments, over and over, until it finishes: `python -m tests.fault.kills`.

Each trial starts a process that writes with three threads; it is killed when it has reported a random number of steps,
that is, at whatever its threads are doing by then; the next one resumes. The result must be what an undisturbed run
writes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.fault.trial import CHUNK_NBYTES, OLD, Trial


@dataclass(frozen=True)
class Result:
    """Of one trial: how often it was killed, and the most that a resumed run found done."""

    n_kills: int
    resumed_nbytes: int


def kill_at_random(directory: Path, chance: random.Random, max_kills: int = 3) -> Result:
    """Begin an output in `directory`, kill it up to `max_kills` times, finish it, and compare."""
    directory.mkdir(parents=True)
    trial = Trial(
        directory / "out.gguf",
        seed=chance.randrange(1 << 30),
        nbytes=chance.randrange(20, 60) * CHUNK_NBYTES + chance.randrange(1, CHUNK_NBYTES),
        chunks_per_record=chance.randrange(1, 6),
        n_threads=3,
    )
    trial.dst.write_bytes(OLD)
    n_kills = 0
    for attempt in range(chance.randrange(1, max_kills + 1)):
        n_kills += _run_and_kill(trial, resume=attempt > 0, n_steps=chance.randrange(1, 70))
        trial.assert_old_or_new()
    trial.run(resume=True)
    trial.assert_done()
    return Result(n_kills, trial.resumed_nbytes)


def _run_and_kill(trial: Trial, *, resume: bool, n_steps: int) -> bool:
    """True where the process was killed before it came to its end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            trial.progress = lambda: _step(writing)
            trial.run(resume=resume)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    while n_steps and os.read(reading, 1):
        n_steps -= 1
    os.kill(pid, signal.SIGKILL)
    os.close(reading)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the writer failed by itself"
    return os.WIFSIGNALED(status)


def _step(descriptor: int) -> None:
    os.write(descriptor, b".")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument(
        "--directory", type=Path, help="on the filesystem to try; default: the system's own for scratch"
    )
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    chance = random.Random(seed)
    done = n_trials = n_resumed = 0
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        while done < options.kills:
            result = kill_at_random(Path(scratch) / str(n_trials), chance)
            n_trials += 1
            done += result.n_kills
            n_resumed += result.resumed_nbytes > 0
    print(f"seed {seed}: {done} kills in {n_trials} trials, {n_resumed} finished from a record, all byte-identical")
    return 0


if __name__ == "__main__":
    sys.exit(main())
