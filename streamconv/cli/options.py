"""The options of streamconv/options.py as argparse has them, and those that only a command line has."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from streamconv import options as declared
from streamconv.errors import UsageError
from streamconv.ggml.outtypes import canonical
from streamconv.options import Kind

HEADINGS = {
    "output": "output",
    "types": "tensor types, as in llama-quantize",
    "projector": "the projector of a vision or audio model, a second file",
    "split": "several files, named OUT-00001-of-0000N.gguf; llama.cpp loads the first",
    "run": "run",
}
EXIT_CODES = """exit codes:
  0 done                       4 not enough memory
  1 internal error             5 problem with the destination
  2 usage error                6 verification mismatch
  3 problem with the sources   130/143 interrupted"""
OUTPUT_FLAGS = ("-o", "--output", "--outfile")  # the last is that of llama.cpp's converters
HELP_WIDTH = 78
MAX_SHOWN_CHOICES = 6  # in the place of a value; more are listed in the help
PROGRESS = ("bar", "plain", "none")
SUGGESTION_CUTOFF = 0.6  # difflib's ratio, above which a word may have been meant


class Parser(argparse.ArgumentParser):
    """Reports wrong usage like any other error, so that --json covers it.

    The error for an unknown word suggests the nearest known one of the same command.
    """

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help", code="command-line")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._refuse_unknown(args)
        known, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return known, left

    def _refuse_unknown(self, args: Sequence[str]) -> None:
        """Raise UsageError for the first option that this parser does not have, before a command if it has some."""
        for word in args:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return
            name = word.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                known = [flag for flag in self._option_string_actions if flag.startswith("--")]
                hint = self._place_of(name) or self._nearest(name, known)
                raise UsageError(f"no option {name}", hint=hint, code="option-unknown")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            shown = [row.dest for row in action._choices_actions]
            raise UsageError(f"no command {value!r}", hint=self._nearest(str(value), shown), code="command-unknown")
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:  # a value that is not one of the choices
            known = [str(choice) for choice in action.choices or ()]
            raise UsageError(str(error), hint=self._nearest(str(value), known), code="command-line") from None

    def _place_of(self, name: str) -> str | None:
        """Where an option belongs that was given before the command."""
        found = [one for one in self._actions if isinstance(one, argparse._SubParsersAction)]
        for command, parser in found[0].choices.items() if found else ():
            if name in parser._option_string_actions:
                return f"options follow the command: streamconv {command} {name}"
        return None

    def _nearest(self, word: str, known: Sequence[str]) -> str:
        near = difflib.get_close_matches(word, known, n=1, cutoff=SUGGESTION_CUTOFF)
        return f"did you mean {near[0]}? {self.prog} --help" if near else f"{self.prog} --help lists all"


def add_command(commands: Any, name: str, *, help: str, description: str, epilog: str = EXIT_CODES) -> Parser:
    """Add the parser of a command. `help` is a phrase for the list of commands, `epilog` an example and exit codes."""
    parser: Parser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, HELP_WIDTH),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=name)
    return parser


def add_options(parser: argparse.ArgumentParser, command: str, *, output: str | None = None) -> None:
    """Add the options declared for a command, and those that only the command line has.

    Args:
        output: an example of the default name of the output; None if the command writes none.
    """
    groups: dict[str, Any] = {"": parser}

    def group(name: str) -> Any:
        if name not in groups:
            groups[name] = parser.add_argument_group(HEADINGS[name])
        return groups[name]

    for one in declared.taken_by(command):
        if one.option.flag is not None:
            name = one.option.group if output or one.option.group == "run" else ""
            if name == "output" and name not in groups:
                help = f"default: {output}, in this folder; {{name}} and {{outtype}} are filled in"
                group(name).add_argument(*OUTPUT_FLAGS, dest="output", metavar="OUT", type=dst_name, help=help)
            _add(group(name), one, command)
    if "dry_run" in declared.parameters(command):
        group("run").add_argument(
            "--tensors", action="store_true", help="with --dry-run: also print a line for each tensor"
        )
    add_report_options(group("run"))


def _add(group: Any, one: declared.Declared, command: str) -> None:
    flag, kind = one.option.flag, one.option.kind
    words: dict[str, Any] = {"dest": one.name, "help": one.option.help_for(command)}
    if kind is Kind.FLAG:
        group.add_argument(flag, *one.option.aliases, action="store_true", **words)
        return
    if kind is Kind.WORD:
        words["choices"] = [word for word in one.option.choices_for(command) if word not in one.option.hidden]
        if len(words["choices"]) > MAX_SHOWN_CHOICES:
            words |= {"metavar": "TYPE", "help": f"{words['help']}; one of {', '.join(words['choices'])}"}
    else:
        words["metavar"] = one.option.metavar
    if kind in (Kind.ADAPTERS, Kind.TEXTS, Kind.FILES):
        words["action"] = "append"
    group.add_argument(flag, *one.option.aliases, type=_reader(one, command), **words)


def _reader(one: declared.Declared, command: str) -> Callable[[str], Any]:
    """The function that converts the text on the command line to a value."""
    readers: dict[Kind, Callable[[str], Any]] = {
        Kind.COUNT: positive,
        Kind.NUMBER: float,
        Kind.SOURCE: src_path,
        Kind.FILES: src_path,
        Kind.DESTINATION: dst_path,
    }
    return partial(_word, one, command) if one.option.kind is Kind.WORD else readers.get(one.option.kind, str)


def _word(one: declared.Declared, command: str, text: str) -> str:
    """The word in lower case. UsageError with a hint if it is unknown or belongs elsewhere."""
    word = canonical(text)
    if word not in one.option.choices_for(command):
        error = declared.not_a_choice(one, text, f"argument {one.option.flag}: ", command)
        if error.hint:
            raise error
    return word


def add_report_options(group: Any, *, json: str = "one JSON object on stdout", elsewhere: str = "none") -> None:
    """Add the options on the output of a run.

    Args:
        json: the help of --json.
        elsewhere: how progress is shown if stderr is not a terminal.
    """
    group.add_argument("--json", action="store_true", help=json)
    group.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    progress = f"how to show progress on stderr; default: bar on a terminal, {elsewhere} elsewhere"
    group.add_argument("--progress", choices=PROGRESS, help=progress)
    add_verbose(group)


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """Add --recipe to a command that declares its other options itself."""
    (one,) = (one for one in declared.declared() if one.name == "recipes")
    _add(parser, one, "convert")


def add_verbose(group: Any) -> None:
    group.add_argument("-v", "--verbose", action="store_true", help="print more; for an internal error, its traceback")


def add_resume_options(group: Any, unfinished: str) -> None:
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help=f"continue {unfinished}; the default")
    either.add_argument("--restart", action="store_true", help=f"discard {unfinished} and start over")


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


positive.__name__ = "number"  # argparse shows this name in errors


def src_path(text: str) -> Path:
    """Return a source path. An empty one, as from an unset variable, is refused: it would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; the current folder is .")
    return Path(text)


def dst_name(text: str) -> str:
    """Return an output path as given, since a slash at its end means a folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file")
    if text == "-":
        raise argparse.ArgumentTypeError(
            "an output cannot be written to standard output; for a file named -, write ./-"
        )
    return text


def dst_path(text: str) -> Path:
    return Path(dst_name(text))
