"""Peak of resident memory with a vocabulary of Llama 3's size.

Claim: 128,256 tokens and 280,147 merges (a tokenizer.json of 9.1 MB, as Llama 3's) convert within 128 MiB.
Fair: the weights are LFM2-350M's, so that the vocabulary is the only difference to the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.bench import Bench, Sample
from benchmarks.converters import STREAMCONV
from benchmarks.summary import MIB, Row, highest

NAME: Final = "vocabulary"
BAR_MIB: Final = 128


def measure(bench: Bench) -> None:
    model = bench.settings.vocabulary_model
    src = bench.source(model, sparse=True)
    for outtype in bench.settings.outtypes:
        bench.convert(NAME, STREAMCONV, model, src, outtype, "any")


def rows(samples: Sequence[Sample]) -> list[Row]:
    return [
        Row(s.case, s.model, s.outtype, s.cache, s.converter, "peak MiB", *highest([s.peak_rss_nbytes / MIB]), BAR_MIB)
        for s in samples
    ]
