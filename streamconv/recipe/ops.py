"""The operations that turn a stored tensor into a tensor of a GGUF file; conventions are in operation.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.lazy import arithmetic, dtype, indexing, norms, views
from streamconv.lazy.node import LazyTensor, TensorSpec
from streamconv.recipe.dims import differ, parse_extent, parse_shape
from streamconv.recipe.operation import N_EXPERTS, CannotAdapt, Extents, Op

if TYPE_CHECKING:
    from streamconv.recipe.language import Model

F16, F32, BF16, Q8_0 = (
    GGMLQuantizationType.F16,
    GGMLQuantizationType.F32,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
)

# With a smaller factor, the F16 scale of a Q8_0 block whose largest weight is 0.03 is subnormal (a multiple of 2**-24)
# with fewer than 8 significant bits, so that its rounding error exceeds that of the quants.
LEAST_F16_FACTOR = 2.0**-4

Index = NDArray[np.int64]


def _axis_of_rows(shape: Extents, what: str) -> int:
    """Return the axis of the rows of each matrix, or of the elements of a vector.

    Raises:
        ValueError: That axis counts experts.
    """
    if len(shape) == 2 and shape[0] == N_EXPERTS:
        raise ValueError(f"the rows of {' '.join(shape)} are experts, which have no {what}")
    return max(0, len(shape) - 2)


def _axis_of_columns(shape: Extents) -> int:
    if len(shape) < 2:
        raise ValueError("a vector has no columns")
    return len(shape) - 1


def _with_part(shape: Extents, axis: int) -> Extents:
    return (*shape[:axis], "?", *shape[axis + 1 :])


# ---------------------------------------------------------------- rows and columns in another order


@dataclass(frozen=True, slots=True)
class Permute(Op):
    """Reorder the rows of Q or K, within each head, from half-split to interleaved RoPE.

    Attributes:
        heads: The number of heads, as an extent in dims: "A" or "K".
    """

    keeps_shape = True

    heads: str

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        return views.PairHalves(parent, _size(self.heads, model))

    def check(self, shape: tuple[int, ...], model: Model) -> str | None:
        rows = TensorSpec(shape, dtype.F32).n_rows
        return (
            f"its {rows} rows cannot be split into heads of two halves"
            if rows % (2 * _size(self.heads, model))
            else None
        )

    def on_b(self, b: LazyTensor, model: Model) -> LazyTensor:
        heads = parse_extent(self.heads).value(model.dims)
        if heads is None:
            raise CannotAdapt("heads", "the base's number of heads is unknown")
        if b.spec.n_rows % (2 * heads):
            raise CannotAdapt("heads", f"its {b.spec.n_rows} rows cannot be split into {heads} heads of two halves")
        return views.PairHalves(b, heads)

    def dims(self) -> Iterable[str]:
        return parse_extent(self.heads).names

    def extents(self, shape: Extents) -> Extents:
        _axis_of_rows(shape, "heads")
        if len(shape) > 2:
            raise ValueError(f"heads are rows of a matrix, but {' '.join(shape)} is a stack of matrices")
        return shape


@dataclass(frozen=True, slots=True)
class _Indexed(Op):
    """Select rows or columns by index.

    Attributes:
        index: A rule that returns, for each row or column of the result, its number in the source; or None if a model
            needs no reordering.
    """

    index: Callable[[Model], Index | None]

    def __post_init__(self) -> None:
        if not callable(self.index):
            raise ValueError(f"{self.index!r} is not a rule: write a function of the model")


@dataclass(frozen=True, slots=True)
class Rows(_Indexed):
    """Reorder the rows of each matrix, or the elements of a vector, by an index; some may be left out."""

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        index = self.index(model)
        return parent if index is None else indexing.rows_in_order(parent, index)

    def on_b(self, b: LazyTensor, model: Model) -> LazyTensor:
        return self.node(b, model)

    def extents(self, shape: Extents) -> Extents:
        return _with_part(shape, max(0, len(shape) - 2))


@dataclass(frozen=True, slots=True)
class Columns(_Indexed):
    """Reorder the columns by an index; some may be left out."""

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        index = self.index(model)
        return parent if index is None else indexing.IndexColumns(parent, index)

    def on_a(self, a: LazyTensor, model: Model) -> LazyTensor:
        return self.node(a, model)

    def extents(self, shape: Extents) -> Extents:
        return _with_part(shape, _axis_of_columns(shape))


# ---------------------------------------------------------------- a part of a fused tensor


@dataclass(frozen=True, slots=True)
class Split(Op):
    """Take one block of the rows of each matrix of a fused tensor, or of the elements of a vector.

    Attributes:
        index: The number of the block, from 0.
        sizes: The sizes of all blocks in dims, such as "A*D K*D K*D"; a number N means N equal blocks.
        of_columns: Take a block of columns instead, as in a stack of vectors [E, 2*M].
    """

    index: int
    sizes: str | int
    of_columns: bool = False

    def __post_init__(self) -> None:
        count = self.sizes if isinstance(self.sizes, int) else len(self.sizes.split())
        if not 0 <= self.index < count:
            raise ValueError(f"there is no block {self.index} of {self.sizes!r}")
        if count == 1:
            raise ValueError(f"the only block of {self.sizes!r} is the whole")

    def bounds(self, extent: int, model: Model) -> tuple[int, int]:
        """Return (start, size) of the block.

        Raises:
            ValueError: The sizes of the blocks do not add up to `extent`.
        """
        if isinstance(self.sizes, int):
            size, rest = divmod(extent, self.sizes)
            if rest:
                raise ValueError(f"{extent} are not {self.sizes} equal blocks")
            return self.index * size, size
        sizes = [_size(text, model) for text in self.sizes.split()]
        if sum(sizes) != extent:
            raise ValueError(f"blocks of {sizes} do not make up {extent}")
        return sum(sizes[: self.index]), sizes[self.index]

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        shape = parent.spec.shape
        if self.of_columns:
            start, size = self.bounds(parent.spec.n_columns, model)
            return indexing.IndexColumns(parent, np.arange(start, start + size))
        period = shape[-2] if len(shape) > 1 else shape[0]
        start, size = self.bounds(period, model)
        block = views.RowBlocks(parent, period, start, size)
        return block if len(shape) == 3 else views.Reshape(block, (*shape[:-2], size, *shape[1:][-1:]))

    def on_a(self, a: LazyTensor, model: Model) -> LazyTensor:
        return self.node(a, model) if self.of_columns else a

    def on_b(self, b: LazyTensor, model: Model) -> LazyTensor:
        return b if self.of_columns else self.node(b, model)

    def dims(self) -> Iterable[str]:
        return () if isinstance(self.sizes, int) else _names(self.sizes)

    def extents(self, shape: Extents) -> Extents:
        axis = _axis_of_parts(shape, self.of_columns)
        if isinstance(self.sizes, int):
            _check_divides(shape[axis], self.sizes)
        elif differ(["+".join(f"({size})" for size in self.sizes.split())], [shape[axis]]):
            raise ValueError(f"blocks of {self.sizes} do not make up {shape[axis]}")
        return _with_part(shape, axis)


@dataclass(frozen=True, slots=True)
class Interleaved(Op):
    """Take every `count`-th row of each matrix, or element of a vector: one of gate and up that are interleaved.

    Attributes:
        index: The first row to take, from 0.
        count: The number of interleaved tensors.
        of_columns: Take columns instead, as in a stack of vectors [E, 2*M].
    """

    index: int
    count: int
    of_columns: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"there is no row {self.index} of every {self.count}")
        if self.count == 1:
            raise ValueError("every row is the whole")

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        shape = parent.spec.shape
        extent = parent.spec.n_columns if self.of_columns else shape[-2] if len(shape) > 1 else shape[0]
        if extent % self.count:
            raise ValueError(f"{extent} rows cannot be interleaved {self.count} ways")
        index = np.arange(self.index, extent, self.count)
        return indexing.IndexColumns(parent, index) if self.of_columns else indexing.rows_in_order(parent, index)

    def on_a(self, a: LazyTensor, model: Model) -> LazyTensor:
        return self.node(a, model) if self.of_columns else a

    def on_b(self, b: LazyTensor, model: Model) -> LazyTensor:
        return b if self.of_columns else self.node(b, model)

    def extents(self, shape: Extents) -> Extents:
        axis = _axis_of_parts(shape, self.of_columns)
        _check_divides(shape[axis], self.count)
        return _with_part(shape, axis)


def _check_divides(extent: str, count: int) -> None:
    """Raise ValueError if an extent is a number that is not divisible by `count`."""
    if extent.isdecimal() and int(extent) % count:
        raise ValueError(f"{extent} does not divide by {count}")


def _axis_of_parts(shape: Extents, of_columns: bool) -> int:
    if of_columns:
        return _axis_of_columns(shape)
    return _axis_of_rows(shape, "parts: of_columns=True takes them from each expert's vector")


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True, slots=True)
class Squeeze(Op):
    """Remove extents of 1: the kernel of a convolution [H, 1, C] becomes [H, C]."""

    refuses = "a convolution, for which LoRA is not supported"

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        return reshaped(parent, tuple(extent for extent in parent.spec.shape if extent != 1) or (1,))

    def extents(self, shape: Extents) -> Extents:
        if not {"1", "?"} & set(shape):
            raise ValueError(f"no extent of {' '.join(shape)} is 1")
        return tuple(extent for extent in shape if extent != "1") or ("1",)


@dataclass(frozen=True, slots=True)
class Reshape(Op):
    """Change the shape; the order of the elements is the same.

    Attributes:
        to: The new shape in dims, such as "A D H".
    """

    to: str
    refuses = "reshaped for llama.cpp"

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        return reshaped(parent, tuple(_size(extent.text, model) for extent in parse_shape(self.to)))

    def dims(self) -> Iterable[str]:
        return _names(self.to)

    def extents(self, shape: Extents) -> Extents:
        to = tuple(self.to.split())
        if not to or differ(to, shape):
            raise ValueError(f"{' '.join(shape)} cannot be seen as {self.to!r}")
        if to == shape:
            raise ValueError(f"it is {self.to} already")
        return to


@dataclass(frozen=True, slots=True)
class Transpose(Op):
    """Transpose a matrix, or each matrix of a stack."""

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        return views.transposed(parent)

    def on_factors(self, a: LazyTensor, b: LazyTensor, model: Model) -> tuple[LazyTensor, LazyTensor]:
        return self.node(b, model), self.node(a, model)

    def extents(self, shape: Extents) -> Extents:
        last = _axis_of_columns(shape)
        return (*shape[: last - 1], shape[last], shape[last - 1])


# ---------------------------------------------------------------- changed values


@dataclass(frozen=True, slots=True)
class PlusOne(Op):
    """Add 1 to every element, in F32: Gemma stores the weight of a norm minus 1."""

    keeps_shape = True

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        return arithmetic.PlusConstant(parent, 1.0)

    def is_exact(self, type_: GGMLQuantizationType, model: Model) -> bool:
        return type_ == F32


@dataclass(frozen=True, slots=True)
class MinusExp(Op):
    """Compute -exp(x) of every element, in F32: the A of a state space model, stored as log(-A)."""

    keeps_shape = True
    refuses = "stored as a logarithm"

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        return arithmetic.NegExp(parent)

    def is_exact(self, type_: GGMLQuantizationType, model: Model) -> bool:
        return type_ == F32


@dataclass(frozen=True, slots=True)
class Scale(Op):
    """Multiply every element by a factor.

    Attributes:
        rule: A function that returns the factor for a model.
    """

    keeps_shape = True
    rule: Callable[[Model], float]

    def __post_init__(self) -> None:
        if not callable(self.rule):
            raise ValueError(f"{self.rule!r} is not a rule: write a function of the model")

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        factor = self.rule(model)
        return parent if factor == 1.0 else arithmetic.Scale(parent, factor)

    def factor(self, model: Model) -> float:
        if not model.has_config:
            raise CannotAdapt(
                "factor", "a GGUF file does not record how its experts were scaled: give the base's folder"
            )
        return self.rule(model)

    def is_exact(self, type_: GGMLQuantizationType, model: Model) -> bool:
        """Whether storing the scaled weights as `type_` loses no more precision than storing the source as `type_`.

        A power of two changes only exponents. Any other factor rounds F32 once, as a runtime that multiplies by it
        also does, and changes only the scales of Q8_0; but it would round every 16-bit weight that was stored exactly.
        F16, and Q8_0 with its F16 scales, have a small range of exponents: a small factor makes values subnormal.
        """
        factor = self.rule(model)
        is_power = math.frexp(factor)[0] in (0.5, -0.5, 0.0)
        if type_ not in (F32, BF16) and 0 < abs(factor) < LEAST_F16_FACTOR:
            return False
        return is_power or type_ not in (F16, BF16)

    def phrase(self, model: Model) -> str:
        return f"scales these weights by {self.rule(model):g}"


@dataclass(frozen=True, slots=True)
class _FoldedNorm(Op):
    """A vector of a folded batch norm, computed in F32 from `n_sources` vectors of the same length.

    Attributes:
        epsilon: The number added to the variance.
    """

    keeps_shape = True
    refuses = "a batch norm, which is folded"

    epsilon: float = 1e-5  # torch's default for BatchNorm1d

    def node(self, parent: LazyTensor, model: Model) -> LazyTensor:
        return self.join([parent] * self.n_sources, model)

    def is_exact(self, type_: GGMLQuantizationType, model: Model) -> bool:
        return type_ == F32


@dataclass(frozen=True, slots=True)
class FoldedScale(_FoldedNorm):
    """The scale of a batch norm, from its weight; running_var is in the row's `also`."""

    n_sources = 2

    def join(self, sources: Sequence[LazyTensor], model: Model) -> LazyTensor:
        weight, variance = sources
        return norms.NormScale(weight, variance, self.epsilon)


@dataclass(frozen=True, slots=True)
class FoldedShift(_FoldedNorm):
    """The shift of a batch norm, from its bias; running_mean, weight and running_var are in the row's `also`."""

    n_sources = 4

    def join(self, sources: Sequence[LazyTensor], model: Model) -> LazyTensor:
        bias, mean, weight, variance = sources
        return norms.NormShift(bias, mean, norms.NormScale(weight, variance, self.epsilon))


def _names(shape: str) -> tuple[str, ...]:
    return tuple(name for extent in parse_shape(shape) for name in extent.names)


def reshaped(parent: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Return a node with another shape and the same order of elements.

    Raises:
        ValueError: The numbers of elements differ.
    """
    if math.prod(shape) != parent.spec.n_elements:
        raise ValueError(f"{list(parent.spec.shape)} cannot be reshaped to {list(shape)}")
    spec = TensorSpec(shape, parent.spec.dtype)
    keeps_rows = (spec.n_rows, spec.n_columns) == (parent.spec.n_rows, parent.spec.n_columns)
    return views.Reshape(parent, shape) if keeps_rows else views.Reflow(parent, shape)


def _size(text: str, model: Model) -> int:
    value = parse_extent(text).value(model.dims)
    if value is None:
        raise CannotAdapt("dims", f"the base does not define {text}")
    return value
