"""The token list of a GGUF file: a text, a type and, for SentencePiece, a score for each row of the embedding.

The list is exactly as long as the embedding; rows without a token are filled. No text occurs twice, since llama.cpp
aborts on that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from gguf.constants import GGUFValueType, TokenType
from numpy.typing import NDArray

from streamconv.errors import RunWarning, SourceError
from streamconv.files.store import Place
from streamconv.gguf.format import PackedArray
from streamconv.metadata.vocab.packing import encode_joined, joined
from streamconv.metadata.vocab.tokenizer_json import shown

ADDED_SCORE = -1000.0  # llama.cpp's converter writes this for added tokens, which match before any merge
PADDING_SCORE = -10000.0  # as in llama.cpp's converter
_BLOCK = 4096  # tokens packed at a time
_MAX_NAMES_SHOWN = 4

_SPM_SPACE = "▁".encode()
# llama.cpp's converter treats these as control tokens even if no file marks them (does_token_look_special).
_CONTROL_TEXTS = frozenset((b"<pad>", b"<mask>", b"<2mass>", b"[@BOS@]"))
_CONTROL_ENDS = tuple((a.encode(), b.encode()) for a, b in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">")))


def added_type(text: bytes, special: bool) -> TokenType:
    """Return the type of an added token by the rules of llama.cpp's converter."""
    looks_special = text in _CONTROL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in _CONTROL_ENDS)
    return TokenType.CONTROL if special or looks_special else TokenType.USER_DEFINED


def added_text(text: bytes, type_: TokenType) -> bytes:
    """Return the text that llama.cpp matches; USER_DEFINED tokens have plain spaces."""
    return text.replace(_SPM_SPACE, b" ") if type_ == TokenType.USER_DEFINED else text


@dataclass(slots=True)
class TokenList:
    """Tokens by id, and `ids` by text. Rows without a token are UNUSED; `packed` gives them a text."""

    file: Place
    ids: dict[bytes, int]
    texts: list[bytes | None]
    types: NDArray[np.int32]
    scores: NDArray[np.float32] | None = None
    warnings: list[RunWarning] = field(default_factory=list)
    left_out: dict[bytes, int] = field(default_factory=dict)  # ids, as in the files, of added tokens beyond the rows

    @classmethod
    def of(cls, file: Place, ids: dict[bytes, int], n_vocab: int) -> TokenList:
        """Make a list of NORMAL tokens.

        Raises:
            SourceError: Two tokens have the same id.
        """
        texts: list[bytes | None] = [None] * n_vocab
        for text, id_ in ids.items():
            texts[id_] = text
        if n_vocab - texts.count(None) != len(ids):
            first, second = next((text, texts[id_]) for text, id_ in ids.items() if texts[id_] != text)
            raise SourceError(
                f"tokens {shown(first)} and {shown(second)} both have the id {ids[first]}", file=file, code="token-ids"
            )
        types = np.full(n_vocab, TokenType.UNUSED, dtype=np.int32)
        types[np.fromiter(ids.values(), np.int64, len(ids))] = TokenType.NORMAL
        return cls(file, ids, texts, types)

    def put(self, id_: int, text: bytes, type_: TokenType, score: float = ADDED_SCORE) -> None:
        """Set row `id_` to this token, replacing the previous one.

        Raises:
            SourceError: Another row has the same text.
        """
        held = self.texts[id_]
        if held != text:
            if held is not None:
                del self.ids[held]
            if text in self.ids:
                raise SourceError(
                    f"token {shown(text)} would have two ids, {self.ids[text]} and {id_}",
                    file=self.file,
                    code="token-ids",
                )
            self.ids[text] = id_
            self.texts[id_] = text
        self.types[id_] = type_
        if self.scores is not None:
            self.scores[id_] = score

    def warn_of_left_out(self) -> None:
        """Add a warning that lists the added tokens beyond the rows."""
        if self.left_out:
            names = ", ".join(f"{shown(text)} ({id_})" for text, id_ in [*self.left_out.items()][:_MAX_NAMES_SHOWN])
            n = len(self.left_out)
            more = f" and {n - _MAX_NAMES_SHOWN} more" if n > _MAX_NAMES_SHOWN else ""
            what = f"no prompt can use tokens beyond the model's {len(self.texts):,} rows: {names}{more}"
            message = f"{n} added token{'s were' if n > 1 else ' was'} left out: {what}"
            self.warnings.append(RunWarning("tokens-beyond-rows", message))

    def packed(self) -> tuple[PackedArray, PackedArray, PackedArray | None]:
        """Return texts, types and scores as GGUF arrays. Rows without a token become `[PADn]`.

        Raises:
            SourceError: llama.cpp would abort on the list.
        """
        for id_ in [id_ for id_, text in enumerate(self.texts) if text is None]:
            self.put(id_, b"[PAD%d]" % id_, TokenType.UNUSED, PADDING_SCORE)
        payload = bytearray()
        for start in range(0, len(self.texts), _BLOCK):
            texts = [text for text in self.texts[start : start + _BLOCK] if text is not None]  # all of them
            block = joined(texts)
            if b"\0" in block:
                self._check_cuts(start, texts)
            payload += encode_joined(block)
        return (
            PackedArray(GGUFValueType.STRING, len(self.texts), payload),
            PackedArray.of_numbers(GGUFValueType.INT32, self.types),
            None if self.scores is None else PackedArray.of_numbers(GGUFValueType.FLOAT32, self.scores),
        )

    def _check_cuts(self, start: int, texts: list[bytes]) -> None:
        """Raise if two tokens are equal up to a NUL, where llama.cpp stops reading."""
        for id_, text in enumerate(texts, start):
            cut = text.partition(b"\0")[0]
            if cut and self.ids.setdefault(cut, id_) != id_:
                problem = (
                    f"llama.cpp reads token {id_} as {shown(cut)} (up to the NUL), which is also token {self.ids[cut]}"
                )
                raise SourceError(problem, file=self.file, code="token-twice")
