"""Mapped reads against positioned ones, from a warm source and from a cold one.

Claim: encoding straight from the page cache takes at most 1.15 times as long as reading at positions where the source
is warm, and 1.05 where it is cold, within 96 MiB.
Fair: the same command with `--io mapped` and `--io positioned`, in random order on the same source; the ratio is taken
within the pair. Verification and merges of F32 weights read at positions in both. How the page cache came to hold a
file matters to mapped reads (large folios are mapped at once, single pages one by one), so sources are warmed as `cp`
would, by reading them through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.bench import Bench, Cache, Sample
from benchmarks.converters import STREAMCONV_MAPPED, STREAMCONV_POSITIONED
from benchmarks.machine import Unavailable
from benchmarks.summary import MIB, Row, highest, middle, ratios
from streamconv.files.window import mapping_module
from streamconv.ggml.encode import best_kernel

NAME: Final = "reads"
BAR_MODEL: Final = "1.2b"
WALL_BARS: Final = {"warm": 1.15, "cold": 1.05}
PEAK_BAR_MIB: Final = 96


def measure(bench: Bench) -> None:
    settings = bench.settings
    if mapping_module() is None or not best_kernel().borrows:
        bench.skip(NAME, "mapped reads need Linux 5.14 and the compiled kernels")
        return
    caches: tuple[Cache, ...] = ("warm", "cold")
    for model in settings.dense:
        src = bench.source(model)
        for outtype in settings.outtypes:
            for cache in (cache for cache in caches if cache in settings.caches):
                try:
                    for pair in range(settings.n_pairs):
                        for converter in bench.in_turn([STREAMCONV_MAPPED, STREAMCONV_POSITIONED]):
                            bench.convert(NAME, converter, model, src, outtype, cache, pair)
                except Unavailable as why:
                    bench.skip(f"{NAME} {cache}", why)


def rows(samples: Sequence[Sample]) -> list[Row]:
    made: list[Row] = []
    for model, outtype, cache in dict.fromkeys((sample.model, sample.outtype, sample.cache) for sample in samples):
        same = [sample for sample in samples if (sample.model, sample.outtype, sample.cache) == (model, outtype, cache)]
        name = (NAME, model, outtype, cache, STREAMCONV_MAPPED.name)
        in_pairs = ratios(same, STREAMCONV_MAPPED.name, STREAMCONV_POSITIONED.name)
        if in_pairs:
            bar = WALL_BARS.get(cache) if model == BAR_MODEL else None
            made.append(Row(*name, "wall / positioned", *middle(in_pairs), bar))
        for converter in (STREAMCONV_MAPPED, STREAMCONV_POSITIONED):
            if peaks := [sample.peak_rss_nbytes / MIB for sample in same if sample.converter == converter.name]:
                made.append(Row(*name[:4], converter.name, "peak MiB", *highest(peaks), PEAK_BAR_MIB))
    return made
