"""Tokenizer folders with one peculiarity each, to compare with the keys that llama.cpp's converter writes for them.

The references are in data/vocab/goldens.json (tools/make_vocab_goldens.py makes them again). A case takes no input; it
starts from a tokenizer of tests/tiny and edits its JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import tokenizer as tiny

GOLDENS = Path(__file__).parent / "data" / "vocab" / "goldens.json"
N_SPARE = 5  # rows behind the last token

Edit = Callable[[Any], None]

BOS, EOS, PAD, TURN, END = (tiny.SPECIALS[i] for i in (1, 2, 0, 3, 4))
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def special(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}


def sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


def template(single: list[Any], pair: list[Any]) -> dict[str, Any]:
    texts = {piece["SpecialToken"]["id"] for piece in (*single, *pair) if "SpecialToken" in piece}
    tokens = {text: {"id": text, "ids": [tiny.SPECIALS.index(text)], "tokens": [text]} for text in sorted(texts)}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def added(id_: int, text: str, *, special: bool = False, normalized: bool = True) -> dict[str, Any]:
    return {
        "id": id_,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": normalized,
        "special": special,
    }


def edit(path: Path, change: Edit) -> None:
    """Change the JSON object in a file, or make one."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_config(directory: Path, n_vocab: int, **more: Any) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": n_vocab,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config | more), encoding="utf-8")


def _bpe(
    directory: Path,
    *,
    pre: str = "llama-bpe",
    pair_merges: bool = True,
    tokenizer: Edit | None = None,
    tokenizer_config: Edit | None = None,
    **config: Any,
) -> None:
    tiny.write_bpe(directory, pre=pre, pair_merges=pair_merges)
    write_config(directory, tiny.N_BPE_TOKENS + N_SPARE, **config)
    for name, change in (("tokenizer.json", tokenizer), ("tokenizer_config.json", tokenizer_config)):
        if change:
            edit(directory / name, change)


def _spm(directory: Path, *, model: bool = True, fast: bool = True, tokenizer_config: Edit | None = None) -> None:
    tiny.write_spm(directory, model=model, fast=fast)
    write_config(directory, tiny.N_SPM_TOKENS + N_SPARE)
    if tokenizer_config:
        edit(directory / "tokenizer_config.json", tokenizer_config)


def _post_processor(*processors: dict[str, Any]) -> Edit:
    def change(value: Any) -> None:
        value["post_processor"] = {"type": "Sequence", "processors": list(processors)}

    return change


def _odd_added_tokens(value: Any) -> None:
    first = tiny.N_BPE_TOKENS
    value["added_tokens"] += [
        added(first, "<|not_special|>"),
        added(first + 1, "<unused3>", normalized=False),
        added(first + 2, "Ġhey", normalized=False),
        added(first + 3, "▁under score"),
        added(first + 4, "<｜wide｜>", normalized=False),
    ]


def _old_template(directory: Path) -> None:
    _bpe(directory, tokenizer_config=lambda value: value.pop("chat_template"))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "{{ old }}"}), encoding="utf-8")


def _jinja_templates(directory: Path) -> None:
    _bpe(directory, tokenizer_config=lambda value: value.pop("chat_template"))
    (directory / "chat_template.jinja").write_bytes("{{ first }}\r\n{{ zwei ü }}\n".encode())
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool-use.jinja").write_text("{{ tool }}", encoding="utf-8")


def _without_companions(directory: Path) -> None:
    _bpe(directory, tokenizer=_post_processor(BYTE_LEVEL, template([special(BOS), sequence("A")], [])))
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").unlink()


def _spm_with_added_tokens(directory: Path) -> None:
    first = tiny.N_SPM_TOKENS

    def change(value: Any) -> None:
        value["added_tokens_decoder"] = {
            "0": added(0, "<unk>", special=True),
            "1": added(1, "<s>", special=True),
            str(first + 1): added(first + 1, "▁two words"),
            str(first + 2): added(first + 2, "<|im_end|>"),
            str(first + 99): added(first + 99, "<beyond>"),
        }

    _spm(directory, fast=False, tokenizer_config=change)
    edit(directory / "added_tokens.json", lambda value: value.update({"<old>": first, "<|im_end|>": first + 2}))


def _spm_with_own_pieces(directory: Path) -> None:
    """Pieces of the type USER_DEFINED (4) in place of NORMAL (1)."""
    _spm(directory, fast=False)
    path = directory / "tokenizer.model"
    model = path.read_bytes()
    at = model.rindex(b"\n\x01W\x15")  # the piece "W": text, score, type
    assert model[at + 8 : at + 10] == b"\x18\x01"
    path.write_bytes(model[: at + 9] + b"\x04" + model[at + 10 :])


CASES: dict[str, Callable[[Path], None]] = {
    "smollm": lambda directory: _bpe(directory, pre="smollm", pair_merges=False),
    "gpt-2": lambda directory: _bpe(directory, pre="gpt-2"),
    "prefix-space": lambda directory: _bpe(
        directory, pre="gpt-2", tokenizer_config=lambda value: value.update(add_prefix_space=False)
    ),
    "bos-template": lambda directory: _bpe(
        directory,
        tokenizer=_post_processor(
            BYTE_LEVEL,
            template([special(BOS), sequence("A")], [special(BOS), sequence("A"), special(BOS), sequence("B")]),
        ),
        tokenizer_config=lambda value: value.update(add_bos_token=False),
    ),
    "bos-eos-template": lambda directory: _bpe(
        directory,
        tokenizer=_post_processor(
            template(
                [special(BOS), sequence("A"), special(END)],
                [special(BOS), sequence("A"), special(END), sequence("B"), special(END)],
            )
        ),
    ),
    "separator-template": lambda directory: _bpe(
        directory,
        tokenizer=_post_processor(
            template([special(BOS), sequence("A")], [special(BOS), sequence("A"), special(EOS), sequence("B")])
        ),
    ),
    "roberta": lambda directory: _bpe(
        directory,
        pre="gpt-2",
        tokenizer=_post_processor(
            {"type": "RobertaProcessing", "sep": [END, 4], "cls": [TURN, 3], "trim_offsets": True}
        ),
    ),
    "byte-level-only": lambda directory: _bpe(
        directory, tokenizer=_post_processor(BYTE_LEVEL), tokenizer_config=lambda value: value.pop("add_bos_token")
    ),
    "cls-and-sep": lambda directory: _bpe(
        directory,
        tokenizer_config=lambda value: (
            [value.pop("bos_token"), value.pop("eos_token")]
            and value.update(cls_token=TURN, sep_token={"__type": "AddedToken", "content": END}, mask_token=PAD)
        ),
    ),
    "ids-of-config": lambda directory: _bpe(
        directory,
        tokenizer_config=lambda value: [value.pop(f"{role}_token") for role in ("bos", "eos", "pad")] and None,
        bos_token_id=3,
        pad_token_id=4,
        text_config={"eos_token_id": 1, "unk_token_id": 0},
        eos_token_id=None,
    ),
    "named-templates": lambda directory: _bpe(
        directory,
        tokenizer_config=lambda value: value.update(
            chat_template=[
                {"name": "default", "template": "{{ a }}"},
                {"name": "tool-use", "template": "{{ 'ü' }}"},
                {"name": "rag", "template": ""},
            ]
        ),
    ),
    "jinja-templates": _jinja_templates,
    "old-template": _old_template,
    "odd-added-tokens": lambda directory: _bpe(directory, tokenizer=_odd_added_tokens),
    "configured-added-tokens": lambda directory: _bpe(
        directory,
        tokenizer_config=lambda value: value.update(
            added_tokens_decoder={
                "3": added(3, TURN, special=False),
                str(tiny.N_BPE_TOKENS - 1): added(tiny.N_BPE_TOKENS - 1, "<tool>", special=True),
                str(tiny.N_BPE_TOKENS): added(tiny.N_BPE_TOKENS, "<new>", normalized=False),
            }
        ),
    ),
    "renumbered-added-token": lambda directory: _bpe(
        directory, tokenizer=lambda value: value["added_tokens"][-1].update(id=tiny.N_BPE_TOKENS + 2)
    ),
    "without-companions": _without_companions,
    "spm": _spm,
    "spm-alone": lambda directory: _spm(directory, fast=False),
    "spm-added-tokens": _spm_with_added_tokens,
    "spm-own-pieces": _spm_with_own_pieces,
}
