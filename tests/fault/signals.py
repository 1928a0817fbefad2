"""Stop the whole command at random moments, over and over: `python -m tests.fault.signals --signals 500`.

Each trial starts a conversion over an old file, sends it SIGINT, SIGTERM or SIGKILL at up to four random moments, each
time with --resume, and lets it finish. The destination must be the old file until it is byte for byte the new one.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from pathlib import Path

from tests.fault.stopped import Program, stop_and_resume

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault.signals", description=__doc__)
    parser.add_argument("--signals", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--directory", type=Path, help="on the filesystem to try")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    chance = random.Random(seed)
    n_signals = n_trials = 0
    slowest = 0.0
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        first = Program.make(Path(scratch))
        while n_signals < options.signals:
            (Path(scratch) / str(n_trials)).mkdir()
            program = Program(first.src, Path(scratch) / str(n_trials) / "model.gguf")
            program.__dict__["expected"] = first.expected
            program.dst.write_bytes(first.dst.read_bytes())
            stops = stop_and_resume(program, chance, NUMBERS)
            n_signals += len(stops)
            slowest = max([slowest, *(stopped.seconds for stopped in stops)])
            n_trials += 1
            program.dst.unlink()
    print(f"seed {seed}: {n_signals} signals in {n_trials} trials, slowest stop {slowest:.2f} s, all byte-identical")
    return 0


if __name__ == "__main__":
    sys.exit(main())
