"""Where the files of a tokenizer lie: in one folder, or in two, as an adapter's over its base's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamconv.files.store import Place

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
TEKKEN = "tekken.json"  # Mistral's own
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
OLD_TEMPLATE = "chat_template.json"
NAMED_TEMPLATES = "additional_chat_templates"

_TOKENS = (TOKENIZER_JSON, SENTENCEPIECE_MODEL, TEKKEN)
_COMPANIONS = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG, ADDED_TOKENS)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files of `folder`, and in place of some of them those that `over` has."""

    folder: Place
    over: Place | None = None

    @property
    def folders(self) -> tuple[Place, ...]:
        """The one that counts first."""
        return (self.folder,) if self.over is None else (self.over, self.folder)

    def find(self, name: str) -> Place:
        """The file of this name, which need not be there.

        A folder that has tokens of its own goes without the other's tokenizer.json: the two would be two vocabularies.
        """
        for folder in self.folders:
            if (folder / name).exists() or (name == TOKENIZER_JSON and has_tokens(folder)):
                return folder / name
        return self.folder / name


def has_tokens(folder: Place) -> bool:
    """Whether a folder has a vocabulary."""
    return any((folder / name).is_file() for name in _TOKENS)


def template_files(folder: Place) -> list[Place]:
    """The files that hold nothing but templates, the default one first, in the order of their names."""
    named = sorted(folder.glob(f"{NAMED_TEMPLATES}/*.jinja"), key=lambda path: path.name)
    return [path for path in (folder / TEMPLATE, *named, folder / OLD_TEMPLATE) if path.exists()]


def tokenizer_files(folder: Place) -> Iterator[str]:
    """The names of all files of `folder` that say anything of a tokenizer."""
    names = (*_TOKENS, *_COMPANIONS, TEMPLATE, OLD_TEMPLATE)
    yield from (name for name in names if (folder / name).is_file())
    yield from (f"{NAMED_TEMPLATES}/{path.name}" for path in folder.glob(f"{NAMED_TEMPLATES}/*.jinja"))
