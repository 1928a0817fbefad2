"""What an adapter needs to know of its base: which tensors there are, their shapes and heads. No weight is read.

A base that is a GGUF file (gguf_base.py) and one that is a folder (open_base.py) are both seen through the
architecture's recipe, so every architecture that has one has adapters.
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

N_LAYERS, N_EXPERTS, N_VOCAB = "L", "E", "V"  # dims that have these names in every recipe

# Tensors that llama.cpp's runtime uses without asking for an adapter (llama-adapter.cpp, llama-graph.cpp).
_IGNORED_TARGETS = {"_norm.weight": "a norm, for which llama.cpp asks no adapter"}


@dataclass(frozen=True, slots=True)
class Landing:
    """A tensor of the GGUF that a module's change arrives in, and the operations it goes through on its way."""

    target: str
    order: tuple[int, int, int]  # its place among the base's tensors
    ops: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """One matrix of the base that a pair of factors may change; of stacked experts one, or all where `expert` is None.

    landings: what it becomes in the GGUF, several where a fused matrix is split. shape: row-major [out, in] as stored,
    None where the base does not tell.
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

    model: its dims and kinds, as far as the base gives them. targets: the names of its tensors in GGUF, None where it
    does not list them all. shapes: of those whose shapes it gives itself; the others follow from dims. is_tied: None
    where the base does not tell. is_merged: whether adapters change it before it is written, so that it does not matter
    for which tensors llama.cpp asks adapters.
    """

    path: Place
    model: Model
    is_tied: bool | None
    keys: Sequence[KeyValue]
    targets: frozenset[str] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    warnings: list[RunWarning] = field(default_factory=list)
    is_merged: bool = False

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
        """Whether the model has a tensor of this name in its checkpoint; a tied base's head counts."""
        is_head = self.recipe.canonical(name) == self.recipe.head
        return is_head or any(self._rows(name)) or self.recipe.is_of_another(name)

    def slot(self, module: str) -> Slot | Problem:
        """What `module` (as model.layers.0.self_attn.q_proj) is in this base, or why no adapter can change it."""
        return self.slot_of(f"{module}.weight")

    def slot_of(self, name: str) -> Slot | Problem:
        """As `slot`, of a tensor by its own name, which need not end in .weight."""
        module = name.removesuffix(".weight")
        if self.is_tied and self.recipe.canonical(name) == self.recipe.head:
            return Problem("tied", "the base is tied: it has no head of its own that llama.cpp could adapt", (module,))
        rows = list(self._rows(name))
        if not rows and self.recipe.is_of_another(name):
            what = (
                "it is of another file than the model's, such as a vision tower, for which llama.cpp takes no adapter"
            )
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
        """The recipe's rows that take the tensor `name`, each with its number, as far as this base has them."""
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
        """[out, in] of a row's source: as the base has the target, where the operations leave it as it is."""
        known = self.shapes.get(landing.target, ())
        if len(known) > 1 and all(op.keeps_shape for op in row.ops):
            return known[-2], known[-1]
        n_out, n_in = (extent.value(self.dims) for extent in parse_shape(row.shape)[-2:])
        return n_out, n_in


def _is_stack(row: Tensor) -> bool:
    """Whether the source of a row is all experts of a layer in one tensor."""
    first, *matrix = (extent.text for extent in parse_shape(row.shape))
    return first == N_EXPERTS and len(matrix) == 2


def _no_matrix(row: Tensor, *, is_merged: bool) -> str:
    """Why a row of the recipe is nothing that a pair of factors could change; empty where it is."""
    if row.no_adapter and not is_merged:
        return row.no_adapter
    for ending, what in _IGNORED_TARGETS.items():
        if row.target.endswith(ending):
            return f"it is {what}"
    if len(parse_shape(row.shape)) - _is_stack(row) == 2:
        return ""
    return f"it is {next((op.refuses for op in row.ops if op.refuses), 'no matrix')}"
