"""Lazy tensors: a tensor is a rule for making its rows, and nothing can ask for more rows than fit.

A node says which rows of its parents it needs, a step at a time, and what it makes of them. `read` is the only way to
get data: it hands a node the slabs of a step together, so that no node ever reads by itself, and takes every temporary
from the worker's Scratch. `peak_nbytes` derives how much that is, for every node alike, from what the node declares.

What a node keeps it has allocated when it was made, before memory is proved.

A tensor of any rank is seen as rows of its last dimension: [4, 3, 64] has 12 rows of 64 elements. A vector has rows of
one element each, so that operations on rows apply to biases as well.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import NoReturn, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from streamconv.files.window import Mapped, Unread
from streamconv.ggml.encode import REFERENCE, Kernel, Stats, best_kernel
from streamconv.lazy.dtype import Dtype
from streamconv.lazy.scratch import Scratch, padded_nbytes
from streamconv.timing import Stopwatch

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Row-major shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def n_columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def row_nbytes(self) -> int:
        return self.dtype.row_nbytes(self.n_columns)

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_nbytes

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


class Readable(Protocol):
    """A file that fills a buffer from an offset, and can say whether it is still the one that was opened.

    Both raise SourceError. `map` gives its bytes where they lie, None where it cannot.
    """

    @property
    def nbytes(self) -> int: ...
    @property
    def is_mapped(self) -> bool: ...
    def map(self, offset: int, nbytes: int) -> Mapped | None: ...

    def read_into(self, offset: int, out: Bytes) -> None: ...
    def check_unchanged(self) -> None: ...


class Lender(Protocol):
    """What gives the bytes of a file where they lie (files.window.Window)."""

    def lend(self, file: Readable, offset: int, nbytes: int, /) -> AbstractContextManager[Bytes | None]: ...
    def maps(self, file: Readable, /) -> bool: ...
    def rows_before_border(self, offset: int, row_nbytes: int, n_rows: int, /) -> int: ...


@dataclass(slots=True)
class Workspace:
    """What one worker has: scratch memory, a kernel, a window on sources, a tally of what it saw, and a stopwatch."""

    scratch: Scratch
    kernel: Kernel = field(default_factory=best_kernel)
    tally: dict[str, Stats] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    counting: bool = True  # off while a row is made a second time, for the next chunk
    files: set[Readable] = field(default_factory=set)  # that were read
    window: Lender | None = None  # None: sources are read, and not mapped


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one parent that a node needs at one time."""

    parent: LazyTensor
    rows: range

    @property
    def nbytes(self) -> int:
        return len(self.rows) * self.parent.spec.row_nbytes


Step = tuple[Piece, ...]  # the pieces that a node needs together


class LazyTensor(ABC):
    """A tensor that is made row by row, when asked, and never whole."""

    spec: TensorSpec
    parents: tuple[LazyTensor, ...] = ()

    # Whether each column of the result is made of the same column of every parent, whatever the other columns are.
    is_column_wise: bool = False

    @abstractmethod
    def needs(self, rows: range) -> Iterable[Step]:
        """The steps that make `rows`, in order; arithmetic only.

        A leaf has one step without pieces.
        """

    @abstractmethod
    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        """Put into `out` what one step contributes.

        Args:
            rows: The rows that are being made, of all steps together.
            step: The step, as `needs` gave it.
            slabs: For each of its pieces the bytes of those rows, C-contiguous. They are read-only where they are lent
                (see `lend`), else the node may change them.
            out: The bytes of `rows`; of a node that is `in_place` the part that the step's first piece fills, which is
                `slabs[0]` itself unless that was lent.
            work: Its scratch is for temporaries, at most `scratch_nbytes` of it.
        """

    @abstractmethod
    def describe(self) -> str:
        """All that decides this node's bytes besides its class, its shape and dtype, and its parents.

        The same in every process and every version of Python: a resumed run compares it (`description`).
        """

    def largest(self, n_rows: int) -> Iterable[Step]:
        """Steps that bound those of `needs` for at most `n_rows` rows, wherever they lie: only lengths count.

        By default one piece of as many rows of each parent.
        """
        yield tuple(Piece(parent, range(min(n_rows, parent.spec.n_rows))) for parent in self.parents)

    def scratch_nbytes(self, n_rows: int, kernel: Kernel = REFERENCE) -> int:
        """Temporaries of one `apply` with `kernel`, as Scratch counts them, where at most `n_rows` rows are made."""
        return 0

    @property
    def in_place(self) -> bool:
        """Whether the first pieces of the steps, one after the other, are the result or become it where they lie."""
        return False

    def borrows(self, work: Workspace) -> bool:
        """Whether `apply` can read memory that is not the process's own: read-only, of any alignment (see `lend`)."""
        return False

    @property
    def least_rows(self) -> int:
        """Under how many rows at a time a parent would be read more often than it should be."""
        return max((parent.least_rows for parent in self.parents), default=1)

    def lend(self, rows: range, work: Workspace) -> AbstractContextManager[Bytes | None]:
        """The bytes of `rows` where they already lie, read-only and valid inside the `with`; None where they do not.

        A source in mapped memory lends its pages, and views pass them on, to a node that `borrows`. What is lent is
        not scratch: `peak_nbytes` stays a bound.
        """
        return nullcontext()

    def lendable(self, rows: range, work: Workspace) -> int:
        """How many of `rows`, from the first on, can be made of one loan; 0 where they are not lent."""
        return 0

    def columns(self, columns: range) -> LazyTensor | None:
        """Only these columns, without reading the others; None where this tensor's rows must be made whole for them."""
        if not self.is_column_wise or not self.parents:
            return None
        sliced = [parent.columns(columns) for parent in self.parents]
        return self._over([one for one in sliced if one is not None]) if None not in sliced else None

    def _over(self, parents: Sequence[LazyTensor]) -> Self:
        """The same node over parents that differ in their number of columns."""
        node = copy.copy(self)
        node.parents = tuple(parents)
        node.spec = TensorSpec((*self.spec.shape[:-1], parents[0].spec.n_columns), self.spec.dtype)
        return node

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a LazyTensor has no array: read() gives its rows")


def read(tensor: LazyTensor, rows: range, out: Bytes, work: Workspace) -> None:
    """Fill `out` (uint8, exactly the bytes of `rows`) with rows of `tensor`."""
    filled = 0
    for step in tensor.needs(rows):
        part = out
        if tensor.in_place:
            part = out[filled : filled + step[0].nbytes]
            filled += part.nbytes
        tally = dict(work.tally)
        try:
            _make(tensor, rows, step, part, work, borrows=tensor.borrows(work))
        except Unread:
            work.tally = tally
            _make(tensor, rows, step, part, work, borrows=False)


def read_lent(tensor: LazyTensor, rows: range, out: Bytes, work: Workspace) -> bool:
    """Whether `out` was filled with `rows` of `tensor`, made of what its first parent lends and nothing else.

    `rows` are `lendable`. They take no scratch that grows with them, so they may be more than a slab has.
    """
    tally = dict(work.tally)
    try:
        for step in tensor.needs(rows):
            with work.scratch.frame(), step[0].parent.lend(step[0].rows, work) as lent:
                if lent is None:
                    raise Unread
                others = [_slab(tensor, number, piece, out, work, None) for number, piece in enumerate(step[1:], 1)]
                tensor.apply(rows, step, [lent, *others], out, work)
    except Unread:
        work.tally = tally
        return False
    return True


def _make(tensor: LazyTensor, rows: range, step: Step, part: Bytes, work: Workspace, *, borrows: bool) -> None:
    """One step. Unread where what was lent for it does not do."""
    with work.scratch.frame(), ExitStack() as loans:
        slabs = [
            _slab(tensor, number, piece, part, work, loans if borrows else None) for number, piece in enumerate(step)
        ]
        tensor.apply(rows, step, slabs, part, work)


def _slab(
    tensor: LazyTensor, number: int, piece: Piece, part: Bytes, work: Workspace, loans: ExitStack | None
) -> Bytes:
    """The bytes of one piece: lent, or where the result will be, or in scratch."""
    if loans is not None and (lent := loans.enter_context(piece.parent.lend(piece.rows, work))) is not None:
        return lent
    slab = part if tensor.in_place and number == 0 else work.scratch.take(piece.nbytes).view(np.uint8)
    read(piece.parent, piece.rows, slab, work)
    return slab


def peak_nbytes(tensor: LazyTensor, n_rows: int, kernel: Kernel = REFERENCE) -> int:
    """The scratch that `read` takes for at most `n_rows` rows; derived from what the nodes declare.

    By default with the numpy kernels, which take more than compiled ones.
    """
    deepest = 0
    for step in tensor.largest(n_rows):
        taken = 0
        for number, piece in enumerate(step):
            if number or not tensor.in_place:
                taken += padded_nbytes(piece.nbytes)
            deepest = max(deepest, taken + peak_nbytes(piece.parent, len(piece.rows), kernel))
        deepest = max(deepest, taken + tensor.scratch_nbytes(n_rows, kernel))
    return deepest


def description(tensor: LazyTensor) -> str:
    """All that decides a tensor's bytes but the content of its files: two that are alike make the same bytes."""
    parents = ", ".join(description(parent) for parent in tensor.parents)
    shape = "x".join(map(str, tensor.spec.shape))
    return f"{type(tensor).__name__}[{tensor.describe()}]({parents}) -> {tensor.spec.dtype} {shape}"
