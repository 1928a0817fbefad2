"""One pass over the header of an untrusted GGUF file, in bounded time and memory.

Counts, lengths and offsets in the file are not trusted: each is checked against the size of the file before memory is
allocated or a loop begins. The size of the header, and the memory kept from it, have fixed limits. The rules are those
of ggml's loader: https://github.com/ggml-org/ggml, src/gguf.cpp, gguf_init_from_reader.
"""

from __future__ import annotations

import math
import struct
import sys

from gguf.constants import GGMLQuantizationType, GGUFValueType

from streamconv.budget import Budget
from streamconv.files import sniff as magic
from streamconv.files.local import Cursor
from streamconv.files.store import Blob
from streamconv.ggml.element_types import tensor_nbytes
from streamconv.gguf.entries import MAX_HEADER_NBYTES, TYPE_IDS, FileProblem, GGUFKey, Span, StoredTensor
from streamconv.gguf.format import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_KEY_NBYTES,
    MAX_NAME_NBYTES,
    SCALAR_FORMATS,
    VERSION,
    Scalar,
    align,
)

# Limit on the memory of names and values. 46,000 tensors (a mixture of experts before stacking) take 25 MB.
MAX_KEPT_NBYTES = 32 << 20
# Memory of the Python objects for one key or tensor, besides its text. Measured: 429 for a tensor, 140 for a key.
ENTRY_NBYTES = 440
# A longer string stays in the file, as arrays do. The longest chat templates have 20 KB.
MAX_TEXT_NBYTES = 64 << 10
HEADERS = "GGUF headers"  # their name in the budget
_STEP_NBYTES = 128 << 10  # reserved at a time
MAX_PROBLEMS = 100  # further ones are only counted

_MIN_KEY_NBYTES = 8 + 4 + 1  # length of the name, type, a one-byte value
_MIN_TENSOR_NBYTES = 8 + 4 + 4 + 8  # length of the name, number of dimensions, type, offset
_INT64_MAX = 2**63 - 1

_VALUE_TYPE_IDS = frozenset(GGUFValueType)


class HeaderParser:
    """One pass over a header.

    Args:
        file: The open file.
        budget: Reserves the memory for names and values.
        term: The name under which it is reserved.
    """

    def __init__(self, file: Blob, budget: Budget, term: str) -> None:
        self.file, self.budget, self.term = file, budget, term
        self.reserved_nbytes = 0
        self.cursor = Cursor(file, 0, min(file.nbytes, MAX_HEADER_NBYTES), "no model has a header of that size")
        self.keys: dict[str, GGUFKey] = {}
        self.infos: list[tuple[str, tuple[int, ...], int, int]] = []  # name, shape, type, offset in the data
        self.problems: list[FileProblem] = []
        self.n_problems = 0
        self.kept_nbytes = 0

    def parse(self) -> tuple[int, int, int, dict[str, GGUFKey], dict[str, StoredTensor], tuple[FileProblem, ...], int]:
        """The fields of a GGUFFile that follow `file`.

        Raises:
            SourceError: The header cannot be parsed.
            BudgetError: Its names and values do not fit in memory.
        """
        version = self._version()
        cursor = self.cursor
        n_tensors, n_keys = cursor.u64(), cursor.u64()
        cursor.where = f"the header, which declares {n_keys:,} keys and {n_tensors:,} tensors"
        cursor.expect(n_keys * _MIN_KEY_NBYTES + n_tensors * _MIN_TENSOR_NBYTES)
        for i in range(n_keys):
            cursor.where = f"key {i + 1} of {n_keys}"
            self._key()
        for i in range(n_tensors):
            cursor.where, cursor.tensor = f"entry {i + 1} of {n_tensors} in the tensor list", None
            self._tensor()
        alignment = self._alignment()
        data_offset = align(cursor.position, alignment)
        tensors = self._layout(data_offset, alignment)
        if self.n_problems > MAX_PROBLEMS:
            self.problems.append(
                FileProblem("more", f"{self.n_problems - MAX_PROBLEMS} more problems are not listed", self.file.path)
            )
        return version, alignment, data_offset, self.keys, tensors, tuple(self.problems), self.kept_nbytes

    def _version(self) -> int:
        cursor = self.cursor
        head = bytearray(min(magic.HEAD_NBYTES, self.file.nbytes))
        self.file.read_into(0, head)
        if head[:4] != MAGIC:
            guess = magic.guess(bytes(head))
            what = f": this is {guess.what}" if guess else f": it begins with {bytes(head[:4])!r}"
            cursor.fail(f"not a GGUF file{what}", guess.hint if guess else None, code="not-gguf")
        cursor.skip(4)
        version = cursor.u32()
        if version and version & 0xFFFF == 0:
            cursor.fail(
                "is a big-endian GGUF file",
                "get the little-endian file; this one is for s390x machines",
                code="big-endian",
            )
        if version not in (2, VERSION):  # 2 has the layout of 3; 1 had 32-bit lengths
            hint = "get a newer file of the model" if version == 1 else None
            cursor.fail(f"GGUF version {version} is not supported, only 2 and {VERSION}", hint, code="gguf-version")
        return version

    def _problem(self, code: str, message: str, tensor: str | None = None) -> None:
        self.n_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(FileProblem(code, message, self.file.path, tensor))

    def _keep(self, nbytes: int) -> None:
        self.kept_nbytes += nbytes
        if self.kept_nbytes > MAX_KEPT_NBYTES:
            where = self.cursor.where
            self.cursor.fail(
                f"names and values up to {where} take more than {MAX_KEPT_NBYTES >> 20} MiB of memory",
                code="memory-names",
            )
        if self.kept_nbytes > self.reserved_nbytes:
            step = max(_STEP_NBYTES, nbytes)
            self.budget.reserve(self.term, step, file=self.file.path)
            self.reserved_nbytes += step

    def _name(self, what: str, max_nbytes: int) -> str:
        nbytes = self.cursor.u64()
        if nbytes > MAX_KEY_NBYTES:
            self.cursor.expect(nbytes)
            self.cursor.fail(f"{self.cursor.where} has a name of {nbytes:,} bytes", code="name-length")
        raw = self.cursor.raw(nbytes)
        name = self._text(raw)
        self._keep(ENTRY_NBYTES)
        shown = f"the name of {what} {_short(name)}"
        if not 0 < nbytes <= max_nbytes:
            self._problem("name", f"{shown} has {nbytes} bytes; loaders accept 1 to {max_nbytes}")
        if b"\x00" in raw:
            self._problem("name", f"{shown} contains a NUL byte, at which loaders cut it off")
        return name

    def _text(self, raw: bytes) -> str:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            text = raw.decode("utf-8", "backslashreplace")
            self._problem("utf-8", f"{self.cursor.where} has text that is not UTF-8: byte {raw[error.start]:#04x}")
        self._keep(sys.getsizeof(text))
        return text

    def _key(self) -> None:
        name = self._name("key", MAX_KEY_NBYTES)
        self.cursor.where = f"key {_short(name)}"
        key = GGUFKey(name, (type_ := self._value_type()), self._value(type_))
        if self.keys.setdefault(name, key) is not key:
            self._problem("duplicate-key", f"key {_short(name)} occurs twice")

    def _value_type(self) -> GGUFValueType:
        raw = self.cursor.u32()
        if raw not in _VALUE_TYPE_IDS:
            self.cursor.fail(
                f"{self.cursor.where} has a value of type {raw}, which GGUF does not have", code="value-type"
            )
        return GGUFValueType(raw)

    def _value(self, type_: GGUFValueType) -> Scalar | Span:
        cursor = self.cursor
        if type_ == GGUFValueType.ARRAY:
            return self._array()
        if type_ != GGUFValueType.STRING:
            form = SCALAR_FORMATS[type_]
            value: Scalar = struct.unpack_from(form, cursor.window, cursor.take(struct.calcsize(form)))[0]
            return value
        start = cursor.position
        nbytes = cursor.u64()
        if nbytes > MAX_TEXT_NBYTES:
            cursor.skip(nbytes)
            return Span(self.file, type_, 1, start, cursor.position - start)
        return self._text(cursor.raw(nbytes))

    def _array(self) -> Span:
        cursor = self.cursor
        element = self._value_type()
        if element == GGUFValueType.ARRAY:
            cursor.fail(f"{cursor.where} is an array of arrays, which no loader accepts", code="nested-array")
        length = cursor.u64()
        start = cursor.position
        if element == GGUFValueType.STRING:
            cursor.skip_strings(length)
        else:
            cursor.skip(length * struct.calcsize(SCALAR_FORMATS[element]))
        return Span(self.file, element, length, start, cursor.position - start)

    def _tensor(self) -> None:
        cursor = self.cursor
        name = self._name("tensor", MAX_NAME_NBYTES)
        cursor.where, cursor.tensor = f"the entry of tensor {_short(name)}", _short(name)
        n_dims = cursor.u32()
        if n_dims > MAX_DIMS:
            cursor.fail(f"{n_dims:,} dimensions, GGUF allows {MAX_DIMS}", code="dimensions")
        shape = tuple(cursor.u64() for _ in range(n_dims))[::-1]
        self.infos.append((name, shape, cursor.u32(), cursor.u64()))

    def _alignment(self) -> int:
        key = self.keys.get("general.alignment")
        if key is None:
            return DEFAULT_ALIGNMENT
        value = key.value
        if key.type != GGUFValueType.UINT32 or not isinstance(value, int) or value.bit_count() != 1:
            shown = value if isinstance(value, int) else "not an integer"
            message = f"general.alignment is {shown} ({key.type_name}); loaders accept a power of two of type uint32"
            self._problem("alignment", f"{message}. Offsets are computed for {DEFAULT_ALIGNMENT}")
            return DEFAULT_ALIGNMENT
        return value

    def _layout(self, data_offset: int, alignment: int) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        beyond: list[StoredTensor] = []
        expected: int | None = 0  # None after a tensor of unknown size
        for name, shape, type_id, offset in self.infos:
            tensor = StoredTensor(name, shape, type_id, data_offset + offset, self._nbytes(name, shape, type_id))
            if tensors.setdefault(name, tensor) is not tensor:
                self._problem("duplicate-tensor", "occurs twice", name)
            if expected is not None and offset != expected:
                self._problem("offset", f"its data is at {offset}; loaders expect it at {expected}", name)
            if tensor.offset + (tensor.nbytes or 0) > self.file.nbytes:
                beyond.append(tensor)
            expected = None if tensor.nbytes is None else align(offset + tensor.nbytes, alignment)
        if beyond:
            needed = max(tensor.offset + (tensor.nbytes or 0) for tensor in beyond)
            sizes = f"the file has {self.file.nbytes:,} bytes, but its tensor data needs {needed:,}"
            message = f"{sizes}: {len(beyond)} of {len(self.infos)} tensors are incomplete; this is the first"
            self._problem("truncated", message, beyond[0].name)
        return tensors

    def _nbytes(self, name: str, shape: tuple[int, ...], type_id: int) -> int | None:
        if type_id not in TYPE_IDS:
            self._problem("type", f"type {type_id} is not known to this version of the gguf package", name)
            return None
        try:
            nbytes = tensor_nbytes(shape, GGMLQuantizationType(type_id))
        except ValueError as error:
            self._problem("row", str(error), name)
            return None
        if max(*shape, math.prod(shape), nbytes, 0) > _INT64_MAX:
            self._problem("size", f"shape {list(shape)} has more elements than can be counted in 63 bits", name)
        return nbytes


def _short(name: str) -> str:
    """`name`, shortened for messages."""
    return name if len(name) <= 80 else f"{name[:77]}..."
