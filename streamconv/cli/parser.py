"""The whole command's parser, of which help, completion and docs/cli.md are made.

Owns: the list of commands. Does not own: a command's options and run (the modules it comes from).
"""

from __future__ import annotations

import argparse

from streamconv import __version__
from streamconv.cli import batch, convert, look
from streamconv.cli.options import EXIT_CODES, Parser

ADDED = (
    convert.add_convert,
    convert.add_lora,
    convert.add_verify,
    batch.add_batch,
    batch.add_batch_job,
    look.add_inspect,
    look.add_architectures,
    look.add_draft,
)


def build_parser() -> Parser:
    """The parser; each command sets `run`, a function of the options that gives the exit code."""
    parser = Parser(
        prog="streamconv",
        description="Convert Hugging Face checkpoints and LoRA adapters to GGUF, streaming, in bounded memory.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"streamconv {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for add in ADDED:
        add(commands)
    return parser
