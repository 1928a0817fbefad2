"""Where sources come from: a `Store` lists files and opens them as `Blob`s, which read bytes at any position.

A local folder is one kind of store (local.py). Anything else that can list names and read ranges of bytes can be
another, such as an archive, a bucket or memory. All files of a model are read through these classes: config, index,
tokenizer, templates, model card, shards, adapters and GGUF bases.
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
    """Identifies a blob and its state when it was opened.

    Attributes:
        lasting: Stays the same until the bytes change, also on another day and after a restart of the machine: a
            size and a time, or an ETag. A resumed run compares it.
        momentary: Must also stay the same while the blob is open, such as device and inode.
    """

    lasting: str
    momentary: tuple[int, ...] = ()


class Blob(ABC):
    """A file of a store, open for reads at any position from any number of threads. A context manager that closes it.

    Attributes:
        path: Its path as messages show it; the last component is its name.
        nbytes: Its size in bytes when it was opened.
        identity: Its identity when it was opened.
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
        """Check that the blob has not changed since it was opened.

        Raises:
            SourceError: It has.
        """

    def view(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """`nbytes` bytes from `offset` on, read-only and valid inside the `with`. By default they are a copy.

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
        """Whether `map` should be used instead of `read_into`."""
        return False

    def map(self, offset: int, nbytes: int) -> Mapped | None:
        """The mapped bytes; None if they can only be read.

        Args:
            offset: A multiple of 2 MiB.
            nbytes: The number of bytes.

        Raises:
            OSError: Some of them are missing; the caller then uses `read_into`, which raises the error to report.
        """
        return None

    def close(self) -> None:
        """Release resources; no method may be called afterwards."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Store(ABC):
    """A set of named files. Names may contain folders, as `a/b.json`.

    Attributes:
        name: The name of the model in it, unless one of its files gives another.
    """

    name: str

    @abstractmethod
    def names(self, folder: str = "") -> Iterable[str]:
        """The names of the files directly in `folder`, by default the store's root."""

    @abstractmethod
    def open(self, name: str) -> Blob:
        """The opened file of this name.

        Raises:
            SourceError: There is none, or it cannot be opened.
        """

    def has(self, name: str) -> bool:
        """Whether there is a file or a folder of this name."""
        folder, _, last = name.rpartition("/")
        return last in self.names(folder) or self.is_folder(name)

    def is_folder(self, name: str) -> bool:
        return name == "" or any(True for _ in self.names(name))

    def show(self, name: str) -> str:
        """The file's name as messages show it."""
        return posixpath.join(self.name, name) if name else self.name

    def local_path(self, name: str) -> Path | None:
        """The local path of the file; None if it has none."""
        return None


class Place(Protocol):
    """The location of a source: a name in a store (`StorePath`), or a path on this machine (`pathlib.Path`)."""

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
    """A name in a store, with the interface of a path; an empty name is the store itself."""

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
        """The files that match `pattern` in this folder, or in the folder with which the pattern begins."""
        folder, _, last = pattern.rpartition("/")
        place = self / folder if folder else self
        return (place / name for name in place.store.names(place.key) if fnmatchcase(name, last))

    def open(self) -> Blob:
        return self.store.open(self.key)
