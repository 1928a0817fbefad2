"""The options of each command: what its function, its command line and its jobs take, and how they pass it on."""

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
    """All options, in order."""
    return list(language.declared(*GROUPS))


def find(name: str) -> Declared:
    """The option of this name."""
    (one,) = (one for one in declared() if one.name == name)
    return one


def taken_by(command: str) -> list[Declared]:
    """The options that a command takes."""
    return [one for one in declared() if command in one.option.commands]


def parameters(command: str) -> dict[str, Any]:
    """The keyword parameters of the command's function with their defaults; the parts of a split are one."""
    found = {one.name: one.default for one in taken_by(command) if one.of is not SplitOptions}
    return found | ({"split": None} if any(one.of is SplitOptions for one in taken_by(command)) else {})


def arguments(command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for the command's function.

    Args:
        given: values by the options' names, texts of sizes and of adapters included, None where one was not given.
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
    """A function of the library: its arguments are checked against its annotations before it begins.

    Args:
        command: the command that it is. {options} in its docstring becomes the help of the command's options.
    """

    def decorate(function: F) -> F:
        if command is not None and function.__doc__:  # which python -OO leaves out
            rows = [
                f"{one.name}: {one.option.help_for(command)}" for one in taken_by(command) if one.of is not SplitOptions
            ]
            if "split" in parameters(command):
                rows.append("split: several files, named after `dst`")
            function.__doc__ = function.__doc__.replace("{options}", "\n        ".join(f"{row}." for row in rows))
        return checked(function)

    return decorate
