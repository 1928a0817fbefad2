"""The token list of a tokenizer.model: its pieces, and the tokens that other files add.

Files take precedence as in llama.cpp's converter. A row that no file names stays empty; a token beyond the model's rows
is left out with a warning.
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
    """Return the token list for the tokenizer model `llama`.

    Args:
        model: The parsed tokenizer.model.
        companions: The small files beside it.
        added: Added tokens of tokenizer.json, for rows that no other file names. They also mark the pieces that match
            before any merge, which the config files of transformers 5 no longer do.
        n_vocab: Number of rows of the embedding.
    """
    ids: dict[bytes, int] = {}
    for index, text in enumerate(model.texts):
        if ids.setdefault(text, index) != index:
            problem = f"piece {shown(text)} occurs twice, at {ids[text]} and {index}, which makes llama.cpp abort"
            raise SourceError(problem, file=model.path, code="token-twice")
    tokens = TokenList.of(model.path, ids, n_vocab)
    n_pieces = len(model.texts)
    kinds = np.frombuffer(model.kinds, dtype=np.uint8)
    # As in llama.cpp's converter, except for pieces that match before any merge: after a USER_DEFINED token llama.cpp
    # inserts the space that SentencePiece puts before a text, so models with such a space have them as NORMAL.
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
            "the SentencePiece model is not BPE, but llama.cpp treats it as BPE: some texts are tokenized differently"
        )
        faults.append(RunWarning("sentencepiece-type", message))
    n_own = model.kinds.count(PieceKind.USER_DEFINED) if model.add_dummy_prefix else 0
    if n_own:
        message = (
            f"SentencePiece matches {n_own} user-defined pieces before any merge; llama.cpp only makes them by merges"
        )
        faults.append(RunWarning("sentencepiece-user-defined", message))
    if model.remove_extra_whitespaces or model.has_character_map:
        message = "the SentencePiece model normalizes text (spaces or characters), but llama.cpp does not"
        faults.append(RunWarning("normalizer-ignored", message))
    return faults
