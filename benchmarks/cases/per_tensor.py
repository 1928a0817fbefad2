"""What a tensor costs beside its bytes.

Claim: at most 0.2 ms. Fair: the same 24 MB in 217 and in 2,152 tensors, converted in turn; the difference of a
pair's wall times over the difference of the counts. Both have the same small vocabulary, so start-up cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.bench import Bench, Sample
from benchmarks.converters import STREAMCONV
from benchmarks.shapes import SHAPES, tensors_of
from benchmarks.summary import Row, middle

NAME: Final = "per-tensor"
FEW, MANY = "few-tensors", "many-tensors"
BAR_MS: Final = 0.2


def measure(bench: Bench) -> None:
    sources = {model: bench.source(model) for model in (FEW, MANY)}
    for outtype in bench.settings.outtypes:
        for pair in range(bench.settings.n_pairs):
            for model in (FEW, MANY) if pair % 2 else (MANY, FEW):
                bench.convert(NAME, STREAMCONV, model, sources[model], outtype, "warm", pair)


def rows(samples: Sequence[Sample]) -> list[Row]:
    n_more = sum(1 for _ in tensors_of(SHAPES[MANY])) - sum(1 for _ in tensors_of(SHAPES[FEW]))
    made = []
    for outtype in dict.fromkeys(sample.outtype for sample in samples):
        wall = {(s.model, s.pair): s.wall_seconds for s in samples if s.outtype == outtype}
        pairs = sorted(pair for model, pair in wall if model == MANY and (FEW, pair) in wall)
        costs = [(wall[MANY, pair] - wall[FEW, pair]) * 1000 / n_more for pair in pairs]
        if costs:
            made.append(Row(NAME, "", outtype, "warm", STREAMCONV.name, "ms a tensor", *middle(costs), BAR_MS))
    return made
