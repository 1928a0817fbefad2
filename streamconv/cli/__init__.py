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
from pathlib import Path
from types import FrameType

from streamconv.cli.output import print_stderr, say
from streamconv.cli.parser import build_parser
from streamconv.errors import Interrupted, InterruptedByTerm, StreamconvError, no_memory, with_notes

RESUME = "run it again to continue"
RESUMED = frozenset({"convert", "lora", "quantize", "batch"})  # commands that can be resumed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    started = time.monotonic() - (_age_seconds() if arguments is None else 0)  # with arguments, the process is older
    arguments = _asked(list(sys.argv[1:] if arguments is None else arguments))
    as_json = "--json" in arguments
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # numpy's products are small; starting threads for them takes 40 ms
    gc.set_threshold(10_000, 20, 20)  # modules and vocabularies live on; scanning them for cycles takes 10 ms
    hint = RESUME if RESUMED & set(arguments[:1]) else None
    _keep_standard_streams()
    _print_any_character()
    try:
        with _signals(hint):
            parser = build_parser(arguments[:1])
            try:
                options = parser.parse_args(arguments, argparse.Namespace(started=started))
            except SystemExit:  # raised by --help and --version
                say(end="", flush=True)
                raise
            if arguments[0] in ("-v", "--verbose"):  # given before the command, whose default then replaced it
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
        if type(error) is MemoryError:  # during an import; the library reports its own
            return _fail(no_memory(), as_json)
        if {"-v", "--verbose"} & set(arguments):
            raise
        what = f"internal error: {type(error).__name__}: {error}".replace("\n", " ")
        return _fail(
            StreamconvError(what, hint="please report it with the output of -v", code="internal-error"), as_json
        )


def _asked(words: list[str]) -> list[str]:
    """The arguments, with the usual ways to ask for help replaced by --help."""
    if not words:
        return ["--help"]
    if {*words} <= {"-v", "--verbose", "-V", "--version"}:
        return sorted(words, key=lambda word: word in ("-V", "--version"))  # which prints and exits
    if words[0] == "help":
        return [word for word in words[1:2] if word != "help"] + ["--help", *words[2:]]
    return words


def _age_seconds() -> float:
    """Return the time since this process started: the interpreter's and its imports'. 0 without Linux's /proc."""
    try:
        status = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(status.rpartition(")")[2].split()[19])  # proc(5): starttime, field 22, since the boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def _fail(error: StreamconvError, as_json: bool) -> int:
    print_stderr(f"streamconv: {error}")
    if as_json:
        from streamconv.report import error_to_json

        try:
            print(json.dumps(error_to_json(error)), flush=True)
        except BrokenPipeError:
            return _leave_pipe()
        except OSError:
            sys.stdout = None  # reported on stderr; the interpreter would retry at exit
    return error.exit_code


def _leave_pipe() -> int:
    """Discard buffered output silently after the reader has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _keep_standard_streams() -> None:
    """Redirect a closed stdin, stdout or stderr to /dev/null, so that no opened file gets its descriptor."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _print_any_character() -> None:
    """Print characters that the terminal's encoding lacks as escapes instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _signals(hint: str | None) -> Iterator[None]:
    """Make SIGTERM stop a run like Ctrl-C."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise InterruptedByTerm("terminated", hint=hint, code="interrupted")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
