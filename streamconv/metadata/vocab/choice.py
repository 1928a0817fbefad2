"""Which tokenizer a merged model gets: its base's, or the one that was trained and saved beside an adapter.

An adapter that brings rows of the embedding or head brings their tokens. One that brings none may still have been
trained with another end token or chat template, which trainers save beside it; these are written where the tokens are
the base's, one for one, so that an id means the same.
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

Read = Callable[[Place, Place | None], Vocabulary]  # of a folder, and of another one over it
Values = dict[str, object]


@dataclass(frozen=True, slots=True)
class Tokenizers:
    """The folders that may have the tokenizer of a model.

    Attributes:
        base: The model's own.
        adapters: Those of the adapters that are merged into it, in order.
        with_rows: The adapter's whose rows of the embedding or head the model has, with a tokenizer; else None.
    """

    base: Place
    adapters: tuple[Place, ...] = ()
    with_rows: Place | None = None


def choose_vocabulary(tokenizers: Tokenizers, preference: str, read: Read) -> Vocabulary:
    """The vocabulary of a model, with a warning where another folder has a tokenizer of its own.

    Args:
        tokenizers: Where to look.
        preference: `base` or `adapter` where the user decided.
        read: Reads one folder, with another one over it.

    Raises:
        SourceError: A tokenizer that would be written cannot be.
        UsageError: `adapter`, and no adapter has a tokenizer.
    """
    taken = tokenizers.base
    if tokenizers.with_rows is not None and preference != "base":
        return _of_the_rows(tokenizers.with_rows, tokenizers, read)
    own = [folder for folder in tokenizers.adapters if _first_own_file(folder, taken) is not None]
    if preference == "adapter" and not any(any(tokenizer_files(folder)) for folder in tokenizers.adapters):
        raise UsageError("--tokenizer adapter, and no adapter has a tokenizer beside it", code="tokenizer-missing")
    if not own or preference == "base":
        return _with_left_out(read(taken, None), taken, own)
    if preference == "adapter" or not has_tokens(taken):
        return _with_left_out(read(taken, own[0]), taken, own[1:])
    return _trained(taken, own, read)


def _of_the_rows(taken: Place, tokenizers: Tokenizers, read: Read) -> Vocabulary:
    """The vocabulary of the adapter that has the rows, with what it says otherwise than the base of the same tokens."""
    before = None
    if has_tokens(tokenizers.base) and _first_own_file(taken, tokenizers.base) is not None:
        with suppress(SourceError):  # the base's tokens are not written
            before, _ = _digested(read(tokenizers.base, None))
    vocabulary = read(taken, None)
    after = _values(vocabulary)
    if before is not None and after != before and after[Keys.Tokenizer.LIST] == before[Keys.Tokenizer.LIST]:
        del vocabulary
        vocabulary = read(tokenizers.base, taken)  # what the adapter is silent of is as in the base
        after = _values(vocabulary)
        vocabulary = _with(vocabulary, [_of_adapter(taken, before, after)] if after != before else [])
    return _with_left_out(vocabulary, taken, tokenizers.adapters)


def _trained(base: Place, own: Sequence[Place], read: Read) -> Vocabulary:
    """The vocabulary with the first of the folders `own` that has the base's tokens and says anything else of them."""
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
            warnings.append(_left_out(folder, base, ", which has other tokens, and the adapter has no rows for them"))
        elif after != before:
            warnings.append(_of_adapter(folder, before, after))
            return _with_left_out(_with(vocabulary, warnings), base, own[number + 1 :])
        else:  # what it says may have been in vain, as an end token that the vocabulary does not have
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
    return RunWarning("tokenizer-left-out", f"{what} was left out{why}: {taken} has the tokenizer that is written")


def _first_own_file(folder: Place, taken: Place) -> Place | None:
    """A tokenizer's file of `folder` that is another one than in `taken`, or that is not there; None: there is none."""
    for name in tokenizer_files(folder):
        ours, theirs = folder / name, taken / name
        if folder != taken and not (theirs.is_file() and has_same_content(ours, theirs)):
            return ours
    return None


def _digested(vocabulary: Vocabulary) -> tuple[Values, Sequence[RunWarning]]:
    """What is compared of a vocabulary, without its tokens, so that two are never in memory."""
    return _values(vocabulary), vocabulary.warnings


def _values(vocabulary: Vocabulary) -> Values:
    """Keys and values, arrays and long texts as digests."""
    return {key.key: _value(key.value) for key in vocabulary.keys}


def _value(value: object) -> object:
    if isinstance(value, PackedArray):
        return value.length, hashlib.sha256(value.payload).hexdigest()
    return value


def _differences(before: Values, after: Values) -> Iterator[str]:
    """What changed, key by key, in the words of the keys."""
    for key in dict.fromkeys((*after, *before)):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        name = key.removeprefix("tokenizer.").removeprefix("ggml.")
        if all(value is None or isinstance(value, int) for value in (old, new)):
            yield f"{name} {_number(new)} in place of {_number(old)}"
        else:
            yield name


def _number(value: object) -> str:
    return "none" if value is None else str(value)
