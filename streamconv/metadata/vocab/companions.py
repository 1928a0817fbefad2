"""The small files beside a tokenizer: its config, its special tokens, the generation config.

Owns: reading them and what their fields may look like. Does not own: what follows from them (special_tokens.py,
chat_templates.py, token_list.py).
Invariant: a field of a wrong type counts as absent, as it does for llama.cpp's converter, unless a token depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.errors import SourceError
from streamconv.files.store import Place
from streamconv.files.strict_json import load_object_if_present
from streamconv.metadata.vocab.tokenizer_json import AddedToken, parse_added_token

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
ADDED_TOKENS = "added_tokens.json"
FILE_NAMES = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG, ADDED_TOKENS)


@dataclass(frozen=True, slots=True)
class Companions:
    """Their contents, each empty where there is no such file. `config` is the model's."""

    directory: Place
    config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    generation_config: Mapping[str, Any]

    @classmethod
    def load(cls, directory: Place, config: Mapping[str, Any]) -> Companions:
        names = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG)
        return cls(directory, config, *(load_object_if_present(directory / name) for name in names))

    def added_tokens(self) -> Iterator[AddedToken]:
        """tokenizer_config's `added_tokens_decoder`. Ids may be beyond the model's rows; SourceError for no token."""
        path = self.directory / TOKENIZER_CONFIG
        decoder = self.tokenizer_config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, Mapping):
            raise SourceError(
                "'added_tokens_decoder' is an object of added tokens by id", file=path, code="tokenizer-malformed"
            )
        for key, entry in decoder.items():
            id_ = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else key
            yield parse_added_token(entry if not isinstance(entry, Mapping) else {**entry, "id": id_}, path)

    def old_added_tokens(self) -> Iterator[AddedToken]:
        """added_tokens.json, beside old SentencePiece models: ids by text."""
        path = self.directory / ADDED_TOKENS
        for text, id_ in load_object_if_present(path).items():
            yield parse_added_token({"content": text, "id": id_}, path)


def token_text(entry: Any) -> str | None:
    """The text of a special token, which is a string or an object with `content`; None for anything else."""
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    return content if isinstance(content, str) and content else None


def token_id(entry: Any) -> int | None:
    """A token id, of a list the first; None for anything else."""
    first = entry[0] if isinstance(entry, list) and entry else entry
    return first if isinstance(first, int) and not isinstance(first, bool) and first >= 0 else None
