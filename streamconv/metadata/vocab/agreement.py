"""Check that tokenizer.json and tokenizer.model in one folder have the same tokens.

transformers reads tokenizer.json, so a model was trained with its tokens. Often there is also a tokenizer.model of the
same vocabulary, with scores and types that tokenizer.json lacks. If only tokenizer.json was extended or reordered,
tokenizer.model still has the base model's tokens, and its ids mean other tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamconv.metadata.vocab.token_list import TokenList
from streamconv.metadata.vocab.tokenizer_json import TokenizerJson, shown

_NO_TOKEN = 0
_SPM_SPACE = "\u2581".encode()  # GGUF writes it as a plain space in added tokens


class FastTokens:
    """A hash of each token's text in a tokenizer.json, eight bytes per row."""

    def __init__(self, tokenizer: TokenizerJson, n_vocab: int) -> None:
        """Args:
        tokenizer: A parsed tokenizer.json with its vocabulary, which is not needed afterwards.
        n_vocab: Number of rows of the model's embedding.
        """
        self.name = tokenizer.path.name
        self.has_tokens = bool(tokenizer.vocab)  # Unigram stores a list instead, which is not read here
        self.hashes: NDArray[np.int64] = np.full(n_vocab, _NO_TOKEN, dtype=np.int64)
        for text, id_ in tokenizer.vocab.items():
            self.hashes[id_] = _hash(text)
        for token in tokenizer.added:
            if token.id < n_vocab:
                self.hashes[token.id] = _hash(token.text)

    def difference(self, tokens: TokenList, n_pieces: int) -> str | None:
        """Describe the first difference from the tokens of a tokenizer.model; None if there is none.

        Args:
            tokens: Its pieces, and the tokens that the files beside it add.
            n_pieces: Number of pieces; only other files may name the tokens after them.
        """
        for row, (text, hash_) in enumerate(zip(tokens.texts, self.hashes.tolist(), strict=True)):
            if text is None and hash_ != _NO_TOKEN:
                return f"{tokens.file.name} has no token {row}, but {self.name} does"
            if text is not None and hash_ == _NO_TOKEN and row < n_pieces:
                return f"{tokens.file.name} has {shown(text)} as token {row}, but {self.name} has no token there"
            if text is not None and hash_ not in (_NO_TOKEN, _hash(text)):
                return f"{tokens.file.name} has {shown(text)} as token {row}, but {self.name} has another token there"
        return None


def _hash(text: bytes) -> int:
    return hash(text.replace(_SPM_SPACE, b" ")) or 1
