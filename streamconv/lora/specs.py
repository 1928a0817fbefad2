"""Which adapters a run merges, and with which weights: parsed from the user's arguments, opened and merged.

The modules that read and merge adapters are imported only if there is one, so that other conversions start faster.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamconv.budget import Budget
from streamconv.errors import RunWarning, UsageError
from streamconv.files.hub import Source
from streamconv.files.store import Place

if TYPE_CHECKING:
    from streamconv.checkpoint.safetensors import Shard
    from streamconv.lazy.node import LazyTensor
    from streamconv.lora.files import LoraFile
    from streamconv.metadata.vocab.choice import Tokenizers
    from streamconv.recipe.language import Model, Stored

AdapterSpec = Source | tuple[Source, float]  # a path, or a path and its weight

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An open adapter, and the weight by which its scale is multiplied."""

    file: LoraFile
    weight: float = 1.0

    @property
    def label(self) -> str:
        weight = "" if self.weight == 1 else f"={self.weight:g}"
        return f"{self.file.directory}{weight}"


@dataclass(frozen=True, slots=True)
class Merged:
    """A model with its adapters merged.

    Attributes:
        tokenizers: The folders in which its tokenizer may be.
        options: The inputs that determine its bytes.
        outputs: The tensors of further outputs that were changed, by role.
    """

    model: Model
    tokenizers: Tokenizers
    adapters: tuple[Adapter, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[RunWarning, ...] = ()
    outputs: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(adapter.file.shard for adapter in self.adapters)

    @property
    def directories(self) -> tuple[Place, ...]:
        return tuple(adapter.file.directory for adapter in self.adapters)

    def changed_by(self, tensor: LazyTensor) -> tuple[str, ...]:
        """Return the adapters that changed `tensor`."""
        from streamconv.lazy.leaves import sources

        files = {id(source.file) for source in sources(tensor)}
        return tuple(adapter.label for adapter in self.adapters if id(adapter.file.shard) in files)


def parse_adapter(text: str) -> tuple[str, float]:
    """Return path and weight of "PATH=0.5", split at the last "=" if a decimal number follows; else all is the path."""
    path, _, weight = text.rpartition("=")
    return (path, float(weight)) if path and _NUMBER.fullmatch(weight) else (text, 1.0)


@contextmanager
def open_adapters(specs: Sequence[AdapterSpec], budget: Budget) -> Iterator[tuple[Adapter, ...]]:
    """Open the adapters, reading only their headers.

    Raises:
        SourceError: A file is missing or malformed.
        UsageError: A path is empty, or a weight is not a finite number.
    """
    with ExitStack() as stack:
        opened = []
        if specs:
            from streamconv.lora.files import LoraFile
        for source, weight in map(_source_and_weight, specs):
            opened.append(Adapter(stack.enter_context(LoraFile.open(source, budget)), weight))
        yield tuple(opened)


def _source_and_weight(spec: AdapterSpec) -> tuple[Source, float]:
    source, weight = spec if isinstance(spec, tuple) and len(spec) == 2 else (spec, 1.0)
    if not str(source):
        raise UsageError("the path of an adapter is empty", hint="give its folder", code="adapter-spec")
    if not math.isfinite(weight):
        raise UsageError(f"{weight} is not a valid weight for an adapter", code="adapter-spec")
    return source, float(weight)
