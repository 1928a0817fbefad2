"""Find the files of a tokenizer in one folder, or in an adapter's and its base's, of which the former comes first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamconv.files.store import Place

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
TEKKEN = "tekken.json"  # Mistral's own format
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
    """The files of `folder`, or those of the same name in `over` if it has them."""

    folder: Place
    over: Place | None = None

    @property
    def folders(self) -> tuple[Place, ...]:
        """The folders in order of precedence."""
        return (self.folder,) if self.over is None else (self.over, self.folder)

    def find(self, name: str) -> Place:
        """Return the path of the file `name`, which may not exist.

        If the first folder has its own tokens, tokenizer.json is not taken from the second: that is another vocabulary.
        """
        for folder in self.folders:
            if (folder / name).exists() or (name == TOKENIZER_JSON and has_tokens(folder)):
                return folder / name
        return self.folder / name


def has_tokens(folder: Place) -> bool:
    """Return whether `folder` has a vocabulary."""
    return any((folder / name).is_file() for name in _TOKENS)


def template_files(folder: Place) -> list[Place]:
    """Return the files that contain only chat templates: the default one, named ones in order, the old format."""
    named = sorted(folder.glob(f"{NAMED_TEMPLATES}/*.jinja"), key=lambda path: path.name)
    return [path for path in (folder / TEMPLATE, *named, folder / OLD_TEMPLATE) if path.exists()]


def tokenizer_files(folder: Place) -> Iterator[str]:
    """Yield the names of all tokenizer files in `folder`."""
    names = (*_TOKENS, *_COMPANIONS, TEMPLATE, OLD_TEMPLATE)
    yield from (name for name in names if (folder / name).is_file())
    yield from (f"{NAMED_TEMPLATES}/{path.name}" for path in folder.glob(f"{NAMED_TEMPLATES}/*.jinja"))
