"""What a run prints for people: the progress bar, the plan, the summary.

A failure to write to stdout is an error; a failure to write to stderr loses the text and changes nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, Final

from streamconv.budget import MIB, in_words
from streamconv.errors import DestinationError, printable

if TYPE_CHECKING:
    from streamconv.report import Gives, PlannedTensor, RelativeErrors, Report

BAR: Final = "{l_bar}{bar}| {done} of {whole} [{elapsed}<{remaining}, {speed}/s]"


def say(text: str = "", *, end: str = "\n", flush: bool = False) -> None:
    """Print `text` to stdout.

    Raises:
        DestinationError: It cannot be written.
        BrokenPipeError: The reader has closed the pipe.
    """
    try:
        print(text, end=end, flush=flush)
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = None  # else the interpreter retries at exit, and returns 120
        raise DestinationError(
            f"cannot be written: {error.strerror}", file="standard output", code="cannot-write"
        ) from None


class _Stderr:
    """Standard error, whether it is open, closed, or on a full disk."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
        except (OSError, ValueError):
            sys.stderr = None  # else the interpreter retries at exit, and returns 120

    def isatty(self) -> bool:
        return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)  # tqdm reads the terminal's width and encoding


STDERR: Final = _Stderr()


def print_stderr(line: str) -> None:
    """Print `line` to stderr for people. A failure to write is ignored."""
    STDERR.write(from_here(line) + "\n")
    STDERR.flush()


def from_here(line: str) -> str:
    """Return `line` with each path below the current folder made relative to it, as it was most likely given."""
    try:
        here = str(Path.cwd())
    except OSError:  # the folder was removed
        return line
    return line if here == "/" else re.sub(rf"(?<![^\s:='\"(]){re.escape(here)}/(?=[^\s/])", "", line)


@contextmanager
def shown_progress(how: str, *labels: str) -> Iterator[Callable[[int, int], None] | None]:
    """Return a callback that shows progress on stderr; None for `none`.

    Args:
        how: one of PROGRESS.
        labels: a label for each phase, which goes from 0 to its total.
    """
    if how == "none":
        yield None
        return
    make = bar if how == "bar" else Lines
    shown: Any = None
    later = list(labels)

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if shown is None or done < shown.n:  # a new phase starts
            if shown is not None:
                shown.close()
            shown = make(later.pop(0), total)
        shown.total = total
        shown.update(done - shown.n)

    try:
        yield progress
    finally:
        if shown is not None:
            shown.close()


def progress_of(options: argparse.Namespace, *, elsewhere: str = "none") -> str:
    """Return how to show progress: as requested, else a bar if stderr is a terminal, else `elsewhere`."""
    if options.quiet or getattr(options, "dry_run", False):
        return "none"
    return options.progress or ("bar" if STDERR.isatty() else elsewhere)


class Lines:
    """Progress as lines for a log, one for each tenth; same interface as a bar."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.n = label, total, 0
        self._told = 0

    def update(self, n: int) -> None:
        self.n += n
        tenth = 10 * self.n // self.total if self.total else 10
        if tenth > self._told:
            self._told = tenth
            print_stderr(f"{self.label}: {10 * tenth}% ({in_words(self.n)} of {in_words(self.total)})")

    def close(self) -> None:
        """Nothing to do: every line was complete."""


def bar(label: str, total: int | None, **words: Any) -> Any:
    """Return a progress bar on stderr in bytes. `words`: further keywords for tqdm."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        @property
        def format_dict(self) -> MutableMapping[str, Any]:
            known: MutableMapping[str, Any] = super().format_dict
            speed = known["rate"] or self.n / max(known["elapsed"], 1e-9)
            sizes = {"done": self.n, "whole": self.total or 0, "speed": speed}
            return {**known, **{name: in_words(int(nbytes)) for name, nbytes in sizes.items()}}

    # miniters: the pace of one phase must not decide how often the next is drawn
    return Bar(
        desc=label,
        total=total,
        miniters=1,
        leave=False,
        file=STDERR,
        ascii=_is_ascii(os.environ, STDERR.encoding),
        **{"bar_format": BAR, **words},
    )


def _is_ascii(environment: Mapping[str, str], encoding: str | None) -> bool:
    """Whether the terminal may show only ASCII. Python uses UTF-8 even if the locale is C."""
    asked = [environment.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG")]
    if asked[1] == "C.UTF-8" and asked[2] in ("", "C", "POSIX"):
        asked[1] = ""  # Python itself sets it, in the locale C (PEP 538)
    locale = next(filter(None, asked), "C")
    return "utf" not in locale.lower() or "utf" not in (encoding or "utf-8").lower()


def show_report(report: Report, options: argparse.Namespace) -> None:
    """Print warnings to stderr, then JSON, the plan of a dry run, or a summary to stdout."""
    print_warnings(report)
    if options.json:
        say(json.dumps(report.to_json()))
    elif report.plan is not None:
        if not options.quiet:
            _say_plan(report)
            if options.tensors:
                _say_tensors(report.plan)
    elif not options.quiet:
        _say_summary(report, options)


def print_warnings(report: Report) -> None:
    """Print each warning of a complete result on a line of stderr."""
    for warning in report.warnings:
        where = f"{warning.tensor}: " if warning.tensor else ""
        print_stderr(printable(f"streamconv: warning: {where}{warning.message}"))


def _say_plan(report: Report) -> None:
    assert report.memory is not None
    _say_totals(report, "would write")
    _say_memory(report.memory)


def _say_tensors(rows: Sequence[PlannedTensor]) -> None:
    """Print a line for each tensor, with columns as wide as the names need."""
    width = max((len(row.target) for row in rows), default=0)
    for row in rows:
        source = row.source[0] if row.source else "(computed)"
        if len(row.source) > 1:
            source += f" and {len(row.source) - 1} more"
        if row.changed_by:
            source += f" + {', '.join(row.changed_by)}"
        shape = "x".join(map(str, row.shape))
        say(f"{row.target:<{width}}  {row.type:<5} {shape:>14} {row.nbytes:>13,}  <- {source}")


def _say_memory(memory: Mapping[str, Any]) -> None:
    """Print the memory proof term by term, rounded so that the terms add up."""
    tenths = {name: round(10 * nbytes / MIB) for name, nbytes in memory["terms"].items()}
    say(f"memory ({memory['workers']} workers, {memory['io']} reads):")
    for name, value in tenths.items():
        say(f"  {name:<24}{value / 10:>7.1f} MiB")
    say(f"  {'projected':<24}{sum(tenths.values()) / 10:>7.1f} MiB of {memory['allowed'] / MIB:.1f} MiB allowed")


def _say_summary(report: Report, options: argparse.Namespace) -> None:
    _say_totals(report, "wrote")
    if report.verified:
        merged = f", with {' and '.join(report.adapters)} merged" if report.adapters else ""
        say(f"verified: {report.n_tensors} of {report.n_tensors} tensors match the source{merged}")
    for output in report.outputs:
        if output.sha256:
            say(f"sha256 {output.sha256}  {output.path}")
    for path in report.beside:
        say(from_here(f"wrote {path}"))
    if report.resumed_nbytes:
        say(f"resumed after {in_words(report.resumed_nbytes)} of {in_words(report.nbytes)} written by an earlier run")
    if options.verbose:
        for name, total in report.types.items():
            say(f"  {name:<5} {total.n_tensors:>6} tensors {total.nbytes:>16,} bytes")
        for output in report.outputs:
            say(f"  {output.path}: {output.nbytes:,} bytes")
        say(f"  {report.n_parameters:,} parameters, dialect {report.dialect}")
    speed = report.nbytes / max(report.seconds, 1e-9) / MIB
    say(f"{report.seconds:.1f} s ({speed:,.0f} MiB/s), peak resident memory {report.peak_rss_nbytes / MIB:.1f} MiB")
    if command := next_command(report, getattr(options, "base", None)):
        say(from_here(f"next: {command}"))


_RUN_WITH: dict[Gives, str] = {
    "text": "llama-cli -m {}",
    "vectors": "llama-embedding -m {} -p TEXT",
    "token vectors": "llama-embedding -m {} -p TEXT --pooling none",
    "scores": "llama-server -m {} --reranking",
}


def next_command(report: Report, base: Path | None) -> str | None:
    """Return a command that runs the result, or None if unknown. `base`: the base of an adapter."""
    modelfile = next((path for path in report.beside if path.name.endswith(".Modelfile")), None)
    first, *others = report.outputs
    if modelfile is not None:
        return f"ollama create NAME -f {shlex.quote(str(modelfile))}"
    if first.role == "adapter":
        model = shlex.quote(str(base)) if base is not None and base.suffix == ".gguf" else "BASE.gguf"
        return f"llama-cli -m {model} --lora {shlex.quote(str(first.path))}"
    if projector := next((one for one in others if one.role == "mmproj"), None):
        return f"llama-mtmd-cli -m {shlex.quote(str(first.path))} --mmproj {shlex.quote(str(projector.path))}"
    number = re.search(r"-(\d{5})-of-\d{5}\.gguf$", first.path.name)
    is_whole = number is None or (int(number[1]) == 1 and others)
    return _RUN_WITH[report.gives].format(shlex.quote(str(first.path))) if first.role == "model" and is_whole else None


def error_lines(path: Path, errors: RelativeErrors) -> Iterator[str]:
    """Return lines with the errors of a file and its tensors, the worst first; exact tensors are only counted."""
    yield f"{path}: relative RMS error {_figure(errors.relative_rms)}, {errors.bits_per_weight:.2f} bits per weight"
    shown = [one for one in errors.tensors if one.relative_rms != 0]
    width = max((len(one.type) for one in shown), default=0)
    for one in shown:
        yield f"{_figure(one.relative_rms):>10}  {one.type:<{width}}  {one.name}"
    if n := len(errors.tensors) - len(shown):
        yield f"{n} tensor{'s are' if n > 1 else ' is'} exact"


def _figure(relative_rms: float | None) -> str:
    return (
        "not finite"
        if relative_rms is None
        else f"{relative_rms:.6f}"
        if relative_rms >= 1e-4
        else f"{relative_rms:.2e}"
    )


def _size(nbytes: int) -> str:
    """A file's size in bytes and in readable units."""
    return f"{nbytes:,} bytes" + (f" ({in_words(nbytes)})" if nbytes >= MIB else "")


def _say_totals(report: Report, verb: str) -> None:
    types = ", ".join(f"{total.n_tensors} {name}" for name, total in report.types.items())
    parts = f" and {len(report.outputs) - 1} more" if len(report.outputs) > 1 else ""
    what, size = f"{verb} {report.output}{parts}:", _size(report.nbytes)
    is_wide = sys.stdout.isatty() and len(what) + len(size) >= get_terminal_size().columns
    say(f"{what}\n  {size}" if is_wide else f"{what} {size}")
    say(f"{report.architecture}, {report.n_tensors} tensors ({types})")
