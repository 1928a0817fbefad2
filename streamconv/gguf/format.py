"""The GGUF format: typed keys, tensor infos, layout arithmetic and the bytes of a header.

Encoding is exact: a key keeps its type, an int array does not silently become INT32, an empty array is kept, and a
duplicate key is an error.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from streamconv.ggml.element_types import tensor_nbytes

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_KEY_NBYTES = 65535  # ggml's docs/gguf.md: a key has at most 2^16 - 1 bytes
MAX_NAME_NBYTES = 63  # ggml's GGML_MAX_NAME is 64 with the terminating NUL
MAX_DIMS = 4  # ggml's GGML_MAX_DIMS

SCALAR_FORMATS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}

Scalar = str | int | float | bool
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class PackedArray:
    """An array value, already encoded as in the file, so that a vocabulary does not become a list of Python objects.

    Attributes:
        element: The type of its values.
        length: The number of values.
        payload: Their bytes.
    """

    element: GGUFValueType
    length: int
    payload: Buffer

    @classmethod
    def of_strings(cls, values: Iterable[str | bytes]) -> PackedArray:
        """An array of strings, each encoded as its length (uint64) and its UTF-8 bytes."""
        payload = bytearray()
        length = 0
        for value in values:
            payload += encode_string(value)
            length += 1
        return cls(GGUFValueType.STRING, length, payload)

    @classmethod
    def of_numbers(cls, element: GGUFValueType, values: Sequence[int | float] | NDArray[np.generic]) -> PackedArray:
        """An array of numbers of exactly the type `element`.

        Raises:
            OverflowError: A number does not fit.
        """
        dtype = np.dtype(SCALAR_FORMATS[element])
        return cls(element, len(values), np.asarray(values, dtype=dtype).tobytes())

    def has_string(self, text: str) -> bool:
        """Whether the array contains the string `text`, judged by its encoded bytes."""
        payload = self.payload if isinstance(self.payload, bytes | bytearray) else bytes(self.payload)
        return encode_string(text) in payload


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One metadata key with the exact type that is written. `type` is ARRAY if `value` is a PackedArray."""

    key: str
    type: GGUFValueType
    value: Scalar | PackedArray

    @classmethod
    def string(cls, key: str, value: str) -> KeyValue:
        return cls(key, GGUFValueType.STRING, value)

    @classmethod
    def u32(cls, key: str, value: int) -> KeyValue:
        return cls(key, GGUFValueType.UINT32, value)

    @classmethod
    def i32(cls, key: str, value: int) -> KeyValue:
        return cls(key, GGUFValueType.INT32, value)

    @classmethod
    def f32(cls, key: str, value: float) -> KeyValue:
        return cls(key, GGUFValueType.FLOAT32, value)

    @classmethod
    def boolean(cls, key: str, value: bool) -> KeyValue:
        return cls(key, GGUFValueType.BOOL, value)

    @classmethod
    def array(cls, key: str, value: PackedArray) -> KeyValue:
        return cls(key, GGUFValueType.ARRAY, value)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's entry in a header. `shape` is row-major (the file stores it innermost first)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # from the start of the tensor data

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.shape, self.type)


def encode_string(value: str | bytes) -> bytes:
    """A string as GGUF stores it: the length (uint64), then the UTF-8 bytes."""
    raw = value.encode("utf-8") if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def align(offset: int, alignment: int = DEFAULT_ALIGNMENT) -> int:
    """`offset` rounded up to a multiple of `alignment`."""
    return -(-offset // alignment) * alignment


class Header:
    """All bytes before the tensor data, in pieces that are not copied, so that no vocabulary is held twice."""

    __slots__ = ("nbytes", "pieces")

    def __init__(self, pieces: Iterable[Buffer]) -> None:
        self.pieces = tuple(pieces)
        self.nbytes = sum(map(len, self.pieces))

    def fill(self, out: NDArray[np.uint8], start: int) -> int:
        """Copy the header's bytes from `start` on to the beginning of `out`.

        Returns:
            The number of bytes copied.
        """
        filled, passed = 0, 0
        for piece in self.pieces:
            first = start + filled - passed
            passed += len(piece)
            if first < len(piece):
                part = np.frombuffer(piece, dtype=np.uint8)[first : first + out.nbytes - filled]
                out[filled : filled + len(part)] = part
                filled += len(part)
        return filled


def encode_header(
    keys: Sequence[KeyValue], tensors: Sequence[TensorInfo], alignment: int = DEFAULT_ALIGNMENT
) -> Header:
    """All bytes before the tensor data, padding included.

    Args:
        keys: The metadata, in the order in which it is written.
        tensors: The list of tensors.
        alignment: Of the tensor data, in bytes.

    Raises:
        ValueError: A name is duplicate or too long, or a tensor has too many dimensions.
    """
    _check(keys, tensors)
    pieces: list[Buffer] = []
    out = bytearray(struct.pack("<4sIQQ", MAGIC, VERSION, len(tensors), len(keys)))
    for entry in keys:
        out += encode_string(entry.key) + struct.pack("<I", entry.type)
        if isinstance(entry.value, PackedArray):
            out += struct.pack("<IQ", entry.value.element, entry.value.length)
            pieces += [out, entry.value.payload]
            out = bytearray()
        else:
            out += _encode_scalar(entry.type, entry.value)
    for info in tensors:
        out += encode_string(info.name)
        out += struct.pack(f"<I{len(info.shape)}QIQ", len(info.shape), *reversed(info.shape), info.type, info.offset)
    nbytes = sum(map(len, pieces)) + len(out)
    out.extend(bytes(align(nbytes, alignment) - nbytes))
    return Header([*pieces, out])


def _encode_scalar(type_: GGUFValueType, value: Scalar) -> bytes:
    return encode_string(str(value)) if type_ == GGUFValueType.STRING else struct.pack(SCALAR_FORMATS[type_], value)


def _check(keys: Sequence[KeyValue], tensors: Sequence[TensorInfo]) -> None:
    for what, names in (("key", [entry.key for entry in keys]), ("tensor", [info.name for info in tensors])):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise ValueError(f"duplicate {what} {name!r}")
            seen.add(name)
    for entry in keys:
        if len(entry.key.encode()) > MAX_KEY_NBYTES:
            raise ValueError(f"key {entry.key[:40]!r}... is longer than {MAX_KEY_NBYTES} bytes")
    for info in tensors:
        if len(info.name.encode()) > MAX_NAME_NBYTES:
            raise ValueError(f"tensor name {info.name!r} is longer than {MAX_NAME_NBYTES} bytes")
        if len(info.shape) > MAX_DIMS:
            raise ValueError(f"tensor {info.name!r} has {len(info.shape)} dimensions, GGUF allows {MAX_DIMS}")
