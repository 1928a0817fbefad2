"""What an adapter has whole beside its factors: weights in place of the base's, and the tokenizer's files.

Owns: telling whether two of a kind are the same. Does not own: which of them a merge takes (merge.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from streamconv.checkpoint.safetensors import SourceTensor
from streamconv.files.local import has_same_content
from streamconv.files.store import Place
from streamconv.lora.specs import Adapter
from streamconv.recipe.dims import extents, match_name
from streamconv.recipe.language import Model

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
CHAT_TEMPLATE = "chat_template.jinja"
COMPARED_NBYTES = 1 << 20  # at a time


@dataclass(frozen=True, slots=True)
class WholeWeight:
    """A whole weight that stands in place of the base's: who brought it, and whether it was trained."""

    adapter: Adapter
    tensor: SourceTensor
    is_trained: bool

    def excludes(self, other: WholeWeight) -> bool:
        """Whether the two cannot stand in one place: they can where both are the same frozen numbers."""
        return self.is_trained or other.is_trained or not _are_equal(self.tensor, other.tensor)


def _are_equal(one: SourceTensor, other: SourceTensor) -> bool:
    """Whether two stored tensors are the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    ours, theirs = np.empty((2, min(one.nbytes, COMPARED_NBYTES)), np.uint8)
    for start in range(0, one.nbytes, COMPARED_NBYTES):
        n = min(COMPARED_NBYTES, one.nbytes - start)
        one.shard.read_into(one.offset + start, ours[:n])
        other.shard.read_into(other.offset + start, theirs[:n])
        if not np.array_equal(ours[:n], theirs[:n]):
            return False
    return True


def one_by_one(model: Model, name: str, stack: SourceTensor) -> Iterator[tuple[str, SourceTensor]]:
    """Stacked experts as a checkpoint names and stores them that has them one by one; none of another tensor.

    As transformers 5 holds experts, and PEFT saves those that were trained whole, whatever the checkpoint's way.
    """
    template, numbers = match_name(name)
    alone = {row.target: row.source for row in model.recipe.tensors if "{e}" in row.source}
    for row in model.recipe.tensors:
        index, count = (row.part.index, row.part.count) if row.part else (0, 1)
        if row.source != template or row.target not in alone or stack.shape != extents(row.shape, model.dims):
            continue
        n_experts, n_rows, n_columns = stack.shape
        nbytes = stack.nbytes // (n_experts * count)
        for e in range(n_experts):
            offset = stack.offset + (e * count + index) * nbytes
            expert = replace(stack, shape=(n_rows // count, n_columns), offset=offset, nbytes=nbytes)
            yield alone[row.target].format(i=numbers[0], e=e), expert


def has_tokenizer(folder: Place) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def left_out(folder: Place, taken: Place) -> Place | None:
    """A tokenizer's file in `folder` that is another one than in `taken`, or that is not there; None: there is none."""
    for name in (*TOKENIZERS, CHAT_TEMPLATE):
        ours, theirs = folder / name, taken / name
        if ours.is_file() and not (theirs.is_file() and has_same_content(ours, theirs)):
            return ours
    return None
