"""The small files beside a tokenizer: its config, its special tokens, the generation config.

As in llama.cpp's converter, a field of the wrong type counts as absent, unless a token depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import SourceError
from streamconv.files.store import Place
from streamconv.files.strict_json import load_object_if_present
from streamconv.metadata.vocab.files import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TokenizerFiles,
    template_files,
)
from streamconv.metadata.vocab.tokenizer_json import AddedToken, parse_added_token

FILE_NAMES = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG, ADDED_TOKENS)
CHAT_TEMPLATE = "chat_template"


@dataclass(frozen=True, slots=True)
class Companions:
    """The contents of these files, empty for a missing one. `config` is that of the model.

    Attributes:
        templates: The folder whose template files are used.
        brought: Special tokens that an adapter's folder defines differently from the base's, by field name (eos_token
            is a text, eos_token_id an id), each with the file that defines it.
    """

    files: TokenizerFiles
    config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    templates: Place
    brought: Mapping[str, tuple[Place, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, files: TokenizerFiles, config: Mapping[str, Any]) -> Companions:
        below = _load(files.folder)
        if files.over is None:
            return cls(files, config, *below, files.folder)
        above, templates = _load(files.over), files.folder
        tokenizer_config, special_tokens, generation = (a | b for a, b in zip(below, above, strict=True))
        own = above[0].get(CHAT_TEMPLATE)
        if own == below[0].get(CHAT_TEMPLATE):
            own = None  # a copy of the base's template; a separate template file takes precedence
        if own is not None or template_files(files.over):
            templates = files.over
            tokenizer_config[CHAT_TEMPLATE] = own
        brought = _brought(below, above, files.over)
        return cls(files, config, tokenizer_config, special_tokens, generation, templates, brought)

    def added_tokens(self) -> Iterator[AddedToken]:
        """Tokens of `added_tokens_decoder` in tokenizer_config.json, whose ids may be beyond the model's rows.

        Raises:
            SourceError: An entry is not a token.
        """
        path = self.files.find(TOKENIZER_CONFIG)
        decoder = self.tokenizer_config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, Mapping):
            raise SourceError(
                "'added_tokens_decoder' must be an object that maps ids to added tokens",
                file=path,
                code="tokenizer-malformed",
            )
        for key, entry in decoder.items():
            id_ = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else key
            yield parse_added_token(entry if not isinstance(entry, Mapping) else {**entry, "id": id_}, path)

    def old_added_tokens(self) -> Iterator[AddedToken]:
        """Ids by text from added_tokens.json, a file of older SentencePiece models."""
        path = self.files.find(ADDED_TOKENS)
        for text, id_ in load_object_if_present(path).items():
            yield parse_added_token({"content": text, "id": id_}, path)


_MERGED = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG)
_Contents = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # of the files in _MERGED


def _load(folder: Place) -> _Contents:
    one, two, three = (load_object_if_present(folder / name) for name in _MERGED)
    return one, two, three


def _brought(below: _Contents, above: _Contents, folder: Place) -> dict[str, tuple[Place, Any]]:
    """The special tokens that the files `above` define differently from those `below`; the first file wins."""
    brought: dict[str, tuple[Place, Any]] = {}
    for name, ours, theirs in zip(_MERGED, above, below, strict=True):
        for key, value in ours.items():
            if key.endswith("_token") and token_text(value) not in (None, token_text(theirs.get(key))):
                brought.setdefault(key, (folder / name, token_text(value)))
            elif key.endswith("_token_id") and token_id(value) is not None and value != theirs.get(key):
                brought.setdefault(key, (folder / name, token_id(value)))
    return brought


def token_text(entry: Any) -> str | None:
    """Return the text of a special token, given as a string or as an object with `content`, else None."""
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    return content if isinstance(content, str) and content else None


def token_id(entry: Any) -> int | None:
    """Return a token id, the first one if `value` is a list; None for anything else."""
    first = entry[0] if isinstance(entry, list) and entry else entry
    return first if isinstance(first, int) and not isinstance(first, bool) and first >= 0 else None
