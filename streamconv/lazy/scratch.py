"""The working memory of one worker, allocated once and aligned.

A node can get what its step declared; one that uses more raises an error instead of growing the process.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import DTypeLike, NDArray

ALIGNMENT = 64  # a cache line; enough for any vector load


def aligned_buffer(nbytes: int) -> NDArray[np.uint8]:
    """`nbytes` of zeroed, page-aligned memory (for O_DIRECT), returned to the system when it is deleted."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=np.uint8)[:nbytes]


def padded_nbytes(nbytes: int) -> int:
    """The size of `nbytes` in a Scratch, with padding."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Overdraft(MemoryError):
    """A step took more than it had declared, which is a bug."""


class Scratch:
    """A stack of temporaries inside one fixed buffer."""

    def __init__(self, nbytes: int) -> None:
        self._buffer = aligned_buffer(nbytes)
        self._used = 0

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def take(self, shape: tuple[int, ...] | int, dtype: DTypeLike = np.uint8) -> NDArray[np.generic]:
        """An uninitialised C-contiguous array, valid until the enclosing `frame` ends.

        Overdraft beyond the declared size.
        """
        kind = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else shape
        nbytes = kind.itemsize
        for extent in shape:
            nbytes *= extent
        start, end = self._used, self._used + padded_nbytes(nbytes)
        if end > self._buffer.nbytes:
            raise Overdraft(f"scratch of {self._buffer.nbytes} bytes cannot give {nbytes} at {start}")
        self._used = end
        return self._buffer[start : start + nbytes].view(kind).reshape(shape)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Arrays taken inside are free again afterwards."""
        mark = self._used
        try:
            yield
        finally:
            self._used = mark
