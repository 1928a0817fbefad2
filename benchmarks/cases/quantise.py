"""One pass to Q4_K_M and Q6_K, against `cp`, our own BF16 run, and llama.cpp's converter followed by llama-quantize.

Claim: LFM2-1.2B becomes Q4_K_M in at most 3.0 times `cp` + `sync -f` of its shards and 4.5 times our own BF16 run, Q6_K
in 2.0 and 3.0 times, within 96 MiB, with peaks as flat from 350M to an 8B mixture of experts as for other types; and at
least 8 times as fast as llama.cpp's converter to BF16 followed by llama-quantize with two threads.
Fair: whole processes, in random order on the same warm source, ratios within the pair. llama.cpp's two programs are one
sample; nothing between them is flushed, and neither ends with a sync. What each leaves on the disk is given. Sparse
models are for memory alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.baselines import llama_cpp
from benchmarks.baselines.cp import CP
from benchmarks.bench import Bench, Sample
from benchmarks.converters import STREAMCONV, Converter
from benchmarks.summary import MIB, Row, highest, middle, ratios
from streamconv.ggml.encode import best_kernel

NAME: Final = "quantise"
MEMORY: Final = "quantise-memory"
BAR_MODEL: Final = "1.2b"
CP_BARS: Final = {"q4_k_m": 3.0, "q6_k": 2.0}
BF16_BARS: Final = {"q4_k_m": 4.5, "q6_k": 3.0}
PIPELINE_BAR: Final = 1 / 8
PEAK_BAR_MIB: Final = 96
FLAT_BAR_MIB: Final = 8


def _to_bf16(src: Path, dst: Path, _outtype: str) -> list[str]:
    return STREAMCONV.command(src, dst, "bf16")


OWN_BF16: Final = Converter("streamconv-bf16", _to_bf16)


def measure(bench: Bench) -> None:
    settings = bench.settings
    if best_kernel().name == "numpy":
        bench.skip(NAME, "no compiled kernels here")
        return
    pipeline = llama_cpp.pipeline()
    if settings.peer and pipeline is None:
        bench.skip(f"{NAME} llama.cpp", "LLAMA_QUANTIZE_PYTHON is not set")
    for model in settings.dense:
        src = bench.source(model)
        for pair in range(settings.n_pairs):
            for outtype in CP_BARS:
                converters = [CP, STREAMCONV, OWN_BF16]
                if pipeline and outtype == "q4_k_m" and pair < settings.n_few_pairs:
                    converters.append(pipeline)
                for converter in bench.in_turn(converters):
                    bench.convert(NAME, converter, model, src, outtype, "warm", pair)
    for model in settings.models:
        src = bench.source(model, sparse=model in settings.sparse)
        for outtype in CP_BARS:
            bench.convert(MEMORY, STREAMCONV, model, src, outtype, "any")


def rows(samples: Sequence[Sample]) -> list[Row]:
    made: list[Row] = []
    timed = [sample for sample in samples if sample.case == NAME]
    for model, outtype in dict.fromkeys((sample.model, sample.outtype) for sample in timed):
        same = [sample for sample in timed if (sample.model, sample.outtype) == (model, outtype)]
        name = (NAME, model, outtype, "warm", STREAMCONV.name)
        is_bar = model == BAR_MODEL
        for figure, other, bar in (
            ("wall / cp", CP.name, CP_BARS.get(outtype)),
            ("wall / own bf16", OWN_BF16.name, BF16_BARS.get(outtype)),
            ("wall / llama.cpp", llama_cpp.NAME, PIPELINE_BAR),
        ):
            if in_pairs := ratios(same, STREAMCONV.name, other):
                made.append(Row(*name, figure, *middle(in_pairs), bar if is_bar else None))
        for converter in dict.fromkeys(sample.converter for sample in same):
            own = [sample for sample in same if sample.converter == converter]
            disk = highest([sample.output_nbytes / 1e6 for sample in own])
            made.append(Row(*name[:4], converter, "MB on disk", *disk))
    for outtype in CP_BARS:
        peaks = [s for s in samples if (s.converter, s.outtype) == (STREAMCONV.name, outtype)]
        for model in dict.fromkeys(sample.model for sample in peaks):
            mib = [sample.peak_rss_nbytes / MIB for sample in peaks if sample.model == model]
            made.append(Row(NAME, model, outtype, "any", STREAMCONV.name, "peak MiB", *highest(mib), PEAK_BAR_MIB))
        once = [sample.peak_rss_nbytes / MIB for sample in peaks if sample.case == MEMORY]
        if len(once) > 1:
            name = (NAME, f"{len(once)} models", outtype, "any", STREAMCONV.name)
            made.append(Row(*name, "peaks apart, MiB", *highest([max(once) - min(once)]), FLAT_BAR_MIB))
    return made
