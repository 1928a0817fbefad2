"""A disk that loses what was not synced.

Model: a file's writes and changes of size since its last sync, and a directory's changes of names since its last sync,
each survive or vanish independently of all others; a write may survive by half. Nothing orders them. What was synced
stays. This is harsher than any journaling filesystem.
"""

from __future__ import annotations

import errno
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fault.calls import Call


class PowerCut(KeyboardInterrupt):
    """The power went. As at an interrupt, nothing is done afterwards."""


@dataclass
class _File:
    """One inode: what is on the disk, and what is only on its way."""

    keeper: Path  # a second link, so that the inode number stays
    data: bytearray = field(default_factory=bytearray)
    mtime_ns: int = 0
    pending: list[tuple[int, bytes] | int] = field(default_factory=list)  # (offset, bytes), or a new size


class Disk:
    """Follows the calls of runs in one directory, cuts the power, and shows what a later start would find."""

    def __init__(self, directory: Path, keepers: Path, chance: random.Random) -> None:
        self._directory, self._keepers, self._chance = directory, keepers, chance
        keepers.mkdir()
        self._files: dict[int, _File] = {}
        self._names: dict[str, int] = {}
        self._pending_names: list[dict[str, int | None]] = []
        self._calls_left = 0
        self.n_calls = 0
        self.adopt()

    def adopt(self) -> None:
        """What lies in the directory now is on the disk."""
        self._pending_names.clear()
        self._names.clear()
        for path in self._directory.iterdir():
            self._names[path.name] = self._know(path)
            file = self._files[self._names[path.name]]
            file.data, file.mtime_ns = bytearray(path.read_bytes()), path.stat().st_mtime_ns
            file.pending.clear()

    def cut_after(self, n_calls: int) -> None:
        """The next run's power goes after this many of its calls."""
        self._calls_left = n_calls
        self.n_calls = 0

    def handle(self, call: Call) -> Any:
        """A handler for `calls.watched`."""
        if call.name == "open" and call.arguments[1] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "this disk is a model: no need to wait for the real one")
        if call.name == "sync_file_range":
            return 0
        if not call.changes_something or call.name == "flock":
            return call.do()
        if self.n_calls >= self._calls_left:
            raise PowerCut
        self.n_calls += 1
        if call.name in ("fsync", "fdatasync"):
            return self._sync(call)
        before = call.path
        existed = Path(before).exists()
        result = call.do()
        self._follow(call, before, existed, result)
        return result

    def _follow(self, call: Call, path: str, existed: bool, result: Any) -> None:
        name = Path(path).name
        match call.name:
            case "open" if not existed:
                self._pending_names.append({name: self._know(Path(path))})
            case "pwrite":
                fd, data, offset = call.arguments
                self._file(fd).pending.append((offset, bytes(data[:result])))
            case "ftruncate":
                self._file(call.arguments[0]).pending.append(call.arguments[1])
            case "fallocate" if call.arguments[1] == 0:
                self._file(call.arguments[0]).pending.append(call.arguments[3].value)
            case "unlink":
                self._pending_names.append({name: None})
            case "replace" | "rename" | "renameat2":
                target = os.fsdecode(call.arguments[3 if call.name == "renameat2" else 1])
                inode = Path(target).stat().st_ino
                self._pending_names.append({name: None, Path(target).name: inode})

    def _sync(self, call: Call) -> None:
        if Path(call.path) == self._directory:
            for change in self._pending_names:
                _apply_names(self._names, change)
            self._pending_names.clear()
            return
        file = self._file(call.arguments[0])
        for write in file.pending:
            _apply(file.data, write)
        file.pending.clear()
        file.mtime_ns = os.fstat(call.arguments[0]).st_mtime_ns

    def lose(self, survival: float) -> None:
        """Leave in the directory what a start after the cut could find: each unsynced change has this chance."""
        for change in self._pending_names:
            if self._chance.random() < survival:
                _apply_names(self._names, change)
        self._pending_names.clear()
        for path in self._directory.iterdir():
            path.unlink()
        for inode in self._files.keys() - self._names.values():
            self._files.pop(inode).keeper.unlink()
        for file in self._files.values():
            for write in file.pending:
                if self._chance.random() < survival:
                    _apply(file.data, write)
                elif not isinstance(write, int) and self._chance.random() < survival:
                    offset, data = write
                    _apply(file.data, (offset, data[: self._chance.randrange(len(data))]))
            file.pending.clear()
            with file.keeper.open("r+b") as kept:
                kept.write(file.data)
                kept.truncate()
            os.utime(file.keeper, ns=(file.mtime_ns, file.mtime_ns))
        for name, inode in self._names.items():
            os.link(self._files[inode].keeper, self._directory / name)

    def _know(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self._files:
            keeper = self._keepers / str(inode)
            os.link(path, keeper)
            self._files[inode] = _File(keeper)
        return inode

    def _file(self, fd: int) -> _File:
        return self._files[os.fstat(fd).st_ino]


def _apply(data: bytearray, change: tuple[int, bytes] | int) -> None:
    """A write, or a new size; a gap is zeros."""
    end = change if isinstance(change, int) else change[0] + len(change[1])
    if len(data) < end:
        data.extend(bytes(end - len(data)))
    if isinstance(change, int):
        del data[end:]
    else:
        data[change[0] : end] = change[1]


def _apply_names(names: dict[str, int], change: dict[str, int | None]) -> None:
    for name, inode in change.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode
