"""The command line: the only code that prints, handles signals or chooses an exit code.

Each command calls one function of the library. Every error that a user can cause is one line on stderr. Nothing heavy
is imported before the command is known, so that --help is instant.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from streamconv.cli.output import say, tell
from streamconv.cli.parser import build_parser
from streamconv.errors import Interrupted, InterruptedByTerm, StreamconvError, no_memory, with_notes

RESUME = "run it again to continue"
RESUMED = frozenset({"convert", "lora", "quantize", "batch"})  # the commands that have something to resume


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one call of the command."""
    arguments = _asked(list(sys.argv[1:] if arguments is None else arguments))
    as_json, started = "--json" in arguments, time.monotonic()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's products are small here; threads for them cost 40 ms
    gc.set_threshold(10_000, 20, 20)  # modules and vocabularies stay; looking through them for cycles takes 10 ms
    hint = RESUME if RESUMED & set(arguments[:1]) else None
    _keep_standard_streams()
    _print_any_character()
    try:
        with _signals(hint):
            parser = build_parser(arguments[:1])
            try:
                options = parser.parse_args(arguments, argparse.Namespace(started=started))
            except SystemExit:  # of --help and --version
                say(end="", flush=True)
                raise
            if arguments[0] in ("-v", "--verbose"):  # before the command, whose own default came later
                options.verbose = True
            code = int(options.run(options))
            say(end="", flush=True)
            return code
    except Interrupted as error:
        return _fail(with_notes(error, error), as_json)
    except StreamconvError as error:
        return _fail(error, as_json)
    except KeyboardInterrupt as error:
        return _fail(with_notes(Interrupted("interrupted", hint=hint, code="interrupted"), error), as_json)
    except BrokenPipeError:
        return _leave_pipe()
    except Exception as error:
        if type(error) is MemoryError:  # while a module was imported; the library tells its own
            return _fail(no_memory(), as_json)
        if {"-v", "--verbose"} & set(arguments):
            raise
        what = f"internal error: {type(error).__name__}: {error}".replace("\n", " ")
        return _fail(
            StreamconvError(what, hint="please report it with the output of -v", code="internal-error"), as_json
        )


def _asked(words: list[str]) -> list[str]:
    """The words, with what people type to get help in the one form that the parser has."""
    if not words:
        return ["--help"]
    if {*words} <= {"-v", "--verbose", "-V", "--version"}:
        return sorted(words, key=lambda word: word in ("-V", "--version"))  # which answers at once
    return [*words[1:2], "--help", *words[2:]] if words[0] == "help" else words


def _fail(error: StreamconvError, as_json: bool) -> int:
    tell(f"streamconv: {error}")
    if as_json:
        from streamconv.report import error_to_json

        try:
            print(json.dumps(error_to_json(error)), flush=True)
        except BrokenPipeError:
            return _leave_pipe()
        except OSError:
            sys.stdout = None  # stderr has it; the interpreter would try again at its end
    return error.exit_code


def _leave_pipe() -> int:
    """Nobody reads on: what is still in the buffer goes nowhere, without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _keep_standard_streams() -> None:
    """A closed stdin, stdout or stderr leads nowhere from now on: none of our files may come to have its number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _print_any_character() -> None:
    """A character that the terminal's encoding lacks is shown by its number, and ends nothing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _signals(hint: str | None) -> Iterator[None]:
    """SIGTERM stops a run as Ctrl-C does."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise InterruptedByTerm("terminated", hint=hint, code="interrupted")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
