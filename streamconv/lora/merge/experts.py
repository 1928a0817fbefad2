"""Split stacked experts into single ones, as needed for factors of single experts and for whole weights of PEFT.

transformers 5 keeps the experts of a layer in one tensor, whatever the checkpoint has. A recipe that supports both
forms has a row for each; the additional operations in the row of the stack extract a single expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from streamconv.lazy.node import LazyTensor
from streamconv.lazy.views import matrix_of
from streamconv.lora.merge.weights import Made, Weights
from streamconv.lora.resolve import LoraModule
from streamconv.recipe.dims import extents
from streamconv.recipe.language import Model, Output
from streamconv.recipe.names import fill, has_experts
from streamconv.recipe.operation import applied
from streamconv.recipe.words import Tensor


def single_rows(recipe: Output) -> dict[str, Tensor]:
    """Return, by target, the recipe rows of experts that are stored one by one."""
    return {row.target: row for row in recipe.tensors if has_experts(row.source)}


def one_by_one(model: Model, name: str, stack: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    """Return the experts of a stack by the names of single experts; empty if the tensor is not a stack."""
    singles, found = single_rows(model.recipe), model.recipe.find(name)
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


def unstacked(weights: Weights, modules: Sequence[LoraModule], singles: Mapping[str, Tensor]) -> Weights:
    """Return `weights` with each stack that one of the modules changes replaced by single experts."""
    stored = dict(weights.stored)
    rows = weights.recipe.tensors
    for module in modules:
        for landing in module.slot.landings if module.slot.expert is None else module.slot.landings[:1]:
            layer, number, _ = landing.order
            target = rows[number].target
            if module.slot.n_experts and target in singles and fill(singles[target].source, layer, 0) not in stored:
                names = {fill(row.source, layer, 0) for row in rows if row.target == target}
                (name,) = names & stored.keys()
                stored |= {
                    one: Made(expert) for one, expert in one_by_one(weights.model, name, stored.pop(name).lazy())
                }
    return replace(weights, stored=stored)
