"""What an operation of a recipe is, and how several in a row are asked.

An `Op` answers for the model (`node`), for the two factors of a LoRA (`on_a`, `on_b`), for the numbers that a type can
hold (`is_exact`) and for shapes (`check`); its node describes it to a run that is resumed. A row of an architecture
lists its ops in the order in which they are applied; what reads rows asks the ops, and knows none of them.

Conventions: a matrix is [rows, columns], row-major, [out, in] of a linear layer; a stack is [E, rows, columns]; the
rows of a vector are its elements. W + scale * b @ a is the changed weight, with b [rows, r] and a [r, columns].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from gguf.constants import GGMLQuantizationType

from streamconv.lazy import dtype
from streamconv.lazy.leaves import Leaf
from streamconv.lazy.node import LazyTensor, TensorSpec

if TYPE_CHECKING:
    from streamconv.recipe.language import Model

Extents = tuple[str, ...]  # a shape as rows have it, in dims
N_EXPERTS = "E"  # as the first extent of a row's shape: what follows is stacked


class CannotAdapt(Exception):
    """Why a pair of factors cannot carry a change through an op; `code` is that of the adapter's problem."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Op(ABC):
    """One operation of a row. Ops are values: frozen dataclasses of dims, numbers and rules."""

    __slots__ = ()
    keeps_shape: ClassVar[bool] = False
    refuses: ClassVar[str] = ""  # what a tensor is of which no pair of factors can carry a change through this
    n_sources: ClassVar[int] = 1  # the source of its row, and those in the row's `also`

    @abstractmethod
    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        """The operation on `parent`. ValueError where its shape does not suit."""

    def join(self, sources: Sequence[LazyTensor], model: Model) -> LazyTensor:
        """The operation on all sources of a row, of which there are `n_sources`, of one shape."""
        (parent,) = sources
        return self.node(parent, model)

    def on_a(self, a: LazyTensor, model: Model) -> LazyTensor:
        """What becomes of the factor a [r, columns]. CannotAdapt where no factor can carry a change through this."""
        if self.refuses:
            raise CannotAdapt("no-matrix", f"it is {self.refuses}")
        return a

    def on_b(self, b: LazyTensor, model: Model) -> LazyTensor:
        """What becomes of the factor b [rows, r]. CannotAdapt where the base lacks what that takes."""
        return b

    def on_factors(self, a: LazyTensor, b: LazyTensor, model: Model) -> tuple[LazyTensor, LazyTensor]:
        """Both factors of the changed result, (a, b)."""
        return self.on_a(a, model), self.on_b(b, model)

    def factor(self, model: Model) -> float:
        """By which number the op multiplies a change, beside what it does to the factors."""
        return 1.0

    def check(self, shape: tuple[int, ...], model: Model) -> str | None:
        """What is wrong with a source of `shape`, as "has no heads of two halves"; None where nothing is."""
        try:
            self.node(Blank(shape), model)
        except ValueError as error:
            return f"does not suit: {error}"
        return None

    def is_exact(self, type_: GGMLQuantizationType, model: Model) -> bool:
        """Whether the result loses no more in `type_` than the source would."""
        return True

    def phrase(self, model: Model) -> str:
        """What the op does to the weights, as "scales these weights by 2.5"."""
        return f"changes these weights ({type(self).__name__})"

    def dims(self) -> Iterable[str]:
        """The dims that the op is written in."""
        return ()

    def extents(self, shape: Extents) -> Extents:
        """The shape after the op, as far as a recipe alone gives it: extents that are not known are "?".

        Raises:
            ValueError: The op is meaningless for a tensor of that shape, whatever the dims are.
        """
        return shape


class Blank(Leaf):
    """A tensor of some shape and without rows, to try operations on."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.spec = TensorSpec(shape, dtype.F32)

    def apply(self, *_: object) -> None:
        raise AssertionError("a shape has no rows")

    def describe(self) -> str:
        return ""


def applied(ops: Sequence[Op], tensor: LazyTensor, model: Model) -> LazyTensor:
    """`tensor` after all of the ops."""
    for op in ops:
        tensor = op.node(tensor, model)
    return tensor


def first_fault(ops: Sequence[Op], shape: tuple[int, ...], model: Model) -> str | None:
    """What is wrong with a source of `shape` for the first op that cannot take what comes to it."""
    tensor: LazyTensor = Blank(shape)
    for op in ops:
        if (fault := op.check(tensor.spec.shape, model)) is not None:
            return fault
        tensor = op.node(tensor, model)
    return None


def loss(ops: Sequence[Op], type_: GGMLQuantizationType, model: Model) -> str | None:
    """What `type_` would round that the sources do not, as a phrase; None where it is nothing."""
    return next((op.phrase(model) for op in ops if not op.is_exact(type_, model)), None)


def factors_through(ops: Sequence[Op], a: LazyTensor, b: LazyTensor, model: Model) -> tuple[LazyTensor, LazyTensor]:
    """The factors (a, b) of the change after all of the ops. CannotAdapt where one of them refuses."""
    for op in ops:
        a, b = op.on_factors(a, b, model)
    return a, b


def total_factor(ops: Sequence[Op], model: Model) -> float:
    """By which number all of the ops together multiply a change."""
    return math.prod(op.factor(model) for op in ops)
