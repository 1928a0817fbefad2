"""A file of strangers read at positions, and forward through one small window.

Owns: bounds of reads, and which files were read, so that none of them is written over. Does not own: what the bytes
mean (gguf_file/reader.py).
Invariants: nothing is mapped, so a file that shrinks is an error of ours and never a SIGBUS; nothing is read or
allocated for a length that the file does not have; every file that a run reads is opened here.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from streamconv.errors import SourceError, SourceReadError

WINDOW_NBYTES = 64 << 10

Buffer = NDArray[np.uint8] | bytearray | memoryview  # one dimension of bytes

FileId = tuple[int, int]  # device and inode: the same under every name

_opened: ContextVar[dict[FileId, Path] | None] = ContextVar("opened", default=None)

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells that a file is still the one that was opened, as it was then."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@contextmanager
def noting_files() -> Iterator[None]:
    """Inside, `files_read` knows every file that was opened since the beginning, by whatever name."""
    token = _opened.set({})
    try:
        yield
    finally:
        _opened.reset(token)


def files_read() -> Mapping[FileId, Path]:
    """The files that were opened so far inside `noting_files`; none outside of it."""
    return dict(_opened.get() or {})


class PositionedFile:
    """An open regular file, read at given positions, from any number of threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Not blocking: opening a FIFO would wait for its writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot be opened: {getattr(error, 'strerror', error)}", file=path) from None
        status = os.fstat(self._fd)
        self.identity = Identity.of(status)
        self.nbytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise SourceError("is not a regular file", file=path)
        if (opened := _opened.get()) is not None:
            opened.setdefault((self.identity.device, self.identity.inode), path)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` from byte `offset` on. SourceError where the file ends first or the disk fails."""
        view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
        if offset + len(view) > self.nbytes:
            raise SourceError(f"has {self.nbytes:,} bytes, {offset + len(view):,} are needed", file=self.path)
        while view:
            try:
                n_read = os.preadv(self._fd, [view], offset)
            except OSError as error:
                message = f"cannot be read at byte {offset}: {error.strerror}"
                hint = "where the disk comes back, run it again with --resume to go on"
                raise SourceReadError(message, file=self.path, hint=hint) from None
            if not n_read:
                message = f"ends at byte {offset}, it had {self.nbytes:,} bytes when it was opened"
                raise SourceError(message, file=self.path, hint="leave the file alone while it is read")
            view, offset = view[n_read:], offset + n_read

    def check_unchanged(self) -> None:
        """SourceError if the file under this path is no longer the one that was opened, as it was then."""
        try:
            now = self.path.stat()
        except OSError:
            raise self._changed("it is gone from its path") from None
        if Identity.of(os.fstat(self._fd)) != self.identity:
            raise self._changed("its size or time is not what it was")
        if Identity.of(now) != self.identity:
            raise self._changed("another file has taken its place")

    def _changed(self, how: str) -> SourceError:
        hint = "let its writer finish, then start again"
        return SourceError(f"changed while it was read: {how}", file=self.path, hint=hint)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def read_start(path: Path, max_nbytes: int) -> bytearray:
    """The file's bytes, as many of them as `max_nbytes`. SourceError where it cannot be read."""
    file = PositionedFile(path)
    try:
        text = bytearray(min(file.nbytes, max_nbytes))
        file.read_into(0, text)
    finally:
        file.close()
    return text


class Cursor:
    """Reads forward from `position` to `end`, a window at a time; what would pass the end is an error.

    For messages: `where` says what is being read, `tensor` of which tensor, `limit` why `end` is not the file's end.
    """

    def __init__(self, file: PositionedFile, position: int, end: int, limit: str) -> None:
        self.file = file
        self.position = position
        self.end = end
        self.window = bytearray(min(WINDOW_NBYTES, end - position))
        self._start = position  # of the window
        self._n_held = 0
        self.limit = limit
        self.where = "the header"
        self.tensor: str | None = None

    @property
    def n_left(self) -> int:
        return self.end - self.position

    def fail(self, message: str, hint: str | None = None) -> NoReturn:
        raise SourceError(message, file=self.file.path, tensor=self.tensor, hint=hint)

    def expect(self, nbytes: int) -> None:
        """SourceError unless `nbytes` more are there."""
        if nbytes <= self.n_left:
            return
        if self.end < self.file.nbytes:
            self.fail(f"{self.where} goes on beyond byte {self.end:,}: {self.limit}")
        hint = "it is damaged, or was not downloaded to its end"
        self.fail(f"ends inside {self.where}: needs {nbytes:,} more bytes, {self.n_left:,} are left", hint)

    def take(self, nbytes: int) -> int:
        """Where in `window` the next `nbytes` (at most WINDOW_NBYTES) are."""
        at = self.position - self._start
        if at + nbytes > self._n_held:
            self.expect(nbytes)
            self._start, at = self.position, 0
            self._n_held = min(len(self.window), self.n_left)
            self.file.read_into(self._start, memoryview(self.window)[: self._n_held])
        self.position += nbytes
        return at

    def u32(self) -> int:
        return int(_U32.unpack_from(self.window, self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.window, self.take(8))[0])

    def raw(self, nbytes: int) -> bytes:
        """The next `nbytes`, whatever their number."""
        self.expect(nbytes)
        if nbytes <= len(self.window):
            at = self.take(nbytes)
            return bytes(memoryview(self.window)[at : at + nbytes])
        data = bytearray(nbytes)
        self.file.read_into(self.position, data)
        self.position += nbytes
        return bytes(data)

    def skip(self, nbytes: int) -> None:
        self.expect(nbytes)
        self.position += nbytes

    def skip_strings(self, count: int) -> None:
        """Pass over `count` strings without an object for each."""
        self.expect(count * 8)
        unpack, window = _U64.unpack_from, self.window
        while count:
            start = at = self.take(8)
            last = self._n_held - 8
            n_passed = 0
            while at <= last and n_passed < count:
                at += 8 + unpack(window, at)[0]
                n_passed += 1
            count -= n_passed
            self.position -= 8
            self.skip(at - start)
