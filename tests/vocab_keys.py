"""The result of read_vocabulary as plain Python values, and a model around it that llama.cpp loads."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

from streamconv.gguf.format import KeyValue, PackedArray, TensorInfo, align, encode_header
from streamconv.metadata.vocab import Vocabulary, read_vocabulary
from tests.oracles.ggufs import MAX_LISTED

_NUMBERS = {GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4"}
_HIDDEN = 32


def read(
    directory: Path, n_vocab: int | None = None, *, default_pre: str | None = None, pre: str | None = None
) -> Vocabulary:
    """The vocabulary of a directory with a config.json (or none), for its vocab_size."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = config["vocab_size"] if n_vocab is None else n_vocab
    return read_vocabulary(directory, config=config, n_vocab=rows, default_pre=default_pre, pre=pre)


def values(vocabulary: Vocabulary) -> dict[str, Any]:
    """Keys and values, arrays as lists."""
    return {entry.key: unpacked(entry.value) for entry in vocabulary.keys}


def types(vocabulary: Vocabulary) -> dict[str, list[str]]:
    """Keys and types as the goldens have them."""
    return {
        entry.key: [entry.type.name, *([entry.value.element.name] if isinstance(entry.value, PackedArray) else [])]
        for entry in vocabulary.keys
    }


def codes(vocabulary: Vocabulary) -> list[str]:
    """The codes of the warnings."""
    return [warning.code for warning in vocabulary.warnings]


def listed(value: Any) -> Any:
    """A value as the goldens have it: of a long array its length and digest."""
    if isinstance(value, list) and len(value) > MAX_LISTED:
        return {"n": len(value), "sha256": hashlib.sha256(json.dumps(value).encode()).hexdigest()}
    return value


def unpacked(value: Any) -> Any:
    if not isinstance(value, PackedArray):
        return value
    if value.element == GGUFValueType.STRING:
        strings = list(_strings(bytes(value.payload)))
        assert len(strings) == value.length
        return strings
    numbers = np.frombuffer(value.payload, dtype=_NUMBERS[value.element])
    assert len(numbers) == value.length
    return numbers.tolist()


def _strings(payload: bytes) -> Iterator[str]:
    at = 0
    while at < len(payload):
        (length,) = struct.unpack_from("<Q", payload, at)
        yield payload[at + 8 : at + 8 + length].decode("utf-8")
        at += 8 + length
    assert at == len(payload)


def write_model(path: Path, keys: Iterable[KeyValue], n_vocab: int) -> Path:
    """A Llama of one layer whose weights are all zero (a hole in the file): enough to tokenize with."""
    settings = (
        KeyValue.string("general.architecture", "llama"),
        KeyValue.u32("llama.block_count", 1),
        KeyValue.u32("llama.context_length", 64),
        KeyValue.u32("llama.embedding_length", _HIDDEN),
        KeyValue.u32("llama.feed_forward_length", _HIDDEN),
        KeyValue.u32("llama.attention.head_count", 1),
        KeyValue.f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
    )
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (n_vocab, _HIDDEN), "output_norm": (_HIDDEN,)}
    shapes |= {f"blk.0.{name}": (_HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.{name}": (_HIDDEN, _HIDDEN) for name in matrices}
    infos: list[TensorInfo] = []
    end = 0
    for name, shape in shapes.items():
        infos.append(TensorInfo(f"{name}.weight", shape, GGMLQuantizationType.F32, end))
        end = align(end + infos[-1].nbytes)
    with path.open("wb") as file:
        file.writelines(encode_header([*settings, *keys], infos).pieces)
        file.truncate(file.tell() + end)
    return path
