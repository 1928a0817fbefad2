"""The contents of a GGUF file besides weights: typed keys, the list of tensors, and the defects found in them."""

from __future__ import annotations

import codecs
import math
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from gguf.constants import GGMLQuantizationType, GGUFValueType

from streamconv.errors import SourceError
from streamconv.files.local import Cursor
from streamconv.files.store import Blob, Place
from streamconv.gguf.format import (
    SCALAR_FORMATS,
    Scalar,
)

# The largest vocabularies (262,144 tokens, 514,906 merges) take about 20 MB, and a tokenizer.json in a string the same.
MAX_HEADER_NBYTES = 128 << 20

_Utf8 = codecs.getincrementaldecoder("utf-8")
TYPE_IDS = frozenset(GGMLQuantizationType)


@dataclass(frozen=True, slots=True)
class FileProblem:
    """A defect for which a strict loader refuses the file.

    Attributes:
        code: The cause in kebab-case; stable.
        message: A sentence, which may change between versions.
        file: The file.
        tensor: The tensor that it concerns, if it is one.
    """

    code: str
    message: str
    file: Place
    tensor: str | None = None


def refuse(problems: Iterable[FileProblem], ignore: Collection[str] = ()) -> None:
    """Raise the first problem as an error, if there is any.

    Args:
        problems: The defects of one or more files.
        ignore: Codes of problems that are accepted.

    Raises:
        SourceError: With the code and message of the first problem whose code is not in `ignore`.
    """
    found = [problem for problem in problems if problem.code not in ignore]
    if found:
        more = f" ({len(found) - 1} more problems)" if len(found) > 1 else ""
        hint = f"streamconv inspect {found[0].file} lists all problems"
        raise SourceError(
            found[0].message + more, file=found[0].file, tensor=found[0].tensor, hint=hint, code=found[0].code
        )


@dataclass(frozen=True, slots=True)
class Span:
    """A value that stays in the file: an array, or a string longer than MAX_TEXT_NBYTES. Iterating reads it in pieces.

    Attributes:
        file: The open file.
        element: The type of its values.
        length: The number of values.
        offset: Of the first value, from the start of the file.
        nbytes: The size of all values in the file.
    """

    file: Blob = field(repr=False)
    element: GGUFValueType
    length: int
    offset: int
    nbytes: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Scalar]:
        return self.values()

    def first(self, n: int, text_nbytes: int = MAX_HEADER_NBYTES) -> list[Scalar]:
        """The first `n` values, or all if there are fewer; strings are cut off after `text_nbytes` bytes."""
        return list(islice(self.values(text_nbytes), n))

    def values(self, text_nbytes: int = MAX_HEADER_NBYTES) -> Iterator[Scalar]:
        """All values in order, in constant memory; strings are cut off after `text_nbytes` bytes."""
        cursor = Cursor(self.file, self.offset, self.offset + self.nbytes, "the file changed while it was read")
        if self.element == GGUFValueType.STRING:
            for _ in range(self.length):
                nbytes = cursor.u64()
                raw = cursor.raw(min(nbytes, text_nbytes))
                yield _Utf8("backslashreplace").decode(raw, final=nbytes <= text_nbytes)
                cursor.skip(nbytes - len(raw))
            return
        form = struct.Struct(SCALAR_FORMATS[self.element])
        for _ in range(self.length):
            yield form.unpack_from(cursor.window, cursor.take(form.size))[0]


@dataclass(frozen=True, slots=True)
class GGUFKey:
    """One metadata key with its exact type; `value` is a Span if it stays in the file."""

    name: str
    type: GGUFValueType
    value: Scalar | Span

    @property
    def type_name(self) -> str:
        """The type for messages: "uint32", "string", "array[int32]"."""
        if self.type == GGUFValueType.ARRAY and isinstance(self.value, Span):
            return f"array[{self.value.element.name.lower()}]"
        return self.type.name.lower()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of the list of tensors.

    Attributes:
        name: The name.
        shape: Row-major.
        type_id: GGML's number of the type, known or not.
        offset: Of the data, from the start of the file.
        nbytes: The size of the data; None if the type is unknown or a row does not divide into whole blocks, both of
            which are listed as problems.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    nbytes: int | None

    @property
    def type(self) -> GGMLQuantizationType | None:
        """The type; None if the gguf package does not know it."""
        return GGMLQuantizationType(self.type_id) if self.type_id in TYPE_IDS else None

    @property
    def type_name(self) -> str:
        return self.type.name if self.type is not None else f"type {self.type_id}"

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)
