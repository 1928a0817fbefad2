"""Merging a LoRA adapter while converting, against the same conversion without it.

Claim: with rank 16 on every matrix but the embedding, at most 2 times the wall time and 16 MiB more at the peak.
Fair: the same command but for --adapter, in random order on the same warm source; the ratio is taken within the pair,
and the peak is the highest of all samples on either side. Nobody else merges while converting, so there is no peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.adapters import adapter
from benchmarks.bench import Bench, Sample
from benchmarks.converters import STREAMCONV, Converter
from benchmarks.shapes import SHAPES
from benchmarks.summary import MIB, Row, highest, middle, ratios

NAME: Final = "merge"
MERGING: Final = "streamconv-merge"
BAR_MODEL: Final = "1.2b"
WALL_BAR: Final = 2.0
PEAK_BAR_MIB: Final = 16


def measure(bench: Bench) -> None:
    settings = bench.settings
    if not settings.dense:
        bench.skip(NAME, "no model without holes")
    for model in settings.dense:
        src = bench.source(model)
        merging = _merging(adapter(SHAPES[model], settings.cache))
        for outtype in settings.outtypes:
            for pair in range(settings.n_pairs):
                for converter in bench.in_turn((STREAMCONV, merging)):
                    bench.convert(NAME, converter, model, src, outtype, "warm", pair)


def _merging(folder: Path) -> Converter:
    def command(src: Path, dst: Path, outtype: str) -> list[str]:
        return [*STREAMCONV.command(src, dst, outtype), "--adapter", str(folder)]

    return Converter(MERGING, command)


def rows(samples: Sequence[Sample]) -> list[Row]:
    made: list[Row] = []
    for model, outtype in dict.fromkeys((sample.model, sample.outtype) for sample in samples):
        same = [sample for sample in samples if (sample.model, sample.outtype) == (model, outtype)]
        name = (NAME, model, outtype, "warm", MERGING)
        wall_bar, peak_bar = (WALL_BAR, PEAK_BAR_MIB) if model == BAR_MODEL else (None, None)
        if in_pairs := ratios(same, MERGING, STREAMCONV.name):
            made.append(Row(*name, "wall / without", *middle(in_pairs), wall_bar))
        peaks = {
            converter: max((s.peak_rss_nbytes / MIB for s in same if s.converter == converter), default=0.0)
            for converter in (MERGING, STREAMCONV.name)
        }
        if all(peaks.values()):
            more = peaks[MERGING] - peaks[STREAMCONV.name]
            made.append(Row(*name, "peak MiB more", *highest([more]), peak_bar))
    return made
