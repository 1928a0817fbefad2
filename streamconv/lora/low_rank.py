"""The nodes of merging: W + s B A, and DoRA's magnitudes, made row by row from W's rows and two small factors.

Owns: the arithmetic of a merged weight as lazy tensors. Does not own: which tensors an adapter changes (merge.py), the
product itself (codecs.add_product).
Invariants: a merged row is a function of W's row and the factors alone, never of the rows made with it, so chunks,
threads, resume and verify all see the same bits; factors are read when rows are made and forgotten with them.
Source of DoRA's formula: DoraLinearVariant and DoraEmbeddingVariant in PEFT 0.21.2, tuners/lora/variants.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from streamconv.ggml import encode as codecs
from streamconv.lazy.node import (
    F32,
    NUMPY_DTYPES,
    Bytes,
    LazyTensor,
    Piece,
    Reshape,
    RowBlocks,
    Source,
    TensorSpec,
    Transpose,
    Widen,
    Workspace,
    peak_nbytes,
    read,
)
from streamconv.lazy.scratch import padded_nbytes

SQUARES_PIECE = 1 << 15  # float64 squares at a time: they stay in a core's second-level cache

Floats = NDArray[np.float32]


def widened(tensor: LazyTensor) -> LazyTensor:
    """`tensor` as F32; itself where it is."""
    return tensor if tensor.spec.type == F32 else Widen(tensor)


def matrix_of(stack: LazyTensor, index: int, n_rows: int) -> LazyTensor:
    """Matrix `index` of those of `n_rows` rows that lie one after the other in `stack`."""
    block = RowBlocks(stack, stack.spec.n_rows, index * n_rows, n_rows)
    return Reshape(block, (n_rows, stack.spec.n_columns))


class Columns(Source):
    """A stored matrix [r, n] as its transpose [n, r], for an r that is small: n rows take r short reads."""

    def __init__(self, stored: Source) -> None:
        n_runs, n_columns = stored.spec.shape
        super().__init__(stored.name, stored.file, stored.offset, TensorSpec((n_columns, n_runs), stored.spec.type))

    def scratch_nbytes(self, n_rows: int) -> int:
        return padded_nbytes(n_rows * self.spec.row_nbytes)

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        kind = NUMPY_DTYPES[self.spec.type]
        with work.scratch.frame(), work.stopwatch.time("read"):
            runs = work.scratch.take((self.spec.n_columns, len(rows)), kind)
            for number, run in enumerate(runs):
                first = number * self.spec.n_rows + rows.start
                self.file.read_into(self.offset + first * kind.itemsize, run.view(np.uint8))
            out.view(kind).reshape(len(rows), -1)[:] = runs.T


def by_rows(factor: LazyTensor) -> LazyTensor:
    """A factor whose rows are read some at a time: of one that is stored transposed, without reading all of it."""
    stored = factor.parents[0] if isinstance(factor, Transpose) else None
    return Columns(stored) if isinstance(stored, Source) else factor


def transposed(factor: LazyTensor) -> LazyTensor:
    """The transpose of a factor, to be read some rows at a time."""
    if isinstance(factor, Transpose):
        return factor.parents[0]
    assert isinstance(factor, Source)
    return Columns(factor)


class InPlace(LazyTensor):
    """A node that changes its parent's F32 rows where they lie."""

    def __init__(self, parent: LazyTensor) -> None:
        parent = widened(parent)
        self.spec = parent.spec
        self.parents = (parent,)

    @property
    def in_place(self) -> bool:
        return True

    def needs(self, rows: range) -> Iterator[Piece]:
        yield Piece(self.parents[0], rows)

    def _values(self, data: Bytes) -> Floats:
        return data.view("<f4").reshape(-1, self.spec.n_columns)


class AddProduct(InPlace):
    """parent + scale * left @ right in F32: left [n, r] has a row for each of the parent's, right is [r, columns].

    `right` is read whole for every slab of rows: it is small, and next to a slab of W it costs little.
    """

    def __init__(self, parent: LazyTensor, left: LazyTensor, right: LazyTensor, scale: float) -> None:
        super().__init__(parent)
        if (left.spec.n_rows, left.spec.n_columns, right.spec.n_columns) != (
            *(self.spec.n_rows, right.spec.n_rows),
            self.spec.n_columns,
        ):
            raise ValueError(f"{left.spec.shape} times {right.spec.shape} is no {self.spec.shape}")
        self.left, self.right, self.scale = widened(left), widened(right), np.float32(scale)
        self.parents = (self.parents[0], self.left, self.right)

    def scratch_nbytes(self, n_rows: int) -> int:
        n_right = self.right.spec.n_rows
        factors = padded_nbytes(n_rows * self.left.spec.row_nbytes) + padded_nbytes(self.right.spec.nbytes)
        reading = max(peak_nbytes(self.left, n_rows), peak_nbytes(self.right, n_right))
        return factors + max(reading, codecs.product_scratch_nbytes(n_rows, self.spec.n_columns))

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        with work.scratch.frame():
            left = _read(self.left, rows, work)
            right = _read(self.right, range(self.right.spec.n_rows), work)
            with work.stopwatch.time("merge"):
                codecs.add_product(left, right, self.scale, self._values(out), work.scratch, work.kernel)


def _read(tensor: LazyTensor, rows: range, work: Workspace) -> Floats:
    slab = work.scratch.take(len(rows) * tensor.spec.row_nbytes).view(np.uint8)
    read(tensor, rows, slab, work)
    return slab.view("<f4").reshape(len(rows), tensor.spec.n_columns)


def _square(values: Floats, out: NDArray[np.generic]) -> NDArray[np.float64]:
    """The squares of `values`, exact, in the first rows of `out` (F64)."""
    part = out[: len(values)].view(np.float64)
    part[:] = values
    return np.multiply(part, part, out=part)


class RowMagnitudes(InPlace):
    """Each row of the parent scaled to its magnitude: DoRA of a linear layer, m * V / |V| with |V| a row's norm.

    Norms are summed in F64; the quotient is rounded to F32 once, and multiplied in F32, as PEFT does.
    """

    def __init__(self, parent: LazyTensor, magnitudes: LazyTensor) -> None:
        super().__init__(parent)
        if magnitudes.spec.shape != (self.spec.n_rows,):
            raise ValueError(f"{magnitudes.spec.shape} magnitudes for {self.spec.n_rows} rows")
        self.magnitudes = widened(magnitudes)
        self.parents = (self.parents[0], self.magnitudes)

    def _piece_rows(self, n_rows: int) -> int:
        return min(n_rows, max(1, SQUARES_PIECE // self.spec.n_columns))

    def scratch_nbytes(self, n_rows: int) -> int:
        vectors = padded_nbytes(4 * n_rows) + max(padded_nbytes(8 * n_rows), peak_nbytes(self.magnitudes, n_rows))
        return vectors + padded_nbytes(8 * self._piece_rows(n_rows) * self.spec.n_columns)

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        values = self._values(out)
        step = self._piece_rows(len(rows))
        with work.scratch.frame(), np.errstate(all="ignore"):
            factors = _read(self.magnitudes, rows, work)[:, 0]
            norms = work.scratch.take(len(rows), np.float64)
            squares = work.scratch.take((step, self.spec.n_columns), np.float64)
            with work.stopwatch.time("merge"):
                for start in range(0, len(rows), step):
                    part = values[start : start + step]
                    np.add.reduce(_square(part, squares), axis=1, out=norms[start : start + step])
                np.divide(factors, np.sqrt(norms, out=norms), out=norms)
                factors[:] = norms
                np.multiply(values, factors[:, None], out=values)


class ColumnMagnitudes(InPlace):
    """Each column of the parent scaled to its magnitude: DoRA of an embedding, as PEFT has it.

    A column's norm takes all rows: the first worker that makes rows reads the whole parent once for them, in pieces of
    fixed size, and keeps one factor a column. The memory for these is taken at once, so that what is resident before
    the run has it.
    """

    def __init__(self, parent: LazyTensor, magnitudes: LazyTensor) -> None:
        super().__init__(parent)
        if magnitudes.spec.shape != (self.spec.n_columns,):
            raise ValueError(f"{magnitudes.spec.shape} magnitudes for {self.spec.n_columns} columns")
        self.magnitudes = widened(magnitudes)
        self.parents = (self.parents[0], self.magnitudes)
        self._factors: Floats = np.full(self.spec.n_columns, np.nan, dtype=np.float32)
        self._has_factors = False
        self._lock = threading.Lock()
        self._step = max(1, SQUARES_PIECE // self.spec.n_columns)

    def scratch_nbytes(self, n_rows: int) -> int:
        n_columns, parent = self.spec.n_columns, self.parents[0]
        vectors = 2 * padded_nbytes(8 * n_columns) + padded_nbytes(4 * n_columns)
        slab = padded_nbytes(self._step * self.spec.row_nbytes) + padded_nbytes(8 * self._step * n_columns)
        reading = max(peak_nbytes(parent, self._step), peak_nbytes(self.magnitudes, n_columns))
        return vectors + slab + reading

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        with self._lock:
            if not self._has_factors:
                self._make_factors(work)
                self._has_factors = True
        values = self._values(out)
        with work.stopwatch.time("merge"), np.errstate(all="ignore"):
            np.multiply(values, self._factors, out=values)

    def _make_factors(self, work: Workspace) -> None:
        n_rows, n_columns = self.spec.n_rows, self.spec.n_columns
        with work.scratch.frame(), np.errstate(all="ignore"):
            norms, sums = (work.scratch.take(n_columns, np.float64) for _ in range(2))
            squares = work.scratch.take((self._step, n_columns), np.float64)
            norms[:] = 0
            for start in range(0, n_rows, self._step):
                rows = range(start, min(start + self._step, n_rows))
                with work.scratch.frame():
                    np.add.reduce(_square(_read(self.parents[0], rows, work), squares), axis=0, out=sums)
                np.add(norms, sums, out=norms)
            sums[:] = _read(self.magnitudes, range(n_columns), work)[:, 0]
            self._factors[:] = np.divide(sums, np.sqrt(norms, out=norms), out=sums)
