"""The kernels of block types by themselves, against `ggml_quantize_chunk` in the same process, on one core.

Claim: with AVX2, with an importance matrix and without, as many times as fast as ggml as the bars say. Machines without
AVX2 get about half of that.
Fair: see benchmarks/blocks.py. A sample is the best of many calls, as seconds for 10^9 weights; bars are on the ratio
of these to ggml's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.bench import Bench, Sample
from benchmarks.summary import Row, middle, ratios

NAME: Final = "kernels"
OURS: Final = "c"
GGML: Final = "ggml"
SECONDS: Final = 0.1  # of each kernel and type
N_ROWS: Final = 32
# How many times as fast as ggml: without an importance matrix, with one.
BARS: Final = {
    **dict.fromkeys(("Q4_K", "Q5_K", "Q2_K"), (7.0, 7.0)),
    **dict.fromkeys(("IQ4_XS", "IQ4_NL"), (40.0, 35.0)),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1"), (1.7, 6.0)),
    "Q6_K": (6.0, 6.0),
    "Q3_K": (3.5, 6.0),
}
KINDS: Final = ("plain", "imatrix")


def measure(bench: Bench) -> None:
    from benchmarks import blocks

    try:
        from tests.oracles import ggml  # noqa: F401
    except ImportError:
        bench.skip(NAME, 'xllamacpp is missing: pip install -e ".[test]"')
        return
    if OURS not in blocks.kernels():
        bench.skip(NAME, "no compiled kernels here")
        return
    for target in blocks.BLOCK_TYPES:
        for kind in KINDS:
            found = blocks.measure(target, kind == "imatrix", N_ROWS, SECONDS)
            for kernel, speed in found.items():
                seconds = 1e3 / speed
                name = f"{target.name} {kind}"
                bench.add(Sample(NAME, "", name, "any", kernel, 0, seconds, seconds, 0.0, 0, 0, 0, 0, 0))


def rows(samples: Sequence[Sample]) -> list[Row]:
    made: list[Row] = []
    for outtype in dict.fromkeys(sample.outtype for sample in samples):
        same = [sample for sample in samples if sample.outtype == outtype]
        if in_pairs := ratios(same, OURS, GGML):
            name, kind = outtype.split()
            limit = 1 / BARS[name][KINDS.index(kind)] if name in BARS else None
            made.append(Row(NAME, "", outtype, "any", OURS, "time / ggml", *middle(in_pairs), limit))
        for sample in same:
            speed = 1e3 / sample.wall_seconds
            made.append(Row(NAME, "", outtype, "any", sample.converter, "Melem/s", *middle([speed])))
    return made
