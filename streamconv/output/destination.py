"""The destination of an output: what may be replaced, whether another run is writing it, whether there is room.

This module names every file that a run writes, refuses bad destinations before any work, locks the destination, renames
the finished file, and turns system errors into messages. Files that the run reads are never overwritten. Another
existing file is replaced only if that is allowed, in one step, once the new one is complete. A part file is touched
only under the lock on its journal, and only if that journal shows that streamconv wrote it.
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
_LOCK_ATTEMPTS = 100  # each fails only if another run starts or ends at that very moment
# A batch takes the lock for a moment to test it; a run holds it as long as it writes.
_LOCK_PATIENCE_SECONDS = 0.25
_LOCK_PAUSE_SECONDS = 0.01
_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

_ELSEWHERE = "choose another path"
_AGAIN = "run the same command again to continue"


class _Words(NamedTuple):
    """The message, hint and code for an errno."""

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
    errno.ENOTDIR: _Words("a component of its path is not a directory", _ELSEWHERE, code="folder-missing"),
    errno.EISDIR: _Words("is a directory", "give a file in it", code="is-folder"),
    errno.ELOOP: _Words("is a loop of symbolic links", _ELSEWHERE, code="link-loop"),
    errno.ENAMETOOLONG: _Words("its name is too long", "choose a shorter one", code="name-too-long"),
    errno.EMFILE: _Words(
        "the limit on open files is too low for this many parts",
        "raise it with ulimit -n, or make larger parts",
        code="open-files-limit",
    ),
    errno.EEXIST: _Words("exists already", "--force replaces it once the new file is complete", code="exists"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """The three names of an output file: the final one, the part file's, and the journal's."""

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
        """Raise DestinationError if the final name exists."""
        if os.path.lexists(self.path):
            raise failure(FileExistsError(errno.EEXIST, ""), self.path)


@dataclass(slots=True)
class OpenFile:
    """An open file of a run.

    Attributes:
        path: Its name.
        fd: Its descriptor; -1 once it is closed.
        is_new: Whether this run created it.
        is_locked: Whether this run holds a lock on it; False on a filesystem without locks.
    """

    path: Path
    fd: int
    is_new: bool
    is_locked: bool = False

    def status(self) -> os.stat_result:
        return os.fstat(self.fd)

    def is_there(self) -> bool:
        """Whether `path` still names the open file."""
        there = _status(self.path, follow_symlinks=False)
        return there is not None and os.path.samestat(there, self.status())

    def take_name(self, path: Path, *, replaces: bool) -> None:
        """Rename this file to `path`.

        Args:
            path: The new name.
            replaces: Whether an existing file may be replaced.

        Raises:
            OSError: `path` exists and must not be replaced, or the system refuses.
            DestinationError: Another program has removed or replaced this file.
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
        """Remove the name if it still belongs to the open file. A lock is held until `close`."""
        unlink_own(self.path, self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def failure(exc: OSError, path: Path) -> DestinationError:
    """The DestinationError for a system error; `path` is named if the error does not name a file."""
    words = _WORDS.get(exc.errno or 0, _Words(exc.strerror or str(exc), None, code="cannot-write"))
    # For an open file the name is its number, and for a missing folder it is the first file that was created in it.
    is_named = isinstance(exc.filename, str | Path) and exc.errno != errno.ENOENT
    return DestinationError(words.message, file=exc.filename if is_named else path, hint=words.hint, code=words.code)


@contextmanager
def failures(path: Path) -> Iterator[None]:
    """Turn every OSError inside the `with` into a DestinationError."""
    try:
        yield
    except OSError as exc:
        raise failure(exc, path) from exc


def output_path(dst: str | Path | None, default: str, *, name: str, outtype: str) -> Path:
    """The path of the output: `dst` with its fields filled in, or `default` in the current directory if it is None.

    Args:
        dst: A path with fields, as in a jobs file and in --outfile of llama.cpp's converters: {name}, {outtype} and
            {ftype}, and {OUTTYPE} and {FTYPE} for capitals. Other braces are part of the name.
        default: The path to use without `dst`.
        name: The model's name.
        outtype: The file's type.

    Raises:
        DestinationError: `dst` ends in a slash.
    """
    if isinstance(dst, str) and dst.endswith(os.sep):  # Path would drop the slash
        raise failure(IsADirectoryError(errno.EISDIR, ""), Path(dst))
    if dst is None:
        return Path(default)
    values = {"name": name, "outtype": outtype, "ftype": outtype, "OUTTYPE": outtype.upper(), "FTYPE": outtype.upper()}
    return Path(_FIELD.sub(lambda match: values[match[1]], str(dst)))


def claim(paths: Sequence[Path], sources: Mapping[FileId, Path]) -> list[Place]:
    """The names of every file that one run writes.

    Args:
        paths: The final names.
        sources: The files that the run reads.

    Raises:
        DestinationError: Two names are the same, or as `resolve`.
    """
    places = [resolve(path, sources) for path in paths]
    for name, count in Counter(name for place in places for name in place.names).items():
        if count > 1:
            raise DestinationError("would be written twice", file=name, hint=_ELSEWHERE, code="same-output")
    return places


def resolve(dst: Path, sources: Mapping[FileId, Path] = MappingProxyType({})) -> Place:
    """The names for an output. A symbolic link is followed: its target is the file that will be replaced.

    Args:
        dst: The final name.
        sources: The files that the run reads.

    Raises:
        DestinationError: `dst` can never be written, because it is a directory, a pipe, a device or one of `sources`,
            or one of its other names is not a regular file.
    """
    try:
        found = _status(dst)
        place = Place(Path(os.path.realpath(dst)))
        taken = [status for path in place.names if (status := _status(path))]
        siblings = {path: status for path in place.names[1:] if (status := _status(path, follow_symlinks=False))}
    except OSError as exc:
        raise failure(exc, dst) from None
    except ValueError as exc:  # a NUL, or characters that the system's encoding does not have
        raise DestinationError(
            f"is not a file name: {exc}", file=repr(str(dst)), hint=_ELSEWHERE, code="file-name"
        ) from None
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise failure(IsADirectoryError(errno.EISDIR, ""), dst)
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise DestinationError(
            "is a pipe or a device",
            file=dst,
            hint="outputs are not written in order: name a regular file",
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
    """Write a small text file in UTF-8, as `write_bytes` does."""
    write_bytes(place, text.encode(), replaces=replaces)


def write_bytes(place: Place, data: bytes, *, replaces: bool) -> None:
    """Write a small file completely, or leave what was there before.

    Args:
        place: The names of the file.
        data: Its content. If the file already has it, nothing is written.
        replaces: Whether a file with other content may be replaced.

    Raises:
        DestinationError: The file cannot or must not be written.
    """
    with failures(place.path), suppress(FileNotFoundError):
        if place.path.stat().st_size == len(data) and place.path.read_bytes() == data:
            return  # the run that this one resumes wrote it
    with failures(place.path), ExitStack() as stack:
        part = open_locked(place.part)
        stack.callback(part.close)
        stack.callback(part.remove)  # if it still has that name
        os.ftruncate(part.fd, 0)
        write_all(part.fd, memoryview(data), 0)
        os.fsync(part.fd)
        part.take_name(place.path, replaces=replaces)


def open_locked(path: Path) -> OpenFile:
    """The file at `path`, opened or created, and locked.

    Raises:
        DestinationError: Another run holds the lock.
    """
    deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
    for _ in range(_LOCK_ATTEMPTS):
        file = _open_or_create(path)
        if file is None:
            continue
        try:
            file.is_locked = _lock(file.fd, deadline)
            # The previous holder of the lock may have renamed or removed the file that was opened here.
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
    """A new part file; DestinationError if its name is taken."""
    try:
        return OpenFile(path, open_plain(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), is_new=True)
    except FileExistsError:
        raise foreign(path) from None


def open_part(path: Path) -> OpenFile | None:
    """The part file of an earlier run; None if there is none."""
    if (there := _status(path, follow_symlinks=False)) is None:
        return None
    _check_sibling(path, there)
    with suppress(FileNotFoundError):
        return OpenFile(path, open_plain(path, os.O_RDWR), is_new=False)
    return None


def foreign(path: Path) -> DestinationError:
    """The error for a file with the name of a part file or journal that streamconv did not write."""
    return DestinationError(
        "was not written by streamconv, so it is left as it is",
        file=path,
        hint=f"move it away, or {_ELSEWHERE}",
        code="part-foreign",
    )


def check_folder(place: Place) -> None:
    """Check, before any work, that the folder of a file that is written at the end is writable.

    Raises:
        DestinationError: It is missing or not writable.
    """
    with failures(place.path):
        folder = place.path.parent
        folder.stat()
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "")


def check_room(places: Sequence[Place], sizes: Sequence[int]) -> None:
    """Check that there is enough disk space for all outputs of a run together.

    Space that earlier runs have already taken for these outputs counts as available.

    Args:
        places: The outputs; all are on one filesystem.
        sizes: Their sizes in bytes.

    Raises:
        DestinationError: There is not enough; the message has the numbers.
    """
    with failures(places[0].path):
        needed = sum(max(0, size - _held_nbytes(one)) for one, size in zip(places, sizes, strict=True))
        volume = os.statvfs(places[0].path.parent)
    available = (volume.f_bfree if os.geteuid() == 0 else volume.f_bavail) * volume.f_frsize
    if volume.f_blocks > 0 and needed > available:
        raise _too_little(needed, available, places[0].path)


def reserve_space(fd: int, nbytes: int, path: Path) -> None:
    """Give the open file its full size and, if the filesystem supports that, its disk space.

    Args:
        fd: The file.
        nbytes: Its full size.
        path: Its name, for messages.

    Raises:
        DestinationError: There is not enough space; the message has the numbers.
        OSError: Another fault.
    """
    needed = max(0, nbytes - os.fstat(fd).st_blocks * 512)
    volume = os.fstatvfs(fd)
    available = volume.f_bavail * volume.f_frsize
    is_known = volume.f_blocks > 0  # some network filesystems report nothing

    # A request for more than there is would occupy all free space until it fails.
    if is_known and needed > volume.f_bfree * volume.f_frsize:
        raise _too_little(needed, available, path)
    try:
        is_reserved = reserve(fd, nbytes)
    except OSError as exc:
        if exc.errno not in _NO_ROOM:
            raise
        volume = os.fstatvfs(fd)  # once more: another program may have taken the space
        available = volume.f_bavail * volume.f_frsize
        if needed > available:
            raise _too_little(needed, available, path) from None
        raise failure(exc, path) from None  # such as a quota, for which the numbers would be misleading
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
    """The disk space that an earlier run has already taken for this output, in bytes."""
    if (part := _status(place.part, follow_symlinks=False)) is not None:
        return part.st_blocks * 512
    published = _status(place.path) if os.path.lexists(place.journal) else None
    return published.st_size if published is not None else 0


def _check_sibling(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DestinationError(
            "is not a regular file, but has the name of the unfinished output",
            file=path,
            hint="move it away",
            code="part-foreign",
        )


def _open_or_create(path: Path) -> OpenFile | None:
    """The file at `path`, opened or created; None if it vanished in between."""
    with suppress(FileExistsError):
        return OpenFile(path, open_plain(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), is_new=True)
    return open_part(path)


def _lock(fd: int, deadline: float) -> bool:
    """Lock the file; False if its filesystem has no locks. BlockingIOError if another process keeps it too long."""
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
