"""Small tokenizer files that their readers accept as real: byte-level BPE, and SentencePiece with byte fallback.

`tokenizers`, `sentencepiece` and llama.cpp load these files. A text with digits, contractions, newlines, spaces and
non-ASCII letters splits differently under a wrong pre-tokenizer, since merges exist across its boundaries.
"""

from __future__ import annotations

import json
import struct
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIALS = ("<|pad|>", "<|startoftext|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>")
SPM_SPECIALS = ("<unk>", "<s>", "</s>")
N_BPE_TOKENS = 404
N_SPM_TOKENS = 341

# Merges that make words, runs of digits, spaces and newlines, and bytes of non-ASCII letters, in an order of use.
_WORDS = (
    "the and ing her over 123 12345 's 'll ... == .. \n\n \n \n\n\n\n      \t\t "
    "ü é они 我们 1999 2026 don't hello world quick brown"
)
CHAT_TEMPLATE = (
    "{{bos_token}}{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
)

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split_at(*patterns: str) -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, _byte_level(False)]}


_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"

PRE_TOKENIZERS: dict[str, Any] = {
    "lfm2": _split_at(CL100K),
    "llama-bpe": _split_at(CL100K),
    "dbrx": _split_at(CL100K),
    "deepseek-v3": _split_at(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3),
    "qwen2": _split_at(CL100K.replace(r"\p{N}{1,3}", r"\p{N}")),
    "seed-coder": _split_at(
        CL100K.replace(r"\p{N}{1,3}", r"\p{N}{1}").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
    ),
    "gpt-4o": _split_at("|".join([*(word + _CONTRACTION + "?" for word in _CASED), r"\p{N}{1,3}", _CASED_ENDS])),
    "tekken": _split_at("|".join([*_CASED, r"\p{N}", _CASED_ENDS])),
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]},
    "gpt-2": _byte_level(True),
}


def write_bpe(
    directory: Path, *, pre: str = "lfm2", n_tokens: int = N_BPE_TOKENS, pair_merges: bool = True, bos: bool = True
) -> None:
    """tokenizer.json and its companions: special tokens, 256 bytes, merges, and last `<tool>`, added and not special.

    `pre` names a row of PRE_TOKENIZERS; `pair_merges` picks one of the two JSON spellings of a merge; `bos` is
    tokenizer_config's add_bos_token.
    """
    merges = _bpe_merges(n_tokens - len(SPECIALS) - 256 - 1)
    if len(SPECIALS) + 256 + len(merges) + 1 != n_tokens:
        raise ValueError(f"a tokenizer of {n_tokens} tokens: there are merges for {N_BPE_TOKENS} at most")
    tokens = [*SPECIALS, *_BYTE_CHARS, *(left + right for left, right in merges)]
    added = [(index, token, True) for index, token in enumerate(SPECIALS)] + [(len(tokens), "<tool>", False)]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, token, special) for index, token, special in added],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in ("lfm2", "llama-bpe", "tekken"),
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [list(pair) if pair_merges else " ".join(pair) for pair in merges],
        },
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_companions(directory, SPECIALS[1], SPECIALS[2], SPECIALS[0], bos)


def write_tekken(directory: Path, *, n_special: int = 20, n_unused: int = 3, **changes: Any) -> list[bytes]:
    """tekken.json alone, as Mistral writes it: bytes, and what merges make of them, the last `n_unused` left out.

    changes: fields of the file. Returns the tokens in use, without the special ones.
    """
    byte_of = {letter: byte for byte in range(256) for letter in _letters_of(bytes([byte]))}
    made = list(dict.fromkeys(left + right for left, right in _bpe_merges(1 << 16)))
    tokens = [*(bytes([byte]) for byte in range(256)), *(bytes(byte_of[letter] for letter in text) for text in made)]
    vocab = [
        {"rank": rank, "token_bytes": b64encode(raw).decode(), "token_str": _text_or_none(raw)}
        for rank, raw in enumerate(tokens)
    ]
    pattern = PRE_TOKENIZERS["tekken"]["pretokenizers"][0]["pattern"]["Regex"]
    config = {
        "pattern": pattern,
        "num_vocab_tokens": len(tokens),
        "default_vocab_size": n_special + len(tokens) - n_unused,
        "default_num_special_tokens": n_special,
        "version": "v3",
    }
    value = {"config": config, "vocab": vocab} | changes
    value["config"] = config | changes.get("config", {})
    _write_json(directory / "tekken.json", value)
    return tokens[: len(tokens) - n_unused]


def _text_or_none(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def write_spm(
    directory: Path,
    *,
    n_tokens: int = N_SPM_TOKENS,
    model: bool = True,
    fast: bool = True,
    prefix: bool = True,
    own: Sequence[str] = (),
) -> None:
    """Llama 2's kind: tokenizer.model (`model`), tokenizer.json of the same vocabulary (`fast`), their companions.

    prefix: a space is put before a text; own: further pieces, of SentencePiece's kind USER_DEFINED.
    """
    characters = ["▁", *dict.fromkeys("etaoinshrdlucmfwypvbgkqxjzTHEWQ,.!?0123456789'")]
    pieces: list[str] = []
    merges: list[tuple[str, str]] = []
    for left, right in _merge_steps(
        [list("▁" + word) for word in ("the", "and", "over", "ing", "her", "hello", "world", "quick", "brown")]
    ):
        if len(SPM_SPECIALS) + 256 + len(characters) + len(pieces) == n_tokens:
            break
        merges.append((left, right))
        pieces.append(left + right)
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokens = [*SPM_SPECIALS, *bytes_, *pieces, *characters, *own]
    if model:
        scores = [0.0] * (3 + 256) + [-float(index) for index in range(len(pieces) + len(characters))]
        kinds = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256 + [_NORMAL] * (len(pieces) + len(characters))
        scores, kinds = scores + [0.0] * len(own), kinds + [_USER_DEFINED] * len(own)
        (directory / "tokenizer.model").write_bytes(sentencepiece_model(tokens, scores, kinds, prefix))
    if fast:
        _write_json(directory / "tokenizer.json", _spm_tokenizer_json(tokens, merges, prefix, own))
    _write_companions(
        directory, "<s>", "</s>", "<unk>", True, chat_template=None, unk_token="<unk>", tokenizer_class="LlamaTokenizer"
    )


def _write_companions(directory: Path, bos: str, eos: str, pad: str, add_bos: bool, **more: Any) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(
        directory / "tokenizer_config.json", {key: value for key, value in (config | more).items() if value is not None}
    )
    _write_json(directory / "special_tokens_map.json", {"bos_token": bos, "eos_token": eos, "pad_token": pad})


def _byte_chars() -> list[str]:
    """The letters that byte-level BPE writes for bytes, printable bytes first, as GPT-2 orders them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return [chr(value) for value in printable] + [chr(256 + index) for index, _ in enumerate(others)]


_BYTE_CHARS = _byte_chars()


def _letters(text: str) -> list[str]:
    return _letters_of(text.encode("utf-8"))


def _letters_of(raw: bytes) -> list[str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    order = printable + [value for value in range(256) if value not in printable]
    letter = {value: _BYTE_CHARS[index] for index, value in enumerate(order)}
    return [letter[value] for value in raw]


def _bpe_merges(limit: int) -> list[tuple[str, str]]:
    words = [word for text in _WORDS.split(" ") if text for word in (text, " " + text)] + ["  ", "    "]
    return _merge_steps([_letters(word) for word in words])[:limit]


def _merge_steps(words: Sequence[list[str]]) -> list[tuple[str, str]]:
    """Merges that build each word by joining neighbours, level by level; each pair once, in order of need."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        parts = list(word)
        while len(parts) > 1:
            pairs = list(zip(parts[::2], parts[1::2], strict=False))
            merges.update(dict.fromkeys(pairs))
            parts = [left + right for left, right in pairs] + parts[len(pairs) * 2 :]
    return list(merges)


def _added(index: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": index, "content": content, **flags}


def _spm_tokenizer_json(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], prefix: bool, own: Sequence[str]
) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    first = len(tokens) - len(own)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            *(_added(index, token, True) for index, token in enumerate(SPM_SPECIALS)),
            *(
                _added(index, token, token.startswith("<")) | {"normalized": False}
                for index, token in enumerate(own, first)
            ),
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if prefix else replace,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


# sentencepiece_model.proto: field numbers and the values of SentencePiece.Type and TrainerSpec.ModelType.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_MODEL_TYPE_BPE = 2


def sentencepiece_model(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], prefix: bool) -> bytes:
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    byte_fallback = _number(35, 1)
    trainer = _field(2, _number(3, _MODEL_TYPE_BPE) + _number(4, len(tokens)) + byte_fallback)
    normalizer = _field(3, _field(1, b"identity") + _number(3, int(prefix)) + _number(4, 0) + _number(5, 1))
    return pieces + trainer + normalizer


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
