"""Added tokens for which the embedding has no row, from each file that can add tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.errors import SourceError
from tests import extras, tiny, vocab_keys
from tests.oracles import ggufs, runtime
from tests.tiny import tokenizer as made
from tests.tiny import write_json
from tests.vocab_cases import added, edit

BPE, SPM = made.N_BPE_TOKENS, made.N_SPM_TOKENS


def in_tokenizer_json(folder: Path, id_: int) -> None:
    edit(folder / "tokenizer.json", lambda value: value["added_tokens"].append(pad(id_)))


def in_the_vocabulary_too(folder: Path, id_: int) -> None:
    in_tokenizer_json(folder, id_)
    edit(folder / "tokenizer.json", lambda value: value["model"]["vocab"].update({"[PAD]": id_}))


def in_tokenizer_config(folder: Path, id_: int) -> None:
    edit(folder / "tokenizer_config.json", lambda value: value.update(added_tokens_decoder={str(id_): pad(id_)}))


def in_both(folder: Path, id_: int) -> None:
    in_tokenizer_json(folder, id_)
    in_tokenizer_config(folder, id_)


def in_added_tokens(folder: Path, id_: int) -> None:
    (folder / "tokenizer.json").unlink()
    write_json(folder / "added_tokens.json", {"[PAD]": id_})


def pad(id_: int) -> dict[str, Any]:
    return added(id_, "[PAD]", special=True, normalized=False)


Add = Callable[[Path, int], None]
BYTE_LEVEL: list[Add] = [in_tokenizer_json, in_the_vocabulary_too, in_tokenizer_config, in_both]
SENTENCEPIECE: list[Add] = [in_tokenizer_json, in_tokenizer_config, in_both, in_added_tokens]


@pytest.mark.parametrize("gap", [0, 7])
@pytest.mark.parametrize(
    ("kind", "add"), [*(("llama-bpe", add) for add in BYTE_LEVEL), *(("spm", add) for add in SENTENCEPIECE)]
)
def test_a_pad_token_beyond_the_rows_is_left_out(tmp_path: Path, kind: str, add: Add, gap: int) -> None:
    folder = tiny.llama(tmp_path / "model", tokenizer=kind)
    n_rows = SPM if kind == "spm" else BPE
    before = streamconv.convert(folder, tmp_path / "before.gguf")
    add(folder, n_rows + gap)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(folder / name, lambda value: value.update(pad_token="[PAD]"))
    edit(folder / "config.json", lambda value: value.update(pad_token_id=n_rows + gap))
    edit(folder / "generation_config.json", lambda value: value.update(pad_token_id=n_rows + gap))
    report = streamconv.convert(folder, tmp_path / "out.gguf")
    codes = [warning.code for warning in report.warnings]
    assert "tokens-beyond-rows" in codes
    assert any("[PAD]" in warning.message for warning in report.warnings)
    ours, theirs = ggufs.read(report.output), ggufs.read(before.output)
    assert ours["tokenizer.ggml.tokens"] == theirs["tokenizer.ggml.tokens"]
    assert len(ours["tokenizer.ggml.tokens"]) == n_rows
    assert ours.golden()["tensors"] == theirs.golden()["tensors"]
    key = "tokenizer.ggml.padding_token_id"
    assert key not in ours.keys or ours[key] < n_rows
    assert runtime.load(report.output).status == "loaded"


def test_a_token_below_the_rows_stays_where_tokenizers_puts_it(tmp_path: Path) -> None:
    made.write_bpe(tmp_path)
    new = [added(BPE + 9, "<far>"), added(BPE + 1, "<near>"), added(BPE + 2, "<next>")]
    edit(tmp_path / "tokenizer.json", lambda value: value["added_tokens"].extend(new))
    vocabulary = vocab_keys.read(tmp_path, BPE + 3, default_pre="lfm2")
    tokens = vocab_keys.values(vocabulary)["tokenizer.ggml.tokens"]
    reference = extras.tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("<near>", "<next>"):
        assert tokens[reference.token_to_id(text)] == text
    assert "<far>" not in tokens
    assert vocab_keys.codes(vocabulary) == ["tokens-beyond-rows"]


@pytest.mark.parametrize("id_", [2**32, 2**40, 2**62])
@pytest.mark.parametrize("add", [in_tokenizer_json, in_tokenizer_config])
def test_the_id_of_what_is_left_out_is_named(tmp_path: Path, add: Add, id_: int) -> None:
    folder = tiny.llama(tmp_path / "model", tokenizer="llama-bpe")
    add(folder, id_)
    report = streamconv.convert(folder, tmp_path / "out.gguf")
    (warning,) = [one for one in report.warnings if one.code == "tokens-beyond-rows"]
    assert str(id_) in warning.message


@pytest.mark.parametrize("kind", ["llama-bpe", "spm"])
def test_an_eos_that_is_left_out_is_said_to_be_the_eos(tmp_path: Path, kind: str) -> None:
    folder = tiny.llama(tmp_path / "model", tokenizer=kind)
    n_rows = SPM if kind == "spm" else BPE
    in_tokenizer_json(folder, n_rows)
    edit(folder / "tokenizer_config.json", lambda value: value.update(eos_token="[PAD]"))
    report = streamconv.convert(folder, tmp_path / "out.gguf")
    found = {warning.code: warning.message for warning in report.warnings}
    assert "cannot end an answer" in found["special-token-range"]
    assert ggufs.read(report.output)["tokenizer.ggml.eos_token_id"] == 2  # config.json's


@pytest.mark.parametrize("kind", ["llama-bpe", "spm"])
def test_a_token_of_the_models_own_beyond_the_rows_is_an_error(tmp_path: Path, kind: str) -> None:
    folder = tiny.llama(tmp_path / "model", tokenizer=kind)
    n_rows = SPM if kind == "spm" else BPE
    edit(folder / "tokenizer.json", lambda value: value["model"]["vocab"].update({"[PAD]": n_rows}))
    with pytest.raises(SourceError):
        streamconv.convert(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("tokenizer_config.json", {"eos_token": "<|nowhere|>"}, "special-token-unknown"),
        ("special_tokens_map.json", {"eos_token": {"content": "<|nowhere|>"}}, "special-token-unknown"),
        ("tokenizer_config.json", {"bos_token": "<|nowhere|>"}, "special-token-unknown"),
        ("config.json", {"eos_token_id": 410}, "special-token-unknown"),  # a row without a token
        ("config.json", {"eos_token_id": 416}, "special-token-range"),
    ],
)
def test_an_eos_that_the_vocabulary_does_not_have_is_a_warning(
    tmp_path: Path, name: str, value: dict[str, Any], code: str
) -> None:
    folder = tiny.lfm2(tmp_path / "model")
    edit(folder / name, lambda content: content.update(value))
    report = streamconv.convert(folder, tmp_path / "out.gguf")
    assert [warning.code for warning in report.warnings] == [code]
    keys = ggufs.read(report.output)
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
