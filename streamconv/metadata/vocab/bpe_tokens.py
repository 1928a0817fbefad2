"""The token list of a tokenizer.json: byte-level BPE, and llama-style BPE with byte fallback.

Assigns ids and texts to added tokens, and computes scores that reproduce the order of merges. Texts get the same ids as
from the `tokenizers` library; if GGUF cannot represent that, there is a warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate

import numpy as np
from gguf.constants import TokenType

from streamconv.errors import RunWarning, SourceError
from streamconv.metadata.vocab.companions import Companions
from streamconv.metadata.vocab.pretokenizers import is_byte_level
from streamconv.metadata.vocab.token_list import TokenList, added_text, added_type
from streamconv.metadata.vocab.tokenizer_json import AddedToken, Merges, TokenizerJson, shown

NEVER_MERGED_SCORE = -1e6  # below the score of any merge

MAX_NAMES_SHOWN = 4

_BYTE = re.compile(rb"<0x[0-9A-Fa-f]{2}>")


def byte_level_tokens(tokenizer: TokenizerJson, companions: Companions, n_vocab: int) -> TokenList:
    """Return the token list for the tokenizer model `gpt2`: vocabulary and added tokens, no scores."""
    tokens = TokenList.of(tokenizer.path, tokenizer.vocab, n_vocab)
    decodes = is_byte_level(tokenizer.parts["decoder"])

    def text_of(token: AddedToken) -> bytes:
        # llama.cpp matches plain text, so its converter writes the decoded token.
        return _decoded(token.text) if decodes and not token.normalized else token.text

    _place_added(tokens, _added_tokens(tokens, tokenizer, companions), text_of)
    return tokens


def byte_fallback_tokens(tokenizer: TokenizerJson, merges: Merges, companions: Companions, n_vocab: int) -> TokenList:
    """Return the token list for the tokenizer model `llama`, which merges the pair whose token has the best score.

    Scores are negated merge ranks, so that the order of merges is kept.
    """
    tokens = TokenList.of(tokenizer.path, tokenizer.vocab, n_vocab)
    tokens.scores = np.where(merges.ranks < 0, NEVER_MERGED_SCORE, -merges.ranks).astype(np.float32)
    if not merges.grouped or merges.lines.length != sum(_n_splits(text, tokens.ids) for text in tokens.ids):
        message = (
            "llama.cpp merges by token score, but these merges have no such order: some texts may split differently"
        )
        tokens.warnings.append(RunWarning("merges-without-scores", message))
    for text, id_ in tokens.ids.items():
        if _BYTE.fullmatch(text):
            tokens.types[id_] = TokenType.BYTE
    _place_added(tokens, _added_tokens(tokens, tokenizer, companions), lambda token: token.text)
    return tokens


def _added_tokens(tokens: TokenList, tokenizer: TokenizerJson, companions: Companions) -> Iterator[AddedToken]:
    """Those of tokenizer.json, with flags from tokenizer_config.json, then those that only the latter has."""
    configured = {token.text: token for token in companions.added_tokens()}
    for token in tokenizer.added:
        flags = configured.pop(token.text, None)
        yield replace(flags, id=token.id) if flags else token
    yield from sorted(configured.values(), key=lambda token: token.id)


def _place_added(tokens: TokenList, added: Iterator[AddedToken], text_of: Callable[[AddedToken], bytes]) -> None:
    placement = _Placement(tokens)
    moved: list[str] = []
    n_spaced = 0
    for token in added:
        row = placement.row_of(token)
        if row is None:
            continue
        text = text_of(token)
        type_ = added_type(text, token.special)
        tokens.put(row, added_text(text, type_), type_, NEVER_MERGED_SCORE)
        if row != token.id:
            moved.append(f"{shown(token.text)} {row} instead of {token.id}")
        n_spaced += token.lstrip or token.rstrip or token.single_word
    if moved:
        message = (
            f"{len(moved)} added tokens have the ids that the tokenizers library gives them, not those of the file"
        )
        tokens.warnings.append(RunWarning("added-token-ids", f"{message}: {', '.join(moved[:MAX_NAMES_SHOWN])}"))
    tokens.warn_of_left_out()
    if n_spaced:
        message = (
            f"{n_spaced} added tokens strip spaces around them or match only whole words (lstrip, rstrip, single_word)"
        )
        tokens.warnings.append(RunWarning("added-token-spaces", f"{message}; llama.cpp ignores these flags"))


class _Placement:
    """Finds the row of each added token.

    The tokenizers library numbers tokens that are not in the vocabulary consecutively; if that row is taken, the id in
    the file is used. A token whose id is beyond the model's rows is left out, since no prompt can use it.
    """

    def __init__(self, tokens: TokenList) -> None:
        self.tokens = tokens
        self.next_row = len(tokens.ids)
        self.rows = np.full(len(tokens.texts), -1, dtype=np.int32)  # the row of each id in the file
        self.is_placed = np.zeros(len(tokens.texts), dtype=np.bool_)

    def row_of(self, token: AddedToken) -> int | None:
        """Return the row of `token`, or None for a repeated entry or a token that is left out.

        Raises:
            SourceError: Two tokens share an id, or one token has two.
        """
        texts, known = self.tokens.texts, self.tokens.ids.get(token.text)
        if token.id >= len(texts):
            return self._row_of_beyond(token, known)
        earlier = int(self.rows[token.id])
        if earlier >= 0:
            if known == earlier:
                return None
            self._fail_shared(texts[earlier], token)
        if known is None:
            if not self.is_placed[token.id]:
                self._fail_shared(texts[token.id], token)
            row = self.next_row if self.next_row < len(texts) and texts[self.next_row] is None else token.id
            self._fail_shared(texts[row], token)
        elif known == token.id:
            row = known
        else:
            problem = f"token {shown(token.text)} has the id {known}, but {token.id} as an added token"
            raise SourceError(problem, file=self.tokens.file, code="token-ids")
        self.rows[token.id] = row
        self.is_placed[row] = True
        self.next_row = max(self.next_row, row + 1)
        return row

    def _row_of_beyond(self, token: AddedToken, known: int | None) -> int | None:
        """The row of a token whose added id is beyond the rows: its id in the vocabulary, if it has one."""
        if known is None and token.text not in self.tokens.left_out:
            self.tokens.left_out[token.text] = token.id
            self.next_row += 1
        if known is None or self.is_placed[known]:
            return None
        self.is_placed[known] = True
        return known

    def _fail_shared(self, held: bytes | None, token: AddedToken) -> None:
        """Raise if another token, `held`, already has the id."""
        if held is not None:
            problem = f"tokens {shown(held)} and {shown(token.text)} both have the id {token.id}"
            raise SourceError(problem, file=self.tokens.file, code="token-ids")


def spelled(raw: bytes) -> bytes:
    """Return the byte-level BPE letters of `raw`, as UTF-8."""
    return raw.decode("latin-1").translate(_LETTER_OF_BYTE).encode("utf-8")


def _decoded(text: bytes) -> bytes:
    """The bytes that a byte-level decoder makes of a token; the token itself if they are not text."""
    try:
        raw = bytes(map(_BYTE_OF_LETTER.__getitem__, text.decode("utf-8")))
        raw.decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return text
    return raw


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 characters as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()
_LETTER_OF_BYTE = {byte: letter for letter, byte in _BYTE_OF_LETTER.items()}


def _n_splits(text: bytes, ids: Mapping[bytes, int]) -> int:
    """The number of ways in which two tokens make this one."""
    letters = text.decode("utf-8")
    ends = accumulate(len(letter.encode("utf-8")) for letter in letters[:-1])
    return sum(text[:end] in ids and text[end:] in ids for end in ends)
