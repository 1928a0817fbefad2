"""The scratch memory of one worker, aligned and allocated once.

A node that takes more than it declared raises an error instead of growing the process.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import DTypeLike, NDArray

ALIGNMENT = 64  # a cache line; enough for any vector load


def aligned_buffer(nbytes: int) -> NDArray[np.uint8]:
    """`nbytes` of zeroed, page-aligned memory (for O_DIRECT), returned to the system once nothing refers to it."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=np.uint8)[:nbytes]


def padded_nbytes(nbytes: int) -> int:
    """The bytes that `nbytes` occupy in a Scratch, padding included."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Overdraft(MemoryError):
    """A step took more scratch memory than it declared, which is a bug."""


class Scratch:
    """A stack of temporary arrays in one buffer of fixed size."""

    def __init__(self, nbytes: int) -> None:
        self._buffer = aligned_buffer(nbytes)
        self._used = 0

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def take(self, shape: tuple[int, ...] | int, dtype: DTypeLike = np.uint8) -> NDArray[np.generic]:
        """An uninitialised C-contiguous array, valid until the enclosing `frame` ends.

        Raises:
            Overdraft: The buffer is too small for it.
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
        """Arrays taken inside the `with` are released at its end."""
        mark = self._used
        try:
            yield
        finally:
            self._used = mark
