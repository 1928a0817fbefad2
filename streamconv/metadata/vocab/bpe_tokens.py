"""The token list of a tokenizer.json: byte-level BPE, and llama-style BPE with byte fallback.

Gives added tokens their ids and texts, and makes scores that stand for merges. A text gets the ids that the
`tokenizers` library gives it; if GGUF cannot represent that, there is a warning.
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

NEVER_MERGED_SCORE = -1e6  # below that of every merge

MAX_NAMES_SHOWN = 4

_BYTE = re.compile(rb"<0x[0-9A-Fa-f]{2}>")


def byte_level_tokens(tokenizer: TokenizerJson, companions: Companions, n_vocab: int) -> TokenList:
    """For the tokenizer model `gpt2`: vocabulary and added tokens, no scores."""
    tokens = TokenList.of(tokenizer.path, tokenizer.vocab, n_vocab)
    decodes = is_byte_level(tokenizer.parts["decoder"])

    def text_of(token: AddedToken) -> bytes:
        # llama.cpp looks for the text itself, so its converter writes what the decoder makes of the token.
        return _decoded(token.text) if decodes and not token.normalized else token.text

    _place_added(tokens, _added_tokens(tokens, tokenizer, companions), text_of)
    return tokens


def byte_fallback_tokens(tokenizer: TokenizerJson, merges: Merges, companions: Companions, n_vocab: int) -> TokenList:
    """For the tokenizer model `llama`, which joins the pair whose token has the best score: the rank of its merge."""
    tokens = TokenList.of(tokenizer.path, tokenizer.vocab, n_vocab)
    tokens.scores = np.where(merges.ranks < 0, NEVER_MERGED_SCORE, -merges.ranks).astype(np.float32)
    if not merges.grouped or merges.lines.length != sum(_n_splits(text, tokens.ids) for text in tokens.ids):
        message = (
            "llama.cpp merges by one score a token, these merges have no such order: some texts may split otherwise"
        )
        tokens.warnings.append(RunWarning("merges-without-scores", message))
    for text, id_ in tokens.ids.items():
        if _BYTE.fullmatch(text):
            tokens.types[id_] = TokenType.BYTE
    _place_added(tokens, _added_tokens(tokens, tokenizer, companions), lambda token: token.text)
    return tokens


def _added_tokens(tokens: TokenList, tokenizer: TokenizerJson, companions: Companions) -> Iterator[AddedToken]:
    """tokenizer.json's, with the flags that tokenizer_config.json has for them, then what only the latter has."""
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
            moved.append(f"{shown(token.text)} {row} in place of {token.id}")
        n_spaced += token.lstrip or token.rstrip or token.single_word
    if moved:
        message = (
            f"{len(moved)} added tokens have the ids that the tokenizers library gives them, not those of the file"
        )
        tokens.warnings.append(RunWarning("added-token-ids", f"{message}: {', '.join(moved[:MAX_NAMES_SHOWN])}"))
    tokens.warn_of_left_out()
    if n_spaced:
        message = f"{n_spaced} added tokens take spaces beside them or stand alone (lstrip, rstrip, single_word)"
        tokens.warnings.append(RunWarning("added-token-spaces", f"{message}; llama.cpp takes them as they are"))


class _Placement:
    """Finds the row that each added token has in use.

    The tokenizers library numbers those that the vocabulary does not have, one after the other; the file's own number
    holds where that one is taken. A token whose own number is beyond the model's rows is left out: no prompt can hold
    it.
    """

    def __init__(self, tokens: TokenList) -> None:
        self.tokens = tokens
        self.next_row = len(tokens.ids)
        self.rows = np.full(len(tokens.texts), -1, dtype=np.int32)  # in use, by the file's ids
        self.is_placed = np.zeros(len(tokens.texts), dtype=np.bool_)

    def row_of(self, token: AddedToken) -> int | None:
        """None for an entry that was there before. SourceError where two tokens share an id or one has two."""
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
            problem = f"token {shown(token.text)} has the id {known} and, as an added token, {token.id}"
            raise SourceError(problem, file=self.tokens.file, code="token-ids")
        self.rows[token.id] = row
        self.is_placed[row] = True
        self.next_row = max(self.next_row, row + 1)
        return row

    def _row_of_beyond(self, token: AddedToken, known: int | None) -> int | None:
        """The row of a token whose own id is beyond the rows: that of the vocabulary, where it stands there as well."""
        if known is None and token.text not in self.tokens.left_out:
            self.tokens.left_out[token.text] = token.id
            self.next_row += 1
        if known is None or self.is_placed[known]:
            return None
        self.is_placed[known] = True
        return known

    def _fail_shared(self, held: bytes | None, token: AddedToken) -> None:
        """SourceError if there is a token `held` already."""
        if held is not None:
            problem = f"tokens {shown(held)} and {shown(token.text)} both have the id {token.id}"
            raise SourceError(problem, file=self.tokens.file, code="token-ids")


def spelled(raw: bytes) -> bytes:
    """The letters that stand for these bytes in byte-level BPE."""
    return raw.decode("latin-1").translate(_LETTER_OF_BYTE).encode("utf-8")


def _decoded(text: bytes) -> bytes:
    """What a byte-level decoder makes of a token; the token itself where that is not text."""
    try:
        raw = bytes(map(_BYTE_OF_LETTER.__getitem__, text.decode("utf-8")))
        raw.decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return text
    return raw


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()
_LETTER_OF_BYTE = {byte: letter for letter, byte in _BYTE_OF_LETTER.items()}


def _n_splits(text: bytes, ids: Mapping[bytes, int]) -> int:
    """In how many ways two tokens make this one."""
    letters = text.decode("utf-8")
    ends = accumulate(len(letter.encode("utf-8")) for letter in letters[:-1])
    return sum(text[:end] in ids and text[end:] in ids for end in ends)
