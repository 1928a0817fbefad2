"""What a run costs before its first byte: `--help`, and a dry run on 2,302 tensors.

Claim: `--help` takes under 0.15 s; a dry run on the 8B-A1B shape takes under 1 s more than importing what it
imports.
Fair: whole processes with their bytecode cached, as after a first run, in the same order every time and with nothing
flushed before them, since they write nothing. The dry run prints its whole plan as JSON. "imports" is a process that
imports numpy, safetensors, gguf, psutil and streamconv and ends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from benchmarks.bench import Bench, Sample
from benchmarks.converters import streamconv
from benchmarks.summary import Row, middle, paired

NAME: Final = "startup"
HELP, DRY_RUN, IMPORTS = "--help", "dry run", "imports"
HELP_BAR_SECONDS: Final = 0.15
DRY_RUN_BAR_SECONDS: Final = 1.0


def measure(bench: Bench) -> None:
    src = bench.source(bench.settings.startup_model, sparse=True)
    commands = {
        HELP: streamconv("--help"),
        DRY_RUN: streamconv("convert", str(src), "--dry-run", "--json"),
        IMPORTS: [sys.executable, "-c", "import numpy, safetensors, gguf, psutil, streamconv"],
    }
    for command in commands.values():
        bench.command(f"{NAME}-first", "", command, 0)
    for pair in range(bench.settings.n_pairs):
        for name, command in commands.items():
            bench.command(NAME, name, command, pair)


def rows(samples: Sequence[Sample]) -> list[Row]:
    helps = [sample.wall_seconds for sample in samples if sample.converter == HELP]
    imports = [sample.wall_seconds for sample in samples if sample.converter == IMPORTS]
    beyond = [one.wall_seconds - other.wall_seconds for one, other in paired(samples, DRY_RUN, IMPORTS)]
    return [
        Row(NAME, "", "", "", what, figure, *middle(values), bar)
        for what, figure, values, bar in (
            (HELP, "wall seconds", helps, HELP_BAR_SECONDS),
            (IMPORTS, "wall seconds", imports, None),
            (DRY_RUN, "seconds beyond imports", beyond, DRY_RUN_BAR_SECONDS),
        )
        if values
    ]
