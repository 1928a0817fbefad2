"""Read untrusted GGUF files: typed keys and the list of tensors (header.py), and weights on request.

A defect that makes the rest unreadable is a SourceError. A defect for which only a loader would refuse the file is
listed in `GGUFFile.problems`, so that the file can still be inspected; `refuse` turns it into an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from streamconv.budget import Budget, unbounded
from streamconv.errors import SourceError
from streamconv.files.local import open_blob
from streamconv.files.store import Blob, Buffer, Place
from streamconv.gguf.entries import FileProblem, GGUFKey, StoredTensor
from streamconv.gguf.header import HEADERS, HeaderParser

T = TypeVar("T", str, int, float, bool)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open GGUF file: a context manager that closes it.

    Attributes:
        file: The open file.
        version: GGUF's version, 2 or 3.
        alignment: Of the tensor data, in bytes.
        data_offset: Of the tensor data, from the start of the file.
        keys: All keys by name, in file order.
        tensors: All tensors by name, in file order.
        problems: The defects for which a loader would refuse the file.
        kept_nbytes: About the memory that keys and tensors take.
    """

    file: Blob
    version: int
    alignment: int
    data_offset: int
    keys: dict[str, GGUFKey]
    tensors: dict[str, StoredTensor]
    problems: tuple[FileProblem, ...]
    kept_nbytes: int

    @classmethod
    def open(cls, path: str | Place, budget: Budget | None = None, term: str = HEADERS) -> Self:
        """Open a file and parse its header.

        Args:
            path: The file.
            budget: Reserves the memory for keys and tensors; by default nothing is limited.
            term: The name under which it is reserved.

        Raises:
            SourceError: The file cannot be opened or parsed.
            BudgetError: Its keys and tensors do not fit in memory.
        """
        file = open_blob(Path(path) if isinstance(path, str) else path)
        try:
            return cls(file, *HeaderParser(file, budget or unbounded(), term).parse())
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    @property
    def path(self) -> Place:
        return self.file.path

    def scalar(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`; None if the file does not have it.

        Raises:
            SourceError: Its type is not exactly `kind`.
        """
        entry = self.keys.get(key)
        if entry is None:
            return None
        if type(entry.value) is not kind:
            raise SourceError(
                f"key {key} is of type {entry.type_name}, expected {kind.__name__}", file=self.path, code="key-type"
            )
        return entry.value

    def read_into(self, tensor: StoredTensor, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes of `tensor` from its byte `offset` on.

        Raises:
            SourceError: The tensor or the file ends first, or the disk fails.
        """
        end = offset + len(buffer)
        if tensor.nbytes is None or end > tensor.nbytes:
            raise SourceError(
                f"has {tensor.nbytes} bytes, not {end}", file=self.path, tensor=tensor.name, code="truncated"
            )
        self.file.read_into(tensor.offset + offset, buffer)
