"""Read tokenizer.model: SentencePiece's pieces, their scores and types, and its normalizer.

A length or count is accepted only if it stays inside the file and below the model's number of rows, so these two bound
time and memory. Format: sentencepiece_model.proto of https://github.com/google/sentencepiece (ModelProto.pieces = 1,
trainer_spec = 2, normalizer_spec = 3) and the protobuf wire format.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from streamconv.errors import SourceError
from streamconv.files.local import read_start
from streamconv.files.store import Place

MAX_NBYTES = 64 << 20  # the largest published ones have about 5 MB


class PieceKind(IntEnum):
    """SentencePiece.Type. GGUF's token types have the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    """TrainerSpec.ModelType."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(slots=True)
class SentencePieceModel:
    """A parsed tokenizer.model. Piece i is token i; missing fields have the defaults of the .proto."""

    path: Place
    texts: list[bytes] = field(default_factory=list)  # UTF-8
    scores: array[float] = field(default_factory=lambda: array("f"))
    kinds: bytearray = field(default_factory=bytearray)
    model_type: int = ModelType.UNIGRAM
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    has_character_map: bool = False


def read_sentencepiece_model(path: Place, n_vocab: int) -> SentencePieceModel:
    """Parse the tokenizer.model at `path`.

    Args:
        path: The file.
        n_vocab: Number of rows of the model's embedding.

    Raises:
        SourceError: The file is malformed, or has more than `n_vocab` pieces.
    """
    data = read_start(path, MAX_NBYTES + 1)
    if len(data) > MAX_NBYTES:
        raise SourceError(f"larger than the limit of {MAX_NBYTES:,} bytes", file=path, code="sentencepiece-size")
    result = SentencePieceModel(path)
    try:
        _read_model(data, result, n_vocab)
    except ValueError as error:
        hint = "Llama 3's own tokenizer.model has another format: add tokenizer.json, which is then read instead"
        raise SourceError(
            f"not a SentencePiece model: {error}", file=path, hint=hint, code="sentencepiece-malformed"
        ) from None
    return result


def _read_model(data: bytearray, result: SentencePieceModel, n_vocab: int) -> None:
    for number, value in _fields(data, 0, len(data)):
        if number == 1:
            if len(result.texts) == n_vocab:
                raise ValueError(f"it has more pieces than the model's {n_vocab:,} rows")
            _read_piece(data, _message(value), result)
        elif number == 2:
            numbers = _numbers(data, _message(value))
            result.model_type = numbers.get(3, result.model_type)
        elif number == 3:
            numbers = _numbers(data, _message(value))
            result.add_dummy_prefix = bool(numbers.get(3, True))
            result.remove_extra_whitespaces = bool(numbers.get(4, True))
            result.has_character_map = numbers.get(2, 0) > 0
    if not result.texts:
        raise ValueError("it has no pieces")


def _read_piece(data: bytearray, span: slice, result: SentencePieceModel) -> None:
    text, score, kind = b"", 0.0, int(PieceKind.NORMAL)
    for number, value in _fields(data, span.start, span.stop):
        if number == 1:
            text = bytes(data[_message(value)])
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    index = len(result.texts)
    if kind not in PieceKind._value2member_map_:
        raise ValueError(f"piece {index} has the unknown type {kind}")
    if score != score:
        raise ValueError(f"the score of piece {index} is not a finite number")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"piece {index} is not UTF-8") from None
    result.texts.append(text)
    result.scores.append(score)
    result.kinds.append(kind)


def _numbers(data: bytearray, span: slice) -> dict[int, int]:
    """Field numbers of a message with their integers; a string gives its length."""
    values = _fields(data, span.start, span.stop)
    return {
        number: value.stop - value.start if isinstance(value, slice) else int(value)
        for number, value in values
        if not isinstance(value, float)
    }


def _message(value: int | float | slice) -> slice:
    if not isinstance(value, slice):
        raise ValueError("found a number where a message is expected")
    return value


def _fields(data: bytearray, at: int, end: int) -> Iterator[tuple[int, int | float | slice]]:
    """Field numbers of a message with their values; a string or message gives its span in `data`."""
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at, end)
            yield number, value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            length, at = _varint(data, at, end)
        if length is None or not number:
            raise ValueError(f"no field starts at byte {at:,}")
        if length > end - at:
            raise ValueError(f"byte {at:,}: a field of {length:,} bytes, but only {end - at:,} are left")
        yield number, struct.unpack_from("<f", data, at)[0] if wire == 5 else slice(at, at + length)
        at += length


def _varint(data: bytearray, at: int, end: int) -> tuple[int, int]:
    """The varint at `at` (at most 64 bits) and the position after it."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"the data ends in the middle of a number, at byte {at:,}")
