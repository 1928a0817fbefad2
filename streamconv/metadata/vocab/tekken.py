"""Read tekken.json, Mistral's own tokenizer format, as the equivalent tokenizer.json.

Merges follow from the order of the tokens. Tokens and merges take no more bytes than the file, so its size bounds the
memory needed.
Sources: mistral-common's tokens/tokenizers/tekken.py; MistralVocab in llama.cpp's gguf-py/gguf/vocab.py, which makes
the same merges.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGUFValueType

from streamconv.errors import SourceError
from streamconv.files.local import file_nbytes
from streamconv.files.store import Place
from streamconv.gguf.format import PackedArray
from streamconv.metadata.vocab.bpe_tokens import spelled
from streamconv.metadata.vocab.files import TOKENIZER_JSON
from streamconv.metadata.vocab.json_stream import FLAT, EntryKind, JsonStream
from streamconv.metadata.vocab.packing import encode_joined, joined
from streamconv.metadata.vocab.tokenizer_json import (
    MAX_ADDED_NBYTES,
    MAX_NBYTES,
    MAX_PART_NBYTES,
    AddedToken,
    Merges,
    TokenizerJson,
    shown,
)
from streamconv.recipe import SpecialTokens

TEKKEN_ROLES = SpecialTokens(texts={"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"})

# mistral-common's special tokens for files that list none, which are those up to version 7.
_SILENT = """
    <unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG]
    <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]
""".split()  # noqa: SIM905
_SILENT_UP_TO = 7
_FILLER = "<SPECIAL_{}>"

_N_BYTES = 256  # single-byte tokens, which come first
_LENGTH_NBYTES = 8  # of a string in GGUF
_BATCH = 4096  # merges packed at a time
_TOKENS = EntryKind("a token", b"[", rb"\{" + FLAT + rb"\}", b"]")
_SPECIAL_TOKENS = EntryKind("a special token", b"[", rb"\{" + FLAT + rb"\}", b"]")


def read_tekken(path: Place, n_vocab: int) -> TokenizerJson:
    """Read the tekken.json at `path`.

    Args:
        path: The file.
        n_vocab: Number of rows of the model's embedding.

    Raises:
        SourceError: The file is malformed, or has more than `n_vocab` tokens.
    """
    with JsonStream(path, MAX_NBYTES) as stream:
        return _Reader(stream, path, n_vocab).read()


class _Reader:
    def __init__(self, stream: JsonStream, path: Place, n_vocab: int) -> None:
        self.stream = stream
        self.n_vocab = n_vocab
        self.result = TokenizerJson(path, model={"type": "BPE", "ignore_merges": True})
        self.n_left = file_nbytes(path)  # budget for tokens and merges

    def read(self) -> TokenizerJson:
        config: Any = None
        special: list[str] | None = None
        start: int | None = None
        for key in self.stream.members():
            if key == "config":
                config = self.stream.value(MAX_PART_NBYTES)
            elif key == "special_tokens" and self.stream.peek() == ord("["):
                special = list(self._special_tokens())
            else:
                start = self.stream.position if key == "vocab" else start
                self.stream.skip()
        self.stream.end()
        if start is None or not isinstance(config, dict):
            self._fail("the file has no 'vocab' or no 'config'")
        n_special, n_tokens = self._counts(config)
        self._put_special(_silent(config, self.result.path) if special is None else special, n_special)
        self.stream.seek(start)
        self._put_tokens(n_special, n_tokens)
        self._put_parts(config)
        self.result.merges = self._merges(n_special)
        return self.result

    def _counts(self, config: dict[str, Any]) -> tuple[int, int]:
        """The number of special tokens, which come first, and of the other tokens in use."""
        n_special, n_all = (config.get(f"default_{name}") for name in ("num_special_tokens", "vocab_size"))
        if not (type(n_special) is type(n_all) is int and 0 <= n_special <= n_all - _N_BYTES):  # excludes bool
            self._fail(f"{shown(n_special)} special tokens of {shown(n_all)} leave no room for a token for each byte")
        if n_all > self.n_vocab:
            problem = f"{n_all:,} tokens, but the model has only {self.n_vocab:,} rows"
            raise SourceError(problem, file=self.result.path, code="tokens-beyond-rows")
        return n_special, n_all - n_special

    def _special_tokens(self) -> Iterator[str]:
        n_seen = 0
        for batch in self.stream.batches(_SPECIAL_TOKENS):
            for entry in batch.values(self.result.path):
                rank, text = entry.get("rank"), entry.get("token_str")
                if rank != n_seen or not isinstance(text, str) or not text:
                    self._fail(f"special token {n_seen} has rank {shown(rank)} and text {shown(text)}")
                n_seen += 1
                if n_seen > self.n_vocab:
                    self._fail(f"more special tokens than the model's {self.n_vocab:,} rows")
                yield text

    def _put_special(self, texts: list[str], n_special: int) -> None:
        if len(texts) > n_special:
            self._fail(f"{len(texts):,} special tokens, but 'config' allows {n_special:,}")
        self._spend(sum(map(len, texts)))
        texts += [_FILLER.format(id_) for id_ in range(len(texts), n_special)]
        for id_, text in enumerate(texts):
            # The text is literal: its letters do not stand for bytes, as they do in other tokens.
            self.result.added.append(AddedToken(id_, _utf8(text, self.result.path), True, True, False, False, False))
            self._put(_utf8(text, self.result.path), id_)
        if self.result.added.text_nbytes > MAX_ADDED_NBYTES:
            self._fail(f"special tokens take more than {MAX_ADDED_NBYTES:,} bytes")

    def _put_tokens(self, n_special: int, n_tokens: int) -> None:
        rank = 0
        for batch in self.stream.batches(_TOKENS):
            for entry in batch.values(self.result.path):
                if rank == n_tokens:
                    return
                try:
                    raw = binascii.a2b_base64(entry["token_bytes"], strict_mode=True)
                except (KeyError, TypeError, ValueError):
                    self._fail(f"token {rank} has no 'token_bytes' in base64")
                if entry.get("rank") != rank or len(raw) < 1 or (len(raw) == 1) != (rank < _N_BYTES):
                    self._fail(
                        f"token {rank} has rank {shown(entry.get('rank'))}, or is out of order: single bytes come first"
                    )
                self._put(letters := spelled(raw), n_special + rank)
                self._spend(len(letters) + _LENGTH_NBYTES)
                rank += 1
        if rank < n_tokens:
            self._fail(f"{rank:,} tokens, but 'config' says {n_tokens:,}")

    def _put(self, text: bytes, id_: int) -> None:
        held = self.result.vocab.setdefault(text, id_)
        if held != id_:
            problem = f"token {shown(text)} occurs twice, with ids {held} and {id_}"
            raise SourceError(problem, file=self.result.path, code="token-twice")

    def _put_parts(self, config: dict[str, Any]) -> None:
        """Set the other parts of the equivalent tokenizer.json: one split, and BOS before the text."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": config.get("pattern")}, "behavior": "Isolated"}
        template: dict[str, Any] = {"type": "TemplateProcessing"}
        template["single"] = [{"SpecialToken": {"id": TEKKEN_ROLES.texts["bos"]}}, {"Sequence": {"id": "A"}}]
        self.result.parts |= {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": {"type": "Sequence", "processors": [byte_level, template]},
            "decoder": byte_level,
        }

    def _merges(self, n_special: int) -> Merges:
        """All pairs of tokens that make a token, in the order of ids: tiktoken joins the pair of the lowest new id."""
        payload, lines, n_merges = bytearray(), list[bytes](), 0
        ranks = np.full(self.n_vocab, -1, dtype=np.int32)
        for text, id_ in self.result.vocab.items():
            if id_ >= n_special + _N_BYTES and (ends := self._halves(text, n_special)):
                ranks[id_] = n_merges + len(lines)
                lines += [text[:end] + b" " + text[end:] for end in ends]
            if len(lines) >= _BATCH:
                n_merges += len(lines)
                payload += self._packed(lines)
                lines = []
        payload += self._packed(lines)
        return Merges(PackedArray(GGUFValueType.STRING, n_merges + len(lines), payload), ranks, grouped=True)

    def _halves(self, text: bytes, n_special: int) -> list[int]:
        """The positions at which a token splits into two others, those with the lowest ids first."""
        ids = self.result.vocab
        letters = text.decode("utf-8")
        ends = accumulate(len(letter.encode("utf-8")) for letter in letters[:-1])
        pairs = ((ids.get(text[:end], -1), ids.get(text[end:], -1), end) for end in ends)
        return [end for left, right, end in sorted(pairs) if left >= n_special and right >= n_special]

    def _packed(self, lines: list[bytes]) -> bytes:
        self._spend(sum(map(len, lines)) + _LENGTH_NBYTES * len(lines))
        return encode_joined(joined(lines))

    def _spend(self, nbytes: int) -> None:
        self.n_left -= nbytes
        if self.n_left < 0:
            self._fail("the tokens and their merges take more bytes than the file itself")

    def _fail(self, problem: str) -> NoReturn:
        raise SourceError(problem, file=self.result.path, code="tokenizer-malformed")


def _silent(config: dict[str, Any], path: Place) -> list[str]:
    """The special tokens of a file that lists none, if its version allows that."""
    version = config.get("version")
    if not re.fullmatch(rf"v[1-{_SILENT_UP_TO}](m1)?", version if isinstance(version, str) else ""):
        problem = f"no 'special_tokens', which a {path.name} of version {shown(version)} needs"
        raise SourceError(problem, file=path, hint=f"put {TOKENIZER_JSON} beside it", code="tokenizer-tekken")
    return list(_SILENT)


def _utf8(text: str, path: Place) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        problem = f"special token {shown(text)} contains half of a surrogate pair, which is not a character"
        raise SourceError(problem, file=path, code="not-utf8") from None
