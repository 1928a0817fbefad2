"""Kill writers of outputs at random moments, over and over, until they finish: `python -m tests.fault.kills`.

Each trial starts a process that writes with three threads; it is killed when it has reported a random number of steps,
that is, at whatever its threads are doing by then; the next one resumes. The result must be what an undisturbed run
writes. Every fourth trial is a whole conversion, the others are outputs of known content.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

from tests.fault.program import Finished, Program, empty, make_source
from tests.fault.trial import CHUNK_NBYTES, OLD, Trial


def kill_at_random(run: Trial | Program, n_steps: int) -> bool:
    """Run it in another process that is killed once it has reported `n_steps`; False where it was done before."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            run.progress = lambda: _report_step(writing)
            run.run()
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


def kill_writer(directory: Path, chance: random.Random) -> tuple[int, int]:
    """(kills, bytes that the last run found done) of one output of known content, begun, killed and finished."""
    trial = Trial(
        empty(directory) / "out.gguf",
        seed=chance.randrange(1 << 30),
        nbytes=chance.randrange(20, 60) * CHUNK_NBYTES + chance.randrange(1, CHUNK_NBYTES),
        chunks_per_record=chance.randrange(1, 6),
        n_threads=3,
    )
    trial.dst.write_bytes(OLD)
    n_kills = 0
    for _ in range(chance.randrange(1, 4)):
        n_kills += kill_at_random(trial, chance.randrange(1, 70))
        trial.assert_old_or_new()
    trial.run()
    trial.assert_done()
    return n_kills, trial.resumed_nbytes


def kill_conversion(directory: Path, source: Path, expected: Finished, chance: random.Random) -> tuple[int, int]:
    """The same of a whole conversion; for the second figure, 1 where the last run resumed."""
    program = Program(source, empty(directory) / "out.gguf", threads=3)
    program.put_old(set(expected.outputs))
    n_kills = 0
    for _ in range(chance.randrange(1, 4)):
        n_kills += kill_at_random(program, chance.randrange(1, 20))
        expected.assert_old_or_new(program)
    report = program.run()
    expected.assert_same(program, report)
    return n_kills, int(report.resumed)


def _report_step(descriptor: int) -> None:
    os.write(descriptor, b".")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument("--directory", type=Path, help="on the filesystem to try; default: that of temporary files")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    chance = random.Random(seed)
    n_kills = n_trials = n_resumed = 0
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        scratch = Path(name)
        source = make_source(scratch / "Made-Model")
        expected = Finished.of(Program(source, empty(scratch / "whole") / "out.gguf"))
        while n_kills < options.kills:
            directory = scratch / str(n_trials)
            if n_trials % 4 == 3:
                kills, resumed = kill_conversion(directory, source, expected, chance)
            else:
                kills, resumed = kill_writer(directory, chance)
            n_kills += kills
            n_trials += 1
            n_resumed += resumed > 0
    print(f"{n_kills} kills in {n_trials} trials, {n_resumed} finished from a record; every output byte-identical")
    return 0


if __name__ == "__main__":
    sys.exit(main())
