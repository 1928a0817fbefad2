"""What an adapter has whole beside its factors: weights in place of the base's, and the tokenizer's files.

Owns: telling whether two of a kind are the same. Does not own: which of them a merge takes (merge.py).
"""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamconv.adapter_specs import Adapter
from streamconv.checkpoint import SourceTensor

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


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def left_out(folder: Path, taken: Path) -> Path | None:
    """A tokenizer's file in `folder` that is another one than in `taken`, or that is not there; None: there is none."""
    for name in (*TOKENIZERS, CHAT_TEMPLATE):
        ours, theirs = folder / name, taken / name
        if ours.is_file() and not (theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)):
            return ours
    return None
