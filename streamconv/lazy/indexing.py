"""Nodes that select rows and columns by number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from streamconv.lazy.node import Bytes, LazyTensor, Piece, Step, TensorSpec, Workspace
from streamconv.lazy.views import Transpose

# Runs of columns shorter than this are cut from whole rows, unless they are a small part of them.
COLUMN_RUN_NBYTES = 1 << 12
# Rows narrower than NARROW_ROW_NBYTES are read together if all rows of their matrix have at most NARROW_BLOCK_NBYTES.
NARROW_ROW_NBYTES = 1 << 8
NARROW_BLOCK_NBYTES = 1 << 20


def _digest(index: NDArray[np.int64]) -> str:
    return hashlib.sha256(index.astype("<i8").tobytes()).hexdigest()


class IndexRows(LazyTensor):
    """Rows in the order of an index: of a matrix, of each matrix in a stack, or the elements of a vector.

    Args:
        parent: [..., R, C], or [R].
        index: For each row of the result, its row number in the parent's matrix. Rows may be left out or repeated.
    """

    is_column_wise = True

    def __init__(self, parent: LazyTensor, index: NDArray[np.int64] | Sequence[int]) -> None:
        shape = parent.spec.shape
        self._index = np.asarray(index, dtype=np.int64)
        self._n_rows = shape[-2] if len(shape) > 1 else shape[0]
        if (
            self._index.ndim != 1
            or self._index.size == 0
            or not 0 <= self._index.min() <= self._index.max() < self._n_rows
        ):
            raise ValueError(f"the index does not name rows of {shape}")
        rest = (len(self._index), shape[-1]) if len(shape) > 1 else (len(self._index),)
        self.spec = TensorSpec((*shape[:-2], *rest), parent.spec.dtype)
        self.parents = (parent,)

    @property
    def _is_narrow(self) -> bool:
        width = self.spec.row_nbytes
        return width < NARROW_ROW_NBYTES and width * self._n_rows <= NARROW_BLOCK_NBYTES

    def needs(self, rows: range) -> Iterator[Step]:
        (parent,), size = self.parents, len(self._index)
        for block in range(rows.start // size, -(-rows.stop // size)):
            base = block * self._n_rows
            if self._is_narrow:
                yield (Piece(parent, range(base, base + self._n_rows)),)
                continue
            for first, last in self._runs(self._part(block, rows)):
                yield (Piece(parent, range(base + first, base + last)),)

    def largest(self, n_rows: int) -> Iterator[Step]:
        longest = self._n_rows if self._is_narrow else min(n_rows, self._n_rows)
        yield (Piece(self.parents[0], range(longest)),)

    @property
    def in_place(self) -> bool:
        return not self._is_narrow

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        if not self._is_narrow:
            return
        block, width = step[0].rows.start // self._n_rows, self.spec.row_nbytes
        part = self._part(block, rows)
        first = max(block * len(self._index) - rows.start, 0) * width
        result = out[first : first + len(part) * width].reshape(len(part), width)
        np.take(slabs[0].reshape(self._n_rows, width), part, axis=0, out=result, mode="clip")

    def _part(self, block: int, rows: range) -> NDArray[np.int64]:
        """The part of the index for those of `rows` that belong to matrix `block`."""
        base = block * len(self._index)
        return self._index[max(rows.start - base, 0) : rows.stop - base]

    @staticmethod
    def _runs(index: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """(first, end) of each run of consecutive rows."""
        first = last = int(index[0])
        for row in index[1:]:
            if row == last + 1:
                last += 1
                continue
            yield first, last + 1
            first = last = int(row)
        yield first, last + 1

    def describe(self) -> str:
        return f"rows {_digest(self._index)}"


def rows_in_order(parent: LazyTensor, index: NDArray[np.int64]) -> LazyTensor:
    """The rows of `parent` in the order of an index.

    Single rows of a transpose are slow to read, so columns are selected before transposing instead.
    """
    if isinstance(parent, Transpose):
        return Transpose(IndexColumns(parent.parents[0], index))
    return IndexRows(parent, index)


class IndexColumns(LazyTensor):
    """Columns in the order of an index.

    Args:
        parent: [..., R, C].
        index: For each column of the result, its column number in the parent.
    """

    def __init__(self, parent: LazyTensor, index: NDArray[np.int64] | Sequence[int]) -> None:
        shape = parent.spec.shape
        self._index = np.asarray(index, dtype=np.intp)
        is_inside = self._index.size and 0 <= self._index.min() <= self._index.max() < parent.spec.n_columns
        if len(shape) < 2 or parent.spec.dtype.block != 1 or self._index.ndim != 1 or not is_inside:
            raise ValueError(f"the index does not name columns of {shape}")
        self.spec = TensorSpec((*shape[:-1], len(self._index)), parent.spec.dtype)
        self.parents = (parent,)

    def needs(self, rows: range) -> Iterator[Step]:
        yield (Piece(self.parents[0], rows),)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        view = self.spec.dtype.view
        slab, result = (data.view(view).reshape(len(rows), -1) for data in (slabs[0], out))
        np.take(slab, self._index, axis=1, out=result, mode="clip")

    def columns(self, columns: range) -> LazyTensor | None:
        """These columns, from the range of the parent's columns that spans them; None unless the index is regular.

        Regular means every n-th column, in increasing order.
        """
        strides = np.diff(self._index)
        if (strides < 1).any() or (strides != strides[:1]).any():
            return None
        index = self._index[columns.start : columns.stop]
        first = int(index[0])
        parent = self.parents[0].columns(range(first, int(index[-1]) + 1))
        return None if parent is None else IndexColumns(parent, index - first)

    def describe(self) -> str:
        return f"columns {_digest(self._index)}"


class CutColumns(LazyTensor):
    """Consecutive columns, cut from whole rows."""

    is_column_wise = False

    def __init__(self, parent: LazyTensor, columns: range) -> None:
        spec = parent.spec
        if len(spec.shape) < 2 or not 0 <= columns.start < columns.stop <= spec.n_columns or columns.step != 1:
            raise ValueError(f"{spec.shape} has no columns {columns.start}:{columns.stop}")
        self.spec = TensorSpec((*spec.shape[:-1], len(columns)), spec.dtype)
        self.parents = (parent,)
        self._first = spec.dtype.row_nbytes(columns.start)

    def needs(self, rows: range) -> Iterator[Step]:
        yield (Piece(self.parents[0], rows),)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        width = self.spec.row_nbytes
        out.reshape(len(rows), width)[:] = slabs[0].reshape(len(rows), -1)[:, self._first : self._first + width]

    def describe(self) -> str:
        return f"from byte {self._first}"


def slice_columns(parent: LazyTensor, columns: range) -> LazyTensor:
    """Consecutive columns of a tensor: only these are read if that saves enough, or they are cut from whole rows."""
    cut = CutColumns(parent, columns)
    is_long = cut.spec.row_nbytes >= COLUMN_RUN_NBYTES or 8 * cut.spec.row_nbytes <= parent.spec.row_nbytes
    return (parent.columns(columns) if is_long else None) or cut
