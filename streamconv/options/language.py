"""The declaration of options: each is a field of a group, with a flag, a key, help and the commands that take it."""

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
    """The properties of an option in addition to the name, type and default of its field.

    Attributes:
        kind: How the value is written.
        help: The help for `--help` and docs/cli.md, by command if it differs.
        commands: The commands that take it.
        flag: The flag on the command line; None if it exists only in the library.
        aliases: Further flags, which other tools use for it.
        group: The heading in `--help` under which it is listed.
        metavar: The placeholder for its value in `--help`.
        choices: The choices of a WORD, by command if they differ.
        hidden: Choices that the help does not list.
        key: The key in a jobs file; None if jobs files do not have it.
        changes_bytes: Whether it affects the bytes of an output.
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
        """Return the choices for a command; those of all commands for None."""
        if isinstance(self.choices, tuple):
            return self.choices
        if command is not None:
            return self.choices[command]
        return tuple(dict.fromkeys(word for words in self.choices.values() for word in words))


@dataclass(frozen=True)
class Declared:
    """An option together with its field.

    Attributes:
        name: The name of the field.
        default: The default of the field.
        option: The other properties, with flag and key filled in.
        of: The class that has the field.
    """

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
    """Return a dataclass field that is an option.

    Args:
        default: The default of the field.
        help: See `Option`, also for the other arguments.
        flag: By default "--" and the field's name with hyphens.
        key: By default the field's name.
    """
    declared = Option(kind, help, commands, flag, aliases, group, metavar, choices, hidden, key, changes_bytes)
    return field(default=default, metadata={"option": declared})


def declared(*groups: type) -> Iterator[Declared]:
    """Yield the options of these classes, in order."""
    for group in groups:
        for one in dataclasses.fields(group):
            if found := one.metadata.get("option"):
                spelled = {
                    "flag": f"--{one.name.replace('_', '-')}" if found.flag == "" else found.flag,
                    "key": one.name if found.key == "" else found.key,
                }
                yield Declared(one.name, one.default, dataclasses.replace(found, **spelled), group)


def not_a_choice(one: Declared, value: object, start: str | None = None, command: str | None = None) -> UsageError:
    """Return the error for a word that is not among an option's choices, with a hint if there is one.

    Args:
        one: The option.
        value: The word.
        start: The beginning of the message; by default the option's name.
        command: The command whose choices apply; None: those of all commands.
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
        """Return the group with those of its options that are in `values`, which may have other keys too."""
        names = [one.name for one in dataclasses.fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: values[name] for name in names if name in values})

    def check_words(self) -> None:
        """Raise UsageError if a word is not among the choices of its option."""
        for one in declared(type(self)):
            value = getattr(self, one.name)
            choices = one.option.choices_for(None)
            if choices and value not in choices and value != one.default:
                raise not_a_choice(one, value)
