"""A checkpoint's tensors while adapters are merged into them: the value that each step of a merge takes and returns."""

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
    """A tensor that is not stored as it is, for binding."""

    tensor: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.spec.shape

    def lazy(self) -> LazyTensor:
        return self.tensor


@dataclass(frozen=True, slots=True)
class WholeWeight:
    """A whole weight that stands in place of the base's: the adapter that has it, and whether it was trained."""

    adapter: Adapter
    tensor: Stored
    is_trained: bool

    def excludes(self, other: WholeWeight) -> bool:
        """Whether the two cannot stand in one place: they can where both are the same frozen numbers."""
        return self.is_trained or other.is_trained or not has_same_numbers(self.tensor, other.tensor)


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a model by the names they are stored under, as the adapters merged so far leave them.

    Attributes:
        model: As bound without adapters; its `stored` are the base's own tensors.
        n_vocab: Rows of embedding and head, once an adapter's vocabulary has replaced the base's.
        stored: What is stored in the base, or frozen in an adapter whose vocabulary grew.
        made: What adapters changed, in place of what is stored.
        wholes: The whole weights that adapters have.
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
        """Those of a model without adapters."""
        return cls(model, model.dims[N_VOCAB], model.stored)

    @property
    def recipe(self) -> Output:
        return self.model.recipe

    @property
    def has_grown(self) -> bool:
        """Whether the vocabulary has another size than the base's."""
        return self.n_vocab != self.model.dims[N_VOCAB]

    @property
    def table(self) -> dict[str, Stored]:
        """All tensors, for a recipe to bind."""
        return {**self.stored, **{name: Made(tensor) for name, tensor in self.made.items()}}

    def now(self, name: str) -> LazyTensor:
        """The tensor `name` as it is by now; a tied head begins as the embedding."""
        made = self.made.get(name)
        return made or (self.stored.get(name) or self.stored[self.recipe.embedding]).lazy()

    def changed(self, adapter: Adapter, made: Mapping[str, LazyTensor]) -> Self:
        """With tensors that `adapter` changes."""
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
        weights: As the step leaves them.
        origins: What of a configuration and of the base decided the bytes, a line each.
    """

    weights: Weights
    findings: Sequence[Finding] = ()
    warnings: Sequence[RunWarning] = ()
    origins: Sequence[str] = ()

    def then(self, *others: Step) -> Step:
        """This step and those that began with the weights it left."""
        steps = (self, *others)
        return Step(
            steps[-1].weights,
            [finding for step in steps for finding in step.findings],
            [warning for step in steps for warning in step.warnings],
            [origin for step in steps for origin in step.origins],
        )


# ---------------------------------------------------------------- embedding and head


def is_stored(name: str | None, model: Model) -> TypeGuard[str]:
    """Whether a model has the tensor `name`; the head of a tied one counts."""
    return name in model.stored or name == model.recipe.head


def is_end(name: str, model: Model) -> bool:
    """Whether a tensor is the embedding or the head."""
    return name in (model.recipe.embedding, model.recipe.head)


def has_own_head(model: Model) -> bool:
    """Whether a model has a head of its own: one that its config calls the embedding is a copy of that."""
    return model.recipe.head in model.stored and not model.recipe.stated_tie(model.config)
