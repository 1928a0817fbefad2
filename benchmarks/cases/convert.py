"""Wall time against `cp` + `sync -f` of the same shards, and the peak of resident memory.

Claim: LFM2-1.2B (2.34 GB of BF16 in three shards, a vocabulary of 65,536) converts as fast as it copies, within 96
MiB.
Fair: a whole process each, with everything a default run does (start-up, vocabulary, counting of non-finite values,
sealing with fsync); all converters of a pair run in random order on the same warm source, and the ratio is taken
within the pair. "streamconv-numpy" is the same command without the compiled kernels, as where no compiler was at
hand. With the cold cache the source comes from the disk (which may have caches of its own). A hole copies in no
time, so sparse models are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from benchmarks.baselines.cp import CP
from benchmarks.bench import Bench, Cache, Sample
from benchmarks.converters import STREAMCONV, STREAMCONV_NUMPY
from benchmarks.machine import Unavailable
from benchmarks.shapes import SHAPES
from benchmarks.summary import MIB, Row, highest, middle, ratios
from streamconv.ggml.encode import best_kernel

NAME: Final = "convert"
BAR_MODEL: Final = "1.2b"
WALL_BARS: Final = {
    (STREAMCONV.name, "bf16"): 0.8,
    (STREAMCONV.name, "f16"): 1.0,
    (STREAMCONV.name, "q8_0"): 1.0,
    (STREAMCONV_NUMPY.name, "q8_0"): 2.5,
}
PEAK_BAR_MIB: Final = 96


def measure(bench: Bench) -> None:
    settings = bench.settings
    n_pairs_of: dict[Cache, int] = {"warm": settings.n_pairs, "cold": settings.n_few_pairs}
    if not settings.dense:
        bench.skip(NAME, "no model without holes")
    compiled = best_kernel().name != "numpy"
    if not compiled:
        bench.skip(f"{NAME} {STREAMCONV.name}", "no compiled kernels here, so it is streamconv-numpy")
    for model in settings.dense:
        src = bench.source(model)
        for outtype in settings.outtypes:
            for cache, n_pairs in n_pairs_of.items():
                if cache not in settings.caches:
                    continue
                try:
                    for pair in range(n_pairs):
                        converters = [CP, STREAMCONV_NUMPY]
                        if compiled:
                            converters.append(STREAMCONV)
                        if settings.peer and cache == "warm" and pair < settings.n_few_pairs:
                            converters.append(settings.peer)
                        for converter in bench.in_turn(converters):
                            bench.convert(NAME, converter, model, src, outtype, cache, pair)
                except Unavailable as why:
                    bench.skip(f"{NAME} {cache}", why)


def rows(samples: Sequence[Sample]) -> list[Row]:
    made: list[Row] = []
    for model, outtype in dict.fromkeys((sample.model, sample.outtype) for sample in samples):
        same = [sample for sample in samples if (sample.model, sample.outtype) == (model, outtype)]
        warm = [sample for sample in same if sample.cache == "warm"]
        for name in (STREAMCONV.name, STREAMCONV_NUMPY.name):
            bar = WALL_BARS.get((name, outtype)) if model == BAR_MODEL else None
            in_pairs = ratios(warm, name, CP.name)
            if bar and in_pairs:
                made.append(Row(NAME, model, outtype, "warm", name, "wall / cp", *middle(in_pairs), bar))
            if peaks := [sample.peak_rss_nbytes / MIB for sample in same if sample.converter == name]:
                made.append(Row(NAME, model, outtype, "any", name, "peak MiB", *highest(peaks), PEAK_BAR_MIB))
    return made + _steps(samples)


def _steps(samples: Sequence[Sample]) -> list[Row]:
    """Seconds for each GB that a model has more than the next smaller one: about the same from step to step."""
    made = []
    warm = [sample for sample in samples if (sample.converter, sample.cache) == (STREAMCONV.name, "warm")]
    for outtype in dict.fromkeys(sample.outtype for sample in warm):
        wall = {(sample.model, sample.pair): sample.wall_seconds for sample in warm if sample.outtype == outtype}
        models = sorted({model for model, _ in wall}, key=lambda model: SHAPES[model].nbytes)
        for less, more in pairwise(models):
            step = (SHAPES[more].nbytes - SHAPES[less].nbytes) / 1e9
            pairs = [pair for model, pair in wall if model == more and (less, pair) in wall]
            costs = [(wall[more, pair] - wall[less, pair]) / step for pair in pairs]
            name = (NAME, f"{less} to {more}", outtype, "warm", STREAMCONV.name)
            if costs:
                made.append(Row(*name, "seconds a GB", *middle(costs)))
    return made
