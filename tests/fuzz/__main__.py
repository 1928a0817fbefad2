"""Fuzz the parsers: `python -m tests.fuzz --seconds 60` for each target, or `--executions 100000`; exit 1 on findings.

What is found is written to .cache/fuzz/TARGET-ID, a folder that belongs under tests/fuzz/corpus once it is fixed:
tests/fuzz/test_corpus.py then holds it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.fuzz.loop import Finding, fuzz, lay_out
from tests.fuzz.targets import TARGETS

FOUND = Path(".cache/fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, help="for each target; default: 60, without --executions")
    parser.add_argument("--executions", type=int, help="of each target")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--found", type=Path, default=FOUND, help="where to write what is found")
    options = parser.parse_args()
    seconds = 60.0 if options.seconds is None and options.executions is None else options.seconds
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    findings: list[Finding] = []
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        for target in options.target or TARGETS:
            started = time.monotonic()
            rng = random.Random(f"{seed} {target}")
            tally = fuzz(target, rng, Path(scratch), seconds=seconds, executions=options.executions)
            took = time.monotonic() - started
            print(
                f"{target:<18} {tally.n_executions:>9,} executions, {tally.n_errors / max(1, tally.n_executions):4.0%}"
                f" refused, {tally.n_executions / took:6,.0f} /s, slowest {tally.slowest * 1e3:6.1f} ms,"
                f" {len(tally.findings)} findings",
                flush=True,
            )
            for finding in tally.findings.values():
                options.found.mkdir(parents=True, exist_ok=True)
                lay_out(options.found / f"{target}-{finding.name}", finding.files)
                print(f"  {finding.name}  {finding.what}", flush=True)
                findings.append(finding)
    print(f"seed {seed}: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
