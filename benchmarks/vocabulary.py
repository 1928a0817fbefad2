"""Synthetic byte-level BPE tokenizers with the counts of real ones, so that parsing them takes as long as a real file.

Every merge joins two tokens of the vocabulary, and its result is in the vocabulary; the same counts and seed give the
same bytes.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

N_BYTES = 256
_SPACE = "Ġ"  # how byte-level BPE spells a leading space
_LETTERS = "etaoinshrdlu"  # few, so that tokens have as many splits as those of real vocabularies
_LONGEST = 12

# LFM2's pre-tokenizer, as published: one Split, then ByteLevel without its own regex.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIALS = ("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>")
_CHAT_SPECIALS = ("<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Counts of one tokenizer. Tokens are the added ones, 256 bytes, and the results of merges, in this order of ids.

    More merges than results means that some results have several splits, as in Llama 3's file.
    """

    n_rows: int  # of the embedding: the config's vocab_size
    n_tokens: int
    n_added: int
    n_merges: int
    merges_as_pairs: bool  # ["a", "b"] as newer files have it, or "a b"

    @property
    def n_results(self) -> int:
        return self.n_tokens - self.n_added - N_BYTES


LFM2 = Vocabulary(n_rows=65_536, n_tokens=64_400, n_added=507, n_merges=63_683, merges_as_pairs=True)
LLAMA_3 = Vocabulary(n_rows=128_256, n_tokens=128_256, n_added=256, n_merges=280_147, merges_as_pairs=False)
SMALL = Vocabulary(n_rows=4_096, n_tokens=4_000, n_added=37, n_merges=3_750, merges_as_pairs=True)


def write_tokenizer(folder: Path, vocabulary: Vocabulary, seed: int = 0) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json of `vocabulary` into `folder`."""
    added = added_tokens(vocabulary.n_added)
    results, merges = make_merges(vocabulary.n_results, vocabulary.n_merges, seed)
    tokens = [*added, *byte_tokens(), *results]
    entries = [_added_entry(number, token) for number, token in enumerate(added)]
    _write_json(folder / "tokenizer.json", _tokenizer(entries, tokens, merges, vocabulary.merges_as_pairs))
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    decoder = {str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in entries}
    _write_json(
        folder / "tokenizer_config.json",
        {"add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": decoder, **named}
        | {"chat_template": _CHAT_TEMPLATE, "model_max_length": 10**30, "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    _write_json(folder / "special_tokens_map.json", named)


def added_tokens(n_added: int) -> list[str]:
    """The special tokens LFM2 has at the front, then reserved ones up to `n_added`."""
    names = [*_SPECIALS, *_CHAT_SPECIALS]
    return names + [f"<|reserved_{number}|>" for number in range(n_added - len(names))]


def byte_tokens() -> list[str]:
    """One character for each byte value, in byte order: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(N_BYTES)]


def make_merges(n_results: int, n_merges: int, seed: int) -> tuple[list[str], list[tuple[str, str]]]:
    """`n_results` distinct tokens and the merges that make them, then further splits of them up to `n_merges`.

    Raises ValueError where the tokens have fewer splits than that.
    """
    rng = random.Random(seed)
    heads, tails = [_SPACE, *_LETTERS], [*_LETTERS]
    parts: dict[str, tuple[str, str]] = {}
    while len(parts) < n_results:
        head, tail = _pick(rng, heads), _pick(rng, tails)
        token = head + tail
        if token in parts or len(token) > _LONGEST:
            continue
        parts[token] = (head, tail)
        heads.append(token)
        if not token.startswith(_SPACE):
            tails.append(token)
    known = {*heads, *tails}
    splits = ((token, (token[:at], token[at:])) for token in parts for at in range(1, len(token)))
    others = (split for token, split in splits if split != parts[token] and known.issuperset(split))
    merges = [*parts.values(), *islice(others, n_merges - n_results)]
    if len(merges) != n_merges:
        raise ValueError(f"{n_results} tokens have {len(merges)} splits, not {n_merges}")
    return [*parts], merges


def _pick(rng: random.Random, tokens: list[str]) -> str:
    # The fifth power, so that early, short tokens are joined far more often than late, long ones.
    return tokens[int(rng.random() ** 5 * len(tokens))]


def _added_entry(number: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


def _tokenizer(
    entries: list[dict[str, Any]], tokens: list[str], merges: list[tuple[str, str]], as_pairs: bool
) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    model = {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [list(pair) if as_pairs else " ".join(pair) for pair in merges],
    }
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": entries,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level | {"use_regex": True},
        "decoder": byte_level | {"use_regex": True},
        "model": model,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
