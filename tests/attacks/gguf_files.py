"""Malformed GGUF files, each idea with its outcome.

FATAL: the code of the SourceError. LISTED: the code of the problem that is listed while the rest can be read.
"""

from __future__ import annotations

import struct

from tests.tools import gguf_bytes as raw

U64_MAX = 2**64 - 1
ONE = raw.number("one", "B", 1)


def keys(*entries: bytes, cut: int | None = None) -> bytes:
    return raw.gguf(list(entries))[:cut]


def tensors(*entries: bytes, data: bytes = bytes(64)) -> bytes:
    return raw.gguf(tensors=list(entries), data=data)


def string(value: str | bytes, nbytes: int | None = None) -> bytes:
    return keys(raw.key("s", raw.STRING, raw.text(value, nbytes)))


def array(element: int, payload: bytes, length: int, cut: int | None = None) -> bytes:
    return keys(raw.array("a", element, payload, length), cut=cut)


def alignment(form: str, value: float, *entries: bytes) -> bytes:
    return raw.gguf([raw.number("general.alignment", form, value)], list(entries))


FATAL: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not-gguf"),
    "zeros": (bytes(4096), "not-gguf"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not-gguf"),
    "html": (b"\n<!DOCTYPE html><html>", "not-gguf"),
    "hub error": (b"Entry not found", "not-gguf"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not-gguf"),
    "pytorch zip": (b"PK\x03\x04....", "not-gguf"),
    "pickle": (b"\x80\x02}q\x00.", "not-gguf"),
    "ggml": (b"tjgg\x03\0\0\0", "not-gguf"),
    "gzip": (b"\x1f\x8b\x08\0", "not-gguf"),
    "json": (b'{"metadata": {}}', "not-gguf"),
    "unknown": (b"\x7fELF\x02", "not-gguf"),
    "magic alone": (b"GGUF", "truncated"),
    "no counts": (raw.gguf()[:20], "truncated"),
    "version 0": (raw.gguf(version=0), "gguf-version"),
    "version 1": (raw.gguf(version=1), "gguf-version"),
    "version 4": (raw.gguf(version=4), "gguf-version"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    "2**64-1 keys": (raw.gguf([ONE], n_keys=U64_MAX), "truncated"),
    "2**63 tensors": (raw.gguf([ONE], n_tensors=2**63), "truncated"),
    "a key too many": (raw.gguf([ONE], n_keys=4), "truncated"),
    "a tensor too many": (raw.gguf(tensors=[raw.tensor("t", (3,))], n_tensors=3), "truncated"),
    "key name beyond the end": (keys(raw.text("", 2**63) + bytes(32)), "truncated"),
    "key name of 2**64-1": (keys(raw.text("", U64_MAX) + bytes(32)), "truncated"),
    "key name of 64 KiB": (keys(raw.number("k" * 65536, "B", 1)), "name-length"),
    "string beyond the end": (string("x", 10**6), "truncated"),
    "string of 2**64-1": (string("x", U64_MAX), "truncated"),
    "value type 13": (keys(raw.key("k", 13, bytes(16))), "value-type"),
    "value type 2**32-1": (keys(raw.key("k", 2**32 - 1, bytes(16))), "value-type"),
    "array of type 77": (array(77, bytes(8), 1), "value-type"),
    # gguf 0.19 never returns from this one, and its memory grows (llama.cpp pull request 27188).
    "array of 2**63 bytes": (array(raw.NUMBERS["B"], bytes(64), 2**63), "truncated"),
    "array of 2**61 numbers": (array(raw.NUMBERS["Q"], bytes(64), 2**61), "truncated"),
    "array of 2**63 strings": (array(raw.STRING, bytes(64), 2**63), "truncated"),
    "array a string short": (array(raw.STRING, raw.text("b"), 2, cut=58), "truncated"),
    "array a length short": (array(raw.STRING, raw.text("b"), 2, cut=62), "truncated"),
    "string in an array beyond the end": (array(raw.STRING, raw.text("b", 2**63) + bytes(64), 3), "truncated"),
    "string in an array that wraps": (array(raw.STRING, raw.text("b", 2**64 - 8) + bytes(64), 3), "truncated"),
    "array of arrays": (array(raw.ARRAY, struct.pack("<IQ", 0, 0) * 9, 9), "nested-array"),
    "tensor name beyond the end": (tensors(raw.text("t", 2**40)), "truncated"),
    "5 dimensions": (tensors(raw.tensor("t", (1, 1, 1, 1, 1))), "dimensions"),
    "2**32-1 dimensions": (tensors(raw.tensor("t", (1,), n_dims=2**32 - 1)), "dimensions"),
    "cut in the tensor list": (raw.gguf(tensors=[raw.tensor("t" * 60, (3, 5))])[:-24], "truncated"),
}

LISTED: dict[str, tuple[bytes, str]] = {
    "key twice": (keys(ONE, raw.number("one", "I", 2)), "duplicate-key"),
    "padding taken for a key": (raw.gguf([ONE], n_keys=2), "name"),
    "key without a name": (keys(raw.number("", "B", 1)), "name"),
    "key with a NUL": (keys(raw.number("a\0b", "B", 1)), "name"),
    "key that is not UTF-8": (keys(raw.number(b"a\xff", "B", 1)), "utf-8"),
    "string that is not UTF-8": (string(b"\xc3("), "utf-8"),
    "alignment 0": (alignment("I", 0), "alignment"),
    "alignment 48": (alignment("I", 48), "alignment"),
    "alignment as uint64": (alignment("Q", 32), "alignment"),
    "alignment as a bool": (alignment("?", True), "alignment"),
    "alignment as text": (keys(raw.key("general.alignment", raw.STRING, raw.text("32"))), "alignment"),
    "alignment as an array": (keys(raw.array("general.alignment", 4, struct.pack("<I", 32), 1)), "alignment"),
    "tensor twice": (tensors(raw.tensor("t", (3,)), raw.tensor("t", (3,), offset=32)), "duplicate-tensor"),
    "tensor without a name": (tensors(raw.tensor("", (3,))), "name"),
    "tensor name of 64 bytes": (tensors(raw.tensor("t" * 64, (3,))), "name"),
    "tensor name of 64 bytes, 32 characters": (tensors(raw.tensor("ä" * 32, (3,))), "name"),
    "tensor name with a NUL": (tensors(raw.tensor("t\0u", (3,))), "name"),
    "tensor name that is not UTF-8": (tensors(raw.tensor(b"\x80", (3,))), "utf-8"),
    "type 99": (tensors(raw.tensor("t", (32,), 99)), "type"),
    "type 2**32-1": (tensors(raw.tensor("t", (32,), 2**32 - 1)), "type"),
    "type that was removed": (tensors(raw.tensor("t", (32,), 4)), "type"),
    "row of 33 in Q8_0": (tensors(raw.tensor("t", (33,), raw.Q8_0)), "row"),
    "scalar in Q8_0": (tensors(raw.tensor("t", (), raw.Q8_0)), "row"),
    "negative dimension": (tensors(raw.tensor("t", (2**63, 0))), "size"),
    "product beyond 63 bits": (tensors(raw.tensor("t", (2**32, 2**31))), "size"),
    "product that wraps to 0": (tensors(raw.tensor("t", (2**32, 2**32))), "size"),
    "offset of 2**64-1": (tensors(raw.tensor("t", (3,), offset=U64_MAX)), "offset"),
    "offset not padded": (tensors(raw.tensor("t", (3,)), raw.tensor("u", (3,), offset=12)), "offset"),
    "tensors that overlap": (tensors(raw.tensor("t", (16,)), raw.tensor("u", (3,))), "offset"),
    "tensors out of order": (tensors(raw.tensor("t", (3,), offset=32), raw.tensor("u", (3,))), "offset"),
    "a hole": (tensors(raw.tensor("t", (3,)), raw.tensor("u", (3,), offset=64), data=bytes(96)), "offset"),
    "data cut off": (tensors(raw.tensor("t", (17,))), "truncated"),
    "no data at all": (tensors(raw.tensor("t", (17,)), data=b""), "truncated"),
    "data section beyond the end": (alignment("I", 2**31, raw.tensor("t", (0,))), "truncated"),
    "2 GiB of alignment": (alignment("I", 2**31, raw.tensor("t", (3,))), "truncated"),
}
