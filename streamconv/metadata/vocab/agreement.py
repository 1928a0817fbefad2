"""Whether tokenizer.json and tokenizer.model in one folder mean the same tokens.

transformers reads tokenizer.json, so a model was trained with its tokens. Beside it often lies a tokenizer.model of the
same vocabulary, which has scores and types that tokenizer.json lacks. Where the vocabulary was extended or reordered in
tokenizer.json alone, that file is the base's, and its ids mean other tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamconv.metadata.vocab.token_list import TokenList
from streamconv.metadata.vocab.tokenizer_json import TokenizerJson, shown

_NO_TOKEN = 0
_SPM_SPACE = "\u2581".encode()  # GGUF has a plain space for it in added tokens


class FastTokens:
    """What each id means in a tokenizer.json, in eight bytes a row: a hash of its text."""

    def __init__(self, tokenizer: TokenizerJson, n_vocab: int) -> None:
        """Args:
        tokenizer: With its vocabulary, which may be given up afterwards.
        n_vocab: The model's rows.
        """
        self.name = tokenizer.path.name
        self.has_tokens = bool(tokenizer.vocab)  # a Unigram's are a list, which is not read here
        self.hashes: NDArray[np.int64] = np.full(n_vocab, _NO_TOKEN, dtype=np.int64)
        for text, id_ in tokenizer.vocab.items():
            self.hashes[id_] = _hash(text)
        for token in tokenizer.added:
            if token.id < n_vocab:
                self.hashes[token.id] = _hash(token.text)

    def difference(self, tokens: TokenList, n_pieces: int) -> str | None:
        """How a token list of a tokenizer.model differs, None where it does not.

        Args:
            tokens: The pieces with what the files beside them add.
            n_pieces: How many tokens are the model's own; what follows may be named by other files alone.
        """
        for row, (text, hash_) in enumerate(zip(tokens.texts, self.hashes.tolist(), strict=True)):
            if text is None and hash_ != _NO_TOKEN:
                return f"{tokens.file.name} has no token {row}, {self.name} has one"
            if text is not None and hash_ == _NO_TOKEN and row < n_pieces:
                return f"{tokens.file.name} has {shown(text)} as token {row}, {self.name} has none"
            if text is not None and hash_ not in (_NO_TOKEN, _hash(text)):
                return f"{tokens.file.name} has {shown(text)} as token {row}, {self.name} has another"
        return None


def _hash(text: bytes) -> int:
    return hash(text.replace(_SPM_SPACE, b" ")) or 1
