"""A tokenizer.json and a tokenizer.model in one folder: which one is believed where they mean other tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamconv.errors import SourceError
from tests import cases, vocab_keys
from tests.extras import tokenizers
from tests.oracles import runtime
from tests.tiny import tokenizer as tiny
from tests.vocab_cases import added, edit

N = tiny.N_SPM_TOKENS
TEXTS = ("the quick brown fox, hello world", "fellow ld thing", *cases.SPM_TEXTS)


def extended(value: Any) -> None:
    """Further tokens behind the vocabulary, with merges that come first."""
    vocab, merges = value["model"]["vocab"], value["model"]["merges"]
    for left, right in (("▁", "ju"), ("m", "p"), ("▁ju", "mp"), ("j", "u")):
        vocab.setdefault(left + right, len(vocab))
        merges.append([left, right])


def put_between(value: Any) -> None:
    """A token in the middle: all that follow it move by one."""
    vocab = {text: id_ + (id_ >= 300) for text, id_ in value["model"]["vocab"].items()}
    value["model"]["vocab"] = {**vocab, "qx": 300}
    value["model"]["merges"].append(["q", "x"])


def in_another_order(value: Any) -> None:
    vocab = value["model"]["vocab"]
    vocab["e"], vocab["t"], vocab["a"] = vocab["t"], vocab["a"], vocab["e"]


def without_one(value: Any) -> None:
    """A piece of tokenizer.model that transformers never makes."""
    left, right = value["model"]["merges"].pop()
    del value["model"]["vocab"][left + right]


CHANGES: dict[str, tuple[Callable[[Any], None], int]] = {
    "extended": (extended, N + 4),
    "between": (put_between, N + 1),
    "order": (in_another_order, N),
    "fewer": (without_one, N),
}


@pytest.fixture(params=CHANGES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    """A folder whose tokenizer.json was changed, and the rows of its model."""
    tiny.write_spm(tmp_path)
    change, n_vocab = CHANGES[request.param]
    edit(tmp_path / "tokenizer.json", change)
    return tmp_path, n_vocab


def test_tokenizer_json_is_believed_with_a_warning(folder: tuple[Path, int]) -> None:
    directory, n_vocab = folder
    both = vocab_keys.read(directory, n_vocab)
    (directory / "tokenizer.model").unlink()
    alone = vocab_keys.read(directory, n_vocab)
    assert vocab_keys.values(both) == vocab_keys.values(alone)
    assert [*vocab_keys.codes(alone), "tokenizers-differ"] == vocab_keys.codes(both)
    vocab = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = vocab_keys.values(both)["tokenizer.ggml.tokens"]
    assert {text: tokens[id_] for text, id_ in vocab.items()} == {text: text for text in vocab}


def test_llama_cpp_splits_texts_as_transformers_does(folder: tuple[Path, int], tmp_path: Path) -> None:
    directory, n_vocab = folder
    reference = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = vocab_keys.write_model(tmp_path / "m.gguf", vocab_keys.read(directory, n_vocab).keys, n_vocab)
    with runtime.Runtime(model) as llama:
        for text in ("jump the qx", *TEXTS):
            assert llama.tokenize(text) == reference.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json"])
def test_where_they_agree_scores_and_types_are_the_models(tmp_path: Path, where: str) -> None:
    """Added tokens behind the pieces are no disagreement: a tokenizer.model never has them."""
    tiny.write_spm(tmp_path, fast=False)
    alone = vocab_keys.values(vocab_keys.read(tmp_path, N))
    tiny.write_spm(tmp_path)
    token = added(N, "<|end|>", special=True, normalized=False)
    if where == "tokenizer.json":
        edit(tmp_path / where, lambda value: value["added_tokens"].append(token))
    else:
        edit(tmp_path / where, lambda value: value.update(added_tokens_decoder={str(N): token}))
    vocabulary = vocab_keys.read(tmp_path, N + 1)
    values = vocab_keys.values(vocabulary)
    assert vocabulary.warnings == ()
    for key, last in (("tokens", "<|end|>"), ("scores", -1000.0), ("token_type", 3)):
        assert values[f"tokenizer.ggml.{key}"] == [*alone[f"tokenizer.ggml.{key}"], last]


def test_what_cannot_be_read_in_place_of_the_model_is_refused(tmp_path: Path) -> None:
    tiny.write_spm(tmp_path)
    edit(tmp_path / "tokenizer.json", in_another_order)
    edit(tmp_path / "tokenizer.json", lambda value: value.update(normalizer={"type": "NFC"}))
    with pytest.raises(SourceError) as caught:
        vocab_keys.read(tmp_path, N)
    assert caught.value.code == "tokenizers-differ"
    assert "tokenizer.model" in str(caught.value) and "tokenizer.json" in str(caught.value)


def test_a_token_of_the_vocabulary_beyond_the_rows_is_an_error(tmp_path: Path) -> None:
    tiny.write_spm(tmp_path)
    edit(tmp_path / "tokenizer.json", extended)
    with pytest.raises(SourceError):
        vocab_keys.read(tmp_path, N)
