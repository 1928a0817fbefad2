"""Local files as blobs, with bounds-checked reads: at an offset, or forward through a small window.

No memory is allocated for a length that exceeds the file. Every local file that a run reads is opened here and noted,
so that the run cannot overwrite it.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from streamconv.errors import SourceError, SourceReadError
from streamconv.files.store import Blob, Buffer, Identity, Place, Store, StorePath
from streamconv.files.window import Mapped, is_local, mapping_module

WINDOW_NBYTES = 64 << 10
_COMPARED_NBYTES = 64 << 10  # compared at a time

FileId = tuple[int, int]  # device and inode: the same under every name

_opened: ContextVar[dict[FileId, Path] | None] = ContextVar("opened", default=None)

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@contextmanager
def noting_files() -> Iterator[None]:
    """Note every file that is opened inside the `with`, for `files_read`."""
    token = _opened.set({})
    try:
        yield
    finally:
        _opened.reset(token)


def files_read() -> Mapping[FileId, Path]:
    """The files opened so far inside `noting_files`, with the first path of each; empty outside of it."""
    return dict(_opened.get() or {})


@dataclass(frozen=True, slots=True)
class LocalStore(Store):
    """A local folder as a store."""

    folder: Path

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.folder.name

    def names(self, folder: str = "") -> Iterable[str]:
        try:
            return [entry.name for entry in (self.folder / folder).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def open(self, name: str) -> LocalBlob:
        return LocalBlob(self.folder / name)

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def is_folder(self, name: str) -> bool:
        return (self.folder / name).is_dir()

    def show(self, name: str) -> str:
        return str(self.folder / name)

    def local_path(self, name: str) -> Path:
        return self.folder / name


class LocalBlob(Blob):
    """An open regular file.

    Raises:
        SourceError: It cannot be opened, or is not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._path = path
        try:
            # O_NONBLOCK, since opening a FIFO would wait for its writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise SourceError(
                f"cannot be opened: {getattr(error, 'strerror', error)}", file=path, code="cannot-open"
            ) from None
        status = os.fstat(self._fd)
        self.identity = _identity(status)
        self.nbytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise SourceError("is not a regular file", file=path, code="not-regular-file")
        if (opened := _opened.get()) is not None:
            opened.setdefault((status.st_dev, status.st_ino), path)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
        if offset + len(view) > self.nbytes:
            raise SourceError(
                f"has {self.nbytes:,} bytes, but {offset + len(view):,} are needed", file=self.path, code="truncated"
            )
        while view:
            try:
                n_read = os.preadv(self._fd, [view], offset)
            except OSError as error:
                message = f"cannot be read at byte {offset}: {error.strerror}"
                hint = "once the disk works again, run the same command to continue"
                raise SourceReadError(message, file=self.path, hint=hint, code="read-failed") from None
            if not n_read:
                message = f"ends at byte {offset:,}; it had {self.nbytes:,} bytes when it was opened"
                raise SourceError(
                    message, file=self.path, hint="do not change the file while it is being read", code="source-changed"
                )
            view, offset = view[n_read:], offset + n_read

    @cached_property
    def is_mapped(self) -> bool:
        """Whether the system can map it in windows, and its filesystem is a local one."""
        return is_local(self._fd)

    def map(self, offset: int, nbytes: int) -> Mapped | None:
        module = mapping_module()
        return None if module is None else module.Window(self._fd, offset, nbytes)

    def check_unchanged(self) -> None:
        """Check that the file at this path is still the one that was opened, and unchanged.

        Raises:
            SourceError: It is not.
        """
        try:
            now = self._path.stat()
        except OSError:
            raise self._changed("it was removed or renamed") from None
        if _identity(os.fstat(self._fd)) != self.identity:
            raise self._changed("its size or time is different")
        if _identity(now) != self.identity:
            raise self._changed("another file has taken its place")

    def _changed(self, how: str) -> SourceError:
        hint = "wait until no program writes to it, then start again"
        return SourceError(f"changed while it was read: {how}", file=self.path, hint=hint, code="source-changed")

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _identity(status: os.stat_result) -> Identity:
    """Size and time as the lasting part: device and inode can change when the machine restarts or a folder moves."""
    return Identity(f"{status.st_size} {status.st_mtime_ns}", (status.st_dev, status.st_ino))


def local_place(path: Path) -> StorePath:
    """A local path as a place: a folder as a store of its own, a file in the store of its folder."""
    return StorePath(LocalStore(path)) if path.is_dir() else StorePath(LocalStore(path.parent), path.name)


def local_path(place: Place) -> Path | None:
    """The local path of `place`; None if it has none."""
    return place.store.local_path(place.key) if isinstance(place, StorePath) else Path(str(place))


def absolute(place: Place) -> str:
    """The absolute path of `place`, for messages in which a relative path would say too little."""
    path = local_path(place)
    return str(place if path is None else path.absolute())


def open_blob(place: Place) -> Blob:
    """The opened file at `place`; all reads of sources go through this.

    Raises:
        SourceError: It cannot be opened.
    """
    return place.open() if isinstance(place, StorePath) else LocalBlob(Path(str(place)))


def file_nbytes(place: Place) -> int:
    """The size of the file at `place` in bytes; 0 if there is none.

    Raises:
        SourceError: It cannot be opened.
    """
    if not place.exists():
        return 0
    with open_blob(place) as blob:
        return blob.nbytes


def read_start(place: Place, max_nbytes: int) -> bytearray:
    """The first `max_nbytes` bytes of the file, or all if it has fewer.

    Raises:
        SourceError: It cannot be read.
    """
    with open_blob(place) as blob:
        text = bytearray(min(blob.nbytes, max_nbytes))
        blob.read_into(0, text)
    return text


def has_same_content(one: Place, other: Place) -> bool:
    """Whether both files have the same bytes.

    Raises:
        SourceError: One of them cannot be read.
    """
    with open_blob(one) as ours, open_blob(other) as theirs:
        if ours.nbytes != theirs.nbytes:
            return False
        for start in range(0, ours.nbytes, _COMPARED_NBYTES):
            nbytes = min(_COMPARED_NBYTES, ours.nbytes - start)
            with ours.view(start, nbytes) as left, theirs.view(start, nbytes) as right:
                if left != right:
                    return False
    return True


class Cursor:
    """Reads a file forward, a window at a time; reading past `end` is a SourceError.

    Args:
        file: The open file.
        position: The offset at which to begin.
        end: The offset at which to stop.
        limit: For messages: why `end` is not the end of the file.

    Attributes:
        window: The bytes held; `take` returns positions in it.
        where: For messages: the part of the file that is being read.
        tensor: For messages: the tensor that it belongs to.
    """

    def __init__(self, file: Blob, position: int, end: int, limit: str) -> None:
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

    def fail(self, message: str, hint: str | None = None, *, code: str) -> NoReturn:
        """Raise SourceError, naming the file and `tensor`."""
        raise SourceError(message, file=self.file.path, tensor=self.tensor, hint=hint, code=code)

    def expect(self, nbytes: int) -> None:
        """Raise SourceError unless `nbytes` more bytes follow."""
        if nbytes <= self.n_left:
            return
        if self.end < self.file.nbytes:
            self.fail(f"{self.where} extends beyond byte {self.end:,}: {self.limit}", code="out-of-bounds")
        hint = "it is damaged, or its download is incomplete"
        self.fail(
            f"ends inside {self.where}: needs {nbytes:,} more bytes, {self.n_left:,} are left", hint, code="truncated"
        )

    def take(self, nbytes: int) -> int:
        """Advance over the next `nbytes` (at most WINDOW_NBYTES) and return their position in `window`."""
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
        """The next `nbytes`, which may be more than the window holds."""
        self.expect(nbytes)
        if nbytes <= len(self.window):
            at = self.take(nbytes)
            return bytes(memoryview(self.window)[at : at + nbytes])
        data = bytearray(nbytes)
        self.file.read_into(self.position, data)
        self.position += nbytes
        return bytes(data)

    def skip(self, nbytes: int) -> None:
        """Advance over `nbytes` without reading them."""
        self.expect(nbytes)
        self.position += nbytes

    def skip_strings(self, count: int) -> None:
        """Skip `count` strings, each a length (uint64) and its bytes, without creating an object for each."""
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
