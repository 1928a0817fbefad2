"""Lazy tensors: a tensor is a rule for making its rows, and nothing can ask for more rows than fit.

Owns: the nodes that move and change rows, `read` (the only way to get data) and `peak_nbytes` (what that costs).
Does not own: where bytes come from (checkpoint/ gives `Source` a file) and how a number is encoded (ggml/).
Invariants: a node's rows depend on named rows of its parents alone; what a node keeps, it has from its making, and so
before memory is proved; every temporary comes from the worker's Scratch, so what `peak_nbytes` declares cannot be
exceeded.

A tensor of any rank is seen as rows of its last dimension: [4, 3, 64] has 12 rows of 64 elements. A vector has rows of
one element each, so that operations on rows apply to biases as well.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.ggml import encode as codecs
from streamconv.gguf.format import row_nbytes
from streamconv.lazy.scratch import Scratch, padded_nbytes
from streamconv.timing import Stopwatch

F32 = GGMLQuantizationType.F32
NUMPY_DTYPES: dict[GGMLQuantizationType, np.dtype[Any]] = {
    F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype("<u2"),
}

# A transpose reads its parent in pieces of about this size: large enough for the disk, small enough for the cache.
TRANSPOSE_PIECE_NBYTES = 1 << 18

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Row-major shape and element type of a tensor."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def n_columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def row_nbytes(self) -> int:
        return row_nbytes(self.n_columns, self.type)

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_nbytes

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(slots=True)
class Workspace:
    """What one worker has: scratch memory, a kernel, a tally of what it saw, and a stopwatch."""

    scratch: Scratch
    kernel: codecs.Kernel = field(default_factory=codecs.best_kernel)
    tally: dict[str, codecs.Stats] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    counting: bool = True  # off while a row is made a second time, for the next chunk
    files: set[Readable] = field(default_factory=set)  # that were read


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one parent that a node needs at one time."""

    parent: LazyTensor
    rows: range


class LazyTensor(ABC):
    """A tensor that is made row by row, when asked, and never whole."""

    spec: TensorSpec
    parents: tuple[LazyTensor, ...] = ()

    @abstractmethod
    def needs(self, rows: range) -> Iterator[Piece]:
        """The pieces of the parents that make `rows`, in order; arithmetic only."""

    @abstractmethod
    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        """Put into `out` (the bytes of `rows`) what `slab` (the bytes of `piece`) contributes.

        A node without parents is called once, with piece None. One that is `in_place` gets slab = out.
        """

    def largest_piece(self, parent: LazyTensor, n_rows: int) -> int:
        """An upper bound of the rows of `parent` in one piece, when `n_rows` rows are made."""
        return min(n_rows, parent.spec.n_rows)

    def scratch_nbytes(self, n_rows: int) -> int:
        """Temporaries of `apply` for `n_rows` rows, as Scratch counts them."""
        return 0

    @property
    def in_place(self) -> bool:
        """Whether the pieces, one after the other, are the result or become it where they lie."""
        return False

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a LazyTensor has no array: read() gives its rows")


def read(tensor: LazyTensor, rows: range, out: Bytes, work: Workspace) -> None:
    """Fill `out` (uint8, exactly the bytes of `rows`) with rows of `tensor`."""
    if not tensor.parents:
        tensor.apply(rows, None, out, out, work)
        return
    filled = 0
    for piece in tensor.needs(rows):
        if tensor.in_place:
            part = out[filled : filled + len(piece.rows) * piece.parent.spec.row_nbytes]
            read(piece.parent, piece.rows, part, work)
            tensor.apply(rows, piece, part, part, work)
            filled += part.nbytes
            continue
        with work.scratch.frame():
            slab = work.scratch.take(len(piece.rows) * piece.parent.spec.row_nbytes).view(np.uint8)
            read(piece.parent, piece.rows, slab, work)
            tensor.apply(rows, piece, slab, out, work)


def peak_nbytes(tensor: LazyTensor, n_rows: int) -> int:
    """The scratch that `read` takes for at most `n_rows` rows; derived from what the nodes declare."""
    deepest = 0
    for parent in tensor.parents:
        n_parent_rows = tensor.largest_piece(parent, n_rows)
        slab = 0 if tensor.in_place else padded_nbytes(n_parent_rows * parent.spec.row_nbytes)
        deepest = max(deepest, slab + max(peak_nbytes(parent, n_parent_rows), tensor.scratch_nbytes(n_rows)))
    return deepest if tensor.parents else tensor.scratch_nbytes(n_rows)


def sources(tensor: LazyTensor) -> Iterator[Source]:
    """The stored tensors that `tensor` is made of, in order."""
    if isinstance(tensor, Source):
        yield tensor
    for parent in tensor.parents:
        yield from sources(parent)


class Readable(Protocol):
    """A file that fills a buffer from an offset, and can say whether it is still the one that was opened.

    Both raise SourceError.
    """

    def read_into(self, offset: int, out: Bytes) -> None: ...
    def check_unchanged(self) -> None: ...


class Source(LazyTensor):
    """A tensor as it is stored: rows are byte ranges of a file."""

    def __init__(self, name: str, file: Readable, offset: int, spec: TensorSpec) -> None:
        self.name, self.file, self.offset, self.spec = name, file, offset, spec

    def needs(self, rows: range) -> Iterator[Piece]:
        return iter(())

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        work.files.add(self.file)
        with work.stopwatch.time("read"):
            self.file.read_into(self.offset + rows.start * self.spec.row_nbytes, out)


class Resident(LazyTensor):
    """A small tensor that lies in memory: a table, a vector of zeros."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self.spec = TensorSpec(array.shape, F32)
        self._bytes = np.ascontiguousarray(array, dtype="<f4").reshape(-1).view(np.uint8)

    def needs(self, rows: range) -> Iterator[Piece]:
        return iter(())

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        width = self.spec.row_nbytes
        out[:] = self._bytes[rows.start * width : rows.stop * width]


class View(LazyTensor):
    """A node whose rows are its pieces, one after the other: nothing is computed, reads go straight to the result."""

    @property
    def in_place(self) -> bool:
        return True

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        pass


class Reshape(View):
    """The same rows under another shape; squeezes a dimension of one out of [H, 1, L]."""

    def __init__(self, parent: LazyTensor, shape: tuple[int, ...]) -> None:
        self.spec = TensorSpec(shape, parent.spec.type)
        if (self.spec.n_rows, self.spec.n_columns) != (parent.spec.n_rows, parent.spec.n_columns):
            raise ValueError(f"{parent.spec.shape} cannot be seen as rows of {shape}")
        self.parents = (parent,)

    def needs(self, rows: range) -> Iterator[Piece]:
        yield Piece(self.parents[0], rows)


class Transpose(LazyTensor):
    """[R, C] read as [C, R]: each piece of the parent's rows gives a block of columns of the result."""

    def __init__(self, parent: LazyTensor) -> None:
        n_rows, n_columns = parent.spec.shape
        self.spec = TensorSpec((n_columns, n_rows), parent.spec.type)
        self.parents = (parent,)
        self._step = max(1, TRANSPOSE_PIECE_NBYTES // parent.spec.row_nbytes)

    def needs(self, rows: range) -> Iterator[Piece]:
        n_parent_rows = self.parents[0].spec.n_rows
        for start in range(0, n_parent_rows, self._step):
            yield Piece(self.parents[0], range(start, min(start + self._step, n_parent_rows)))

    def largest_piece(self, parent: LazyTensor, n_rows: int) -> int:
        return min(self._step, parent.spec.n_rows)

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        assert piece is not None
        kind = NUMPY_DTYPES[self.spec.type]
        block = slab.view(kind).reshape(len(piece.rows), piece.parent.spec.n_columns)
        result = out.view(kind).reshape(len(rows), self.spec.n_columns)
        result[:, piece.rows.start : piece.rows.stop] = block[:, rows.start : rows.stop].T


class PairHalves(LazyTensor):
    """Rows of each head [2, D/2] interleaved to [D/2, 2]: from Hugging Face's half-split RoPE to llama.cpp's pairs.

    Row j of half k of a head becomes its row 2j + k; with heads = n_head for Q and n_head_kv for K.
    Source: LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py.
    """

    def __init__(self, parent: LazyTensor, n_heads: int) -> None:
        if n_heads < 1 or parent.spec.n_rows % (2 * n_heads):
            raise ValueError(f"{parent.spec.n_rows} rows are not {n_heads} heads of two halves")
        self.spec = parent.spec
        self.parents = (parent,)
        self._head = parent.spec.n_rows // n_heads

    def needs(self, rows: range) -> Iterator[Piece]:
        parent, head = self.parents[0], self._head
        start = rows.start
        while start < rows.stop:
            base = start // head * head
            if start == base and base + head <= rows.stop:  # whole heads: one run
                stop = rows.stop // head * head
                yield Piece(parent, range(start, stop))
            else:  # part of a head: a run of each half
                stop = min(base + head, rows.stop)
                for half in (0, 1):
                    first, last = (start - base + 1 - half) // 2, (stop - base + 1 - half) // 2
                    if first < last:
                        offset = base + half * (head // 2)
                        yield Piece(parent, range(offset + first, offset + last))
            start = stop

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        assert piece is not None
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


class Stack(View):
    """Equal tensors, one after the other, under one more dimension: experts [M, H] to [E, M, H]."""

    def __init__(self, parents: Sequence[LazyTensor]) -> None:
        specs = {parent.spec for parent in parents}
        if len(specs) != 1:
            raise ValueError(f"cannot stack tensors of {len(specs)} different shapes or types")
        (one,) = specs
        if len(one.shape) < 2:
            raise ValueError("only matrices are stacked")
        self.spec = TensorSpec((len(parents), *one.shape), one.type)
        self.parents = tuple(parents)

    def needs(self, rows: range) -> Iterator[Piece]:
        each = self.parents[0].spec.n_rows
        for index in range(rows.start // each, -(-rows.stop // each)):
            base = index * each
            yield Piece(self.parents[index], range(max(rows.start - base, 0), min(rows.stop - base, each)))


class RowBlocks(View):
    """Of every `period` rows the `size` from `start` on: the gate half of a fused [E, 2M, H], as [E, M, H]."""

    def __init__(self, parent: LazyTensor, period: int, start: int, size: int) -> None:
        n_blocks, rest = divmod(parent.spec.n_rows, period)
        if rest or not 0 <= start < start + size <= period:
            raise ValueError(f"{parent.spec.n_rows} rows have no blocks {start}:{start + size} of {period}")
        self.spec = TensorSpec((n_blocks, size, parent.spec.n_columns), parent.spec.type)
        self.parents = (parent,)
        self._period, self._start, self._size = period, start, size

    def needs(self, rows: range) -> Iterator[Piece]:
        for block in range(rows.start // self._size, -(-rows.stop // self._size)):
            base = block * self._size
            first, last = max(rows.start - base, 0), min(rows.stop - base, self._size)
            offset = block * self._period + self._start
            yield Piece(self.parents[0], range(offset + first, offset + last))


class Widen(LazyTensor):
    """The same numbers as F32 (exact: every F16 and BF16 value is one)."""

    def __init__(self, parent: LazyTensor) -> None:
        self.spec = TensorSpec(parent.spec.shape, F32)
        self.parents = (parent,)

    @property
    def in_place(self) -> bool:
        return self.parents[0].spec.type == F32

    def needs(self, rows: range) -> Iterator[Piece]:
        yield Piece(self.parents[0], rows)

    def scratch_nbytes(self, n_rows: int) -> int:
        return codecs.encode_scratch_nbytes(self.parents[0].spec.type, F32, n_rows, self.spec.n_columns)

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        if not self.in_place:
            codecs.encode(self.parents[0].spec.type, F32, slab, out, work.scratch, self.spec.n_columns, work.kernel)


class Scale(Widen):
    """Every element times `factor`, in F32."""

    def __init__(self, parent: LazyTensor, factor: float) -> None:
        super().__init__(parent)
        self.factor = np.float32(factor)

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        super().apply(rows, piece, slab, out, work)
        values = out.view("<f4")
        np.multiply(values, self.factor, out=values)


class Encode(LazyTensor):
    """The rows of one GGUF tensor in its type; counts what is not finite, and refuses what the type cannot hold."""

    def __init__(self, parent: LazyTensor, target: str, type_: GGMLQuantizationType) -> None:
        self.spec = TensorSpec(parent.spec.shape, type_)
        self.parents = (parent,)
        self.target = target

    @property
    def in_place(self) -> bool:
        return self.parents[0].spec.type == self.spec.type

    def needs(self, rows: range) -> Iterator[Piece]:
        yield Piece(self.parents[0], rows)

    def scratch_nbytes(self, n_rows: int) -> int:
        return codecs.encode_scratch_nbytes(self.parents[0].spec.type, self.spec.type, n_rows, self.spec.n_columns)

    def apply(self, rows: range, piece: Piece | None, slab: Bytes, out: Bytes, work: Workspace) -> None:
        source = self.parents[0].spec.type
        with work.stopwatch.time("encode"):
            stats = codecs.encode(source, self.spec.type, slab, out, work.scratch, self.spec.n_columns, work.kernel)
        if work.counting and (stats.n_nan or stats.n_inf):
            work.tally[self.target] = work.tally.get(self.target, codecs.Stats(0, 0)) + stats
