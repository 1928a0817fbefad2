"""Check the arguments of a caller against the annotations of the parameters."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, wraps
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from streamconv.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def checked(function: F) -> F:
    """Return `function` with a check that raises UsageError for an argument of the wrong type.

    An unknown keyword or a wrong number of arguments still raises Python's TypeError.
    """

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        check_types(function, {**dict(zip(_hints(function), arguments, strict=False)), **keywords})
        return function(*arguments, **keywords)

    return cast(F, call)


def check_types(owner: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check values against annotations.

    Args:
        owner: A function or a class with annotations.
        values: The values by name; names that `owner` does not have are ignored.

    Raises:
        UsageError: A value does not have the annotated type; the error names the parameter and the type.
    """
    hints = _hints(owner)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            shown = " ".join(reprlib.repr(value).split())
            elements = [get_args(one)[0] for one in _members(hints[name]) if get_origin(one) is Sequence]
            hint = "put it into a list" if any(_fits(value, one) for one in elements) else None
            raise UsageError(f"{name} is {shown}, expected {_phrase(hints[name])}", hint=hint, code="argument-type")


@cache
def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of parameters or fields, in order."""
    return {name: hint for name, hint in get_type_hints(owner).items() if name != "return"}


def _members(hint: Any) -> Iterator[Any]:
    """Yield the types of a union, or a single type."""
    if get_origin(hint) in (Union, UnionType):
        for one in get_args(hint):
            yield from _members(one)
    else:
        yield hint


def _fits(value: object, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Callable:
        return callable(value)
    if origin is Sequence:
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return is_list and all(_fits(one, inner[0]) for one in cast(Sequence[object], value))
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if hint in (int, float):
        return isinstance(value, int if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, os.PathLike if hint is Path else hint)


def _phrase(hint: Any) -> str:
    """Return a type in words, such as "int, str or None"."""
    words = list(dict.fromkeys(map(_word, _members(hint))))
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _word(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Sequence:
        return f"a list of {_phrase(get_args(hint)[0])}"
    if origin is Callable:
        return "a function"
    if origin is tuple:
        return f"({'; '.join(map(_phrase, get_args(hint)))})"
    return "None" if hint is NoneType else str(hint.__name__)
