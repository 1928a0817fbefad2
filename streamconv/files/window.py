"""Mapped reads: a worker sees the page cache through a window, and encodes from it without a copy.

Measured on Linux 6.18 (ext4): large folios are mapped up to 2 MiB at a time, with one page table entry, if window and
file position are multiples of 2 MiB; smaller windows are slower than a copy. The part of a window that is lent is
populated right before, in one call, which reports missing bytes as an error. The window is unmapped as a whole. If
bytes vanish while they are being read, that is detected (mapped.c), and they are read again with `read_into`, which
raises the error to report.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

WINDOW_NBYTES: Final = 1 << 22  # two huge pages, the largest folios that are mapped at a time

# Local filesystems (statfs(2), linux/magic.h). On others a page fault waits for a server or another process, and the
# memory that mapped pages take is unknown.
_LOCAL: Final = frozenset({
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # xfs
    0x9123683E,  # btrfs
    0xF2F52010,  # f2fs
    0xCA451A4E,  # bcachefs
    0x01021994,  # tmpfs
    0x858458F6,  # ramfs
    0x794C7630,  # overlayfs
    0x2011BAB0,  # exfat
    0x4D44,  # vfat
    0x73717368,  # squashfs
    0xE0F5E1E2,  # erofs
})  # fmt: skip


class Unread(Exception):
    """Lent bytes turned out to be unusable: the caller has to read them instead."""


class Mapped(Protocol):
    """A read-only buffer of a blob's bytes.

    `populate` maps a part of it in one call, and raises OSError if the file does not have these bytes any more.
    `is_lost` is True once a read found some of them missing.
    """

    @property
    def is_lost(self) -> bool: ...
    def populate(self, start: int, nbytes: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...


class Mappable(Protocol):
    """A file that can be mapped.

    Attributes:
        nbytes: Its size.
        is_mapped: Whether mapping is the better way to read it.
    """

    @property
    def nbytes(self) -> int: ...
    @property
    def is_mapped(self) -> bool: ...
    def map(self, offset: int, nbytes: int) -> Mapped | None: ...


class Window:
    """The range of a file that one worker has mapped. Its next reads are likely to be in the same range.

    Args:
        maps_all: Whether to map also files whose `is_mapped` is False.
    """

    def __init__(self, maps_all: bool = False) -> None:
        self._maps_all = maps_all
        self._blob: Mappable | None = None
        self._mapped: Mapped | None = None
        self._first = self._end = 0

    def maps(self, blob: Mappable) -> bool:
        """Whether this window maps `blob`."""
        return blob.is_mapped or self._maps_all

    @contextmanager
    def lend(self, blob: Mappable, offset: int, nbytes: int) -> Iterator[NDArray[np.uint8] | None]:
        """The mapped bytes, valid inside the `with`; None if they must be read, such as across two windows.

        Raises:
            Unread: At the end of the `with`, if some bytes were missing; results computed from them are invalid.
        """
        mapped = self._map(blob, offset, nbytes)
        try:
            if mapped is not None:
                mapped.populate(offset - self._first, nbytes)
        except OSError:  # reading raises the error to report
            self.close()
            mapped = None
        if mapped is None:
            yield None
            return
        try:
            yield np.frombuffer(mapped, np.uint8, nbytes, offset - self._first)  # type: ignore[call-overload]
        finally:
            if mapped.is_lost:
                self.close()
                raise Unread

    def rows_before_border(self, offset: int, row_nbytes: int, n_rows: int) -> int:
        """How many of `n_rows` rows from `offset` on are in the same window; 1 if the first crosses its border."""
        border = (offset // WINDOW_NBYTES + 1) * WINDOW_NBYTES
        return max(1, min(n_rows, (border - offset) // row_nbytes))

    def close(self) -> None:
        """Unmap the current range."""
        self._blob = self._mapped = None

    def _map(self, blob: Mappable, offset: int, nbytes: int) -> Mapped | None:
        if blob is self._blob and self._first <= offset and offset + nbytes <= self._end:
            return self._mapped
        first = offset // WINDOW_NBYTES * WINDOW_NBYTES
        end = min(first + WINDOW_NBYTES, blob.nbytes)
        if offset + nbytes > end or not self.maps(blob):
            return None
        self.close()  # before mapping another: the budget counts one window
        try:
            self._mapped = blob.map(first, end - first)
        except OSError:
            return None
        self._blob, self._first, self._end = blob, first, end
        return self._mapped


@cache
def mapping_module() -> ModuleType | None:
    """The extension module that maps; None if it was not built, or Linux is older than 5.14 and cannot populate."""
    try:
        module = importlib.import_module("streamconv.files._mapped")
        fd = os.memfd_create("streamconv-probe")
    except (ImportError, AttributeError, OSError):
        return None
    try:
        os.truncate(fd, 1)
        module.Window(fd, 0, 1).populate(0, 1)
    except OSError:
        return None
    finally:
        os.close(fd)
    return module


def is_local(fd: int) -> bool:
    """Whether an open file is on a local filesystem."""
    module = mapping_module()
    return module is not None and module.filesystem(fd) in _LOCAL
