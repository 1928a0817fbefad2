"""The interface of the operations in recipes, and functions that apply a sequence of them.

An `Op` defines its effect on a weight (`node`), on the two factors of a LoRA (`on_a`, `on_b`), on precision
(`is_exact`) and on shapes (`check`, `extents`). The description of its node is part of the identity of a run, which
decides whether the run can be resumed. A row of a recipe lists its ops in the order in which they are applied; code
that reads rows uses only this interface and does not depend on individual ops.

Conventions: a matrix is [rows, columns], row-major, which is [out, in] for a linear layer; a stack of experts is
[E, rows, columns]; each element of a vector is a row. An adapter changes a weight W to W + scale * b @ a, with b
[rows, r] and a [r, columns].
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

Extents = tuple[str, ...]  # a shape in dims, as in a row of a recipe
N_EXPERTS = "E"  # as the first extent of a shape: one matrix or vector for each expert


class CannotAdapt(Exception):
    """Raised if the change by an adapter cannot be expressed by a pair of factors after an op.

    Attributes:
        code: The code of the adapter's problem.
        message: The reason.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Op(ABC):
    """One operation of a row. Ops are values: frozen dataclasses of dims, numbers and rules.

    Attributes:
        keeps_shape: Whether the result has the shape of the source.
        refuses: Why no pair of factors can express a change after this op, as the end of "it is ..."; "" if one can.
        n_sources: The number of sources: that of the row, and those in the row's `also`.
    """

    __slots__ = ()
    keeps_shape: ClassVar[bool] = False
    refuses: ClassVar[str] = ""
    n_sources: ClassVar[int] = 1

    @abstractmethod
    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        """Return the node that applies the op to `parent`.

        Raises:
            ValueError: The op cannot be applied to the shape of `parent`.
        """

    def join(self, sources: Sequence[LazyTensor], model: Model) -> LazyTensor:
        """Return the node that applies the op to all `n_sources` sources of a row, which have the same shape."""
        (parent,) = sources
        return self.node(parent, model)

    def on_a(self, a: LazyTensor, model: Model) -> LazyTensor:
        """Return the factor a [r, columns] of the change after the op.

        Raises:
            CannotAdapt: No pair of factors can express the change.
        """
        if self.refuses:
            raise CannotAdapt("no-matrix", f"it is {self.refuses}")
        return a

    def on_b(self, b: LazyTensor, model: Model) -> LazyTensor:
        """Return the factor b [rows, r] of the change after the op.

        Raises:
            CannotAdapt: The base does not define a dim that the op needs.
        """
        return b

    def on_factors(self, a: LazyTensor, b: LazyTensor, model: Model) -> tuple[LazyTensor, LazyTensor]:
        """Return both factors, (a, b), of the change after the op."""
        return self.on_a(a, model), self.on_b(b, model)

    def factor(self, model: Model) -> float:
        """Return the number by which the op multiplies a change, in addition to its effect on the factors."""
        return 1.0

    def check(self, shape: tuple[int, ...], model: Model) -> str | None:
        """Return why the op cannot be applied to a source of `shape`, or None if it can.

        The text continues a sentence that begins with the name of the source.
        """
        try:
            self.node(Blank(shape), model)
        except ValueError as error:
            return f"does not suit: {error}"
        return None

    def is_exact(self, type_: GGMLQuantizationType, model: Model) -> bool:
        """Whether storing the result as `type_` loses no more precision than storing the source as `type_`."""
        return True

    def phrase(self, model: Model) -> str:
        """Return a phrase for messages, such as "scales these weights by 2.5"."""
        return f"changes these weights ({type(self).__name__})"

    def dims(self) -> Iterable[str]:
        """Return the dims, or extents in dims, that the op uses."""
        return ()

    def extents(self, shape: Extents) -> Extents:
        """Return the shape after the op, in dims; extents that a recipe does not determine are "?".

        Raises:
            ValueError: The op cannot be applied to this shape for any values of the dims.
        """
        return shape


class Blank(Leaf):
    """A tensor that has a shape but no data, used to check whether operations can be applied."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.spec = TensorSpec(shape, dtype.F32)

    def apply(self, *_: object) -> None:
        raise AssertionError("a shape has no rows")

    def describe(self) -> str:
        return ""


def applied(ops: Sequence[Op], tensor: LazyTensor, model: Model) -> LazyTensor:
    """Return the node that applies all of the ops to `tensor`, in order."""
    for op in ops:
        tensor = op.node(tensor, model)
    return tensor


def first_fault(ops: Sequence[Op], shape: tuple[int, ...], model: Model) -> str | None:
    """Return why one of the ops, in order, cannot be applied to a source of `shape`; None if all can."""
    tensor: LazyTensor = Blank(shape)
    for op in ops:
        if (fault := op.check(tensor.spec.shape, model)) is not None:
            return fault
        tensor = op.node(tensor, model)
    return None


def loss(ops: Sequence[Op], type_: GGMLQuantizationType, model: Model) -> str | None:
    """Return the phrase of the first op whose result loses precision in `type_`, or None."""
    return next((op.phrase(model) for op in ops if not op.is_exact(type_, model)), None)


def factors_through(ops: Sequence[Op], a: LazyTensor, b: LazyTensor, model: Model) -> tuple[LazyTensor, LazyTensor]:
    """Return the factors (a, b) of the change after all of the ops.

    Raises:
        CannotAdapt: One of the ops has no such factors.
    """
    for op in ops:
        a, b = op.on_factors(a, b, model)
    return a, b


def total_factor(ops: Sequence[Op], model: Model) -> float:
    """Return the number by which all of the ops together multiply a change."""
    return math.prod(op.factor(model) for op in ops)
