"""tekken.json alone: the ids are those of tiktoken's algorithm, and what is malformed is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from streamconv.errors import SourceError
from tests import cases, vocab_keys
from tests.extras import tokenizers
from tests.oracles import runtime
from tests.tiny import tokenizer as tiny
from tests.unit.test_vocab_runtime import PLAIN, SPACES

N_SPECIAL = 20


def ids_of(tokens: list[bytes], text: str) -> list[int]:
    """As tiktoken: a piece that is a token is that token, else the pair whose token comes first is joined."""
    ranks = {raw: rank for rank, raw in enumerate(tokens)}
    regex = tokenizers.Regex(tiny.PRE_TOKENIZERS["tekken"]["pretokenizers"][0]["pattern"]["Regex"])
    pieces = tokenizers.pre_tokenizers.Split(regex, "isolated").pre_tokenize_str(text)
    return [N_SPECIAL + rank for piece, _ in pieces for rank in joined(ranks, piece.encode())]


def joined(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    parts = [piece] if piece in ranks else [bytes([byte]) for byte in piece]
    while True:
        pairs = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return [ranks[part] for part in parts]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_ids_in_the_run_time_are_tiktokens(tmp_path: Path) -> None:
    tokens = tiny.write_tekken(tmp_path)
    n_vocab = N_SPECIAL + len(tokens) + 5
    vocabulary = vocab_keys.read(tmp_path, n_vocab)
    values = vocab_keys.values(vocabulary)
    assert values["tokenizer.ggml.pre"] == "tekken"
    assert values["tokenizer.ggml.tokens"][:4] == ["<unk>", "<s>", "</s>", "[INST]"]
    assert [values[f"tokenizer.ggml.{role}_token_id"] for role in ("unknown", "bos", "eos", "padding")] == [0, 1, 2, 11]
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert values["tokenizer.ggml.token_type"] == [3] * N_SPECIAL + [1] * len(tokens) + [5] * 5
    texts = (*PLAIN, *SPACES, *cases.TEXTS)
    with runtime.Runtime(vocab_keys.write_model(tmp_path / "model.gguf", vocabulary.keys, n_vocab)) as model:
        assert {text: model.tokenize(text, parse_special=False) for text in texts} == {
            text: ids_of(tokens, text) for text in texts
        }
        assert model.tokenize("[INST]the[/INST]") == [3, *ids_of(tokens, "the"), 4]


def test_special_tokens_of_its_own(tmp_path: Path) -> None:
    listed = [
        {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(("<unk>", "<s>", "<x>"))
    ]
    tokens = tiny.write_tekken(tmp_path, special_tokens=listed, config={"version": "v13"})
    values = vocab_keys.values(vocab_keys.read(tmp_path, N_SPECIAL + len(tokens)))
    assert values["tokenizer.ggml.tokens"][2:5] == ["<x>", "<SPECIAL_3>", "<SPECIAL_4>"]
    assert values["tokenizer.ggml.bos_token_id"] == 1
    assert "tokenizer.ggml.padding_token_id" not in values


def test_a_tokenizer_json_beside_it_counts_first(tmp_path: Path) -> None:
    tiny.write_tekken(tmp_path)
    tiny.write_bpe(tmp_path, pre="tekken")
    assert vocab_keys.values(vocab_keys.read(tmp_path, tiny.N_BPE_TOKENS))["tokenizer.ggml.tokens"][0] == "<|pad|>"


def test_it_counts_before_a_tokenizer_model(tmp_path: Path) -> None:
    tokens = tiny.write_tekken(tmp_path)
    tiny.write_spm(tmp_path, fast=False)
    values = vocab_keys.values(vocab_keys.read(tmp_path, N_SPECIAL + len(tokens)))
    assert values["tokenizer.ggml.model"] == "gpt2"


def config(**changes: Any) -> Callable[[Any], None]:
    return lambda value: value["config"].update(changes)


def token(**changes: Any) -> Callable[[Any], None]:
    return lambda value: value["vocab"][300].update(changes)


def huge(value: Any) -> None:
    """Tokens of one letter, each a little longer: their halves grow with the cube of their number."""
    vocab = value["vocab"][:256] + [
        {"rank": 255 + n, "token_bytes": tiny.b64encode(b"a" * n).decode()} for n in range(2, 300)
    ]
    value["vocab"] = vocab
    value["config"]["default_vocab_size"] = N_SPECIAL + len(vocab)


MALFORMED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no vocab": (lambda value: value.pop("vocab"), "tokenizer-malformed"),
    "no config": (lambda value: value.pop("config"), "tokenizer-malformed"),
    "config null": (lambda value: value.update(config=None), "tokenizer-malformed"),
    "vocab an object": (lambda value: value.update(vocab={}), "json-malformed"),
    "count of special tokens": (config(default_num_special_tokens=None), "tokenizer-malformed"),
    "count a truth": (config(default_num_special_tokens=True), "tokenizer-malformed"),
    "fewer than the bytes": (config(default_vocab_size=200), "tokenizer-malformed"),
    "more than the rows": (config(default_vocab_size=1 << 40), "tokens-beyond-rows"),
    "more than there are": (config(default_num_special_tokens=4), "tokenizer-malformed"),
    "a later version without special tokens": (config(version="v11"), "tokenizer-tekken"),
    "no version": (config(version=None), "tokenizer-tekken"),
    "no base64": (token(token_bytes="?"), "tokenizer-malformed"),
    "bytes a number": (token(token_bytes=7), "tokenizer-malformed"),
    "no bytes": (token(token_bytes=""), "tokenizer-malformed"),
    "another rank": (token(rank=7), "tokenizer-malformed"),
    "twice": (token(token_bytes=tiny.b64encode(b"[INST]").decode()), "token-twice"),
    "special token of another rank": (
        lambda value: value.update(special_tokens=[{"rank": 1, "token_str": "<s>"}]),
        "tokenizer-malformed",
    ),
    "special token without text": (
        lambda value: value.update(special_tokens=[{"rank": 0}]),
        "tokenizer-malformed",
    ),
    "half a surrogate": (
        lambda value: value.update(special_tokens=[{"rank": 0, "token_str": "\ud800"}]),
        "not-utf8",
    ),
    "another pattern": (config(pattern=r"\w+"), "pre-unknown"),
    "no pattern": (config(pattern=None), "pre-unknown"),
    "merges beyond measure": (huge, "tokenizer-malformed"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_refused(name: str, tmp_path: Path) -> None:
    change, code = MALFORMED[name]
    n_vocab = N_SPECIAL + len(tiny.write_tekken(tmp_path)) + 400
    value = json.loads((tmp_path / "tekken.json").read_text(encoding="utf-8"))
    change(value)
    (tmp_path / "tekken.json").write_text(json.dumps(value))
    with pytest.raises(SourceError) as refused:
        vocab_keys.read(tmp_path, n_vocab)
    assert refused.value.code == code


def test_the_order_of_its_fields_does_not_matter(tmp_path: Path) -> None:
    n_vocab = N_SPECIAL + len(tiny.write_tekken(tmp_path))
    expected = vocab_keys.values(vocab_keys.read(tmp_path, n_vocab))
    value = json.loads((tmp_path / "tekken.json").read_text(encoding="utf-8"))
    tiny._write_json(tmp_path / "tekken.json", {"image": {"x": [1]}, **dict(reversed(value.items()))})
    assert vocab_keys.values(vocab_keys.read(tmp_path, n_vocab)) == expected
