"""tokenizer.model: the same pieces as the sentencepiece library reads, and no belief in what the file claims."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamconv.errors import SourceError
from streamconv.metadata.vocab.sentencepiece_model import (
    ModelType,
    PieceKind,
    SentencePieceModel,
    read_sentencepiece_model,
)
from tests import vocab_keys
from tests.extras import sentencepiece
from tests.tiny import tokenizer as tiny
from tests.tiny.tokenizer import _field, _number, _varint


def piece(text: bytes, score: float | None = None, kind: int | None = None) -> bytes:
    value = b"" if score is None else _varint(2 << 3 | 5) + struct.pack("<f", score)
    return _field(1, _field(1, text) + value + (b"" if kind is None else _number(3, kind)))


def model(*pieces: bytes, trainer: bytes = b"", normalizer: bytes = b"") -> bytes:
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


PIECES = (piece(b"<unk>", 0.0, 2), piece("▁a".encode(), -1.5, 1), piece(b"b", -2.0, 1))


def read(directory: Path, data: bytes, n_vocab: int = 10) -> SentencePieceModel:
    path = directory / "tokenizer.model"
    path.write_bytes(data)
    return read_sentencepiece_model(path, n_vocab)


def test_the_pieces_are_those_of_the_library(tmp_path: Path) -> None:
    tiny.write_spm(tmp_path)
    ours = read_sentencepiece_model(tmp_path / "tokenizer.model", tiny.N_SPM_TOKENS)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = range(theirs.vocab_size())
    assert [text.decode() for text in ours.texts] == [theirs.id_to_piece(id_) for id_ in ids]
    assert list(ours.scores) == [theirs.get_score(id_) for id_ in ids]
    kinds = [(theirs.is_unknown(id_), theirs.is_control(id_), theirs.is_byte(id_)) for id_ in ids]
    assert kinds == [tuple(kind == wanted for wanted in (2, 3, 6)) for kind in ours.kinds]
    assert (ours.model_type, ours.add_dummy_prefix, ours.remove_extra_whitespaces) == (ModelType.BPE, True, False)


def test_fields_left_out_have_the_values_of_the_proto(tmp_path: Path) -> None:
    ours = read(tmp_path, piece(b"a"))
    assert (list(ours.scores), list(ours.kinds)) == ([0.0], [PieceKind.NORMAL])
    assert (ours.model_type, ours.add_dummy_prefix, ours.remove_extra_whitespaces) == (ModelType.UNIGRAM, True, True)
    assert not ours.has_character_map


def test_fields_of_other_numbers_are_passed_over(tmp_path: Path) -> None:
    others = _field(90, b"xyz") + _number(91, 7) + _varint(92 << 3 | 1) + bytes(8) + _varint(93 << 3 | 5) + bytes(4)
    first = _field(1, others + _field(1, b"a"))
    assert read(tmp_path, others + first + others).texts == [b"a"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "it has no pieces"),
        (b"IQ== 0\nIg== 1\n", "not a SentencePiece model"),
        (b"\x00" * 64, "not a SentencePiece model"),
        (b"\xff" * 64, "in the middle of a number"),
        (model(*PIECES)[:-1], "not a SentencePiece model"),
        (b"\x0a" + _varint(1 << 40) + b"x", "a field of 1,099,511,627,776 bytes, but only 1 are left"),
        (b"\x0a\x04\x0a\x63ab", "a field of 99 bytes, but only 2 are left"),
        (_number(1, 5), "found a number where a message"),
        (_field(1, _number(1, 5)), "found a number where a message"),
        (_varint(1 << 3 | 3), "no field starts"),
        (b"\x02\x01a", "no field starts"),
        (b"\x0a" + b"\x80" * 11, "in the middle of a number"),
        (piece(b"\xff"), "piece 0 is not UTF-8"),
        (piece(b"\xed\xa0\x80"), "piece 0 is not UTF-8"),
        (piece(b"a", 0.0, 7), "piece 0 has the unknown type 7"),
        (piece(b"a", 0.0, 1 << 60), "has the unknown type"),
        (piece(b"a", float("nan")), "the score of piece 0 is not a finite number"),
        (model(*PIECES, *[piece(b"x%d" % n) for n in range(8)]), "more pieces than the model's 10 rows"),
        (_field(1, b""), None),
    ],
)
def test_hostile_models(data: bytes, problem: str | None, tmp_path: Path) -> None:
    if problem is None:
        assert read(tmp_path, data).texts == [b""]
        return
    with pytest.raises(SourceError, match=problem) as caught:
        read(tmp_path, data)
    assert caught.value.file == str(tmp_path / "tokenizer.model")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_model_gives_pieces_or_an_error(data: st.DataObject, tmp_path: Path) -> None:
    raw = model(*PIECES, trainer=_number(3, 2), normalizer=_field(1, b"identity") + _number(3, 1) + _number(4, 0))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        raw = raw[:start] + data.draw(st.binary(max_size=3)) + raw[start + data.draw(st.integers(0, 4)) :]
    try:
        ours = read(tmp_path, raw)
    except SourceError:
        return
    assert len(ours.texts) == len(ours.scores) == len(ours.kinds) <= 10
    assert all(text.decode() is not None for text in ours.texts)


def test_a_piece_twice(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model(*PIECES, PIECES[1]))
    with pytest.raises(SourceError, match="piece '▁a' occurs twice, at 1 and 3"):
        vocab_keys.read(tmp_path, 10)


def test_rows_behind_the_pieces(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model(*PIECES, trainer=_number(3, 2), normalizer=_number(4, 0)))
    values = vocab_keys.values(vocab_keys.read(tmp_path, 5))
    assert values["tokenizer.ggml.tokens"] == ["<unk>", "▁a", "b", "[PAD3]", "[PAD4]"]
    assert values["tokenizer.ggml.token_type"] == [2, 1, 1, 5, 5]
    assert values["tokenizer.ggml.scores"] == [0.0, -1.5, -2.0, -10000.0, -10000.0]


def test_what_llama_cpp_does_otherwise_is_said(tmp_path: Path) -> None:
    normalizer = _field(2, b"map") + _number(3, 0)
    (tmp_path / "tokenizer.model").write_bytes(model(*PIECES, normalizer=normalizer))
    vocabulary = vocab_keys.read(tmp_path, 3)
    assert vocab_keys.codes(vocabulary) == ["sentencepiece-type", "normalizer-ignored"]
    assert vocab_keys.values(vocabulary)["tokenizer.ggml.add_space_prefix"] is False


def test_added_tokens_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model(*PIECES, trainer=_number(3, 2), normalizer=_number(4, 0)))
    path = tmp_path / "added_tokens.json"
    path.write_text('{"<x>": 3, "b": 2, "<far>": 7}')
    vocabulary = vocab_keys.read(tmp_path, 4)
    values = vocab_keys.values(vocabulary)
    assert values["tokenizer.ggml.tokens"] == ["<unk>", "▁a", "b", "<x>"]
    assert values["tokenizer.ggml.token_type"] == [2, 1, 1, 4]
    assert vocab_keys.codes(vocabulary) == ["tokens-beyond-rows"]
    for bad in ('{"<x>": -1}', '{"<x>": "3"}', '{"": 3}', '{"<x>": null}', "[]", '{"b": 3}'):
        path.write_text(bad)
        with pytest.raises(SourceError):
            vocab_keys.read(tmp_path, 4)
