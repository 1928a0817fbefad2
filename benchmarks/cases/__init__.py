"""The cases, each a module with `measure(bench)`, which takes samples, and `rows(samples)`, which computes the figures.

A case's docstring says what it claims and why the comparison is fair. `rows` gets only samples that succeeded, and
computes all rows that are possible if a run was cut short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from benchmarks.bench import Bench, Sample
from benchmarks.cases import (
    cgroup,
    convert,
    earlier,
    kernels,
    memory,
    merge,
    per_tensor,
    quantise,
    reads,
    startup,
    vocabulary,
)
from benchmarks.summary import Row, succeeded


class Case(Protocol):
    NAME: str

    def measure(self, bench: Bench) -> None: ...

    def rows(self, samples: Sequence[Sample]) -> list[Row]: ...


CASES: tuple[Case, ...] = (
    startup,
    convert,
    earlier,
    reads,
    merge,
    memory,
    vocabulary,
    per_tensor,
    cgroup,
    quantise,
    kernels,
)


def rows(samples: Sequence[Sample]) -> list[Row]:
    """All figures. What failed is counted, and stands in no other figure."""
    good = succeeded(samples)
    made = [row for case in CASES for row in case.rows([s for s in good if s.case.startswith(case.NAME)])]
    return made + cgroup.failures(samples)
