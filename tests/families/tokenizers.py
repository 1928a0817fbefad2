"""Tokenizer files of the families: one small vocabulary for each kind, with the structure of the published one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests import tiny

N_VOCAB = {"bpe": 416, "spm": 352}  # rows of the embedding: a few more than there are tokens


def write(kind: str, directory: Path) -> None:
    """The files of a kind of KINDS in `directory`."""
    KINDS[kind](directory)


def n_vocab(kind: str) -> int:
    """The rows of the embedding of a model with this kind."""
    return N_VOCAB["spm" if kind in ("spm", "gemma", "phi3") else "bpe"]


def _renamed(directory: Path, pre: str, names: Mapping[str, str]) -> None:
    """A byte-level BPE whose special tokens have other names."""
    tiny.write_bpe(directory, pre=pre)
    for path in directory.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
        path.write_text(text, encoding="utf-8")


def _without_bos(directory: Path, pre: str) -> None:
    """As Qwen's: no BOS is put before a text."""
    tiny.write_bpe(directory, pre=pre, bos=False)


# What the runtime looks for around images and their tiles, as single tokens.
_IMAGE = ("<image>", "<|image_start|>", "<|image_end|>", "<|img_row_1_col_1|>", "<|img_thumbnail|>")


def _lfm2_vl(directory: Path) -> None:
    tiny.write_bpe(directory, pre="lfm2")
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    first = 1 + max(max(value["model"]["vocab"].values()), *(token["id"] for token in value["added_tokens"]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    value["added_tokens"] += [{"id": first + n, "content": text, **flags} for n, text in enumerate(_IMAGE)]
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _with_eos(directory: Path) -> None:
    """As Qwen's embedding models: an end token is put after a text."""
    _without_bos(directory, "qwen2")
    end, template = tiny.tokenizer.SPECIALS[2], {"Sequence": {"id": "A", "type_id": 0}}
    special = {"SpecialToken": {"id": end, "type_id": 0}}
    _edit(
        directory / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [template, special],
            "pair": [template, special, {"Sequence": {"id": "B", "type_id": 1}}, special],
            "special_tokens": {end: {"id": end, "ids": [2], "tokens": [end]}},
        },
    )


def _with_answers(directory: Path) -> None:
    """As Qwen's rerankers: "yes" and "no" are tokens."""
    _without_bos(directory, "qwen2")
    path = directory / "tokenizer.json"
    added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    more = [{"id": tiny.N_BPE_TOKENS + i, "content": word, **flags} for i, word in enumerate(("yes", "no"))]
    _edit(path, added_tokens=[*added, *more])


def _gemma(directory: Path) -> None:
    """No space before a text, and pieces that are found before any merge: turns, newlines and indentation.

    tokenizer_config.json lists all of them, as published ones do.
    """
    own = ("<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁▁▁")
    tiny.write_spm(directory, prefix=False, own=own)
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    tiny.write_json(path, value | {"pre_tokenizer": split})
    _edit(directory / "tokenizer_config.json", tokenizer_class="GemmaTokenizer")
    _list_added(directory)


def _phi3(directory: Path) -> None:
    """As the others of SentencePiece, with Phi's added tokens; llama.cpp refuses a Phi-3 without `<|endoftext|>`.

    tokenizer_config.json lists all of them, as published ones do.
    """
    tiny.write_spm(directory)
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    for index, token in enumerate(("<|endoftext|>", "<|assistant|>", "<|end|>"), start=tiny.N_SPM_TOKENS):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        value["added_tokens"].append({"id": index, "content": token, **flags})
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    _list_added(directory)


def _list_added(directory: Path) -> None:
    """The added tokens of tokenizer.json in tokenizer_config.json too, as transformers 4 wrote it."""
    added = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    listed = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added}
    _edit(directory / "tokenizer_config.json", added_tokens_decoder=listed)


def _phi4(directory: Path) -> None:
    tiny.write_bpe(directory, pre="gpt-4o")
    _edit(directory / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")


def _edit(path: Path, **settings: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) | settings
    tiny.write_json(path, {key: entry for key, entry in value.items() if entry is not None})


# What GLM calls the special tokens: its converter asks for them by name.
_GLM = {
    "<|pad|>": "<|observation|>",
    "<|startoftext|>": "[gMASK]",
    "<|im_end|>": "<|user|>",
    "<|im_start|>": "<sop>",
}

KINDS: dict[str, Callable[[Path], None]] = {
    "lfm2": partial(tiny.write_bpe, pre="lfm2"),
    "lfm2-vl": _lfm2_vl,
    "llama-bpe": partial(tiny.write_bpe, pre="llama-bpe"),
    "dbrx": partial(tiny.write_bpe, pre="dbrx"),
    "deepseek-v3": partial(tiny.write_bpe, pre="deepseek-v3"),
    "smollm": partial(tiny.write_bpe, pre="smollm"),
    "gpt-2": partial(tiny.write_bpe, pre="gpt-2"),
    "qwen2": partial(_without_bos, pre="qwen2"),
    "qwen2-eos": _with_eos,
    "qwen3-reranker": _with_answers,
    "seed-coder": partial(tiny.write_bpe, pre="seed-coder"),
    "gpt-4o": partial(tiny.write_bpe, pre="gpt-4o"),
    "tekken": partial(tiny.write_bpe, pre="tekken"),
    "glm4": partial(_renamed, pre="llama-bpe", names=_GLM),
    "spm": tiny.write_spm,
    "gemma": _gemma,
    "phi3": _phi3,
    "phi4": _phi4,
}
