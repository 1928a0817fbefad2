"""Lazy tensors: a tensor is a rule for making its rows, and no code can request more rows than fit in memory.

A node declares the rows of its parents that it needs, step by step, and computes its own rows from them. `read` is the
only way to get data: it passes a node the slabs of one step together, so that no node reads by itself, and takes all
temporaries from the worker's Scratch. `peak_nbytes` computes the scratch memory of any node from its declarations.

Memory that a node keeps is allocated with the node, before the memory proof.

A tensor of any rank is treated as rows along its last dimension: [4, 3, 64] has 12 rows of 64 elements. A vector has
rows of one element each, so that operations on rows also work on biases.
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
        """Elements in a row: the last dimension, or 1 for a vector."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def n_rows(self) -> int:
        """The product of all dimensions but the last, or the number of elements of a vector."""
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
    """An open file that nodes read from.

    `read_into` fills a buffer from an offset. `check_unchanged` checks that the file is still the one that was opened.
    Both raise SourceError. `map` returns the mapped bytes, or None if they cannot be mapped.
    """

    @property
    def nbytes(self) -> int: ...
    @property
    def is_mapped(self) -> bool: ...
    def map(self, offset: int, nbytes: int) -> Mapped | None: ...

    def read_into(self, offset: int, out: Bytes) -> None: ...
    def check_unchanged(self) -> None: ...


class Lender(Protocol):
    """Lends the bytes of a file in mapped memory, without a copy (files.window.Window)."""

    def lend(self, file: Readable, offset: int, nbytes: int, /) -> AbstractContextManager[Bytes | None]: ...
    def maps(self, file: Readable, /) -> bool: ...
    def rows_before_border(self, offset: int, row_nbytes: int, n_rows: int, /) -> int: ...


@dataclass(slots=True)
class Workspace:
    """The resources and the tally of one worker.

    Attributes:
        scratch: Memory for temporaries.
        kernel: The encoder and arithmetic to use.
        tally: Counts of non-finite values, by target.
        stopwatch: Times each phase.
        counting: False while a row is made a second time, for the next chunk.
        files: The files that were read.
        window: Lends mapped bytes of sources; None if sources are read into buffers.
    """

    scratch: Scratch
    kernel: Kernel = field(default_factory=best_kernel)
    tally: dict[str, Stats] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    counting: bool = True
    files: set[Readable] = field(default_factory=set)
    window: Lender | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one parent that a node needs in one step."""

    parent: LazyTensor
    rows: range

    @property
    def nbytes(self) -> int:
        return len(self.rows) * self.parent.spec.row_nbytes


Step = tuple[Piece, ...]  # the pieces that a node needs together


class LazyTensor(ABC):
    """A tensor whose rows are made on request, and which is never held whole."""

    spec: TensorSpec
    parents: tuple[LazyTensor, ...] = ()

    # Whether each column of the result depends only on the same column of every parent.
    is_column_wise: bool = False

    @abstractmethod
    def needs(self, rows: range) -> Iterable[Step]:
        """The steps that make `rows`, in order. Pure arithmetic: nothing is read.

        A leaf has one step without pieces.
        """

    @abstractmethod
    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        """Write the contribution of one step into `out`.

        Args:
            rows: The rows being made, by all steps together.
            step: The step, from `needs`.
            slabs: The bytes of each piece's rows, C-contiguous. Lent slabs are read-only (see `lend`); the node may
                change the others.
            out: The bytes of `rows`. For a node that is `in_place`, the part that the step's first piece fills: this
                is `slabs[0]` itself unless that was lent.
            work: The worker's resources. Temporaries come from its scratch: at most `scratch_nbytes`.
        """

    @abstractmethod
    def describe(self) -> str:
        """Everything that determines this node's bytes, except its class, shape, dtype and parents.

        The text must not depend on the process or the version of Python: a resumed run compares it (`description`).
        """

    def largest(self, n_rows: int) -> Iterable[Step]:
        """Steps at least as large as any that `needs` gives for up to `n_rows` rows; only the lengths matter.

        By default, one step with a piece of `n_rows` rows of each parent.
        """
        yield tuple(Piece(parent, range(min(n_rows, parent.spec.n_rows))) for parent in self.parents)

    def scratch_nbytes(self, n_rows: int, kernel: Kernel = REFERENCE) -> int:
        """Bytes of scratch, with padding, that one `apply` with `kernel` needs to make at most `n_rows` rows."""
        return 0

    @property
    def in_place(self) -> bool:
        """Whether the first pieces of the steps, one after another, are the result or are turned into it in place."""
        return False

    def borrows(self, work: Workspace) -> bool:
        """Whether `apply` can read lent memory, which is read-only and has any alignment (see `lend`)."""
        return False

    @property
    def least_rows(self) -> int:
        """The number of rows per slab below which a parent would be read too often."""
        return max((parent.least_rows for parent in self.parents), default=1)

    def lend(self, rows: range, work: Workspace) -> AbstractContextManager[Bytes | None]:
        """The bytes of `rows` without a copy, read-only and valid inside the `with`; None if they must be read.

        A source in mapped memory lends its pages, and views pass them on, to a node that `borrows`. Lent memory is not
        scratch memory, so `peak_nbytes` remains a bound.
        """
        return nullcontext()

    def lendable(self, rows: range, work: Workspace) -> int:
        """How many of `rows`, from the first on, one loan can provide; 0 if they cannot be lent."""
        return 0

    def columns(self, columns: range) -> LazyTensor | None:
        """A tensor of these columns that does not read the others; None if that needs whole rows."""
        if not self.is_column_wise or not self.parents:
            return None
        sliced = [parent.columns(columns) for parent in self.parents]
        return self._over([one for one in sliced if one is not None]) if None not in sliced else None

    def _over(self, parents: Sequence[LazyTensor]) -> Self:
        """The same node over other parents, which differ from its own only in the number of columns."""
        node = copy.copy(self)
        node.parents = tuple(parents)
        node.spec = TensorSpec((*self.spec.shape[:-1], parents[0].spec.n_columns), self.spec.dtype)
        return node

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a LazyTensor cannot become an array: use read() to get its rows")


def read(tensor: LazyTensor, rows: range, out: Bytes, work: Workspace) -> None:
    """Fill `out` with rows of `tensor`.

    Args:
        tensor: The tensor.
        rows: The numbers of the rows.
        out: uint8, of exactly the size of `rows`.
        work: The worker's resources; its scratch must hold `peak_nbytes`.

    Raises:
        SourceError: A file cannot be read.
        EncodeError: The tensor's type cannot hold a value.
    """
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
    """Fill `out` with `rows` of `tensor`, reading its first parent only from lent memory.

    `rows` must be `lendable`. The scratch needed does not grow with them, so they may be more than a slab.

    Returns:
        Whether that worked. If not, the content of `out` is undefined.
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
    """Make one step; raises Unread if lent memory turns out to be unusable."""
    with work.scratch.frame(), ExitStack() as loans:
        slabs = [
            _slab(tensor, number, piece, part, work, loans if borrows else None) for number, piece in enumerate(step)
        ]
        tensor.apply(rows, step, slabs, part, work)


def _slab(
    tensor: LazyTensor, number: int, piece: Piece, part: Bytes, work: Workspace, loans: ExitStack | None
) -> Bytes:
    """The bytes of one piece: lent, read to the place of the result, or read into scratch."""
    if loans is not None and (lent := loans.enter_context(piece.parent.lend(piece.rows, work))) is not None:
        return lent
    slab = part if tensor.in_place and number == 0 else work.scratch.take(piece.nbytes).view(np.uint8)
    read(piece.parent, piece.rows, slab, work)
    return slab


def peak_nbytes(tensor: LazyTensor, n_rows: int, kernel: Kernel = REFERENCE) -> int:
    """Bytes of scratch that `read` needs for at most `n_rows` rows, computed from the nodes' declarations.

    The default is the numpy kernel, which needs more than the compiled ones.
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
    """Everything that determines a tensor's bytes, except the content of its files, as one line.

    Tensors with equal descriptions, over the same files, have equal bytes.
    """
    parents = ", ".join(description(parent) for parent in tensor.parents)
    shape = "x".join(map(str, tensor.spec.shape))
    return f"{type(tensor).__name__}[{tensor.describe()}]({parents}) -> {tensor.spec.dtype} {shape}"
