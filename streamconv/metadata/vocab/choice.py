"""Choose the tokenizer of a merged model: the base's, or one saved beside an adapter.

An adapter that replaces rows of the embedding or head also brings their tokens. Other adapters may still have been
trained with a different end token or chat template, which trainers save beside them. These are used only if all tokens
are those of the base, so that ids keep their meaning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, get_args

from gguf.constants import Keys

from streamconv.errors import RunWarning, SourceError, UsageError
from streamconv.files.local import has_same_content
from streamconv.files.store import Place
from streamconv.gguf.format import PackedArray
from streamconv.metadata.vocab import Vocabulary
from streamconv.metadata.vocab.files import has_tokens, tokenizer_files

Preference = Literal["auto", "base", "adapter"]
PREFERENCES: tuple[str, ...] = get_args(Preference)

Read = Callable[[Place, Place | None], Vocabulary]  # of a folder, with a second folder that takes precedence
Values = dict[str, object]


@dataclass(frozen=True, slots=True)
class Tokenizers:
    """The folders in which a model's tokenizer may be.

    Attributes:
        base: The base model's folder.
        adapters: The folders of the merged adapters, in order.
        with_rows: The folder of the adapter that replaces rows of the embedding or head, if it has a tokenizer.
    """

    base: Place
    adapters: tuple[Place, ...] = ()
    with_rows: Place | None = None


def choose_vocabulary(tokenizers: Tokenizers, preference: str, read: Read) -> Vocabulary:
    """Return the vocabulary of a model, with a warning for each other folder that has a different tokenizer.

    Args:
        tokenizers: The folders to search.
        preference: `base` or `adapter` if the user chose one, else `auto`.
        read: Reads the vocabulary of a folder, with an optional second folder that takes precedence.

    Raises:
        SourceError: The chosen tokenizer is malformed or not supported.
        UsageError: `preference` is `adapter`, but no adapter has a tokenizer.
    """
    taken = tokenizers.base
    if tokenizers.with_rows is not None and preference != "base":
        return _of_the_rows(tokenizers.with_rows, tokenizers, read)
    own = [folder for folder in tokenizers.adapters if _first_own_file(folder, taken) is not None]
    if preference == "adapter" and not any(any(tokenizer_files(folder)) for folder in tokenizers.adapters):
        raise UsageError(
            "--tokenizer adapter was given, but no adapter has a tokenizer beside it", code="tokenizer-missing"
        )
    if not own or preference == "base":
        return _with_left_out(read(taken, None), taken, own)
    if preference == "adapter" or not has_tokens(taken):
        return _with_left_out(read(taken, own[0]), taken, own[1:])
    return _trained(taken, own, read)


def _of_the_rows(taken: Place, tokenizers: Tokenizers, read: Read) -> Vocabulary:
    """The vocabulary of the adapter that replaces rows, with a warning for each difference from the base."""
    before = None
    if has_tokens(tokenizers.base) and _first_own_file(taken, tokenizers.base) is not None:
        with suppress(SourceError):  # the base's tokens are not written
            before, _ = _digested(read(tokenizers.base, None))
    vocabulary = read(taken, None)
    after = _values(vocabulary)
    if before is not None and after != before and after[Keys.Tokenizer.LIST] == before[Keys.Tokenizer.LIST]:
        del vocabulary
        vocabulary = read(tokenizers.base, taken)  # the base fills in what the adapter does not specify
        after = _values(vocabulary)
        vocabulary = _with(vocabulary, [_of_adapter(taken, before, after)] if after != before else [])
    return _with_left_out(vocabulary, taken, tokenizers.adapters)


def _trained(base: Place, own: Sequence[Place], read: Read) -> Vocabulary:
    """The vocabulary from the first of the folders `own` that has the base's tokens but other settings for them."""
    before, known = _digested(read(base, None))
    warnings: list[RunWarning] = []
    for number, folder in enumerate(own):
        try:
            vocabulary = read(base, folder)
        except SourceError as error:
            warnings.append(_left_out(folder, base, f": {error.message}"))
            continue
        after = _values(vocabulary)
        if after[Keys.Tokenizer.LIST] != before[Keys.Tokenizer.LIST]:
            warnings.append(_left_out(folder, base, ", which has other tokens, but the adapter has no rows for them"))
        elif after != before:
            warnings.append(_of_adapter(folder, before, after))
            return _with_left_out(_with(vocabulary, warnings), base, own[number + 1 :])
        else:  # its settings may have had no effect, such as an end token that the vocabulary lacks
            warnings += (warning for warning in vocabulary.warnings if warning not in known)
    return _with(read(base, None), warnings)


def _of_adapter(folder: Place, before: Values, after: Values) -> RunWarning:
    what = "; ".join(_differences(before, after))
    message = f"the tokenizer in {folder} was written, as the adapter was trained with it ({what})"
    return RunWarning("tokenizer-of-adapter", f"{message}; --tokenizer base keeps the base's")


def _with(vocabulary: Vocabulary, warnings: Sequence[RunWarning]) -> Vocabulary:
    return replace(vocabulary, warnings=(*vocabulary.warnings, *warnings))


def _with_left_out(vocabulary: Vocabulary, taken: Place, folders: Sequence[Place]) -> Vocabulary:
    found = [(folder, file) for folder in folders if (file := _first_own_file(folder, taken)) is not None]
    return _with(vocabulary, [_left_out(file, taken, "") for _, file in found])


def _left_out(what: Place, taken: Place, why: str) -> RunWarning:
    return RunWarning(
        "tokenizer-left-out", f"{what} was left out{why}: the tokenizer that is written comes from {taken}"
    )


def _first_own_file(folder: Place, taken: Place) -> Place | None:
    """The first tokenizer file of `folder` that differs from the one in `taken` or is missing there, else None."""
    for name in tokenizer_files(folder):
        ours, theirs = folder / name, taken / name
        if folder != taken and not (theirs.is_file() and has_same_content(ours, theirs)):
            return ours
    return None


def _digested(vocabulary: Vocabulary) -> tuple[Values, Sequence[RunWarning]]:
    """The values to compare, without the tokens, so that two vocabularies are never in memory at once."""
    return _values(vocabulary), vocabulary.warnings


def _values(vocabulary: Vocabulary) -> Values:
    """Keys and values, with arrays as digests."""
    return {key.key: _value(key.value) for key in vocabulary.keys}


def _value(value: object) -> object:
    if isinstance(value, PackedArray):
        return value.length, hashlib.sha256(value.payload).hexdigest()
    return value


def _differences(before: Values, after: Values) -> Iterator[str]:
    """The changed keys, each with its old and new value if these are ids or flags."""
    for key in dict.fromkeys((*after, *before)):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        name = key.removeprefix("tokenizer.").removeprefix("ggml.")
        if all(value is None or isinstance(value, int) for value in (old, new)):
            yield f"{name} {_number(new)} instead of {_number(old)}"
        else:
            yield name


def _number(value: object) -> str:
    return "none" if value is None else str(value)
