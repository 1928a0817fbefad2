"""Where an output will lie: what may be replaced, who is writing, whether there is room.

Owns: the names of the output and its siblings, refusals before any work, the lock, the words for what the system says.
Does not own: the content (sink.py), the journal's (journal.py).
Invariant: nothing here changes an existing output, and a part file is touched only under its lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from streamconv.directio import UNSUPPORTED, open_plain, reserve, unlink_own
from streamconv.errors import DestinationError

_LOCK_ATTEMPTS = 100  # each lost to another run that finished or began at that very moment
_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

_ELSEWHERE = "choose another place with -o"
_WORDS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("no space left on its filesystem", "free some, then run it again with --resume"),
    errno.EDQUOT: ("the quota on its filesystem is used up", "free some, then run it again with --resume"),
    errno.EIO: ("the disk failed while writing", "see the system's log; --resume goes on where it stopped"),
    errno.EFBIG: ("its filesystem, or ulimit -f, does not take a file of this size", _ELSEWHERE),
    errno.EROFS: ("its filesystem is read-only", _ELSEWHERE),
    errno.EACCES: ("permission denied", _ELSEWHERE),
    errno.EPERM: ("the system does not allow it to be written", _ELSEWHERE),
    errno.ENOENT: ("the folder for it does not exist", "make it first"),
    errno.ENOTDIR: ("a part of its path is not a directory", _ELSEWHERE),
    errno.EISDIR: ("is a directory", "name a file in it"),
    errno.ELOOP: ("is a loop of symbolic links", _ELSEWHERE),
    errno.ENAMETOOLONG: ("its name is too long to add .part.journal", "choose a shorter one with -o"),
    errno.EMFILE: (
        "the limit on open files is too low for this many parts",
        "raise it with ulimit -n, or make larger parts",
    ),
    errno.EEXIST: ("exists already", "--force replaces it, once the new file is complete"),
}


@dataclass(frozen=True, slots=True)
class Output:
    """The three names of one output: where it will be, and its siblings while it is made."""

    path: Path

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def journal(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part.journal")

    def refuse_existing(self) -> None:
        if os.path.lexists(self.path):
            raise failure(FileExistsError(errno.EEXIST, ""), self.path)


@dataclass(slots=True)
class Part:
    """The part file, open. `is_new`: it was not there before. `is_locked`: false where the filesystem has no locks."""

    path: Path
    fd: int
    is_new: bool
    is_locked: bool

    def status(self) -> os.stat_result:
        return os.fstat(self.fd)

    def remove(self) -> None:
        """The name goes, if it is still ours; the lock stays until `close`."""
        unlink_own(self.path, self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def failure(exc: OSError, path: Path) -> DestinationError:
    """What the system said, in our words; `path` where it did not say of which file."""
    words, hint = _WORDS.get(exc.errno or 0, (exc.strerror or str(exc), None))
    return DestinationError(words, file=exc.filename or path, hint=hint)


@contextmanager
def failures(path: Path) -> Iterator[None]:
    """Every OSError inside becomes a DestinationError."""
    try:
        yield
    except OSError as exc:
        raise failure(exc, path) from exc


def resolve(dst: Path, sources: Iterable[Path]) -> Output:
    """The names for `dst`. A symbolic link is followed: what it points to is what will be replaced.

    Raises DestinationError where `dst` could never be written: a directory, a pipe, a device, one of `sources`.
    """
    try:
        found = _status(dst)
        output = Output(Path(os.path.realpath(dst)))
        taken = [status for path in (output.path, output.part, output.journal) if (status := _status(path))]
    except OSError as exc:
        raise failure(exc, dst) from None
    except ValueError as exc:  # a NUL, or characters that the system's encoding lacks
        raise DestinationError(f"is not a file name: {exc}", file=repr(str(dst)), hint=_ELSEWHERE) from None
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise failure(IsADirectoryError(errno.EISDIR, ""), dst)
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise DestinationError(
            "is a pipe or a device", file=dst, hint="the output is not written in order: name a file"
        )
    for source in sources:
        if (status := _status(source)) and any(os.path.samestat(status, other) for other in taken):
            raise DestinationError(f"is a file of the source, or would be written over one: {source}", file=dst)
    return output


def lock_part(path: Path) -> Part:
    """The part file at `path`, locked, made where it was missing. DestinationError where another run has it."""
    for _ in range(_LOCK_ATTEMPTS):
        part = _open_part(path)
        if part is None:
            continue
        try:
            part.is_locked = _lock(part.fd)
            # Whoever held the lock before may have renamed or removed the file that we opened.
            if (there := _status(path, follow_symlinks=False)) and os.path.samestat(there, os.fstat(part.fd)):
                return part
        except BlockingIOError:
            part.close()
            break
        except BaseException:
            if part.is_new:
                part.remove()
            part.close()
            raise
        part.close()
    raise DestinationError("another run is writing it", file=path, hint="wait for that one, or stop it")


def reserve_space(fd: int, nbytes: int, path: Path) -> None:
    """Gives the open file its full size and, where the filesystem can, the disk space for it.

    Raises DestinationError with the numbers where there is too little; OSError on other faults.
    """
    needed = max(0, nbytes - os.fstat(fd).st_blocks * 512)
    volume = os.fstatvfs(fd)
    available = volume.f_bavail * volume.f_frsize
    is_known = volume.f_blocks > 0  # some network filesystems say nothing

    def too_little() -> DestinationError:
        return DestinationError(
            f"needs {needed:,} bytes, and its filesystem has {available:,} free",
            file=path,
            hint=f"free some, or {_ELSEWHERE}",
        )

    # Asking for more than there is would take all of it from everybody else until the refusal.
    if is_known and needed > volume.f_bfree * volume.f_frsize:
        raise too_little()
    try:
        is_reserved = reserve(fd, nbytes)
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            raise too_little() from None
        raise
    if not is_reserved and is_known and needed > available:
        raise too_little()


def _open_part(path: Path) -> Part | None:
    """None where it vanished between two looks."""
    with suppress(FileExistsError):
        return Part(path, open_plain(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), is_new=True, is_locked=False)
    if (there := _status(path, follow_symlinks=False)) is None:
        return None
    if not stat.S_ISREG(there.st_mode):
        raise DestinationError("stands where the unfinished output would be", file=path, hint="move it away")
    with suppress(FileNotFoundError):
        return Part(path, open_plain(path, os.O_RDWR), is_new=False, is_locked=False)
    return None


def _lock(fd: int) -> bool:
    """True once we have the lock; BlockingIOError where another has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in _NO_LOCKS:
            return False
        raise
    return True


def _status(path: Path, *, follow_symlinks: bool = True) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return path.stat(follow_symlinks=follow_symlinks)
    return None
