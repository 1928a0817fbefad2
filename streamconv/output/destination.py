"""Where an output will be: what may be replaced, whether another run is writing it, whether there is room.

Names every file that a run writes, makes refusals before any work, locks the destination, renames the finished file,
and translates the system's errors into messages. No file that the run reads is ever written over; another existing file
is replaced only if that is allowed, in one step, once the new one is complete. A part file is touched only under the
lock on its journal, and only if that journal says that streamconv wrote it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from streamconv.errors import DestinationError
from streamconv.files.local import FileId
from streamconv.output.directio import (
    UNSUPPORTED,
    open_plain,
    rename_new,
    reserve,
    sync_directory,
    unlink_own,
    write_all,
)

_FIELD = re.compile(r"\{(name|outtype|ftype|OUTTYPE|FTYPE)\}")
_LOCK_ATTEMPTS = 100  # each lost to another run that finished or began at that very moment
# A batch looks for a moment whether a lock is held, and takes it for that; a run holds it for as long as it writes.
_LOCK_PATIENCE_SECONDS = 0.25
_LOCK_PAUSE_SECONDS = 0.01
_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

_ELSEWHERE = "choose another path"
_AGAIN = "run the same command again to continue"


class _Words(NamedTuple):
    """How an errno is reported."""

    message: str
    hint: str | None
    code: str


_WORDS: dict[int, _Words] = {
    errno.ENOSPC: _Words("no space left on its filesystem", f"free some space, then {_AGAIN}", code="no-space"),
    errno.EDQUOT: _Words("the quota on its filesystem is used up", f"free some space, then {_AGAIN}", code="no-space"),
    errno.EIO: _Words("the disk failed while writing", f"see the system's log, then {_AGAIN}", code="write-failed"),
    errno.EFBIG: _Words(
        "its filesystem, or ulimit -f, does not allow a file of this size", _ELSEWHERE, code="file-size-limit"
    ),
    errno.EROFS: _Words("its filesystem is read-only", _ELSEWHERE, code="read-only"),
    errno.EACCES: _Words("permission denied", _ELSEWHERE, code="permission-denied"),
    errno.EPERM: _Words("the system does not allow it to be written", _ELSEWHERE, code="permission-denied"),
    errno.ENOENT: _Words("the folder for it does not exist", "create it first", code="folder-missing"),
    errno.ENOTDIR: _Words("a part of its path is not a directory", _ELSEWHERE, code="folder-missing"),
    errno.EISDIR: _Words("is a directory", "give a file in it", code="is-folder"),
    errno.ELOOP: _Words("is a loop of symbolic links", _ELSEWHERE, code="link-loop"),
    errno.ENAMETOOLONG: _Words("its name is too long", "choose a shorter one", code="name-too-long"),
    errno.EMFILE: _Words(
        "the limit on open files is too low for this many parts",
        "raise it with ulimit -n, or make larger parts",
        code="open-files-limit",
    ),
    errno.EEXIST: _Words("exists already", "--force replaces it, once the new file is complete", code="exists"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """The three names of one file to write: where it will be, and its siblings while it is made."""

    path: Path

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def journal(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part.journal")

    @property
    def names(self) -> tuple[Path, Path, Path]:
        return self.path, self.part, self.journal

    def refuse_existing(self) -> None:
        if os.path.lexists(self.path):
            raise failure(FileExistsError(errno.EEXIST, ""), self.path)


@dataclass(slots=True)
class OpenFile:
    """A file of a run, open.

    is_new: it was not there before. is_locked: nobody else has it; false on a filesystem without locks.
    """

    path: Path
    fd: int
    is_new: bool
    is_locked: bool = False

    def status(self) -> os.stat_result:
        return os.fstat(self.fd)

    def is_there(self) -> bool:
        """Whether the name is still that of the open file."""
        there = _status(self.path, follow_symlinks=False)
        return there is not None and os.path.samestat(there, self.status())

    def take_name(self, path: Path, *, replaces: bool) -> None:
        """This file becomes the one at `path`. OSError where there is one, unless `replaces`.

        DestinationError where something else has this file's name by now: that must not become it.
        """
        if not self.is_there():
            raise DestinationError(
                "was removed or replaced by another program while it was written", file=self.path, code="output-changed"
            )
        if replaces:
            self.path.replace(path)
        else:
            rename_new(self.path, path)
        sync_directory(path.parent)

    def remove(self) -> None:
        """Removes the name, if it still is that of the open file; a lock stays until `close`."""
        unlink_own(self.path, self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def failure(exc: OSError, path: Path) -> DestinationError:
    """What the system said, in our words; `path` where it did not say of which file."""
    words = _WORDS.get(exc.errno or 0, _Words(exc.strerror or str(exc), None, code="cannot-write"))
    # The system names an open file by its number, and of a missing folder the first file that was to lie in it.
    is_told = isinstance(exc.filename, str | Path) and exc.errno != errno.ENOENT
    return DestinationError(words.message, file=exc.filename if is_told else path, hint=words.hint, code=words.code)


@contextmanager
def failures(path: Path) -> Iterator[None]:
    """Every OSError inside becomes a DestinationError."""
    try:
        yield
    except OSError as exc:
        raise failure(exc, path) from exc


def output_path(dst: str | Path | None, default: str, *, name: str, outtype: str) -> Path:
    """What a caller named as the output; `default`, in the current directory, where that is nothing.

    {name}, {outtype} and {ftype} in it are filled in, in capitals for {OUTTYPE} and {FTYPE}: as in a jobs file and in
    --outfile of llama.cpp's converters. Other braces are part of a name.
    """
    if isinstance(dst, str) and dst.endswith(os.sep):  # which Path would drop
        raise failure(IsADirectoryError(errno.EISDIR, ""), Path(dst))
    if dst is None:
        return Path(default)
    values = {"name": name, "outtype": outtype, "ftype": outtype, "OUTTYPE": outtype.upper(), "FTYPE": outtype.upper()}
    return Path(_FIELD.sub(lambda match: values[match[1]], str(dst)))


def claim(paths: Sequence[Path], sources: Mapping[FileId, Path]) -> list[Place]:
    """The names for every file that one run writes. DestinationError where two of them are the same; as `resolve`."""
    places = [resolve(path, sources) for path in paths]
    for name, count in Counter(name for place in places for name in place.names).items():
        if count > 1:
            raise DestinationError("would be written twice", file=name, hint=_ELSEWHERE, code="same-output")
    return places


def resolve(dst: Path, sources: Mapping[FileId, Path] = MappingProxyType({})) -> Place:
    """The names for `dst`. A symbolic link is followed: what it points to is what will be replaced.

    Raises DestinationError where `dst` could never be written: a directory, a pipe, a device, one of `sources`; or
    where something else than an unfinished output has one of its names.
    """
    try:
        found = _status(dst)
        place = Place(Path(os.path.realpath(dst)))
        taken = [status for path in place.names if (status := _status(path))]
        siblings = {path: status for path in place.names[1:] if (status := _status(path, follow_symlinks=False))}
    except OSError as exc:
        raise failure(exc, dst) from None
    except ValueError as exc:  # a NUL, or characters that the system's encoding lacks
        raise DestinationError(
            f"is not a file name: {exc}", file=repr(str(dst)), hint=_ELSEWHERE, code="file-name"
        ) from None
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise failure(IsADirectoryError(errno.EISDIR, ""), dst)
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise DestinationError(
            "is a pipe or a device",
            file=dst,
            hint="an output is not written in order, so give a regular file",
            code="not-regular-file",
        )
    for status in taken:
        if (source := sources.get((status.st_dev, status.st_ino))) is not None:
            raise DestinationError(
                f"is a file of the source, or would overwrite one: {source}", file=dst, code="output-is-source"
            )
    for path, status in siblings.items():
        _check_sibling(path, status)
    return place


def write_text(place: Place, text: str, *, replaces: bool) -> None:
    """`text` in a small file, as `write_bytes` writes it."""
    write_bytes(place, text.encode(), replaces=replaces)


def write_bytes(place: Place, data: bytes, *, replaces: bool) -> None:
    """`data` in a small file: all of it or, where this fails, what was there before.

    Raises DestinationError; also where there is a file with other bytes, unless `replaces`.
    """
    with failures(place.path), suppress(FileNotFoundError):
        if place.path.stat().st_size == len(data) and place.path.read_bytes() == data:
            return  # written by the run that this one resumes
    with failures(place.path), ExitStack() as stack:
        part = open_locked(place.part)
        stack.callback(part.close)
        stack.callback(part.remove)  # where it still has that name
        os.ftruncate(part.fd, 0)
        write_all(part.fd, memoryview(data), 0)
        os.fsync(part.fd)
        part.take_name(place.path, replaces=replaces)


def open_locked(path: Path) -> OpenFile:
    """The file at `path`, locked, made where it was missing. DestinationError where another run has it."""
    deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
    for _ in range(_LOCK_ATTEMPTS):
        file = _open_or_create(path)
        if file is None:
            continue
        try:
            file.is_locked = _lock(file.fd, deadline)
            # The run that held the lock before may have renamed or removed the file that was opened here.
            if file.is_there():
                return file
        except BlockingIOError:
            file.close()
            break
        except BaseException:
            if file.is_new:
                file.remove()
            file.close()
            raise
        file.close()
    raise DestinationError("another run is writing it", file=path, hint="wait for that run, or stop it", code="locked")


def create_part(path: Path) -> OpenFile:
    """A new part file. DestinationError where something else has taken its name."""
    try:
        return OpenFile(path, open_plain(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), is_new=True)
    except FileExistsError:
        raise foreign(path) from None


def open_part(path: Path) -> OpenFile | None:
    """The part file that an earlier run left; None where there is none."""
    if (there := _status(path, follow_symlinks=False)) is None:
        return None
    _check_sibling(path, there)
    with suppress(FileNotFoundError):
        return OpenFile(path, open_plain(path, os.O_RDWR), is_new=False)
    return None


def foreign(path: Path) -> DestinationError:
    """The error for a file that has the name of an unfinished output and was not written by streamconv."""
    return DestinationError(
        "was not written by streamconv, and is not touched",
        file=path,
        hint=f"move it away, or {_ELSEWHERE}",
        code="part-foreign",
    )


def check_folder(place: Place) -> None:
    """DestinationError where the folder of a file that is written last would not take it: better told first."""
    with failures(place.path):
        folder = place.path.parent
        folder.stat()
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "")


def check_room(places: Sequence[Place], sizes: Sequence[int]) -> None:
    """DestinationError, with the numbers, where all of them together need more than their filesystem has.

    What unfinished outputs take already, or have as finished ones, is not needed again.
    """
    with failures(places[0].path):
        needed = sum(max(0, size - _held_nbytes(one)) for one, size in zip(places, sizes, strict=True))
        volume = os.statvfs(places[0].path.parent)
    available = (volume.f_bfree if os.geteuid() == 0 else volume.f_bavail) * volume.f_frsize
    if volume.f_blocks > 0 and needed > available:
        raise _too_little(needed, available, places[0].path)


def reserve_space(fd: int, nbytes: int, path: Path) -> None:
    """Gives the open file its full size and, where the filesystem can, the disk space for it.

    Raises DestinationError with the numbers where there is too little; OSError on other faults.
    """
    needed = max(0, nbytes - os.fstat(fd).st_blocks * 512)
    volume = os.fstatvfs(fd)
    available = volume.f_bavail * volume.f_frsize
    is_known = volume.f_blocks > 0  # some network filesystems say nothing

    # Asking for more than there is would take all of it from everybody else until the refusal.
    if is_known and needed > volume.f_bfree * volume.f_frsize:
        raise _too_little(needed, available, path)
    try:
        is_reserved = reserve(fd, nbytes)
    except OSError as exc:
        if exc.errno not in _NO_ROOM:
            raise
        volume = os.fstatvfs(fd)  # as it is now: another may have taken it
        available = volume.f_bavail * volume.f_frsize
        if needed > available:
            raise _too_little(needed, available, path) from None
        raise failure(exc, path) from None  # such as a quota: the numbers would say that there is room
    if not is_reserved and is_known and needed > available:
        raise _too_little(needed, available, path)


def _too_little(needed: int, available: int, path: Path) -> DestinationError:
    return DestinationError(
        f"needs {needed:,} bytes, and its filesystem has {available:,} free",
        file=path,
        hint=f"free some space, or {_ELSEWHERE}",
        code="no-space",
    )


def _held_nbytes(place: Place) -> int:
    """Disk space that an earlier run has taken for this output."""
    if (part := _status(place.part, follow_symlinks=False)) is not None:
        return part.st_blocks * 512
    published = _status(place.path) if os.path.lexists(place.journal) else None
    return published.st_size if published is not None else 0


def _check_sibling(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DestinationError(
            "is in the place of the unfinished output", file=path, hint="move it away", code="part-foreign"
        )


def _open_or_create(path: Path) -> OpenFile | None:
    """None where it vanished between two looks."""
    with suppress(FileExistsError):
        return OpenFile(path, open_plain(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), is_new=True)
    return open_part(path)


def _lock(fd: int, deadline: float) -> bool:
    """True once this process has the lock; BlockingIOError where another still has it at the deadline."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOCK_PAUSE_SECONDS)
        except OSError as exc:
            if exc.errno in _NO_LOCKS:
                return False
            raise
        else:
            return True


def _status(path: Path, *, follow_symlinks: bool = True) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return path.stat(follow_symlinks=follow_symlinks)
    return None
