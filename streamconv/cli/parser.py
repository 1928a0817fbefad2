"""The parser of the whole command, from which help, completion and docs/cli.md are made.

Hidden commands are added only when they are called, so that no list of commands shows them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from streamconv import __version__
from streamconv.cli import batch, conversion, look
from streamconv.cli.options import EXIT_CODES, Parser

ADDED = (
    conversion.add_convert,
    conversion.add_lora,
    conversion.add_quantize,
    conversion.add_verify,
    batch.add_batch,
    look.add_inspect,
    look.add_quants,
    look.add_architectures,
    look.add_draft,
    look.add_completion,
)
OWN = {"batch-job": batch.add_batch_job}


class Version(argparse.Action):
    """Prints the version; with -v, also everything else that affects speed and output."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, *_: Any) -> NoReturn:
        print(f"streamconv {__version__}")
        if namespace.verbose:
            from streamconv.cli.look import environment

            print("\n".join(environment()))
        parser.exit()


def build_parser(command: Sequence[str] = ()) -> Parser:
    """Return the parser. Each command sets `run`, a function from options to an exit code.

    Args:
        command: the command that is called, if known.
    """
    parser = Parser(
        prog="streamconv",
        description="Convert Hugging Face checkpoints and LoRA adapters to GGUF, in bounded memory.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-V",
        "--version",
        action=Version,
        nargs=0,
        help="print the version; with -v, also kernels, CPU features and library versions",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for add in (*ADDED, *(OWN[name] for name in command if name in OWN)):
        add(commands)
    return parser
