"""Write GGUF files byte by byte, including those that no writer would write.

Only the raw layout: nothing here checks anything or imports streamconv.
"""

from __future__ import annotations

import struct

STRING, ARRAY = 8, 9
NUMBERS = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}
F32, F16, Q8_0, I32 = 0, 1, 8, 26


def text(value: str | bytes, nbytes: int | None = None) -> bytes:
    """A string; `nbytes` lies about its length."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if nbytes is None else nbytes) + raw


def key(name: str | bytes, value_type: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", value_type) + payload


def number(name: str | bytes, form: str, value: float) -> bytes:
    return key(name, NUMBERS[form], struct.pack(f"<{form}", value))


def array(name: str | bytes, element: int, payload: bytes, length: int) -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", element, length) + payload)


def tensor(
    name: str | bytes, ne: tuple[int, ...], type_: int = F32, offset: int = 0, n_dims: int | None = None
) -> bytes:
    """An entry of the tensor list; `ne` is innermost first, as stored."""
    n_dims = len(ne) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", n_dims, *ne, type_, offset)


def gguf(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; `n_keys` and `n_tensors` lie about the counts."""
    keys, tensors = keys or [], tensors or []
    counts = len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
    header = struct.pack("<4sIQQ", b"GGUF", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data
