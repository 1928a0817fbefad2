"""A checkpoint's tensors during a merge: the value that each step takes and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self, TypeGuard

from streamconv.errors import RunWarning
from streamconv.lazy.node import LazyTensor
from streamconv.lora.base import N_VOCAB
from streamconv.lora.config import Problem
from streamconv.lora.specs import Adapter
from streamconv.recipe.language import Model, Output, Stored
from streamconv.recipe.spelling import has_same_numbers


@dataclass(frozen=True, slots=True)
class Made:
    """A computed tensor that a recipe can bind like a stored one."""

    tensor: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.spec.shape

    def lazy(self) -> LazyTensor:
        return self.tensor


@dataclass(frozen=True, slots=True)
class WholeWeight:
    """A whole weight that replaces the base's: the adapter that has it, and whether it was trained."""

    adapter: Adapter
    tensor: Stored
    is_trained: bool

    def excludes(self, other: WholeWeight) -> bool:
        """Return whether the two conflict. They do not if both are frozen and have equal values."""
        return self.is_trained or other.is_trained or not has_same_numbers(self.tensor, other.tensor)


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a model by stored name, with the adapters merged so far.

    Attributes:
        model: The model bound without adapters; its `stored` has the base's own tensors.
        n_vocab: Rows of embedding and head, once an adapter's vocabulary has replaced the base's.
        stored: Tensors of the base, or frozen ones of an adapter with an enlarged vocabulary.
        made: Tensors that adapters changed, which replace stored ones.
        wholes: The whole weights of adapters.
        changed_by: The adapters that changed a tensor, in order.
    """

    model: Model
    n_vocab: int
    stored: Mapping[str, Stored]
    made: Mapping[str, LazyTensor] = field(default_factory=dict)
    wholes: Mapping[str, WholeWeight] = field(default_factory=dict)
    changed_by: Mapping[str, tuple[Adapter, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model) -> Self:
        """Return the weights of a model without adapters."""
        return cls(model, model.dims[N_VOCAB], model.stored)

    @property
    def recipe(self) -> Output:
        return self.model.recipe

    @property
    def has_grown(self) -> bool:
        """Whether the size of the vocabulary differs from the base's."""
        return self.n_vocab != self.model.dims[N_VOCAB]

    @property
    def table(self) -> dict[str, Stored]:
        """Return all tensors, for a recipe to bind."""
        return {**self.stored, **{name: Made(tensor) for name, tensor in self.made.items()}}

    def now(self, name: str) -> LazyTensor:
        """Return the current tensor `name`; a tied head starts as the embedding."""
        made = self.made.get(name)
        return made or (self.stored.get(name) or self.stored[self.recipe.embedding]).lazy()

    def changed(self, adapter: Adapter, made: Mapping[str, LazyTensor]) -> Self:
        """Return the weights with tensors that `adapter` changes."""
        by = {name: (*self.changed_by.get(name, ()), adapter) for name in made}
        return replace(self, made={**self.made, **made}, changed_by={**self.changed_by, **by})


class Finding(NamedTuple):
    """A reason why an adapter cannot be merged."""

    adapter: Adapter
    problem: Problem


def finding(adapter: Adapter, code: str, message: str, *modules: str) -> Finding:
    return Finding(adapter, Problem(code, message, modules))


@dataclass(frozen=True, slots=True)
class Step:
    """The result of one step of a merge, or of several in turn.

    Attributes:
        weights: The weights after the step.
        origins: A line for each property of a configuration or the base that determined the bytes.
    """

    weights: Weights
    findings: Sequence[Finding] = ()
    warnings: Sequence[RunWarning] = ()
    origins: Sequence[str] = ()

    def then(self, *others: Step) -> Step:
        """Return this step combined with a later one."""
        steps = (self, *others)
        return Step(
            steps[-1].weights,
            [finding for step in steps for finding in step.findings],
            [warning for step in steps for warning in step.warnings],
            [origin for step in steps for origin in step.origins],
        )


# ---------------------------------------------------------------- embedding and head


def is_stored(name: str | None, model: Model) -> TypeGuard[str]:
    """Return whether a model has the tensor `name`; the head of a tied one counts."""
    return name in model.stored or name == model.recipe.head


def is_end(name: str, model: Model) -> bool:
    """Return whether a tensor is the embedding or the head."""
    return name in (model.recipe.embedding, model.recipe.head)


def has_own_head(model: Model) -> bool:
    """Return whether a model has a separate head. A stored one that the config calls tied is only a copy."""
    return model.recipe.head in model.stored and not model.recipe.stated_tie(model.config)
