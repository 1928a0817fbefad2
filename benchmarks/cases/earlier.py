"""This version against another one: wall and processor time of a dry run and of a conversion, and the peak.

Claim: what was added since costs at most a twentieth.
Fair: the same command in either version's own environment, in random order on the same warm source; ratios are taken
within the pair. Wall time means something on a quiet machine only; processor time is the same on a busy one, nearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.bench import Bench, Sample
from benchmarks.converters import STREAMCONV, planning
from benchmarks.summary import MIB, Row, middle, paired, ratios

NAME: Final = "earlier"
OTHER: Final = "earlier"
BAR: Final = 1.05
PLANNING: Final = "dry run"  # in the place of a type


def measure(bench: Bench) -> None:
    settings = bench.settings
    if settings.earlier is None:
        bench.skip(NAME, "EARLIER names no Python that has another version")
        return
    versions = (STREAMCONV, settings.earlier)
    for model in settings.dense:
        src = bench.source(model)
        for pair in range(settings.n_pairs):
            for version in bench.in_turn(map(planning, versions)):
                bench.convert(NAME, version, model, src, PLANNING, "warm", pair)
        for outtype in settings.outtypes:
            for pair in range(settings.n_pairs):
                for version in bench.in_turn(versions):
                    bench.convert(NAME, version, model, src, outtype, "warm", pair)


def rows(samples: Sequence[Sample]) -> list[Row]:
    made: list[Row] = []
    for model, outtype in dict.fromkeys((sample.model, sample.outtype) for sample in samples):
        same = [sample for sample in samples if (sample.model, sample.outtype) == (model, outtype)]
        pairs = paired(same, STREAMCONV.name, OTHER)
        if not pairs:
            continue
        name = (NAME, model, outtype, "warm", STREAMCONV.name)
        processor = [_processor_seconds(one) / _processor_seconds(other) for one, other in pairs]
        more = [(one.peak_rss_nbytes - other.peak_rss_nbytes) / MIB for one, other in pairs]
        made.append(Row(*name, "wall / earlier", *middle(ratios(same, STREAMCONV.name, OTHER)), BAR))
        made.append(Row(*name, "CPU / earlier", *middle(processor), BAR))
        made.append(Row(*name, "peak MiB more", *middle(more)))
    return made


def _processor_seconds(sample: Sample) -> float:
    return sample.user_seconds + sample.system_seconds
