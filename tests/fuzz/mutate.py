"""Structured mutations: JSON by value, safetensors by tensor, journals with valid digests, plain bytes.

A mutant depends only on its seeds and the generator. Contents may be sparse: head bytes, then a hole.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.output.journal import _digest

MAX_NBYTES = 1 << 36  # of a sparse file


@dataclass(frozen=True, slots=True)
class Blob:
    """A file's content: `head`, then zeros up to `nbytes`."""

    head: bytes
    nbytes: int

    @classmethod
    def of(cls, content: bytes) -> Blob:
        return cls(content, len(content))


INTEGERS = (
    *range(-2, 10), 16, 31, 32, 33, 64, 255, 256, 65535, 65536, 10_001, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53,
    2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), 10**30, 10**400, 10**4000,
)  # fmt: skip
FLOATS = (0.5, 1.5, -0.0, 1e-320, 1e-45, 3.5e38, 1e308, math.nan, math.inf, -math.inf)
TEXTS = (
    "", "x", "0", "weight", "\0", "a\nb", "\x1b[31m", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a" * 70, "ä" * 40,
    "\ud800", "\u202e", "<0x41>", "<|x|>", "Ġ", "▁", "{}", "{{ x }}", "default", "BPE", "LORA", "F64", "BF16", "(a*)*",
    "null", "F32", "rank", "llama3", "1e5", "-1", "lm_head", "full_attention", "Sequence", "ByteLevel", "Split",
)  # fmt: skip
STRUCTURES: tuple[Any, ...] = ([], {}, [[]], [None], [0], [-1], [1, 2, 3], ["x"], {"a": {}}, {"": 0}, [{}], [[1], [2]])
_EDGES = [1 << n for n in range(64)] + [(1 << n) - 1 for n in range(65)] + [2**64 - n for n in range(2, 40)]


def junk(rng: random.Random) -> Any:
    """A value that JSON can hold, of any type but the one expected."""
    kind = rng.randrange(12)
    if kind < 4:
        return rng.choice(INTEGERS)
    if kind < 6:
        return rng.choice(FLOATS)
    if kind < 8:
        return rng.choice(TEXTS)
    if kind < 10:
        return rng.choice((None, True, False))
    if kind == 10:
        return rng.choice(STRUCTURES)
    value: Any = rng.choice(TEXTS)
    for _ in range(rng.choice((3, 50, 300))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def mutate_bytes(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Integers of any width, flips, cuts, repetitions, and pieces of other seeds."""
    c = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        at = rng.randrange(len(c) + 1)
        kind = rng.randrange(8)
        if kind <= 1:
            number = struct.pack("<Q", rng.choice(_EDGES))[: rng.choice((1, 4, 8))]
            c[at : at + len(number)] = number
        elif kind == 2:
            c[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 3:
            del c[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            c[at:at] = c[at : at + rng.randrange(1, 60)]
        elif kind == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            c[at:] = other[start : start + rng.randrange(300)]
        elif kind == 6:
            c[at : at + 1] = c[at : at + 1] + rng.randbytes(rng.randrange(9))
        else:
            del c[at:]
    return bytes(c)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """The same JSON value with one node, anywhere in it, replaced, removed, renamed, repeated or exchanged."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        return _near(value, rng)
    if isinstance(value, list):
        items = list(value)
        at = rng.randrange(len(items))
        kind = rng.randrange(10)
        if kind < 6:
            items[at] = mutate_value(items[at], rng)
        elif kind == 6:
            del items[at]
        elif kind == 7:
            items.insert(at, items[rng.randrange(len(items))])
        elif kind == 8:
            other = rng.randrange(len(items))
            items[at], items[other] = items[other], items[at]
        else:
            items.append(junk(rng))
        return items
    pairs = dict(value)
    key = rng.choice(list(pairs))
    kind = rng.randrange(10)
    if kind < 6:
        pairs[key] = mutate_value(pairs[key], rng)
    elif kind == 6:
        del pairs[key]
    elif kind == 7:
        pairs[rng.choice((*TEXTS, key + "x", key[:-1]))] = pairs[key]
    elif kind == 8:
        pairs[key] = pairs[rng.choice(list(pairs))]
    else:
        return {(rng.choice(TEXTS) if name == key else name): item for name, item in pairs.items()}
    return pairs


def _near(value: Any, rng: random.Random) -> Any:
    """Junk, or something of the value's own type: what passes the first check and fails later ones."""
    if rng.random() < 0.5:
        return junk(rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int) and abs(value) < 10**4000:
        return rng.choice((value + 1, value - 1, value * 2, value // 2, -value, value * 32, rng.choice(INTEGERS)))
    if isinstance(value, float):
        return rng.choice((-value, value * 2, round(value) if abs(value) < 1e15 else 1, rng.choice(FLOATS)))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        text = rng.choice(TEXTS)
        return rng.choice((text, value + text, value[:at], value[:at] + text + value[at:], value.upper()))
    return junk(rng)


def dump(value: Any, rng: random.Random) -> bytes:
    """Its JSON text; at times with a key twice, deeply nested, or with a number that no float holds."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    kind = rng.randrange(40)
    if kind == 0 and '"' in text:
        at = text.index('"')
        text = text[:at] + text[at:].replace('"', '"a": 1, "a": 2, "', 1)
    elif kind == 1 and ":" in text:
        at = text.index(":") + 1
        depth = rng.choice((200, 990, 5000, 100_000))
        text = text[:at] + "[" * depth + "]" * depth + "," + text[at:]
    elif kind == 2:
        text = text.replace("0", rng.choice(("1e400", "-0", "1E5", "9" * 5000, "0.1e-9999")), 1)
    elif kind == 3:
        text = rng.choice(("\ufeff", " \n", "[", "")) + text
    return text.encode("utf-8", "surrogatepass")


def mutate_json(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_bytes(content, rng, others)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = mutate_value(value, rng)
    text = dump(value, rng)
    return mutate_bytes(text, rng, others) if rng.random() < 0.08 else text


_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "F8_E4M3": 1}


def mutate_safetensors(blob: Blob, rng: random.Random, others: Sequence[bytes]) -> Blob:
    """By tensor with offsets that hold, or by the header's JSON, its bytes, its length, or the file's size."""
    content = blob.head
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    kind = rng.randrange(10)
    try:
        table = json.loads(header)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        return Blob.of(mutate_bytes(content, rng, others))
    n_data = max(0, blob.nbytes - 8 - length)
    if kind < 6:
        return _retabled(table, rng)
    if kind == 6:
        text = dump(mutate_value(table, rng), rng)
        return Blob(len(text).to_bytes(8, "little") + text, 8 + len(text) + n_data)
    if kind == 7:
        text = mutate_bytes(header, rng, [header])
        return Blob(len(text).to_bytes(8, "little") + text, 8 + len(text) + n_data)
    if kind == 8:
        lie = rng.choice((length - 1, length + 1, length * 2, *_EDGES))
        return Blob((lie % 2**64).to_bytes(8, "little") + header, max(blob.nbytes, 8 + len(header)))
    size = rng.choice((blob.nbytes - 1, blob.nbytes + 1, length, 8, 0, blob.nbytes * 2))
    return Blob(content[:size], min(max(0, size), MAX_NBYTES))


def _retabled(table: dict[str, Any], rng: random.Random) -> Blob:
    """One to three tensors renamed, reshaped, retyped, dropped or repeated; all bytes accounted for."""
    entries = [
        [name, entry.get("dtype"), list(entry["shape"])]
        for name, entry in table.items()
        if isinstance(entry, dict) and isinstance(entry.get("shape"), list)
    ]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not entries:
            break
        entry = rng.choice(entries)
        kind = rng.randrange(9)
        if kind == 0:
            entries.remove(entry)
        elif kind == 1:
            entries.append([entry[0] + rng.choice((".x", "2", "\0", " ")), *entry[1:]])
        elif kind == 2:
            entry[0] = _renamed(entry[0], rng)
        elif kind == 3:
            entry[1] = rng.choice(list(_WIDTHS))
        elif kind == 4 and entry[2]:
            entry[2][rng.randrange(len(entry[2]))] = rng.choice((0, 1, 2, 3, 5, 7, 31, 4096, 2**20, 2**33))
        elif kind == 5:
            entry[2] = entry[2][::-1] if rng.random() < 0.5 else entry[2] + [1]
        elif kind == 6:
            entry[2] = entry[2][1:]
        else:
            other = rng.choice(entries)
            entry[0], other[0] = other[0], entry[0]
    header: dict[str, Any] = {"__metadata__": table["__metadata__"]} if "__metadata__" in table else {}
    end = 0
    for name, dtype, shape in entries:
        nbytes = math.prod(extent for extent in shape if isinstance(extent, int)) * _WIDTHS.get(str(dtype), 2)
        if not 0 <= nbytes <= MAX_NBYTES - end:
            nbytes = 0
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return Blob(len(text).to_bytes(8, "little") + text, 8 + len(text) + end)


def _renamed(name: str, rng: random.Random) -> str:
    parts = name.split(".")
    at = rng.randrange(len(parts))
    parts[at] = rng.choice((*TEXTS[:18], "7", "99999", "0", "00", "-1", "999999", "lora_A", "lora_B", "experts"))
    return ".".join(parts)


def mutate_journal(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Lines changed as JSON, each with the digest that its place asks for; or bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(content, rng, others)
    payloads = [line.partition(b" ")[2] for line in content.splitlines()]
    if payloads:
        at = rng.randrange(len(payloads))
        payloads[at] = mutate_json(payloads[at], rng, payloads).replace(b"\n", b" ")
        if rng.random() < 0.2:
            payloads.insert(at, rng.choice(payloads))
    lines, digest = b"", b""
    for payload in payloads:
        digest = _digest(digest, payload)
        lines += digest.hex().encode() + b" " + payload + b"\n"
    return lines


def mutate_lines(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Text whose lines are `key: value`, `key = value` or JSON: one value of a line, or lines themselves, or bytes."""
    lines = content.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            lines[at] = mutate_bytes(lines[at], rng, others)
        elif kind == 1:
            del lines[at]
            lines = lines or [b""]
        elif kind == 2:
            lines.insert(at, rng.choice(lines))
        elif lines[at].startswith(b"{"):
            lines[at] = mutate_json(lines[at], rng, others)
        else:
            sign = b"=" if b"=" in lines[at] else b":"
            key, _, value = lines[at].partition(sign)
            try:
                new = mutate_value(json.loads(value), rng)
            except (ValueError, RecursionError):
                new = junk(rng)
            lines[at] = key + sign + b" " + json.dumps(new).encode()
    return b"\n".join(lines)


_BY_SUFFIX: dict[str, Callable[[bytes, random.Random, Sequence[bytes]], bytes]] = {
    "json": mutate_json,
    "journal": mutate_journal,
    "toml": mutate_lines,
    "jsonl": mutate_lines,
    "md": mutate_lines,
}


def mutate(files: dict[str, Blob], rng: random.Random, others: Sequence[dict[str, Blob]]) -> dict[str, Blob]:
    """One case more: mostly one of its files mutated, at times two, or one missing or empty."""
    mutant = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(list(mutant))
        if rng.random() < 0.01 and len(mutant) > 1:
            del mutant[name]
            continue
        blob = mutant[name]
        same = [case[name].head for case in others if name in case] or [blob.head]
        suffix = name.rpartition(".")[2]
        if suffix == "safetensors":
            mutant[name] = mutate_safetensors(blob, rng, same)
        else:
            mutant[name] = Blob.of(_BY_SUFFIX.get(suffix, mutate_bytes)(blob.head, rng, same))
    return mutant
