"""One safetensors file: its header, validated before it is used, and the position of each tensor's bytes.

The header is checked here first, in bounded memory and address space, so that an error names the tensor and the cause;
then by the safetensors library if that fits (library.py).

Format: https://github.com/huggingface/safetensors#format; rules of its reader: safetensors/src/tensor.rs there.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import numpy as np
from numpy.typing import NDArray

from streamconv.budget import Budget, unbounded
from streamconv.checkpoint import library
from streamconv.errors import SourceError
from streamconv.files import sniff as magic
from streamconv.files.local import open_blob, read_start
from streamconv.files.store import Place
from streamconv.files.strict_json import objects_nbytes, parse_object
from streamconv.files.window import Mapped
from streamconv.lazy.dtype import DTYPES, FLOATS
from streamconv.lazy.leaves import Source
from streamconv.lazy.node import TensorSpec

MAX_HEADER_NBYTES: Final = 100_000_000  # safetensors' own limit (tensor.rs, MAX_HEADER_SIZE)
MAX_EXTENT: Final = (1 << 64) - 1  # the library's numbers are usize
METADATA: Final = "__metadata__"  # the entry of a header that is not a tensor

# Bounds on the memory of `Shard.tensors`, in bytes: for each entry, each of its extents, and each character of its
# name. Measured: 300 and 36; a Python string takes at most 4 bytes a character.
_TENSOR_NBYTES: Final = 340
_EXTENT_NBYTES: Final = 40
_LETTER_NBYTES: Final = 4


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A stored tensor: dtype (safetensors' name), row-major shape, and position in its shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    offset: int  # from the start of the file
    nbytes: int

    def lazy(self) -> Source:
        """The tensor as a lazy one.

        Raises:
            SourceError: Its dtype cannot be converted.
        """
        dtype = DTYPES[self.dtype]
        if dtype not in FLOATS:
            raise SourceError(
                f"dtype {self.dtype} cannot be converted",
                file=self.shard.path,
                tensor=self.name,
                hint="streamconv reads F32, F16 and BF16: save the checkpoint in one of them",
                code="dtype-unsupported",
            )
        return Source(self.name, self.shard, self.offset, TensorSpec(self.shape, dtype))


class Shard:
    """One safetensors file, open for reads at any position.

    Args:
        path: The file.
        budget: Reserves the memory of the table; by default nothing is limited.

    Attributes:
        tensors: The validated table of tensors by name, in the header's order.
        metadata: The header's `__metadata__`.
        header_sha256: The digest of the header's text.

    Raises:
        SourceError: The file is malformed, truncated, or of another kind.
        BudgetError: Parsing the header would take more than `budget` has left; nothing was parsed.
    """

    def __init__(self, path: Place, budget: Budget | None = None) -> None:
        self.path = path
        self.file = open_blob(path)
        try:
            budget = budget or unbounded()
            header = self._read_header(budget)
            self.header_sha256 = hashlib.sha256(header).hexdigest()
            self.tensors = self._parse(header)
            budget.reserve("tensors", self.parsed_nbytes, file=path)
            parsing = len(header) * library.PARSED_NBYTES_PER_BYTE
            if parsing <= budget.left:
                budget.check("safetensors' reader", parsing, file=path)
                self._ask_library(header)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        return self.file.nbytes

    @property
    def parsed_nbytes(self) -> int:
        """An upper bound on the memory of `tensors`, in bytes."""
        return sum(
            _TENSOR_NBYTES + _EXTENT_NBYTES * len(tensor.shape) + _LETTER_NBYTES * len(tensor.name)
            for tensor in self.tensors.values()
        )

    @property
    def fingerprint(self) -> str:
        """Identifies the bytes without reading them all: the identity of the blob, and the header's digest."""
        return f"{self.file.identity.lasting} {self.header_sha256}"

    def close(self) -> None:
        self.file.close()

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` from byte `offset` on.

        Raises:
            SourceError: The file ends early, or the disk fails.
        """
        self.file.read_into(offset, out)

    @property
    def is_mapped(self) -> bool:
        return self.file.is_mapped

    def map(self, offset: int, nbytes: int) -> Mapped | None:
        return self.file.map(offset, nbytes)

    def check_unchanged(self) -> None:
        """Check that the file at this path is still the one that was opened, and unchanged.

        Raises:
            SourceError: It is not.
        """
        self.file.check_unchanged()

    def _read_header(self, budget: Budget) -> bytearray:
        """The header's JSON text; BudgetError if parsing it would not fit."""
        if self.nbytes < 8:
            raise self._malformed(f"a file of {self.nbytes} bytes is not a safetensors file", code="safetensors-length")
        prefix = bytearray(8)
        self.file.read_into(0, prefix)
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_NBYTES, self.nbytes - 8):
            claim = f"it claims a header of {length:,} bytes in a file of {self.nbytes:,}"
            raise self._malformed(f"{claim}: truncated, or not a safetensors file", code="safetensors-length")
        what = f"a header of {length:,} bytes"
        budget.check(what, length, file=self.path)
        text = bytearray(length)
        self.file.read_into(8, text)
        budget.check(what, length + objects_nbytes([text]), file=self.path)
        return text

    def _parse(self, header: bytearray) -> dict[str, SourceTensor]:
        """The table of tensors, which must cover the file's data without gaps or overlaps."""
        try:
            if header[:1] != b"{":
                raise SourceError("the header does not begin with {", code="header-start")
            entries = parse_object(header, self.path, MAX_HEADER_NBYTES)
            self.metadata = _read_metadata(entries.pop(METADATA, None))
            infos = {name: _read_entry(name, entry) for name, entry in entries.items()}
        except SourceError as error:
            raise self._malformed(
                f"not a valid safetensors file: {error.message}", error.tensor, code=error.code
            ) from None
        for name in infos:
            _check_name(name, self.path)
        start = 8 + len(header)
        self._check_cover(infos, start)
        return {
            name: SourceTensor(name, dtype, shape, self, start + first, last - first)
            for name, (dtype, shape, first, last) in infos.items()
        }

    def _ask_library(self, header: bytearray) -> None:
        """SourceError if the safetensors library refuses a header that passed the checks here."""
        if words := library.objection(len(header).to_bytes(8, "little") + header, self.nbytes):
            raise self._malformed(f"not a valid safetensors file: {words}", code="safetensors-library")

    def _check_cover(self, infos: Mapping[str, _Info], start: int) -> None:
        """SourceError unless the tensors fill the file from `start` to its end, without gaps or overlaps."""
        end, largest = 0, max((last for *_, last in infos.values()), default=0)
        for name, (_, _, first, last) in sorted(infos.items(), key=lambda item: item[1][2:]):
            if start + last > self.nbytes:
                raise SourceError(
                    f"truncated: the file has {self.nbytes:,} bytes, its header describes {start + largest:,}",
                    file=self.path,
                    tensor=name,
                    hint="download the file again",
                    code="shard-truncated",
                )
            if first != end:
                raise self._malformed(
                    f"not a valid safetensors file: this tensor begins at byte {first:,} of the data, expected {end:,}",
                    name,
                    code="data-cover",
                )
            end = last
        if start + end != self.nbytes:
            what = f"{self.nbytes - start - end:,} bytes follow the last tensor"
            raise self._malformed(f"not a valid safetensors file: {what}", code="data-cover")

    def _malformed(self, message: str, tensor: str | None = None, *, code: str) -> SourceError:
        """An error with `message`, or a clearer one if the file is of another kind."""
        head = bytearray(min(magic.HEAD_NBYTES, self.nbytes))
        self.file.read_into(0, head)
        if other := magic.guess_other(bytes(head), magic.SAFETENSORS):
            what = f"not a safetensors file: this is {other.what}"
            return SourceError(what, file=self.path, hint=other.hint, code="not-safetensors")
        hint = "download the file again, or save it again"
        return SourceError(message, file=self.path, tensor=tensor, hint=hint, code=code)


def header_nbytes(path: Place) -> int:
    """The size of the header according to the file, at most MAX_HEADER_NBYTES.

    Raises:
        SourceError: The file cannot be read.
    """
    return min(int.from_bytes(read_start(path, 8), "little"), MAX_HEADER_NBYTES)


_Info = tuple[str, tuple[int, ...], int, int]  # dtype, shape, first byte and end in the data


def _read_entry(name: str, entry: Any) -> _Info:
    """A tensor's entry in the header; SourceError if its dtype, shape and size do not agree."""
    if not isinstance(entry, dict):
        raise SourceError("its entry is not an object", tensor=name, code="header-entry")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SourceError(f"dtype {repr(dtype)[:40]} is not known", tensor=name, code="header-dtype")
    if not _is_numbers(shape):
        raise SourceError("its shape is not a list of whole numbers", tensor=name, code="header-shape")
    if not _is_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SourceError("its data_offsets are not two byte positions", tensor=name, code="header-offsets")
    n_elements = 1
    for extent in shape:
        n_elements *= extent
        if n_elements > MAX_EXTENT:
            raise SourceError(
                "its shape has more elements than can be counted in 64 bits", tensor=name, code="header-elements"
            )
    n_bits = n_elements * DTYPES[dtype].n_bits
    if n_bits > MAX_EXTENT or n_bits % 8 or n_bits // 8 != offsets[1] - offsets[0]:
        what = f"shape {shape} of {dtype} has {n_bits / 8:,.15g} bytes, data_offsets say {offsets[1] - offsets[0]:,}"
        raise SourceError(what, tensor=name, code="header-nbytes")
    return sys.intern(dtype), tuple(shape), offsets[0], offsets[1]


def _is_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= MAX_EXTENT for number in value)


def _read_metadata(value: Any) -> dict[str, str]:
    """The `__metadata__` of a header; SourceError unless it is absent, null or an object of strings."""
    texts = [*value, *value.values()] if isinstance(value, dict) else [] if value is None else [None]
    if not all(map(_is_unicode, texts)):
        raise SourceError(f"{METADATA} is not an object of strings", code="header-metadata")
    return value or {}


def _is_unicode(text: Any) -> bool:
    """Whether `text` is a string without lone surrogates, which JSON can contain."""
    return isinstance(text, str) and text == text.encode("utf-8", "replace").decode("utf-8")


def _check_name(name: str, file: Place) -> None:
    if not name or not name.isprintable() or "/" in name or "\\" in name:
        raise SourceError(
            f"tensor name {name!r} is empty, or has a slash or an unprintable character", file=file, code="tensor-name"
        )
