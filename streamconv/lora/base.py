"""The base of an adapter: the names and shapes of its tensors, and its head counts. No weights are read.

A GGUF file (gguf_base.py) and a folder (open_base.py) are both interpreted by the architecture's recipe, so adapters
work for every architecture that has a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from streamconv.errors import RunWarning
from streamconv.files.store import Place
from streamconv.gguf.format import KeyValue
from streamconv.lora.config import Problem
from streamconv.recipe.dims import parse_shape
from streamconv.recipe.language import EMBEDDING, Model, Output
from streamconv.recipe.names import NONE, Found, fill, has_experts, stack_of
from streamconv.recipe.operation import Op
from streamconv.recipe.words import Tensor

N_LAYERS, N_EXPERTS, N_VOCAB = "L", "E", "V"  # dims that every recipe names like this

# Tensors for which llama.cpp's runtime never looks up an adapter (llama-adapter.cpp, llama-graph.cpp).
_IGNORED_TARGETS = {"_norm.weight": "a norm, to which llama.cpp does not apply adapters"}


@dataclass(frozen=True, slots=True)
class Landing:
    """A GGUF tensor that a module's change is part of, and the operations applied to the change."""

    target: str
    order: tuple[int, int, int]  # sorts by the order of the base's tensors
    ops: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """A matrix of the base that a pair of factors can change: of stacked experts one, or all if `expert` is None.

    Attributes:
        landings: The GGUF tensors made of it, several if a fused matrix is split.
        shape: Row-major [out, in] as stored; None for an unknown extent.
    """

    landings: tuple[Landing, ...]
    shape: tuple[int | None, int | None]
    expert: int | None = None
    n_experts: int = 0
    is_embedding: bool = False
    is_head: bool = False

    @property
    def target(self) -> str:
        return self.landings[0].target

    @property
    def order(self) -> tuple[int, int, int]:
        return self.landings[0].order


@dataclass(slots=True)
class BaseModel:
    """A base as adapters see it.

    Attributes:
        model: Its dims and kinds of layers, as far as they are known.
        targets: The names of its tensors in GGUF, None if it does not list them all.
        shapes: Shapes that the base states; the others follow from its dims.
        is_tied: Whether the head is the embedding, None if unknown.
        is_merged: Whether adapters are merged into it, so that llama.cpp's support for adapters does not matter.
        template: The chat template of a GGUF base, unless it is longer than any known one.
    """

    path: Place
    model: Model
    is_tied: bool | None
    keys: Sequence[KeyValue]
    targets: frozenset[str] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    warnings: list[RunWarning] = field(default_factory=list)
    is_merged: bool = False
    template: str = ""

    @property
    def recipe(self) -> Output:
        return self.model.recipe

    @property
    def dims(self) -> Mapping[str, int]:
        return self.model.dims

    @property
    def n_layers(self) -> int:
        return self.model.n_layers

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor of this name; the head of a tied base counts."""
        is_head = self.recipe.canonical(name) == self.recipe.head
        return is_head or any(self._rows(name)) or self.recipe.is_of_another(name)

    def slot(self, module: str) -> Slot | Problem:
        """Return the slot of `module` (such as model.layers.0.self_attn.q_proj), or why no adapter can change it."""
        return self.slot_of(f"{module}.weight")

    def slot_of(self, name: str) -> Slot | Problem:
        """Like `slot`, for a tensor by its full name, which may not end in .weight."""
        module = name.removesuffix(".weight")
        if self.is_tied and self.recipe.canonical(name) == self.recipe.head:
            return Problem("tied", "the base is tied, so it has no separate head that llama.cpp could adapt", (module,))
        rows = list(self._rows(name))
        if not rows and self.recipe.is_of_another(name):
            what = "it belongs to another file (a vision tower's), for which llama.cpp does not support adapters"
            return Problem("other-output", what, (module,))
        if not rows:
            return Problem("no-module", f"the base ({self.recipe.arch}) has no such module", (module,))
        found, row = rows[0][1:]
        reason = next(filter(None, (_no_matrix(row, is_merged=self.is_merged) for _, _, row in rows)), "")
        if reason:
            return Problem("no-matrix", reason, (module,))
        landings = [Landing(fill(row.target, found.i), (found.i, n, found.e), row.ops) for n, found, row in rows]
        is_stack = has_experts(row.source) or _is_stack(row)
        return Slot(
            landings=tuple(landings),
            shape=self._shape(landings[0], row),
            expert=None if found.e == NONE else found.e,
            n_experts=self.dims.get(N_EXPERTS, 0) if is_stack else 0,
            is_embedding=landings[0].target == EMBEDDING,
            is_head=row.source == self.recipe.head,
        )

    def _rows(self, name: str) -> Iterator[tuple[int, Found, Tensor]]:
        """The recipe's rows that use the tensor `name`, each with its number, if the base has their targets."""
        found = self.recipe.find(name)
        if found is not None:
            for number, row in enumerate(self.recipe.tensors):
                if row.source == found.template and row.unless not in self.model.stored and self._has(row, found):
                    yield number, found, row

    def _has(self, row: Tensor, found: Found) -> bool:
        stack = stack_of(row.source)
        if found.e >= self.dims.get(N_EXPERTS, 0):
            return False
        if self.targets is not None:
            return fill(row.target, found.i) in self.targets
        if stack is not None and found.i >= self.dims.get(self.recipe.stacks[stack], 0):
            return False
        axis, _, kind = row.only.partition("=")
        return stack is None or axis not in self.model.kinds or self.model.kinds[axis][found.i] == kind

    def _shape(self, landing: Landing, row: Tensor) -> tuple[int | None, int | None]:
        """[out, in] of a row's source: the target's shape in the base if no operation changes it, else from dims."""
        known = self.shapes.get(landing.target, ())
        if len(known) > 1 and all(op.keeps_shape for op in row.ops):
            return known[-2], known[-1]
        n_out, n_in = (extent.value(self.dims) for extent in parse_shape(row.shape)[-2:])
        return n_out, n_in


def _is_stack(row: Tensor) -> bool:
    """Return whether the source of a row is one tensor with all experts of a layer."""
    first, *matrix = (extent.text for extent in parse_shape(row.shape))
    return first == N_EXPERTS and len(matrix) == 2


def _no_matrix(row: Tensor, *, is_merged: bool) -> str:
    """Why a pair of factors cannot change a row of the recipe; empty if it can."""
    if row.no_adapter and not is_merged:
        return row.no_adapter
    for ending, what in _IGNORED_TARGETS.items():
        if row.target.endswith(ending):
            return f"it is {what}"
    if len(parse_shape(row.shape)) - _is_stack(row) == 2:
        return ""
    return f"it is {next((op.refuses for op in row.ops if op.refuses), 'no matrix')}"
