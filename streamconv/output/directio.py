"""A file of known size, filled in chunks past the page cache if the filesystem supports that.

This module wraps the system calls for writing, their fallbacks, and calls that Python's `os` does not have. `write`
returns when every byte has been accepted, however the system split or refused the calls; at most WRITE_BEHIND_NBYTES
wait in the page cache; `sync` reports every fault of the disk.

Measured on ext4 (2.34 GB, two threads): direct writes into reserved space take half the CPU time of writes through the
page cache at the same speed, and do not fill a small cgroup with dirty pages; without the reservation they take 1.3
times as long.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

DIRECT_ALIGNMENT = 4096  # address, offset and length: the largest logical block of common disks
WRITE_BEHIND_NBYTES = 32 << 20

# The errors of filesystems that do not support a call; any other error is a fault.
UNSUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY, errno.EXDEV})

_FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_SYNC_FILE_RANGE_WRITE_AND_WAIT = 1 | 2 | 4
_RENAME_NOREPLACE = 1  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h
_OFF = ctypes.c_int64


class ChunkFile:
    """A regular file, written at any offset from any number of threads.

    All methods raise the system's OSError.

    Args:
        fd: A descriptor of the file, which the caller closes.
        path: Its name.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        # Direct writes need a descriptor of their own. So does writing behind: the system reports a disk fault once to
        # each descriptor, and `sync` must receive it on `fd`.
        self._second_fd, self._is_direct = _open_second(fd, path)
        self._waiting: deque[tuple[int, int]] = deque()
        self._waiting_nbytes = 0
        self._lock = Lock()

    def write(self, view: NDArray[np.uint8], offset: int) -> None:
        """Write all of `view` at `offset`; fastest if memory, offset and length are multiples of DIRECT_ALIGNMENT."""
        rest = view.data
        if self._is_direct and not (view.ctypes.data | offset) % DIRECT_ALIGNMENT:
            done = self._write_direct(rest[: len(rest) // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT], offset)
            rest, offset = rest[done:], offset + done
        if rest:
            write_all(self.fd, rest, offset)
            self._write_behind(offset, len(rest))

    def sync_data(self) -> None:
        """Return once everything written before the call is on the disk."""
        sync_data(self.fd)

    def sync(self) -> None:
        """Like `sync_data`, including the file's size and times."""
        _sync(self.fd, os.fsync)

    def close(self) -> None:
        os.close(self._second_fd)

    def _write_direct(self, view: memoryview, offset: int) -> int:
        """Write directly, and return the number of bytes accepted.

        That is all, or fewer if the filesystem refuses direct writes or accepts a part of a block.
        """
        done = 0
        while done < len(view) and done % DIRECT_ALIGNMENT == 0:
            try:
                done += _accepted(os.pwrite(self._second_fd, view[done:], offset + done))
            except OSError as exc:
                if exc.errno not in UNSUPPORTED:
                    raise
                self._is_direct = False
                break
        return done

    def _write_behind(self, offset: int, nbytes: int) -> None:
        """Start writing a range to the disk, and drop the oldest ranges from the page cache once they are written."""
        _sync_range(self._second_fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)
        with self._lock:
            self._waiting.append((offset, nbytes))
            self._waiting_nbytes += nbytes
            leaving = []
            while self._waiting_nbytes > WRITE_BEHIND_NBYTES:
                leaving.append(self._waiting.popleft())
                self._waiting_nbytes -= leaving[-1][1]
        for start, length in leaving:
            _sync_range(self._second_fd, start, length, _SYNC_FILE_RANGE_WRITE_AND_WAIT)
            _forget(self.fd, start, length)


def open_plain(path: Path, flags: int) -> int:
    """A descriptor of `path` that child processes do not inherit.

    It never follows a symbolic link, and never waits for the other end of a FIFO.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`, in as many calls as the system needs."""
    done = 0
    while done < len(view):
        done += _accepted(os.pwrite(fd, view[done:], offset + done))


def reserve(fd: int, nbytes: int) -> bool:
    """Give the file a size of `nbytes` and the disk space for it.

    posix_fallocate is not used: if a filesystem cannot reserve space, glibc writes into every block instead.

    Returns:
        Whether the space was reserved; if not, only the size was set.
    """
    if _reserve(fd, 0, nbytes):
        return True
    os.ftruncate(fd, nbytes)
    return False


def reserve_beyond_end(fd: int, nbytes: int) -> None:
    """Reserve disk space for `nbytes` without changing the file's size, if the filesystem supports that."""
    _reserve(fd, _FALLOC_FL_KEEP_SIZE, nbytes)


def sync_data(fd: int) -> None:
    """fdatasync, or fsync if the system does not have it."""
    _sync(fd, getattr(os, "fdatasync", os.fsync))


def sync_directory(path: Path) -> None:
    """Return once the names in the directory `path` are on the disk, if the system can sync directories."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return  # a directory that can be written but not listed
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def rename_new(src: Path, dst: Path) -> None:
    """Rename `src` to `dst`; FileExistsError if that name is taken."""
    try:
        if _call("renameat2", (_AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), _RENAME_NOREPLACE)):
            return
    except OSError as exc:
        exc.filename = os.fspath(dst)
        raise
    if os.path.lexists(dst):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(dst))
    src.rename(dst)


def unlink_own(path: Path, fd: int) -> None:
    """Remove the name `path` if it still belongs to the open file `fd`."""
    with suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), os.fstat(fd)):
            path.unlink()


def _open_second(fd: int, path: Path) -> tuple[int, bool]:
    """Another descriptor of the same file, and whether it writes directly."""
    second_fd, is_direct = -1, hasattr(os, "O_DIRECT")
    if is_direct:
        try:
            second_fd = open_plain(path, os.O_WRONLY | os.O_DIRECT)
        except OSError as exc:
            if exc.errno not in UNSUPPORTED:
                raise
            is_direct = False
    if not is_direct:
        second_fd = open_plain(path, os.O_WRONLY)
    if not os.path.samestat(os.fstat(fd), os.fstat(second_fd)):
        os.close(second_fd)
        raise OSError(errno.ESTALE, "was replaced by something else", os.fspath(path))
    return second_fd, is_direct


def _accepted(nbytes: int) -> int:
    if nbytes == 0:  # no progress and no error: a retry could loop forever
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return nbytes


def _sync(fd: int, sync: Callable[[int], None]) -> None:
    # On macOS fsync stops at the drive's own cache.
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    sync(fd)


def _sync_range(fd: int, offset: int, nbytes: int, flags: int) -> None:
    _call("sync_file_range", (fd, _OFF(offset), _OFF(nbytes), flags))


def _forget(fd: int, offset: int, nbytes: int) -> None:
    """Advise the system to drop a range that is on the disk from the page cache."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _reserve(fd: int, mode: int, nbytes: int) -> bool:
    return _call("fallocate", (fd, mode, _OFF(0), _OFF(nbytes)))


def _call(name: str, arguments: tuple[object, ...]) -> bool:
    """Call a function of the C library; False if the system or filesystem does not support it, OSError on a fault."""
    function = getattr(_libc(), name, None)
    if function is None:
        return False
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code in UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
