"""Options that several commands share, so that one word means one thing everywhere.

Owns: their names, metavars and help. Does not own: what they do (the library).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from streamconv.errors import UsageError
from streamconv.ggml.outtypes import WORDS

IO = ("mapped", "positioned")
DIALECTS = ("llama.cpp", "ollama-legacy")
EXIT_CODES = """exit codes:
  0 done   2 usage   3 something wrong with the sources   4 memory bound too small
  5 something wrong with the destination   6 verification mismatch   130/143 interrupted   1 a bug of ours"""


class Parser(argparse.ArgumentParser):
    """Reports wrong usage as any other error is reported, so that --json covers it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help", code="command-line")


def add_command(commands: Any, name: str, *, help: str, description: str, epilog: str = EXIT_CODES) -> Parser:
    """The parser of a command. help: a phrase for the list of commands; epilog: an example and the exit codes."""
    parser: Parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=name)
    return parser


def add_output_options(
    parser: argparse.ArgumentParser, *, example: str, auto: str, dialect: str, outtype: str | None = "auto"
) -> None:
    """example: a default name of OUT; auto, dialect: what these options mean here; outtype: its default."""
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="OUT", type=dst_name, help=f"default: {example}, in this folder")
    group.add_argument("--outtype", type=outtype_name, choices=WORDS, default=outtype, help=f"default: auto, {auto}")
    group.add_argument("--dialect", choices=DIALECTS, default=DIALECTS[0], help=dialect)
    group.add_argument("--name", metavar="NAME", help="the name in the file, general.name")
    group.add_argument(
        "--force",
        action="store_true",
        help="replace an existing OUT, once the new file is complete; what lies beside it too",
    )
    group.add_argument("--modelfile", action="store_true", help="write Ollama's Modelfile beside OUT, too")


def add_adapter_option(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--adapter", metavar="PATH[=WEIGHT]", dest="adapters", action="append", default=[], help=help)


def add_tokenizer_option(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--tokenizer", choices=("base", "adapter"), default="auto", help=help)


def add_split_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several files, named OUT-00001-of-0000N.gguf; llama.cpp loads the first")
    group.add_argument("--split-max-size", metavar="SIZE", help="tensor data in a file, as 4G")
    group.add_argument("--split-max-tensors", metavar="N", type=positive, help="tensors in a file")
    group.add_argument("--only-part", metavar="K", type=positive, help="make this one alone: each machine makes a part")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add_resume_options(group, "an unfinished run of the same conversion")
    group.add_argument("--dry-run", action="store_true", help="print the plan and the memory proof, write nothing")
    group.add_argument("--verify", action="store_true", help="read the result back and compare it with the source")
    group.add_argument("--sha256", action="store_true", help="digest of the file, and a manifest of each tensor's")
    group.add_argument(
        "--profile", metavar="FILE", type=dst_path, help="write memory over time and seconds by phase as JSON"
    )
    group.add_argument(
        "--io", choices=IO, help="how sources are read; default: mapped from local files, positioned from others"
    )
    add_resource_options(group)
    add_report_options(group)


def add_resume_options(group: Any, unfinished: str) -> None:
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help=f"go on with {unfinished}; the default")
    either.add_argument("--restart", action="store_true", help=f"discard {unfinished}, and start over")


def add_resource_options(group: Any) -> None:
    group.add_argument(
        "--max-memory", metavar="SIZE", help="ceiling of resident memory, as 96MiB or 1.5G; default 256MiB"
    )
    group.add_argument("--threads", metavar="N", type=positive, help="workers; default: the cores, at most 4")


def add_report_options(group: Any) -> None:
    group.add_argument("--json", action="store_true", help="one JSON object on stdout")
    group.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    add_verbose(group)


def add_verbose(group: Any) -> None:
    group.add_argument("-v", "--verbose", action="store_true", help="say more; of a bug of ours, its traceback")


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


positive.__name__ = "number"  # argparse names it where it refuses a word


def outtype_name(text: str) -> str:
    """The word in small letters; UsageError, with the way to it, on one that only llama.cpp knows."""
    name = text.lower()
    if name not in WORDS:
        from streamconv.ggml.policy import outtype_hint

        if hint := outtype_hint(name):
            raise UsageError(
                f"argument --outtype: {text!r} is none of {', '.join(WORDS)}", hint=hint, code="outtype-unknown"
            )
    return name


def src_path(text: str) -> Path:
    """What is read; not what an unset variable of a script would name, the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; the current folder is .")
    return Path(text)


def dst_name(text: str) -> str:
    """What is written, as it was spelled: a slash at its end says that a folder is meant."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file")
    if text == "-":
        raise argparse.ArgumentTypeError("- is no standard output here; a file of that name is ./-")
    return text


def dst_path(text: str) -> Path:
    return Path(dst_name(text))
