"""A conversion inside a memory cgroup of 128 MiB that counts the page cache.

Claim: the 1.2B shape (else the largest dense one at hand) finishes there, at most 1.5 times slower than without.
Fair: the source is cold on both sides, since warm pages are charged to whoever read them first and would be free
inside; anonymous memory, mapped pages, the source's pages and the written pages all count. The process enters the
group before its program is loaded. Where cgroups cannot be made the row is left out, and the summary says so. The
peer gets one try.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.bench import Bench, Sample
from benchmarks.converters import STREAMCONV
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
        return
    model = MODEL if MODEL in settings.dense else max(settings.dense, key=lambda name: SHAPES[name].nbytes)
    src = bench.source(model)
    try:
        for outtype in settings.outtypes:
            for pair in range(settings.n_few_pairs):
                bench.convert(NAME, STREAMCONV, model, src, outtype, "cold", pair)
                with memory_cgroup(LIMIT_NBYTES) as prefix:
                    bench.convert(INSIDE, STREAMCONV, model, src, outtype, "cold", pair, prefix, may_fail=True)
        if settings.peer:
            with memory_cgroup(LIMIT_NBYTES) as prefix:
                bench.convert(
                    *(INSIDE, settings.peer, model, src, settings.outtypes[0], "cold", 0, prefix),
                    may_fail=True,
                    timeout_seconds=PEER_TIMEOUT_SECONDS,
                )
    except Unavailable as why:
        bench.skip(INSIDE, why)


def rows(samples: Sequence[Sample]) -> list[Row]:
    made: list[Row] = []
    inside = [sample for sample in samples if sample.case == INSIDE]
    for converter, outtype in dict.fromkeys((sample.converter, sample.outtype) for sample in inside):
        own = [sample for sample in inside if (sample.converter, sample.outtype) == (converter, outtype)]
        name = (INSIDE, own[0].model, outtype, "cold", converter)
        n_failed = sum(sample.exit_code != 0 for sample in own)
        made.append(Row(*name, "runs that failed", *highest([n_failed]), 0 if converter == STREAMCONV.name else None))
        outside = {s.pair: s for s in samples if (s.case, s.converter, s.outtype) == (NAME, converter, outtype)}
        slower = [s.wall_seconds / outside[s.pair].wall_seconds for s in own if s.pair in outside and not s.exit_code]
        if slower:
            made.append(Row(*name, "wall / without", *middle(slower), BAR))
    return made
