"""Which adapters a run merges, and how strongly: from what users name to files that are open.

Owns: the spelling PATH=WEIGHT, and holding the files open. Does not own: an adapter's files (file.py), merging.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from streamconv.budget import Budget
from streamconv.errors import UsageError
from streamconv.files.hub import Source
from streamconv.files.store import Store, StorePath
from streamconv.lora.files import LoraFile

AdapterSpec = Source | tuple[Source, float]  # a path, or a path and its weight

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, open, and the weight that its scale is multiplied by."""

    file: LoraFile
    weight: float = 1.0

    @property
    def label(self) -> str:
        weight = "" if self.weight == 1 else f"={self.weight:g}"
        return f"{self.file.directory}{weight}"


def parse_adapter(text: str) -> tuple[str, float]:
    """Path and weight of "PATH=0.5", split at the last "=" if a decimal number follows; else all of it is a path."""
    path, _, weight = text.rpartition("=")
    return (path, float(weight)) if path and _NUMBER.fullmatch(weight) else (text, 1.0)


@contextmanager
def open_adapters(specs: Sequence[AdapterSpec], budget: Budget) -> Iterator[tuple[Adapter, ...]]:
    """The adapters, headers read and nothing else.

    SourceError on what is missing or malformed, UsageError on what is no list of them, a single path included.
    """
    if not isinstance(specs, Sequence) or isinstance(specs, str):
        raise UsageError(
            f"{str(specs)!r} is no list of adapters",
            hint="put it into one, [path] or [(path, weight)]",
            code="adapters-not-list",
        )
    with ExitStack() as stack:
        opened = []
        for source, weight in map(_source_and_weight, specs):
            opened.append(Adapter(stack.enter_context(LoraFile.open(source, budget)), weight))
        yield tuple(opened)


def _source_and_weight(spec: AdapterSpec) -> tuple[Source, float]:
    source, weight = spec if isinstance(spec, tuple) and len(spec) == 2 else (spec, 1.0)
    if not (isinstance(source, str | Path | Store | StorePath) and isinstance(weight, Real)):
        raise UsageError(
            f"{spec!r} is no adapter", hint="name its folder, or the pair of that and a weight", code="adapter-spec"
        )
    if not str(source):
        raise UsageError("an adapter without a name", hint="name its folder", code="adapter-spec")
    if not math.isfinite(weight):
        raise UsageError(f"{weight} is no weight of an adapter", code="adapter-spec")
    return source, float(weight)
