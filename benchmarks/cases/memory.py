"""Peak of resident memory against the model's size.

Claim: with one tokenizer the peak stays within 8 MiB from 350M to an 8B mixture of experts, for every output type.
Fair: whole processes, default options. Large models are sparse files: the reads and the arithmetic are the same, the
values are zeros, and zeros cost neither more nor less memory. The peer runs once a model, with the first output
type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.bench import Bench, Sample
from benchmarks.converters import STREAMCONV
from benchmarks.summary import MIB, Row, highest

NAME: Final = "memory"
FLAT_BAR_MIB: Final = 8


def measure(bench: Bench) -> None:
    settings = bench.settings
    for model in settings.models:
        src = bench.source(model, sparse=model in settings.sparse)
        for outtype in settings.outtypes:
            bench.convert(NAME, STREAMCONV, model, src, outtype, "any")
        if settings.peer and settings.outtypes:
            bench.convert(NAME, settings.peer, model, src, settings.outtypes[0], "any")


def rows(samples: Sequence[Sample]) -> list[Row]:
    made = [
        Row(s.case, s.model, s.outtype, s.cache, s.converter, "peak MiB", *highest([s.peak_rss_nbytes / MIB]))
        for s in samples
    ]
    for outtype in dict.fromkeys(sample.outtype for sample in samples):
        peaks = {
            sample.model: sample.peak_rss_nbytes / MIB
            for sample in samples
            if (sample.converter, sample.outtype) == (STREAMCONV.name, outtype)
        }
        if len(peaks) > 1:
            difference = max(peaks.values()) - min(peaks.values())
            models = f"{len(peaks)} models"
            made.append(
                Row(
                    NAME,
                    models,
                    outtype,
                    "any",
                    STREAMCONV.name,
                    "peaks apart, MiB",
                    *highest([difference]),
                    FLAT_BAR_MIB,
                )
            )
    return made
