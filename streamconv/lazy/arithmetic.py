"""Nodes that compute, all in F32: widening, scaling, low-rank sums, and DoRA's magnitudes.

Every operation is a single IEEE F32 operation, or is done in float64 and rounded once. A row therefore has the same
bits on every machine, whether it is computed by itself or with others.
Source of DoRA's formula: DoraLinearVariant and DoraEmbeddingVariant in PEFT 0.21.2, tuners/lora/variants.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from streamconv.ggml import encode as codecs
from streamconv.ggml.encode import REFERENCE, Kernel
from streamconv.lazy.dtype import F32, F64, FLOATS
from streamconv.lazy.indexing import CutColumns, slice_columns
from streamconv.lazy.node import Bytes, LazyTensor, Piece, Step, TensorSpec, Workspace
from streamconv.lazy.scratch import padded_nbytes

FLOAT64_PIECE = 1 << 15  # float64 numbers at a time (256 KiB): they stay in a core's L2 cache

Floats = NDArray[np.float32]


def widened(tensor: LazyTensor) -> LazyTensor:
    """`tensor` as F32; `tensor` itself if it is F32 already."""
    return tensor if tensor.spec.dtype == F32 else Widen(tensor)


def _floats(data: Bytes, n_columns: int) -> Floats:
    return data.view("<f4").reshape(-1, n_columns)


class Widen(LazyTensor):
    """The same numbers as F32. This is exact: F32 holds every F16 and BF16 value."""

    is_column_wise = True

    def __init__(self, parent: LazyTensor) -> None:
        if parent.spec.dtype not in FLOATS:
            raise ValueError(f"{parent.spec.dtype} cannot be widened")
        self.spec = TensorSpec(parent.spec.shape, F32)
        self.parents = (parent,)

    @property
    def in_place(self) -> bool:
        return self.parents[0].spec.dtype == F32

    def borrows(self, work: Workspace) -> bool:
        return work.kernel.borrows and not self.in_place

    def needs(self, rows: range) -> Iterator[Step]:
        yield (Piece(self.parents[0], rows),)

    def scratch_nbytes(self, n_rows: int, kernel: Kernel = REFERENCE) -> int:
        if self.in_place:
            return 0
        return codecs.encode_scratch_nbytes(self.parents[0].spec.dtype, F32, n_rows, self.spec.n_columns, kernel)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        if not self.in_place:
            source, n_columns = self.parents[0].spec.dtype, self.spec.n_columns
            codecs.encode(source, F32, slabs[0], out, work.scratch, n_columns, work.kernel)

    def describe(self) -> str:
        return ""


class InPlace(LazyTensor):
    """Base class of nodes that change their first parent's rows, as F32, in place."""

    def __init__(self, parent: LazyTensor) -> None:
        parent = widened(parent)
        self.spec = parent.spec
        self.parents = (parent,)

    @property
    def in_place(self) -> bool:
        return True

    def needs(self, rows: range) -> Iterator[Step]:
        yield (Piece(self.parents[0], rows),)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        with np.errstate(all="ignore"):
            values, *others = (
                _floats(data, piece.parent.spec.n_columns) for data, piece in zip((out, *slabs[1:]), step, strict=True)
            )
            self.change(values, others, work)

    @abstractmethod
    def change(self, values: Floats, others: Sequence[Floats], work: Workspace) -> None:
        """Change rows in place.

        Args:
            values: Rows of the first parent, F32 [rows, columns].
            others: The step's pieces of the other parents, in their order.
            work: The worker's scratch and kernel.
        """


class Scale(InPlace):
    """Every element times `factor`."""

    is_column_wise = True

    def __init__(self, parent: LazyTensor, factor: float) -> None:
        super().__init__(parent)
        self.factor = np.float32(factor)

    def change(self, values: Floats, others: Sequence[Floats], work: Workspace) -> None:
        np.multiply(values, self.factor, out=values)

    def describe(self) -> str:
        return f"times {float(self.factor)!r}"


class PlusConstant(InPlace):
    """Every element plus a constant, such as norms that are stored as their difference from 1."""

    is_column_wise = True

    def __init__(self, parent: LazyTensor, constant: float) -> None:
        super().__init__(parent)
        self.constant = np.float32(constant)

    def change(self, values: Floats, others: Sequence[Floats], work: Workspace) -> None:
        np.add(values, self.constant, out=values)

    def describe(self) -> str:
        return f"plus {float(self.constant)!r}"


class NegExp(InPlace):
    """-exp(x) of every element, rounded once from float64: a state-space model's A, which is stored as A_log."""

    is_column_wise = True

    def scratch_nbytes(self, n_rows: int, kernel: Kernel = REFERENCE) -> int:
        return padded_nbytes(8 * min(FLOAT64_PIECE, n_rows * self.spec.n_columns))

    def change(self, values: Floats, others: Sequence[Floats], work: Workspace) -> None:
        flat = values.reshape(-1)
        with work.scratch.frame():
            wide = work.scratch.take(min(FLOAT64_PIECE, flat.size), np.float64).view(np.float64)
            for start in range(0, flat.size, FLOAT64_PIECE):
                part = flat[start : start + FLOAT64_PIECE]
                exact = wide[: part.size]
                exact[:] = part
                np.negative(np.exp(exact, out=exact), out=exact)
                part[:] = exact

    def describe(self) -> str:
        return ""


class AddProduct(InPlace):
    """parent + scale * left @ right, where left is [rows of the parent, r] and right is [r, columns].

    `right` is read whole for every slab of rows. A slab has at least r rows, so in total no more elements of `right`
    are read than the parent has.
    """

    def __init__(self, parent: LazyTensor, left: LazyTensor, right: LazyTensor, scale: float) -> None:
        super().__init__(parent)
        if (left.spec.n_rows, left.spec.n_columns, right.spec.n_columns) != (
            *(self.spec.n_rows, right.spec.n_rows),
            self.spec.n_columns,
        ):
            raise ValueError(f"{left.spec.shape} times {right.spec.shape} is not {self.spec.shape}")
        self.scale = np.float32(scale)
        self.parents = (self.parents[0], widened(left), widened(right))

    def needs(self, rows: range) -> Iterator[Step]:
        parent, left, right = self.parents
        yield (Piece(parent, rows), Piece(left, rows), Piece(right, range(right.spec.n_rows)))

    def largest(self, n_rows: int) -> Iterator[Step]:
        return self.needs(range(min(n_rows, self.spec.n_rows)))

    @property
    def least_rows(self) -> int:
        return max(self.parents[0].least_rows, self.parents[2].spec.n_rows)

    def columns(self, columns: range) -> LazyTensor | None:
        """The same numbers: an element's products are summed in a fixed order, which other columns do not change."""
        parent, left, right = self.parents
        some = parent.columns(columns)
        return None if some is None else AddProduct(some, left, slice_columns(right, columns), float(self.scale))

    def scratch_nbytes(self, n_rows: int, kernel: Kernel = REFERENCE) -> int:
        return codecs.product_scratch_nbytes(n_rows, self.spec.n_columns, kernel)

    def change(self, values: Floats, others: Sequence[Floats], work: Workspace) -> None:
        left, right = others
        with work.stopwatch.time("merge"):
            codecs.add_product(left, right, self.scale, values, work.scratch, work.kernel)

    def describe(self) -> str:
        return f"times {float(self.scale)!r}"


def _square(values: Floats, out: NDArray[np.generic]) -> NDArray[np.float64]:
    """The exact squares of `values`, in the first rows of `out` (F64)."""
    part = out[: len(values)].view(np.float64)
    part[:] = values
    return np.multiply(part, part, out=part)


class RowMagnitudes(InPlace):
    """Each row of the parent scaled to its magnitude: DoRA of a linear layer, m * V / |V|, where |V| is a row's norm.

    Norms are summed in F64; the quotient is rounded once to F32, and the product is F32, as in PEFT.

    Args:
        parent: V, [rows, columns].
        magnitudes: m, [rows].
    """

    def __init__(self, parent: LazyTensor, magnitudes: LazyTensor) -> None:
        super().__init__(parent)
        if magnitudes.spec.shape != (self.spec.n_rows,):
            raise ValueError(f"{magnitudes.spec.shape} magnitudes for {self.spec.n_rows} rows")
        self.parents = (self.parents[0], widened(magnitudes))
        self._factors: Once | None = None  # shared by all tensors from `columns`

    def needs(self, rows: range) -> Iterator[Step]:
        yield tuple(Piece(parent, rows) for parent in self.parents)

    def columns(self, columns: range) -> LazyTensor | None:
        """These columns only; the factors are still computed once, from whole rows."""
        parent, magnitudes = self.parents
        some = parent.columns(columns)
        if some is None:
            return None
        if self._factors is None:
            self._factors = Once(RowFactors(parent, magnitudes))
        return TimesRowFactors(some, self._factors)

    def scratch_nbytes(self, n_rows: int, kernel: Kernel = REFERENCE) -> int:
        return _row_norms_nbytes(n_rows, self.spec.n_columns)

    def change(self, values: Floats, others: Sequence[Floats], work: Workspace) -> None:
        factors = others[0][:, 0]
        with work.stopwatch.time("merge"):
            _divide_by_norms(factors, values, work)
            np.multiply(values, factors[:, None], out=values)

    def describe(self) -> str:
        return ""


def _squared_rows(n_rows: int, n_columns: int) -> int:
    """How many of `n_rows` rows are squared at a time, within FLOAT64_PIECE numbers."""
    return min(n_rows, max(1, FLOAT64_PIECE // n_columns))


def _row_norms_nbytes(n_rows: int, n_columns: int) -> int:
    """Bytes of scratch that `_divide_by_norms` needs."""
    return padded_nbytes(8 * n_rows) + padded_nbytes(8 * _squared_rows(n_rows, n_columns) * n_columns)


def _divide_by_norms(magnitudes: Floats, values: Floats, work: Workspace) -> None:
    """Divide each of `magnitudes` [rows] by the norm of its row of `values`, in place, rounded once from F64."""
    step = _squared_rows(*values.shape)
    with work.scratch.frame():
        norms = work.scratch.take(len(values), np.float64).view(np.float64)
        squares = work.scratch.take((step, values.shape[1]), np.float64)
        for start in range(0, len(values), step):
            part = values[start : start + step]
            np.add.reduce(_square(part, squares), axis=1, out=norms[start : start + step])
        np.divide(magnitudes, np.sqrt(norms, out=norms), out=norms)
        magnitudes[:] = norms


class RowFactors(LazyTensor):
    """Each row's magnitude divided by its norm, F32 [rows]: the factors of `RowMagnitudes`.

    Args:
        parent: F32 [rows, columns].
        magnitudes: F32 [rows].
    """

    def __init__(self, parent: LazyTensor, magnitudes: LazyTensor) -> None:
        self.spec = magnitudes.spec
        self.parents = (parent, magnitudes)
        self._step = max(parent.least_rows, _squared_rows(self.spec.n_rows, parent.spec.n_columns))

    def needs(self, rows: range) -> Iterator[Step]:
        for start in range(rows.start, rows.stop, self._step):
            some = range(start, min(start + self._step, rows.stop))
            yield tuple(Piece(parent, some) for parent in self.parents)

    def largest(self, n_rows: int) -> Iterator[Step]:
        yield tuple(Piece(parent, range(min(n_rows, self._step, self.spec.n_rows))) for parent in self.parents)

    def scratch_nbytes(self, n_rows: int, kernel: Kernel = REFERENCE) -> int:
        return _row_norms_nbytes(min(n_rows, self._step), self.parents[0].spec.n_columns)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        some, factors = step[0].rows, slabs[1].view("<f4")
        with work.stopwatch.time("merge"), np.errstate(all="ignore"):
            _divide_by_norms(factors, _floats(slabs[0], self.parents[0].spec.n_columns), work)
        out.view("<f4")[some.start - rows.start : some.stop - rows.start] = factors

    def describe(self) -> str:
        return ""


class TimesRowFactors(InPlace):
    """Each row of the parent times its factor.

    Args:
        parent: [rows, columns].
        factors: F32 [rows].
    """

    def __init__(self, parent: LazyTensor, factors: LazyTensor) -> None:
        super().__init__(parent)
        self.parents = (self.parents[0], factors)

    def needs(self, rows: range) -> Iterator[Step]:
        yield tuple(Piece(parent, rows) for parent in self.parents)

    def change(self, values: Floats, others: Sequence[Floats], work: Workspace) -> None:
        np.multiply(values, others[0], out=values)

    def describe(self) -> str:
        return ""


class ColumnSquares(LazyTensor):
    """The sum of each column's squares: [n, columns] to F64 [1, columns].

    Rows are summed in blocks of a fixed size, so the result does not depend on slabs. Several blocks are read together
    if reading fewer rows at a time would be inefficient (`least_rows`).
    """

    def __init__(self, parent: LazyTensor) -> None:
        self.spec = TensorSpec((1, parent.spec.n_columns), F64)
        self.parents = (widened(parent),)
        self._block = max(1, FLOAT64_PIECE // parent.spec.n_columns)
        self._step = self._block * -(-parent.least_rows // self._block)

    def needs(self, rows: range) -> Iterator[Step]:
        (parent,) = self.parents
        for start in range(0, parent.spec.n_rows, self._step):
            yield (Piece(parent, range(start, min(start + self._step, parent.spec.n_rows))),)

    def largest(self, n_rows: int) -> Iterator[Step]:
        yield (Piece(self.parents[0], range(min(self._step, self.parents[0].spec.n_rows))),)

    def scratch_nbytes(self, n_rows: int, kernel: Kernel = REFERENCE) -> int:
        n_columns = self.spec.n_columns
        return padded_nbytes(8 * n_columns) + padded_nbytes(8 * self._block * n_columns)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        n_columns, total = self.spec.n_columns, out.view("<f8")
        if step[0].rows.start == 0:
            total[:] = 0
        with work.scratch.frame(), work.stopwatch.time("merge"), np.errstate(all="ignore"):
            sums = work.scratch.take(n_columns, np.float64).view(np.float64)
            squares = work.scratch.take((self._block, n_columns), np.float64)
            values = _floats(slabs[0], n_columns)
            for start in range(0, len(values), self._block):
                np.add.reduce(_square(values[start : start + self._block], squares), axis=0, out=sums)
                np.add(total, sums, out=total)

    def describe(self) -> str:
        return f"{self._block} rows at a time"


class ColumnFactors(LazyTensor):
    """Each column's magnitude divided by its norm, F32 [1, columns], computed in F64 and rounded once.

    Args:
        squares: The sums of squares, F64 [1, columns].
        magnitudes: [columns].
    """

    def __init__(self, squares: LazyTensor, magnitudes: LazyTensor) -> None:
        self.spec = TensorSpec(squares.spec.shape, F32)
        self.parents = (squares, widened(magnitudes))

    def needs(self, rows: range) -> Iterator[Step]:
        yield tuple(Piece(parent, range(parent.spec.n_rows)) for parent in self.parents)

    def largest(self, n_rows: int) -> Iterable[Step]:
        return self.needs(range(1))

    def scratch_nbytes(self, n_rows: int, kernel: Kernel = REFERENCE) -> int:
        return padded_nbytes(8 * self.spec.n_columns)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        norms = slabs[0].view("<f8")
        with work.scratch.frame(), np.errstate(all="ignore"):
            quotients = work.scratch.take(norms.size, np.float64).view(np.float64)
            quotients[:] = slabs[1].view("<f4")
            np.divide(quotients, np.sqrt(norms, out=norms), out=quotients)
            out.view("<f4")[:] = quotients

    def describe(self) -> str:
        return ""


class Once(LazyTensor):
    """A small tensor that is slow to compute: computed on first use, then kept.

    Workers that start at the same time each compute it; they write the same bytes. Its memory is allocated together
    with the node.
    """

    def __init__(self, parent: LazyTensor) -> None:
        self.spec = parent.spec
        self.parents = (parent,)
        self._bytes: Bytes = np.full(parent.spec.nbytes, 0xFF, dtype=np.uint8)
        self._is_made = False

    def needs(self, rows: range) -> Iterator[Step]:
        yield () if self._is_made else self._all()

    def largest(self, n_rows: int) -> Iterator[Step]:
        yield self._all()

    def _all(self) -> Step:
        return (Piece(self.parents[0], range(self.spec.n_rows)),)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        if slabs:
            self._bytes[:] = slabs[0]
            self._is_made = True
        width = self.spec.row_nbytes
        out[:] = self._bytes[rows.start * width : rows.stop * width]

    def describe(self) -> str:
        return ""


class ColumnMagnitudes(InPlace):
    """Each column of the parent scaled to its magnitude: DoRA of an embedding, as in PEFT.

    A column's norm depends on all rows, so the parent is read twice: first for the norms, then for its rows.

    Args:
        parent: [rows, columns].
        magnitudes: [columns].
    """

    def __init__(self, parent: LazyTensor, magnitudes: LazyTensor) -> None:
        super().__init__(parent)
        if magnitudes.spec.shape != (self.spec.n_columns,):
            raise ValueError(f"{magnitudes.spec.shape} magnitudes for {self.spec.n_columns} columns")
        parent = self.parents[0]
        self.parents = (parent, Once(ColumnFactors(ColumnSquares(parent), magnitudes)))

    def needs(self, rows: range) -> Iterator[Step]:
        parent, factors = self.parents
        yield (Piece(parent, rows), Piece(factors, range(1)))

    def largest(self, n_rows: int) -> Iterator[Step]:
        return self.needs(range(min(n_rows, self.spec.n_rows)))

    def columns(self, columns: range) -> LazyTensor | None:
        """These columns only; the factors are still computed once, for all columns."""
        parent, factors = self.parents
        some = parent.columns(columns)
        return None if some is None else self._over([some, CutColumns(factors, columns)])

    def change(self, values: Floats, others: Sequence[Floats], work: Workspace) -> None:
        with work.stopwatch.time("merge"):
            np.multiply(values, others[0], out=values)

    def describe(self) -> str:
        return ""
