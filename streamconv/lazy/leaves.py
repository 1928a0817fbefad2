"""Lazy tensors without parents: stored in a file, held in memory, or computed row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from streamconv.lazy.dtype import F32
from streamconv.lazy.node import Bytes, LazyTensor, Readable, Step, TensorSpec, Workspace


class Leaf(LazyTensor):
    """Base class of tensors without parents: one step without pieces."""

    def needs(self, rows: range) -> Iterable[Step]:
        return ((),)

    def largest(self, n_rows: int) -> Iterable[Step]:
        return ((),)


class Source(Leaf):
    """A tensor as stored: its rows are byte ranges of a file.

    Args:
        name: The name in the file.
        file: The open file.
        offset: Of the first byte, from the start of the file.
        spec: Shape and dtype.
    """

    def __init__(self, name: str, file: Readable, offset: int, spec: TensorSpec) -> None:
        self.name, self.file, self.offset, self.spec = name, file, offset, spec

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        work.files.add(self.file)
        with work.stopwatch.time("read"):
            self.file.read_into(self.offset + rows.start * self.spec.row_nbytes, out)

    def lend(self, rows: range, work: Workspace) -> AbstractContextManager[Bytes | None]:
        if work.window is None:
            return nullcontext()
        work.files.add(self.file)
        width = self.spec.row_nbytes
        return work.window.lend(self.file, self.offset + rows.start * width, len(rows) * width)

    def lendable(self, rows: range, work: Workspace) -> int:
        if work.window is None or not work.window.maps(self.file):
            return 0
        width = self.spec.row_nbytes
        return work.window.rows_before_border(self.offset + rows.start * width, width, len(rows))

    def columns(self, columns: range) -> LazyTensor | None:
        return SourceColumns(self, columns)

    def describe(self) -> str:
        return f"{self.name!r} at {self.offset}"


class SourceColumns(Source):
    """Some columns of a stored matrix: one short read for each row, of these columns only."""

    def __init__(self, stored: Source, columns: range) -> None:
        dtype = stored.spec.dtype
        super().__init__(stored.name, stored.file, stored.offset, TensorSpec((stored.spec.n_rows, len(columns)), dtype))
        self._stride = stored.spec.row_nbytes
        self._first = dtype.row_nbytes(columns.start)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        offset = self.offset + self._first
        work.files.add(self.file)
        with work.stopwatch.time("read"):
            for row, run in zip(rows, out.reshape(len(rows), -1), strict=True):
                self.file.read_into(offset + row * self._stride, run)

    def lend(self, rows: range, work: Workspace) -> AbstractContextManager[Bytes | None]:
        return nullcontext()

    def lendable(self, rows: range, work: Workspace) -> int:
        return 0

    def columns(self, columns: range) -> LazyTensor | None:
        return None

    def describe(self) -> str:
        return f"{super().describe()} + {self._first} every {self._stride}"


class Resident(Leaf):
    """A small F32 tensor held in memory, such as a table computed from the config."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self.spec = TensorSpec(array.shape, F32)
        self._bytes = np.ascontiguousarray(array, dtype="<f4").reshape(-1).view(np.uint8)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        width = self.spec.row_nbytes
        out[:] = self._bytes[rows.start * width : rows.stop * width]

    def describe(self) -> str:
        return hashlib.sha256(self._bytes.data).hexdigest()


class Zeros(Leaf):
    """A tensor of zeros, of any dtype whose zero is stored as zero bytes."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        out[:] = 0

    def describe(self) -> str:
        return ""


class Generated(Leaf):
    """A tensor computed row by row by a function, for tensors that are in no file and too large to hold in memory.

    Args:
        spec: Shape and dtype.
        fill: Called with the row numbers and the array to fill ([rows, columns] in `spec.dtype.view`). It must not
            allocate memory that grows with the number of rows.
        rule: The function's name and parameters, for `describe`.
    """

    def __init__(self, spec: TensorSpec, fill: Callable[[range, NDArray[np.generic]], None], rule: str) -> None:
        self.spec, self._fill, self._rule = spec, fill, rule

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        self._fill(rows, out.view(self.spec.dtype.view).reshape(len(rows), -1))

    def describe(self) -> str:
        return self._rule


def sources(tensor: LazyTensor) -> Iterator[Source]:
    """The stored tensors that `tensor` is computed from, in order, without repetition."""
    yield from dict.fromkeys(_sources(tensor))


def _sources(tensor: LazyTensor) -> Iterator[Source]:
    if isinstance(tensor, Source):
        yield tensor
    for parent in tensor.parents:
        yield from _sources(parent)
