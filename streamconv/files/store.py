"""Where sources come from: a `Store` names files and opens them as `Blob`s, which give bytes at positions.

A folder of this machine is one store (local.py); whatever else can list names and read ranges of bytes can be another,
such as an archive, a bucket or memory. Everything that is read of a model comes through here: config, index, tokenizer,
templates, model card, shards, adapters, GGUF bases.
"""

from __future__ import annotations

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from streamconv.files.window import Mapped

Buffer = NDArray[np.uint8] | bytearray | memoryview  # one dimension of bytes


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells that a blob is still the one that was opened, as it was then.

    Attributes:
        lasting: What stays the same until the bytes change, on another day and after a restart of the machine: a size
            and a time, or an ETag. A resumed run compares it.
        momentary: What must stay the same while the blob is open as well, such as device and inode.
    """

    lasting: str
    momentary: tuple[int, ...] = ()


class Blob(ABC):
    """A file of a store, open for reading at positions from any number of threads. A context manager that closes it.

    Attributes:
        path: What messages call it; its last part is its name.
        nbytes: Its size when it was opened.
        identity: What it was when it was opened.
    """

    path: Place
    nbytes: int
    identity: Identity

    @abstractmethod
    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` from byte `offset` on.

        Raises:
            SourceError: The blob ends first, or it cannot be read.
        """

    @abstractmethod
    def check_unchanged(self) -> None:
        """SourceError if it is no longer what it was when it was opened."""

    def view(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """`nbytes` from byte `offset` on, read-only, valid inside the `with`; here a copy that was read for it.

        Raises:
            SourceError: The blob ends first, or it cannot be read.
        """
        return self._copied(offset, nbytes)

    @contextmanager
    def _copied(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        buffer = bytearray(nbytes)
        self.read_into(offset, buffer)
        yield memoryview(buffer).toreadonly()

    @property
    def is_mapped(self) -> bool:
        """Whether `map` is the better way to read it."""
        return False

    def map(self, offset: int, nbytes: int) -> Mapped | None:
        """The bytes where they already lie, from a multiple of 2 MiB on; None where they can only be read.

        Raises:
            OSError: Not all of them are there; `read_into` says what is wrong.
        """
        return None

    def close(self) -> None:
        """Give back what reading took; no method may be called after it."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Store(ABC):
    """A set of files under names, which may have folders in them, as `a/b.json`.

    Attributes:
        name: What a model in it is called where nothing else says so.
    """

    name: str

    @abstractmethod
    def names(self, folder: str = "") -> Iterable[str]:
        """The names of the files in `folder`, of the store itself by default, without those in folders inside it."""

    @abstractmethod
    def open(self, name: str) -> Blob:
        """The file of this name. SourceError where there is none, or it cannot be opened."""

    def has(self, name: str) -> bool:
        """Whether there is a file of this name, or a folder."""
        folder, _, last = name.rpartition("/")
        return last in self.names(folder) or self.is_folder(name)

    def is_folder(self, name: str) -> bool:
        return name == "" or any(True for _ in self.names(name))

    def show(self, name: str) -> str:
        """What messages call the file of this name."""
        return posixpath.join(self.name, name) if name else self.name

    def local_path(self, name: str) -> Path | None:
        """The file on this machine that has this name's content; None where that has no path here."""
        return None


class Place(Protocol):
    """Where a source lies, or would: a name in a store (`StorePath`), or a path of this machine (`pathlib.Path`)."""

    @property
    def name(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def parent(self) -> Place: ...
    def __truediv__(self, name: str, /) -> Place: ...
    def exists(self) -> bool: ...
    def is_file(self) -> bool: ...
    def is_dir(self) -> bool: ...
    def glob(self, pattern: str, /) -> Iterable[Place]: ...


@dataclass(frozen=True, slots=True)
class StorePath:
    """A name in a store, used as a path is; the store itself where the name is empty."""

    store: Store
    key: str = ""

    @property
    def name(self) -> str:
        return posixpath.basename(self.key) or self.store.name

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def parent(self) -> StorePath:
        return StorePath(self.store, posixpath.dirname(self.key))

    def __truediv__(self, name: str, /) -> StorePath:
        return StorePath(self.store, posixpath.join(self.key, name))

    def __str__(self) -> str:
        return self.store.show(self.key)

    def exists(self) -> bool:
        return self.key == "" or self.store.has(self.key)

    def is_file(self) -> bool:
        return self.exists() and not self.is_dir()

    def is_dir(self) -> bool:
        return self.store.is_folder(self.key)

    def glob(self, pattern: str, /) -> Iterator[StorePath]:
        """The files whose names fit `pattern`, here or, where it begins with a folder, there."""
        folder, _, last = pattern.rpartition("/")
        place = self / folder if folder else self
        return (place / name for name in place.store.names(place.key) if fnmatchcase(name, last))

    def open(self) -> Blob:
        return self.store.open(self.key)
