"""What an adapter has whole beside its factors: weights, and rows of them, in place of the base's.

Owns: telling whether two of a kind are the same. Does not own: which of them a merge takes (merge.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamconv.lazy.arithmetic import widened
from streamconv.lazy.node import LazyTensor
from streamconv.lazy.views import Concatenate, IndexRows, matrix_of
from streamconv.lora.specs import Adapter
from streamconv.recipe.dims import extents
from streamconv.recipe.language import Model, Output, Stored
from streamconv.recipe.names import fill, has_experts
from streamconv.recipe.ops import applied
from streamconv.recipe.spelling import has_same_numbers
from streamconv.recipe.words import Tensor


@dataclass(frozen=True, slots=True)
class WholeWeight:
    """A whole weight that stands in place of the base's: who brought it, and whether it was trained."""

    adapter: Adapter
    tensor: Stored
    is_trained: bool

    def excludes(self, other: WholeWeight) -> bool:
        """Whether the two cannot stand in one place: they can where both are the same frozen numbers."""
        return self.is_trained or other.is_trained or not has_same_numbers(self.tensor, other.tensor)


def alone(recipe: Output) -> dict[str, Tensor]:
    """By target, the rows of experts that are stored one by one."""
    return {row.target: row for row in recipe.tensors if has_experts(row.source)}


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding or head that were trained whole, and their numbers in the order of the rows."""

    numbers: tuple[int, ...]
    tensor: Stored

    def over(self, tensor: LazyTensor) -> LazyTensor:
        """`tensor` with these rows in place of its own."""
        rows = self.tensor.lazy()
        if rows.spec.dtype != tensor.spec.dtype:
            tensor, rows = widened(tensor), widened(rows)
        index = np.arange(tensor.spec.n_rows)
        index[list(self.numbers)] = tensor.spec.n_rows + np.arange(len(self.numbers))
        return IndexRows(Concatenate([tensor, rows]), index)

    def is_same(self, other: TokenRows) -> bool:
        return self.numbers == other.numbers and has_same_numbers(self.tensor, other.tensor)


def one_by_one(model: Model, name: str, stack: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    """Stacked experts as a checkpoint names and stores them that has them one by one; none of another tensor.

    As transformers 5 holds experts, and PEFT saves those that were trained whole, whatever the checkpoint's way. What a
    row does to the stack beyond what the row of single experts does to them is what makes the one of the other.
    """
    singles, found = alone(model.recipe), model.recipe.find(name)
    for row in model.recipe.tensors:
        if found is None or row.source != found.template or row.target not in singles:
            continue
        single = singles[row.target]
        n = len(row.ops) - len(single.ops)
        if n < 0 or row.ops[n:] != single.ops or stack.spec.shape != extents(row.shape, model.dims):
            continue
        for e in range(stack.spec.shape[0]):
            expert = applied(row.ops[:n], matrix_of(stack, e, stack.spec.shape[1]), model)
            yield fill(single.source, found.i, e), expert
