"""A conversion inside a memory cgroup of 128 MiB that counts the page cache.

Claim: the 1.2B shape (else the largest dense one at hand) finishes there, at most 1.5 times slower than without.
Fair: a page is charged to whoever read it first. So the source is cold on both sides and its pages count inside, as
do anonymous memory and the written pages; the mapped pages of Python and its libraries do not, for they are in the
cache since long before. The group therefore gets 128 MiB less the most that the run outside had mapped, which is why
of every pair the run outside comes first. The process enters the group before its program is loaded. Where cgroups
cannot be made the row is left out, and the summary says so. The peer gets one try, with all of the 128 MiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.bench import Bench, Sample
from benchmarks.converters import STREAMCONV, Converter
from benchmarks.machine import Unavailable, memory_cgroup
from benchmarks.shapes import SHAPES
from benchmarks.summary import MIB, Row, highest, middle

NAME: Final = "cgroup"
INSIDE: Final = "cgroup-128MiB"
MODEL: Final = "1.2b"
LIMIT_NBYTES: Final = 128 * MIB
BAR: Final = 1.5
PEER_TIMEOUT_SECONDS: Final = 120


def measure(bench: Bench) -> None:
    settings = bench.settings
    if not settings.dense:
        bench.skip(NAME, "no model without holes")
        return
    model = MODEL if MODEL in settings.dense else max(settings.dense, key=lambda name: SHAPES[name].nbytes)
    src = bench.source(model)
    try:
        for outtype in settings.outtypes:
            for pair in range(settings.n_few_pairs):
                outside = bench.convert(NAME, STREAMCONV, model, src, outtype, "cold", pair)
                with memory_cgroup(LIMIT_NBYTES - outside.peak_file_nbytes) as prefix:
                    bench.convert(INSIDE, STREAMCONV, model, src, outtype, "cold", pair, prefix, may_fail=True)
        if settings.peer:
            _try_peer(bench, settings.peer, model, src)
    except Unavailable as why:
        bench.skip(INSIDE, why)


def _try_peer(bench: Bench, peer: Converter, model: str, src: Path) -> None:
    """Once; not where it failed with all memory before, for then a failure says nothing of the limit."""
    if any(sample.exit_code and sample.converter == peer.name for sample in bench.samples):
        bench.skip(f"{INSIDE} {peer.name}", "it failed outside")
        return
    with memory_cgroup(LIMIT_NBYTES) as prefix:
        bench.convert(
            *(INSIDE, peer, model, src, bench.settings.outtypes[0], "cold", 0, prefix),
            may_fail=True,
            timeout_seconds=PEER_TIMEOUT_SECONDS,
        )


def rows(samples: Sequence[Sample]) -> list[Row]:
    made: list[Row] = []
    for (model, converter, outtype), own in _groups(samples).items():
        outside = {
            s.pair: s for s in samples if (s.case, s.model, s.converter, s.outtype) == (NAME, model, converter, outtype)
        }
        slower = [s.wall_seconds / outside[s.pair].wall_seconds for s in own if s.pair in outside]
        if slower:
            made.append(Row(INSIDE, model, outtype, "cold", converter, "wall / without", *middle(slower), BAR))
    return made


def failures(samples: Sequence[Sample]) -> list[Row]:
    """How many runs failed inside: unlike `rows`, this gets samples that failed, too."""
    made: list[Row] = []
    for (model, converter, outtype), own in _groups(samples).items():
        n_failed = sum(sample.exit_code != 0 for sample in own)
        bar = 0 if converter == STREAMCONV.name else None
        made.append(Row(INSIDE, model, outtype, "cold", converter, "runs that failed", *highest([n_failed]), bar))
    return made


def _groups(samples: Sequence[Sample]) -> dict[tuple[str, str, str], list[Sample]]:
    """The samples inside, by model, converter and outtype."""
    groups: dict[tuple[str, str, str], list[Sample]] = {}
    for sample in samples:
        if sample.case == INSIDE:
            groups.setdefault((sample.model, sample.converter, sample.outtype), []).append(sample)
    return groups
