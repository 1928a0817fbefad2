"""Join many short strings into one text, and encode that text as the payload of a GGUF array.

Strings are UTF-8, so the byte that separates them occurs in none.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

BETWEEN = b"\xff"
MAX_SCATTERED_NBYTES = 128 << 10  # each takes about 20 bytes of scratch
_SHIFT = 8 - len(BETWEEN)  # a length of 8 bytes before each string replaces the separator after it
_LENGTH = struct.Struct("<Q")


def joined(strings: Sequence[bytes]) -> bytes:
    """Return the strings, each followed by BETWEEN."""
    return BETWEEN.join((*strings, b"")) if strings else b""


def split(text: bytes) -> list[bytes]:
    """Return the strings of which `joined` made `text`."""
    return text.split(BETWEEN)[:-1]


def encode_joined(text: bytes) -> bytes:
    """Return the payload of a GGUF string array: each string after its length (little-endian uint64)."""
    if len(text) > MAX_SCATTERED_NBYTES:  # a loop over objects, without scratch for each byte
        return b"".join(_LENGTH.pack(len(string)) + string for string in split(text))
    letters = np.frombuffer(text, dtype=np.uint8)
    ends = np.flatnonzero(letters == BETWEEN[0])
    lengths = np.diff(ends, prepend=-1) - 1
    shifts = np.arange(len(ends)) * _SHIFT
    places = np.arange(8, 8 + len(letters))
    places += np.repeat(shifts, lengths + 1)
    payload = np.empty(len(letters) + _SHIFT * len(ends) + 1, dtype=np.uint8)
    payload[places] = letters  # the last separator lands after the payload, lengths overwrite the others
    payload[(ends - lengths + shifts)[:, None] + np.arange(8)] = lengths.astype("<u8").view(np.uint8).reshape(-1, 8)
    return payload[:-1].tobytes()
