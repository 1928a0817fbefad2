"""The token list of a tokenizer.model: SentencePiece's pieces, and the tokens that files beside it add.

The precedence of those files is that of llama.cpp's converter. A row that no file names stays empty; a token beyond the
model's rows is left out with a warning.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from gguf.constants import TokenType

from streamconv.errors import RunWarning, SourceError
from streamconv.metadata.vocab.companions import Companions
from streamconv.metadata.vocab.sentencepiece_model import ModelType, PieceKind, SentencePieceModel
from streamconv.metadata.vocab.token_list import ADDED_SCORE, PADDING_SCORE, TokenList, added_text, added_type
from streamconv.metadata.vocab.tokenizer_json import AddedToken, shown


def sentencepiece_tokens(
    model: SentencePieceModel, companions: Companions, added: Iterable[AddedToken], n_vocab: int
) -> TokenList:
    """For the tokenizer model `llama`. `added` are tokenizer.json's, for rows that nothing else names.

    They also say which pieces are found in a text before any merge, as configs of transformers 5 no longer do.
    """
    ids: dict[bytes, int] = {}
    for index, text in enumerate(model.texts):
        if ids.setdefault(text, index) != index:
            problem = f"llama.cpp aborts on piece {shown(text)} standing twice, at {ids[text]} and {index}"
            raise SourceError(problem, file=model.path, code="token-twice")
    tokens = TokenList.of(model.path, ids, n_vocab)
    n_pieces = len(model.texts)
    kinds = np.frombuffer(model.kinds, dtype=np.uint8)
    # As llama.cpp's converter has them, but for those that are found before any merge: behind one of type USER_DEFINED
    # llama.cpp puts the space that SentencePiece puts before a text, so where there is such a space it stays as it is.
    own = TokenType.NORMAL if model.add_dummy_prefix else TokenType.USER_DEFINED
    tokens.types[:n_pieces] = np.where(kinds == PieceKind.USER_DEFINED, own, kinds)
    tokens.scores = np.full(n_vocab, PADDING_SCORE, dtype=np.float32)
    tokens.scores[:n_pieces] = model.scores
    for id_ in np.flatnonzero(tokens.types == TokenType.USER_DEFINED).tolist():
        text = added_text(model.texts[id_], TokenType.USER_DEFINED)
        tokens.put(id_, text, TokenType.USER_DEFINED, ADDED_SCORE)
    _add(tokens, companions, added)
    tokens.warnings += _faults(model)
    return tokens


_PLAIN = (TokenType.NORMAL, TokenType.USER_DEFINED)


def _add(tokens: TokenList, companions: Companions, added: Iterable[AddedToken]) -> None:
    n_rows = len(tokens.texts)
    for token in companions.old_added_tokens():
        if token.id >= n_rows:
            tokens.left_out[token.text] = token.id
        elif tokens.ids.get(token.text) != token.id:
            tokens.put(token.id, token.text, TokenType.USER_DEFINED, ADDED_SCORE)
    for token in companions.added_tokens():
        if token.id >= n_rows:
            tokens.left_out[token.text] = token.id
        else:
            _put(tokens, token)
    for token in added:
        if token.id >= n_rows:
            tokens.left_out[token.text] = token.id
        elif tokens.texts[token.id] is None or tokens.types[token.id] in _PLAIN:
            _put(tokens, token)
    tokens.warn_of_left_out()


def _put(tokens: TokenList, token: AddedToken) -> None:
    type_ = added_type(token.text, token.special)
    tokens.put(token.id, added_text(token.text, type_), type_, ADDED_SCORE)


def _faults(model: SentencePieceModel) -> list[RunWarning]:
    faults = []
    if model.model_type != ModelType.BPE:
        message = (
            "the SentencePiece model is not of type BPE; llama.cpp tokenizes it as if it were, some texts otherwise"
        )
        faults.append(RunWarning("sentencepiece-type", message))
    n_own = model.kinds.count(PieceKind.USER_DEFINED) if model.add_dummy_prefix else 0
    if n_own:
        message = (
            f"SentencePiece finds {n_own} user-defined pieces before any merge, llama.cpp makes them of merges or not"
        )
        faults.append(RunWarning("sentencepiece-user-defined", message))
    if model.remove_extra_whitespaces or model.has_character_map:
        message = "the SentencePiece model normalizes texts (spaces or characters), and llama.cpp does not"
        faults.append(RunWarning("normalizer-ignored", message))
    return faults
