"""Which adapters a run merges, and how strongly: from what users name to files that are open, and what comes of them.

Imports what reads and merges adapters only where there is one: a conversion without any starts sooner.
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
    """An adapter, open, and the weight that its scale is multiplied by."""

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
        tokenizers: Where its tokenizer may lie.
        options: What decides its bytes.
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
        """The adapters that `tensor` is made of."""
        from streamconv.lazy.leaves import sources

        files = {id(source.file) for source in sources(tensor)}
        return tuple(adapter.label for adapter in self.adapters if id(adapter.file.shard) in files)


def parse_adapter(text: str) -> tuple[str, float]:
    """Path and weight of "PATH=0.5", split at the last "=" if a decimal number follows; else all of it is a path."""
    path, _, weight = text.rpartition("=")
    return (path, float(weight)) if path and _NUMBER.fullmatch(weight) else (text, 1.0)


@contextmanager
def open_adapters(specs: Sequence[AdapterSpec], budget: Budget) -> Iterator[tuple[Adapter, ...]]:
    """The adapters, headers read and nothing else.

    Raises:
        SourceError: what is missing or malformed.
        UsageError: an adapter without a name, or a weight that is not a number.
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
        raise UsageError(f"{weight} is not a valid weight of an adapter", code="adapter-spec")
    return source, float(weight)
