"""Nodes that move elements and compute nothing: reshape, transpose, permute, split, stack."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

from streamconv.lazy.leaves import Source, SourceColumns
from streamconv.lazy.node import Bytes, LazyTensor, Piece, Step, TensorSpec, Workspace

# A transpose reads its parent in pieces of about this size: large enough for the disk, small enough for the cache.
TRANSPOSE_PIECE_NBYTES = 1 << 18
# It reads at least TRANSPOSE_RUN_NBYTES of each row of its parent at a time, or half of the row, as long as the result
# stays within TRANSPOSE_SLAB_NBYTES, a chunk: shorter reads are slower than longer ones. Measured in benchmarks/LOG.md.
TRANSPOSE_RUN_NBYTES = 1 << 9
TRANSPOSE_SLAB_NBYTES = 1 << 22


class View(LazyTensor):
    """A node whose rows are its pieces, one after another: nothing is computed, and reads go straight to the result."""

    is_column_wise = True

    @property
    def in_place(self) -> bool:
        return True

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        pass

    def largest(self, n_rows: int) -> Iterable[Step]:
        for parent in self.parents:
            yield (Piece(parent, range(min(n_rows, parent.spec.n_rows))),)

    def lend(self, rows: range, work: Workspace) -> AbstractContextManager[Bytes | None]:
        steps = list(self.needs(rows))
        return steps[0][0].parent.lend(steps[0][0].rows, work) if len(steps) == 1 else nullcontext()

    def lendable(self, rows: range, work: Workspace) -> int:
        steps = list(self.needs(rows)) if work.window is not None else []
        return steps[0][0].parent.lendable(steps[0][0].rows, work) if len(steps) == 1 else 0

    def describe(self) -> str:
        return ""


class Reshape(View):
    """The same rows under another shape, as [H, 1, L] to [H, L]."""

    def __init__(self, parent: LazyTensor, shape: tuple[int, ...]) -> None:
        self.spec = TensorSpec(shape, parent.spec.dtype)
        if (self.spec.n_rows, self.spec.n_columns) != (parent.spec.n_rows, parent.spec.n_columns):
            raise ValueError(f"{parent.spec.shape} cannot be seen as rows of {shape}")
        self.parents = (parent,)

    def needs(self, rows: range) -> Iterator[Step]:
        yield (Piece(self.parents[0], rows),)


class Reflow(LazyTensor):
    """The same elements in the same order, with another number of columns; not a transpose."""

    def __init__(self, parent: LazyTensor, shape: tuple[int, ...]) -> None:
        self.spec = TensorSpec(shape, parent.spec.dtype)
        if self.spec.n_elements != parent.spec.n_elements:
            raise ValueError(f"{parent.spec.shape} does not have the elements of {shape}")
        self.parents = (parent,)

    def needs(self, rows: range) -> Iterator[Step]:
        first, last = rows.start * self.spec.row_nbytes, rows.stop * self.spec.row_nbytes
        width = self.parents[0].spec.row_nbytes
        yield (Piece(self.parents[0], range(first // width, -(-last // width))),)

    def largest(self, n_rows: int) -> Iterator[Step]:
        (parent,) = self.parents
        bound = -(-n_rows * self.spec.row_nbytes // parent.spec.row_nbytes) + 1
        yield (Piece(parent, range(min(bound, parent.spec.n_rows))),)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        (piece,) = step
        skipped = rows.start * self.spec.row_nbytes - piece.rows.start * piece.parent.spec.row_nbytes
        out[:] = slabs[0][skipped : skipped + out.nbytes]

    def columns(self, columns: range) -> LazyTensor | None:
        """These columns of a stored tensor, read from the file under the new shape; None for all other parents."""
        (parent,) = self.parents
        if not isinstance(parent, Source) or isinstance(parent, SourceColumns):
            return None
        return Source(parent.name, parent.file, parent.offset, self.spec).columns(columns)

    def describe(self) -> str:
        return ""


def transposed(tensor: LazyTensor) -> LazyTensor:
    """[..., R, C] as [..., C, R]; for a Transpose, its parent."""
    return tensor.parents[0] if isinstance(tensor, Transpose) else Transpose(tensor)


class Transpose(LazyTensor):
    """[..., R, C] as [..., C, R]: the transpose of a matrix, or of each matrix in a stack.

    The result's rows are columns of the parent. If at least half of its columns are requested, the parent is read in
    whole rows, so once or twice in total. Otherwise only the requested columns are read, if the parent supports that
    (`LazyTensor.columns`).
    """

    def __init__(self, parent: LazyTensor) -> None:
        *stack, n_rows, n_columns = parent.spec.shape
        self.spec = TensorSpec((*stack, n_columns, n_rows), parent.spec.dtype)
        self.parents = (parent,)
        self._n_rows, self._n_columns = n_rows, n_columns  # of each matrix of the parent
        self._has_columns = parent.columns(range(1)) is not None

    def needs(self, rows: range) -> Iterator[Step]:
        for matrix in range(rows.start // self._n_columns, -(-rows.stop // self._n_columns)):
            columns = self._columns_of(matrix, rows)
            parent = self._parent_of(columns)
            step = self._step_of(self._run_nbytes(len(columns)) if parent is not self.parents[0] else None)
            for start in range(0, self._n_rows, step):
                first = matrix * self._n_rows + start
                yield (Piece(parent, range(first, first + min(step, self._n_rows - start))),)

    def largest(self, n_rows: int) -> Iterator[Step]:
        widest = min(n_rows, (self._n_columns - 1) // 2)  # the most columns that are less than half
        if not self._has_columns or not widest or 2 * n_rows >= self._n_columns:
            yield (Piece(self.parents[0], range(min(self._step_of(None), self._n_rows))),)
        while self._has_columns and widest:  # the number of rows is the same for all run sizes up to a power of two
            run = self._run_nbytes(widest)
            yield (Piece(self._parent_of(range(widest)), range(min(self._step_of(run), self._n_rows))),)
            widest = run // 2 // self.spec.dtype.block_nbytes if run > TRANSPOSE_RUN_NBYTES else 0

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        (piece,) = step
        matrix, start = divmod(piece.rows.start, self._n_rows)
        columns = self._columns_of(matrix, rows)
        block = slabs[0].view(self.spec.dtype.view).reshape(len(piece.rows), -1)
        if block.shape[1] == self._n_columns:
            block = block[:, columns.start : columns.stop]
        first = matrix * self._n_columns + columns.start - rows.start
        result = out.view(self.spec.dtype.view).reshape(len(rows), self._n_rows)
        result[first : first + len(columns), start : start + len(piece.rows)] = block.T

    @property
    def least_rows(self) -> int:
        most = max(1, TRANSPOSE_SLAB_NBYTES // max(self.spec.row_nbytes, 1))
        half, run = -(-self._n_columns // 2), -(-TRANSPOSE_RUN_NBYTES // self.spec.dtype.block_nbytes)
        return min(half if half <= most or not self._has_columns else run, most)

    def _run_nbytes(self, n_columns: int) -> int:
        """The size of `n_columns` columns of a row, rounded up to TRANSPOSE_RUN_NBYTES times a power of two."""
        run = TRANSPOSE_RUN_NBYTES
        while run < self.spec.dtype.row_nbytes(n_columns):
            run *= 2
        return run

    def _step_of(self, run: int | None) -> int:
        """How many rows of the parent to read at a time, in runs of `run` bytes; None: whole rows."""
        (parent,) = self.parents
        nbytes = parent.spec.row_nbytes if run is None else min(parent.spec.row_nbytes, run)
        return max(1, parent.least_rows, TRANSPOSE_PIECE_NBYTES // nbytes)

    def _columns_of(self, matrix: int, rows: range) -> range:
        """The columns of one matrix of the parent that become some of `rows`."""
        base = matrix * self._n_columns
        return range(max(rows.start - base, 0), min(rows.stop - base, self._n_columns))

    def _parent_of(self, columns: range) -> LazyTensor:
        """The tensor to read these columns from: the parent itself if they are at least half of its columns."""
        (parent,) = self.parents
        return parent if 2 * len(columns) >= self._n_columns else parent.columns(columns) or parent

    def describe(self) -> str:
        return ""


class PairHalves(LazyTensor):
    """Rows of each head, [2, D/2], interleaved to [D/2, 2]: from Hugging Face's half-split RoPE to llama.cpp's pairs.

    Row j of half k of a head becomes the head's row 2j + k. `n_heads` is n_head for Q and n_head_kv for K.
    Source: LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py.
    """

    is_column_wise = True

    def __init__(self, parent: LazyTensor, n_heads: int) -> None:
        if n_heads < 1 or parent.spec.n_rows % (2 * n_heads):
            raise ValueError(f"{parent.spec.n_rows} rows are not {n_heads} heads of two halves")
        self.spec = parent.spec
        self.parents = (parent,)
        self._head = parent.spec.n_rows // n_heads

    def needs(self, rows: range) -> Iterator[Step]:
        parent, head = self.parents[0], self._head
        start = rows.start
        while start < rows.stop:
            base = start // head * head
            if start == base and base + head <= rows.stop:  # whole heads: one run
                stop = rows.stop // head * head
                yield (Piece(parent, range(start, stop)),)
            else:  # part of a head: a run of each half
                stop = min(base + head, rows.stop)
                for half in (0, 1):
                    first, last = (start - base + 1 - half) // 2, (stop - base + 1 - half) // 2
                    if first < last:
                        offset = base + half * (head // 2)
                        yield (Piece(parent, range(offset + first, offset + last)),)
            start = stop

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        (piece,), (slab,) = step, slabs
        width, head = self.spec.row_nbytes, self._head
        result = out.reshape(len(rows), width)
        base = piece.rows.start // head * head
        within = piece.rows.start - base
        if within == 0 and len(piece.rows) % head == 0:
            heads = slab.reshape(-1, 2, head // 2, width).swapaxes(1, 2)
            result[base - rows.start : base - rows.start + len(piece.rows)].reshape(-1, head // 2, 2, width)[:] = heads
        else:
            half, row = divmod(within, head // 2)
            first = base + 2 * row + half - rows.start
            result[first : first + 2 * len(piece.rows) : 2] = slab.reshape(len(piece.rows), width)

    def describe(self) -> str:
        return f"heads of {self._head}"


class Concatenate(View):
    """Tensors of the same dtype and number of columns, one after another: Q, K and V to a fused QKV [Q+K+V, H]."""

    def __init__(self, parents: Sequence[LazyTensor]) -> None:
        kinds = {(parent.spec.dtype, parent.spec.shape[1:]) for parent in parents}
        if len(kinds) != 1:
            raise ValueError(f"cannot concatenate tensors of {len(kinds)} different shapes or dtypes")
        ((dtype, rest),) = kinds
        self.spec = TensorSpec((sum(parent.spec.shape[0] for parent in parents), *rest), dtype)
        self._place(parents)

    def _place(self, parents: Sequence[LazyTensor]) -> None:
        self.parents = tuple(parents)
        self._starts = [0, *accumulate(parent.spec.n_rows for parent in parents)]

    def needs(self, rows: range) -> Iterator[Step]:
        index, at = bisect_right(self._starts, rows.start) - 1, rows.start
        while at < rows.stop:
            start, end = self._starts[index], self._starts[index + 1]
            last = min(end, rows.stop)
            if at < last:
                yield (Piece(self.parents[index], range(at - start, last - start)),)
            at, index = last, index + 1


class Stack(Concatenate):
    """Tensors of one shape and dtype, stacked in a new first dimension: experts [M, H] to [E, M, H], [M] to [E, M]."""

    def __init__(self, parents: Sequence[LazyTensor]) -> None:
        specs = {parent.spec for parent in parents}
        if len(specs) != 1:
            raise ValueError(f"cannot stack tensors of {len(specs)} different shapes or dtypes")
        (one,) = specs
        self.spec = TensorSpec((len(parents), *one.shape), one.dtype)
        self._place(parents if len(one.shape) > 1 else [Reflow(parent, (1, *one.shape)) for parent in parents])


class RowBlocks(View):
    """Rows `start` to `start + size` of every `period` rows: the gate half of a fused [E, 2M, H], as [E, M, H]."""

    def __init__(self, parent: LazyTensor, period: int, start: int, size: int) -> None:
        n_blocks, rest = divmod(parent.spec.n_rows, period)
        if rest or not 0 <= start < start + size <= period:
            raise ValueError(f"{parent.spec.n_rows} rows have no blocks {start}:{start + size} of {period}")
        self.spec = TensorSpec((n_blocks, size, parent.spec.n_columns), parent.spec.dtype)
        self.parents = (parent,)
        self._period, self._start, self._size = period, start, size

    def needs(self, rows: range) -> Iterator[Step]:
        for block in range(rows.start // self._size, -(-rows.stop // self._size)):
            base = block * self._size
            first, last = max(rows.start - base, 0), min(rows.stop - base, self._size)
            offset = block * self._period + self._start
            yield (Piece(self.parents[0], range(offset + first, offset + last)),)

    def describe(self) -> str:
        return f"{self._start}:{self._start + self._size} of {self._period}"


def matrix_of(stack: LazyTensor, index: int, n_rows: int) -> LazyTensor:
    """Matrix `index` of `stack`, whose matrices have `n_rows` rows each."""
    block = RowBlocks(stack, stack.spec.n_rows, index * n_rows, n_rows)
    return Reshape(block, (n_rows, stack.spec.n_columns))
