"""Copy chat templates into the metadata: the default one and named ones. They are never executed.

Files and their precedence are those of llama.cpp's converter.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gguf.constants import Keys

from streamconv.errors import RunWarning, SourceError
from streamconv.files.local import read_start
from streamconv.files.store import Place
from streamconv.files.strict_json import load_object_if_present
from streamconv.gguf.format import MAX_KEY_NBYTES, KeyValue, PackedArray
from streamconv.metadata.vocab.companions import Companions
from streamconv.metadata.vocab.files import OLD_TEMPLATE, TEMPLATE, TOKENIZER_CONFIG, template_files
from streamconv.metadata.vocab.tokenizer_json import shown

MAX_NBYTES = 1 << 20  # of all templates together; published ones have up to 40 KB
DEFAULT = "default"

# Models whose prompt format is not ChatML, and which are published for mistral-common, without a template.
_OWN_FORMAT = frozenset(("mistral", "mixtral", "mistral3", "ministral3"))

NO_TEMPLATES: Mapping[str, str] = MappingProxyType({})

_NAME_LETTERS = frozenset(string.ascii_letters + string.digits)


def chat_template_keys(
    companions: Companions, added: Mapping[str, str] = NO_TEMPLATES
) -> tuple[list[KeyValue], list[RunWarning]]:
    """Return the keys `tokenizer.chat_template`, `.NAME` for each named template, and the list of names.

    Args:
        companions: The files to search. An empty template gives no key.
        added: Templates by name that the architecture defines, used if the files do not have them.

    Raises:
        SourceError: A template is malformed, too large, or not UTF-8.
    """
    templates, warnings = _find(companions)
    templates = {**added, **templates}
    if not templates and companions.config.get("model_type") in _OWN_FORMAT:
        message = (
            "no chat template: llama.cpp falls back to ChatML, which Mistral models were not trained on; put the "
            f"model's {TEMPLATE} beside the tokenizer, or run llama.cpp with --chat-template mistral-v1, -v3, "
            "-v3-tekken, -v7, -v7-tekken"
        )
        warnings.append(RunWarning("chat-template-missing", message))
    named = sorted(name for name in templates if name != DEFAULT)
    texts = {Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): templates[name] for name in named}
    texts[Keys.Tokenizer.CHAT_TEMPLATE] = templates.get(DEFAULT, "")
    keys = [KeyValue.string(key, text) for key, text in texts.items() if text]
    if named:
        keys.append(KeyValue.array(Keys.Tokenizer.CHAT_TEMPLATES, PackedArray.of_strings(named)))
    return keys, warnings


def _find(companions: Companions) -> tuple[dict[str, str], list[RunWarning]]:
    warnings = []
    in_files = _from_files(companions.templates)
    path = companions.files.find(TOKENIZER_CONFIG)
    in_config = _from_value(companions.tokenizer_config.get("chat_template"), path)
    if in_config and in_files and in_config.get(DEFAULT) != in_files.get(DEFAULT):
        message = f"{TOKENIZER_CONFIG} and {TEMPLATE} have different chat templates; the former was written"
        warnings.append(RunWarning("chat-template-twice", message))
    templates = in_config or in_files
    if sum(map(len, templates.values())) > MAX_NBYTES:
        raise SourceError(
            f"chat templates of more than {MAX_NBYTES:,} characters", file=path, code="chat-template-size"
        )
    for name, text in templates.items():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            problem = f"chat template {shown(name)} contains half of a surrogate pair, which is not a character"
            raise SourceError(problem, file=path, code="not-utf8") from None
    return templates, warnings


def _from_files(directory: Place) -> dict[str, str]:
    """chat_template.jinja and named templates beside it, else the older chat_template.json."""
    if (directory / TEMPLATE).exists():
        named = [(DEFAULT if path.name == TEMPLATE else path.stem, path) for path in template_files(directory)]
        return _by_name([(name, _read_text(path)) for name, path in named if path.suffix == ".jinja"], directory)
    path = directory / OLD_TEMPLATE
    return _from_value(load_object_if_present(path).get("chat_template"), path)


def _from_value(value: Any, path: Place) -> dict[str, str]:
    """Templates by name from a string, a list of named templates, or null."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = value if isinstance(value, list) else [None]
    pairs = [(e.get("name"), e.get("template")) for e in entries if isinstance(e, Mapping)]
    named = [(name, text) for name, text in pairs if isinstance(name, str) and isinstance(text, str)]
    if len(named) < len(entries):
        raise SourceError(
            "'chat_template' must be a string, or a list of objects with 'name' and 'template'",
            file=path,
            code="chat-template-malformed",
        )
    return _by_name(named, path)


def _by_name(named: list[tuple[str, str]], file: Place) -> dict[str, str]:
    """Templates by names that are valid in keys; llama.cpp's converter also drops names without a letter."""
    result: dict[str, str] = {}
    for name, text in named:
        key = "".join(letter if letter in _NAME_LETTERS else "_" for letter in name)
        if key in result:
            raise SourceError(f"two chat templates would have the name {key!r}", file=file, code="chat-template-names")
        if len(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=key)) > MAX_KEY_NBYTES:
            raise SourceError(
                f"the name of chat template {shown(key)} has {len(key):,} letters, too long for a GGUF key",
                file=file,
                code="chat-template-names",
            )
        if key:
            result[key] = text
    return result


def _read_text(path: Place) -> str:
    raw = read_start(path, MAX_NBYTES + 1)
    if len(raw) > MAX_NBYTES:
        raise SourceError(f"larger than the limit of {MAX_NBYTES:,} bytes", file=path, code="chat-template-size")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"not UTF-8 at byte {error.start}", file=path, code="not-utf8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
