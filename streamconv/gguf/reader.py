"""Read untrusted GGUF files: typed keys and the tensor list (header.py), and weights on request.

A defect after which the rest cannot be parsed is a SourceError. One that only a loader would refuse is listed in
`GGUFFile.problems`, so that the rest can still be inspected; `refuse` turns it into an error.
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
    """Keys and tensors in file order, and the problems found; a context manager that holds the file open for reads."""

    file: Blob
    version: int
    alignment: int
    data_offset: int  # from the start of the file
    keys: dict[str, GGUFKey]
    tensors: dict[str, StoredTensor]
    problems: tuple[FileProblem, ...]
    kept_nbytes: int  # of memory, about

    @classmethod
    def open(cls, path: str | Place, budget: Budget | None = None, term: str = HEADERS) -> Self:
        """The file at `path`, its header parsed; what is kept of it is reserved from `budget`, as `term`.

        Raises:
            SourceError: It cannot be parsed.
            BudgetError: What it has would not fit.
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
        """The value of `key`, None where the file lacks it; SourceError where it is not exactly a `kind`."""
        entry = self.keys.get(key)
        if entry is None:
            return None
        if type(entry.value) is not kind:
            raise SourceError(
                f"key {key} is of type {entry.type_name}, expected {kind.__name__}", file=self.path, code="key-type"
            )
        return entry.value

    def read_into(self, tensor: StoredTensor, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes of `tensor` from its byte `offset` on. SourceError where some are missing."""
        end = offset + len(buffer)
        if tensor.nbytes is None or end > tensor.nbytes:
            raise SourceError(
                f"has {tensor.nbytes} bytes, not {end}", file=self.path, tensor=tensor.name, code="truncated"
            )
        self.file.read_into(tensor.offset + offset, buffer)
