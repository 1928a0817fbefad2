r"""The journal of an unfinished output: what the output is made from, and how much of it is on the disk.

A line of `OUT.part.journal` is `<digest> <JSON>\n`. The first line is the header; each later line is a record that
replaces the one before it. Every digest covers its line and the previous digest, so a torn, missing or foreign line
ends the journal there: every line that is read back was written completely, by one run and those that resumed it.
sink.py syncs the data before it writes a record.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamconv.output.directio import open_plain, reserve_beyond_end, sync_data, unlink_own, write_all

VERSION = 1
MAX_LINE_NBYTES = 16 << 20  # far more than a header that names every shard of a large model
_DIGEST_NBYTES = 16
_RECORD_ALLOWANCE_NBYTES = 1024  # disk space reserved for one record
_MAX_NAMED_DIFFERENCES = 4
_MAX_SHOWN_CHARS = 40


@dataclass(frozen=True, slots=True)
class Header:
    """Everything that determines the bytes of the output.

    Attributes:
        nbytes: The size of the output.
        identity: The value of every input and option, by name.
        version: Of the journal's format.
    """

    nbytes: int
    identity: Mapping[str, str]
    version: int = VERSION

    def differences(self, other: Header) -> str:
        """The differences from `other`, for a message, with this header's value first; empty if there are none."""
        mine, theirs = self._items(), other._items()
        names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
        named = [_change(name, mine.get(name), theirs.get(name)) for name in names[:_MAX_NAMED_DIFFERENCES]]
        if len(names) > len(named):
            named.append(f"{len(names) - len(named)} more")
        return ", ".join(named)

    def _items(self) -> dict[str, str]:
        return {**self.identity, "output size": str(self.nbytes), "journal format": str(self.version)}


@dataclass(frozen=True, slots=True)
class Stamp:
    """Identifies a finished file: a rename changes none of these."""

    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        """The stamp of a file with this status."""
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Record:
    """How far an output has got.

    Attributes:
        prefix_nbytes: This many bytes from the start are on the disk.
        state: The caller's data about exactly these bytes.
        finished: Set once the whole file is on the disk and only has to be renamed.
    """

    prefix_nbytes: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)
    finished: Stamp | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """The valid part of a journal: its header and last record, and the offset and digest at the end of that record."""

    header: Header
    record: Record
    end: int
    digest: bytes


def read(path: Path) -> Contents | None:
    """The valid part of the journal at `path`, up to its first invalid line; None if there is no valid header.

    Raises:
        OSError: The file exists, but cannot be read.
    """
    try:
        fd = open_plain(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    contents = None
    with os.fdopen(fd, "rb") as file:
        for payload, end, digest in _valid_lines(iter(lambda: file.readline(MAX_LINE_NBYTES), b"")):
            try:
                if contents is None:
                    contents = Contents(_header(json.loads(payload)), Record(), end, digest)
                else:
                    contents = Contents(
                        contents.header, _record(json.loads(payload), contents.header.nbytes), end, digest
                    )
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                break
    return contents


def is_torn(path: Path) -> bool:
    """Whether a file without a valid header can be a journal whose header a power cut left empty or incomplete.

    Raises:
        OSError: The file cannot be read.
    """
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        return not file.read(2 * _DIGEST_NBYTES).strip(b"0123456789abcdef\0")


class Journal:
    """An open journal, ready for the next record. All methods raise the system's OSError."""

    def __init__(self, path: Path, fd: int, end: int, digest: bytes) -> None:
        self._path = path
        self._fd = fd
        self._end = end
        self._digest = digest

    @classmethod
    def begin(cls, path: Path, fd: int, header: Header) -> Journal:
        """Start a journal in the open file at `path`, replacing its content; return once the header is on the disk.

        The journal owns `fd` from then on.
        """
        journal = cls(path, fd, 0, b"")
        if os.fstat(fd).st_size:
            os.ftruncate(fd, 0)
        journal._append(asdict(header))
        return journal

    @classmethod
    def reopen(cls, path: Path, fd: int, contents: Contents) -> Journal:
        """Continue the journal that `contents` was read from, overwriting what follows its last valid record."""
        return cls(path, fd, contents.end, contents.digest)

    def reserve(self, n_records: int) -> None:
        """Reserve disk space for `n_records` records, so that a run with its space is not stopped by a full disk."""
        reserve_beyond_end(self._fd, self._end + n_records * _RECORD_ALLOWANCE_NBYTES)

    def append(self, record: Record) -> None:
        """Append a record and return once it is on the disk. The caller must have synced the bytes that it covers."""
        self._append(asdict(record))

    def remove(self) -> None:
        """Remove the file, unless its name now belongs to another run."""
        unlink_own(self._path, self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, value: Mapping[str, Any]) -> None:
        payload = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
        digest = _digest(self._digest, payload)
        line = memoryview(digest.hex().encode() + b" " + payload + b"\n")
        write_all(self._fd, line, self._end)
        sync_data(self._fd)
        self._end += len(line)
        self._digest = digest


def _valid_lines(lines: Iterator[bytes]) -> Iterator[tuple[bytes, int, bytes]]:
    """(JSON, end of the line in the file, digest) of each line up to the first invalid one."""
    digest, end = b"", 0
    for line in lines:
        found, _, payload = line.removesuffix(b"\n").partition(b" ")
        digest = _digest(digest, payload)
        if not line.endswith(b"\n") or found != digest.hex().encode():
            return
        end += len(line)
        yield payload, end, digest


def _digest(previous: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_DIGEST_NBYTES, key=previous).digest()


def _header(value: dict[str, Any]) -> Header:
    """The header in a line, of any version; TypeError if no version writes such a line."""
    identity, version = value.get("identity", {}), value["version"]
    if type(version) is not int or not all(isinstance(item, str) for item in identity.values()):
        raise TypeError
    return Header(value.get("nbytes", 0), identity, version)


def _record(value: dict[str, Any], nbytes: int) -> Record:
    """The record in a line; TypeError if no version writes such a line."""
    prefix, state, finished = value["prefix_nbytes"], value["state"], value["finished"]
    if type(prefix) is not int or not 0 <= prefix <= nbytes or not isinstance(state, dict):
        raise TypeError
    return Record(prefix, state, None if finished is None else Stamp(**finished))


def _change(name: str, old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return f"{name} ({'removed' if new is None else 'added'})"
    if max(len(old), len(new)) > _MAX_SHOWN_CHARS:
        return f"{name} (changed)"
    return f"{name} (was {old}, is {new})"
