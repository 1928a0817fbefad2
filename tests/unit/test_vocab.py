"""Whole tokenizers against llama.cpp's converter: every key that both write has the same value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import cases, vocab_cases, vocab_keys
from tests.vocab_keys import listed

GOLDENS: dict[str, dict[str, Any]] = json.loads(vocab_cases.GOLDENS.read_text(encoding="utf-8"))

# Of a vocabulary without tokenizer.json, where llama.cpp's converter looks among added tokens alone.
ONLY_OURS = {"tokenizer.ggml.unknown_token_id", "tokenizer.ggml.padding_token_id"}
WARNINGS = {
    "bos-eos-template": ["special-token-disagreement"],
    "cls-and-sep": ["special-token-disagreement"] * 2,
    "renumbered-added-token": ["added-token-ids"],
    "spm-added-tokens": ["tokens-beyond-rows"],
    "spm-own-pieces": ["sentencepiece-user-defined"],
}


@pytest.mark.parametrize("name", vocab_cases.CASES)
def test_keys_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    vocab_cases.CASES[name](tmp_path)
    vocabulary = vocab_keys.read(tmp_path)
    golden = GOLDENS[name]
    if names := golden.get("tokenizer.chat_templates"):
        names["value"].sort()  # a set in llama.cpp's converter
    ours = {
        key: {"type": vocab_keys.types(vocabulary)[key], "value": listed(value)}
        for key, value in vocab_keys.values(vocabulary).items()
    }
    assert {key: ours[key] for key in golden} == golden
    assert ours.keys() - golden.keys() <= (ONLY_OURS if not (tmp_path / "tokenizer.json").exists() else set())
    assert vocab_keys.codes(vocabulary) == WARNINGS.get(name, [])


@pytest.mark.parametrize(("name", "n_vocab", "default_pre"), [("lfm2-given", 320, "lfm2"), ("llama-given", 301, None)])
def test_given_cases(name: str, n_vocab: int, default_pre: str | None) -> None:
    golden = json.loads((cases.GIVEN / f"{name}.golden.json").read_text(encoding="utf-8"))["llamacpp:f32"]["kv"]
    vocabulary = vocab_keys.read(cases.GIVEN / name, n_vocab, default_pre=default_pre)
    ours = {key: listed(value) for key, value in vocab_keys.values(vocabulary).items()}
    assert ours == {key: entry["value"] for key, entry in golden.items() if key.startswith("tokenizer.")}
    assert vocabulary.warnings == ()
