"""GGUF headers of every shape: what is encoded is read; whatever is done to it gives a value or a SourceError."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from gguf.constants import GGMLQuantizationType, GGUFValueType
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamconv.api.inspect_file import inspect
from streamconv.cli.inspection import render
from streamconv.errors import SourceError
from streamconv.files import local as cursor
from streamconv.gguf.entries import Span
from streamconv.gguf.format import KeyValue, PackedArray, TensorInfo, align, encode_header
from streamconv.gguf.reader import GGUFFile
from tests.attacks.gguf_files import FATAL, LISTED

INTEGERS = {
    GGUFValueType.UINT8: (0, 8),
    GGUFValueType.INT8: (1, 7),
    GGUFValueType.UINT16: (0, 16),
    GGUFValueType.INT16: (1, 15),
    GGUFValueType.UINT32: (0, 32),
    GGUFValueType.INT32: (1, 31),
    GGUFValueType.UINT64: (0, 64),
    GGUFValueType.INT64: (1, 63),
}
SCALARS: dict[GGUFValueType, st.SearchStrategy[Any]] = {
    **{kind: st.integers(-signed << bits, (1 << bits) - 1) for kind, (signed, bits) in INTEGERS.items()},
    GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
}
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=15)
TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0)


@st.composite
def values(draw: st.DrawFn) -> tuple[GGUFValueType, bool, Any]:
    kind = draw(st.sampled_from(sorted(SCALARS)))
    is_array = draw(st.booleans())
    return kind, is_array, draw(st.lists(SCALARS[kind], max_size=20) if is_array else SCALARS[kind])


def key_value(name: str, kind: GGUFValueType, is_array: bool, value: Any) -> KeyValue:
    if not is_array:
        return KeyValue(name, kind, value)
    if kind == GGUFValueType.STRING:
        return KeyValue.array(name, PackedArray.of_strings(value))
    return KeyValue.array(name, PackedArray.of_numbers(kind, value))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], GGMLQuantizationType]:
    kind = draw(st.sampled_from(TYPES))
    outer = draw(st.lists(st.integers(0, 5), max_size=3))
    inner = draw(st.integers(0, 3)) * 32 if kind == GGMLQuantizationType.Q8_0 else draw(st.integers(0, 40))
    return (*outer, inner), kind


KEYS = st.dictionaries(NAMES, values(), max_size=6)
TENSORS = st.dictionaries(NAMES, shapes(), max_size=5)


def encode(keys: dict[str, Any], tensors: dict[str, Any]) -> tuple[bytes, list[TensorInfo]]:
    infos: list[TensorInfo] = []
    offset = 0
    for name, (shape, kind) in tensors.items():
        infos.append(TensorInfo(name, shape, kind, offset))
        offset = align(offset + infos[-1].nbytes)
    header = encode_header([key_value(name, *value) for name, value in keys.items()], infos)
    return b"".join(header.pieces) + bytes(offset), infos


def look(content: bytes) -> GGUFFile:
    """The file read as far as it goes: keys, arrays, tensors."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.gguf"
        path.write_bytes(content)
        with GGUFFile.open(path) as file:
            for key in file.keys.values():
                if isinstance(key.value, Span):
                    assert len(key.value.first(3)) == min(3, len(key.value))
                    if key.value.nbytes < 1 << 16:
                        assert sum(1 for _ in key.value) == len(key.value)
            for tensor in file.tensors.values():
                assert tensor.type_name
                if not file.problems and tensor.nbytes:
                    file.read_into(tensor, 0, bytearray(tensor.nbytes))
        return file


@given(KEYS, TENSORS, st.integers(8, 300))
def test_what_is_encoded_is_read(keys: dict[str, Any], tensors: dict[str, Any], window_nbytes: int) -> None:
    content, infos = encode(keys, tensors)
    with tempfile.TemporaryDirectory() as directory, mock.patch.object(cursor, "WINDOW_NBYTES", window_nbytes):
        path = Path(directory) / "x.gguf"
        path.write_bytes(content)
        with GGUFFile.open(path) as file:
            assert (file.problems, list(file.keys)) == ((), list(keys))
            for name, (kind, is_array, value) in keys.items():
                found = file.keys[name].value
                assert (file.keys[name].type == GGUFValueType.ARRAY) == is_array == isinstance(found, Span)
                assert (list(found) if isinstance(found, Span) else found) == value
                assert kind.name.lower() in file.keys[name].type_name
            stored = [(t.name, t.shape, t.type, t.offset, t.nbytes) for t in file.tensors.values()]
            start = file.data_offset
            assert stored == [(t.name, t.shape, t.type, start + t.offset, t.nbytes) for t in infos]


VALID = encode(
    {
        "general.architecture": (GGUFValueType.STRING, False, "llama"),
        "llama.block_count": (GGUFValueType.UINT32, False, 2),
        "general.alignment": (GGUFValueType.UINT32, False, 32),
        "tokenizer.ggml.tokens": (GGUFValueType.STRING, True, ["<s>", "a", "bc", "€"]),
        "tokenizer.ggml.scores": (GGUFValueType.FLOAT32, True, [0.5, -1.0, 3.25]),
        "llama.rope.freq_base": (GGUFValueType.FLOAT32, False, 5e5),
    },
    {
        "token_embd.weight": ((7, 32), GGMLQuantizationType.Q8_0),
        "blk.0.attn_q.weight": ((3, 5), GGMLQuantizationType.BF16),
        "blk.0.attn_norm.weight": ((5,), GGMLQuantizationType.F32),
    },
)[0]
DATA_NBYTES = align(7 * 34) + align(3 * 5 * 2) + align(5 * 4)
HEADER_NBYTES = len(VALID) - DATA_NBYTES
NUMBERS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(0, 400),
    st.sampled_from(
        [1 << n for n in range(64)] + [(1 << n) - 1 for n in range(65)] + [2**64 - n for n in range(1, 40)]
    ),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file after a few blows: numbers overwritten, pieces dropped or doubled, the end cut off or extended."""
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(content), HEADER_NBYTES))))
        match draw(st.sampled_from(["number", "number", "byte", "drop", "double", "cut", "extend"])):
            case "number":
                form = draw(st.sampled_from("QIB"))
                raw = struct.pack("<Q", draw(NUMBERS))[: struct.calcsize(form)]
                content[at : at + len(raw)] = raw
            case "byte":
                content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "drop":
                del content[at : at + draw(st.integers(1, 40))]
            case "double":
                content[at:at] = content[at : at + draw(st.integers(1, 60))]
            case "cut":
                del content[at:]
            case "extend":
                content += draw(st.binary(max_size=60))
    return bytes(content)


@given(mutated())
@settings(max_examples=500)
@example(VALID)
def test_mutations_give_a_value_or_a_source_error(content: bytes) -> None:
    try:
        look(content)
    except SourceError as error:
        assert "\n" not in str(error) and "x.gguf" in str(error)


@given(mutated())
def test_mutations_can_be_inspected(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.gguf"
        path.write_bytes(content)
        try:
            found = inspect(path)
        except SourceError:
            return
        json.dumps(found.to_json(), allow_nan=False)
        assert all(line.isprintable() and len(line) <= 80 for line in render(found, tensors=True))


@given(st.binary(max_size=200))
def test_noise_gives_a_value_or_a_source_error(content: bytes) -> None:
    for start in (b"", VALID[:24], VALID[:16]):
        try:
            look(start + content)
        except SourceError:
            continue


def test_every_truncation() -> None:
    n_errors = 0
    for nbytes in range(len(VALID)):
        try:
            file = look(VALID[:nbytes])
        except SourceError:
            n_errors += 1
            continue
        is_whole = nbytes >= len(VALID) - 12  # the last tensor's padding, which no loader asks for
        assert [problem.code for problem in file.problems] == ([] if is_whole else ["truncated"])
    assert HEADER_NBYTES - 32 < n_errors <= HEADER_NBYTES


def test_every_attack_read_as_far_as_it_goes() -> None:
    for content, _ in LISTED.values():
        look(content)
    for content, _ in FATAL.values():
        try:
            look(content)
        except SourceError:
            continue
        raise AssertionError(content)
