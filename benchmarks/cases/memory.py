"""Peak of resident memory against the model's size.

Claim: with one tokenizer the peak stays within 8 MiB from 350M to an 8B mixture of experts, for every output type,
with the compiled kernels and without.
Fair: whole processes, default options. Large models are sparse files: the reads and the arithmetic are the same, the
values are zeros, and zeros cost neither more nor less memory. The peer runs once a model, with the first output
type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.bench import Bench, Sample
from benchmarks.converters import STREAMCONV, STREAMCONV_NUMPY
from benchmarks.summary import MIB, Row, highest
from streamconv.ggml.encode import best_kernel

NAME: Final = "memory"
FLAT_BAR_MIB: Final = 8


def measure(bench: Bench) -> None:
    settings = bench.settings
    converters = (STREAMCONV,) if best_kernel().name == "numpy" else (STREAMCONV, STREAMCONV_NUMPY)
    for model in settings.models:
        src = bench.source(model, sparse=model in settings.sparse)
        for outtype in settings.outtypes:
            for converter in converters:
                bench.convert(NAME, converter, model, src, outtype, "any")
        if settings.peer and settings.outtypes:
            bench.convert(NAME, settings.peer, model, src, settings.outtypes[0], "any")


def rows(samples: Sequence[Sample]) -> list[Row]:
    made = [
        Row(s.case, s.model, s.outtype, s.cache, s.converter, "peak MiB", *highest([s.peak_rss_nbytes / MIB]))
        for s in samples
    ]
    for converter, outtype in dict.fromkeys((sample.converter, sample.outtype) for sample in samples):
        same = [sample for sample in samples if (sample.converter, sample.outtype) == (converter, outtype)]
        peaks = {sample.model: sample.peak_rss_nbytes / MIB for sample in same}
        if len(peaks) > 1:
            name = (NAME, f"{len(peaks)} models", outtype, "any", converter)
            bar = FLAT_BAR_MIB if converter in (STREAMCONV.name, STREAMCONV_NUMPY.name) else None
            made.append(Row(*name, "peaks apart, MiB", *highest([max(peaks.values()) - min(peaks.values())]), bar))
    return made
