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
from itertools import groupby
from typing import Final

from benchmarks.baselines.cp import CP
from benchmarks.bench import Bench, Cache, Sample
from benchmarks.converters import STREAMCONV, STREAMCONV_NUMPY
from benchmarks.machine import Unavailable
from benchmarks.summary import MIB, Row, highest, middle, ratios

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
    plans: tuple[tuple[Cache, int], ...] = (("warm", settings.n_pairs), ("cold", settings.n_few_pairs))
    for model in settings.dense:
        src = bench.source(model)
        for outtype in settings.outtypes:
            for cache, n_pairs in plans:
                try:
                    for pair in range(n_pairs):
                        converters = [CP, STREAMCONV, STREAMCONV_NUMPY]
                        if settings.peer and cache == "warm" and pair < settings.n_few_pairs:
                            converters.append(settings.peer)
                        for converter in bench.in_turn(converters):
                            bench.convert(NAME, converter, model, src, outtype, cache, pair)
                except Unavailable as why:
                    bench.skip(f"{NAME} {cache}", why)


def rows(samples: Sequence[Sample]) -> list[Row]:
    made: list[Row] = []
    for key, group in groupby(samples, key=lambda sample: (sample.case, sample.model, sample.outtype, sample.cache)):
        same = list(group)
        for name in sorted({sample.converter for sample in same} - {CP.name}):
            own = [sample for sample in same if sample.converter == name]
            bar = WALL_BARS.get((name, key[2])) if (key[1], key[3]) == (BAR_MODEL, "warm") else None
            if in_pairs := ratios(same, name, CP.name):
                made.append(Row(*key, name, "wall / cp", *middle(in_pairs), bar))
            made.append(Row(*key, name, "wall seconds", *middle([sample.wall_seconds for sample in own])))
            made.append(Row(*key, name, "CPU seconds", *middle([s.user_seconds + s.system_seconds for s in own])))
            peak_bar = PEAK_BAR_MIB if name.startswith(STREAMCONV.name) else None
            made.append(Row(*key, name, "peak MiB", *highest([s.peak_rss_nbytes / MIB for s in own]), peak_bar))
        if copies := [sample.wall_seconds for sample in same if sample.converter == CP.name]:
            made.append(Row(*key, CP.name, "wall seconds", *middle(copies)))
    return made
