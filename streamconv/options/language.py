"""What an option is: a field of a group of options, with its flag, its key, its help and the commands that take it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, Literal, Self

from streamconv.errors import UsageError

Command = Literal["convert", "lora", "verify"]
MAKE: Final = ("convert", "lora", "quantize")  # the commands that write a file
ALL: Final = (*MAKE, "verify")


class Kind(Enum):
    """How the value of an option is written."""

    FLAG = auto()
    TEXT = auto()
    WORD = auto()  # one of its choices
    SIZE = auto()  # as 4G or 96MiB
    COUNT = auto()  # a whole number from 1
    NUMBER = auto()
    SOURCE = auto()  # a path, or the id of a repo
    DESTINATION = auto()  # a path
    TEXTS = auto()  # any number of them
    ADAPTERS = auto()  # PATH or PATH=WEIGHT, any number of them
    FILES = auto()  # paths, any number of them


@dataclass(frozen=True)
class Option:
    """What a field does not say of itself.

    Attributes:
        kind: how it is written.
        help: for `--help` and docs/cli.md, by command where it differs.
        commands: those that take it.
        flag: on the command line; None where it exists in the library alone.
        aliases: further flags, by which other tools have it.
        group: the heading of `--help` that it is under.
        metavar: what stands for its value there.
        choices: of a WORD, by command where they differ.
        hidden: choices that the command line does not name.
        key: in a jobs file; None where it has no place there.
        changes_bytes: whether it decides what an output holds.
    """

    kind: Kind
    help: str | Mapping[str, str]
    commands: tuple[str, ...]
    flag: str | None
    aliases: tuple[str, ...]
    group: str
    metavar: str | None
    choices: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    hidden: tuple[str, ...]
    key: str | None
    changes_bytes: bool

    def help_for(self, command: str) -> str:
        return self.help if isinstance(self.help, str) else self.help[command]

    def choices_for(self, command: str | None) -> tuple[str, ...]:
        """The choices of a command; of all together for None."""
        if isinstance(self.choices, tuple):
            return self.choices
        if command is not None:
            return self.choices[command]
        return tuple(dict.fromkeys(word for words in self.choices.values() for word in words))


@dataclass(frozen=True)
class Declared:
    """An option with the name and default of its field. `of` is the class that has the field."""

    name: str
    default: Any
    option: Option
    of: type


def option(
    default: Any,
    help: str | Mapping[str, str],
    *,
    kind: Kind = Kind.FLAG,
    commands: tuple[str, ...] = ALL,
    flag: str | None = "",
    aliases: tuple[str, ...] = (),
    group: str = "",
    metavar: str | None = None,
    choices: tuple[str, ...] | Mapping[str, tuple[str, ...]] = (),
    hidden: tuple[str, ...] = (),
    key: str | None = "",
    changes_bytes: bool = True,
) -> Any:
    """A field that is an option. flag, key: by default the field's name, in the spelling of either."""
    declared = Option(kind, help, commands, flag, aliases, group, metavar, choices, hidden, key, changes_bytes)
    return field(default=default, metadata={"option": declared})


def declared(*groups: type) -> Iterator[Declared]:
    """The options of these classes, in order."""
    for group in groups:
        for one in dataclasses.fields(group):
            if found := one.metadata.get("option"):
                spelled = {
                    "flag": f"--{one.name.replace('_', '-')}" if found.flag == "" else found.flag,
                    "key": one.name if found.key == "" else found.key,
                }
                yield Declared(one.name, one.default, dataclasses.replace(found, **spelled), group)


def not_a_choice(one: Declared, value: object, start: str | None = None, command: str | None = None) -> UsageError:
    """The error for a word that is not among an option's choices, with the way to the one that was meant.

    Args:
        start: what the message begins with; by default the option's name.
    """
    hint, choices = None, one.option.choices_for(command)
    if one.name == "outtype":
        from streamconv.ggml.policy import outtype_hint

        hint = outtype_hint(str(value), choices)
    what = f"{start or f'{one.name} '}{value!r} is not one of {', '.join(choices)}"
    return UsageError(what, hint=hint, code="word-unknown")


class Options:
    """A group of options."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The options that are among `values`, which may hold other things as well."""
        names = [one.name for one in dataclasses.fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: values[name] for name in names if name in values})

    def check_words(self) -> None:
        """UsageError where a word is not among its option's choices."""
        for one in declared(type(self)):
            value = getattr(self, one.name)
            choices = one.option.choices_for(None)
            if choices and value not in choices and value != one.default:
                raise not_a_choice(one, value)
