"""The options of each command, and their conversion to the keyword arguments of its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from streamconv.budget import parse_size
from streamconv.options import language
from streamconv.options.checking import checked
from streamconv.options.groups import GROUPS, SplitOptions
from streamconv.options.language import Declared, Kind

F = TypeVar("F", bound=Callable[..., Any])


def declared() -> list[Declared]:
    """Return all options, in order."""
    return list(language.declared(*GROUPS))


def find(name: str) -> Declared:
    """Return the option with this name."""
    (one,) = (one for one in declared() if one.name == name)
    return one


def taken_by(command: str) -> list[Declared]:
    """Return the options that a command takes."""
    return [one for one in declared() if command in one.option.commands]


def parameters(command: str) -> dict[str, Any]:
    """Return the keyword parameters of the command's function with their defaults; `split` has all SplitOptions."""
    found = {one.name: one.default for one in taken_by(command) if one.of is not SplitOptions}
    return found | ({"split": None} if any(one.of is SplitOptions for one in taken_by(command)) else {})


def arguments(command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for the command's function.

    Args:
        command: The command.
        given: Values by the names of the options; sizes and adapters may be text. None means that a value was not
            given.

    Raises:
        UsageError: A value is invalid.
    """
    values: dict[str, Any] = {}
    for one in taken_by(command):
        value = given.get(one.name)
        if value is not None:
            is_list = one.option.kind in (Kind.ADAPTERS, Kind.FILES, Kind.TEXTS)
            values[one.name] = [value] if is_list and isinstance(value, str) else value
    split = {one.name: values.pop(one.name) for one in language.declared(SplitOptions) if one.name in values}
    if split:
        if isinstance(split.get("max_nbytes"), str):
            split["max_nbytes"] = parse_size(split["max_nbytes"])
        values["split"] = SplitOptions(**split)
    if "adapters" in values:
        from streamconv.lora.specs import parse_adapter

        values["adapters"] = [parse_adapter(text) for text in values["adapters"]]
    return values


def public(command: str | None = None) -> Callable[[F], F]:
    """Return a decorator for public functions, which checks arguments against the annotations.

    Args:
        command: The command that the function implements; {options} in its docstring is replaced by the help of the
            command's options. None if there is no such command.
    """

    def decorate(function: F) -> F:
        if command is not None and function.__doc__:  # python -OO removes it
            rows = [
                f"{one.name}: {one.option.help_for(command)}" for one in taken_by(command) if one.of is not SplitOptions
            ]
            if "split" in parameters(command):
                rows.append("split: several files, named after `dst`")
            function.__doc__ = function.__doc__.replace("{options}", "\n        ".join(f"{row}." for row in rows))
        return checked(function)

    return decorate
