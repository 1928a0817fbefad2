"""What people read of a run: the progress bar, the plan, the summary.

Owns: lines for the terminal. Does not own: the facts (report.py), the JSON that scripts read (Report.to_json).
Invariant: what stdout does not take is an error; what stderr does not take is lost, and changes nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from streamconv.errors import DestinationError, printable

if TYPE_CHECKING:
    from streamconv.report import Report

MIB = 1 << 20


def say(text: str = "", *, end: str = "\n", flush: bool = False) -> None:
    """`text` on stdout. DestinationError where that cannot be written; a pipe that nobody reads is BrokenPipeError."""
    try:
        print(text, end=end, flush=flush)
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = None  # or else the interpreter tries again at its end, and exits with 120
        raise DestinationError(
            f"cannot be written: {error.strerror}", file="standard output", code="cannot-write"
        ) from None


class _Stderr:
    """Standard error as it is at the time: there or closed, on a disk with room or without."""

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
            sys.stderr = None  # or else the interpreter tries again at its end, and exits with 120

    def isatty(self) -> bool:
        return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)  # tqdm asks for the terminal's width and encoding


STDERR: Final = _Stderr()


def tell(line: str) -> None:
    """`line` on stderr, for people; nothing depends on whether it can be written."""
    STDERR.write(line + "\n")
    STDERR.flush()


@contextmanager
def progress_bar(*labels: str, is_wanted: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A tqdm bar in bytes on stderr, where it is wanted and that is a terminal. labels: of each time it fills."""
    if not is_wanted or not STDERR.isatty():
        yield None
        return
    from tqdm import tqdm

    first, *later = labels
    # miniters: the pace of one phase must not decide how often the next is drawn
    with tqdm(desc=first, unit="B", unit_scale=True, unit_divisor=1024, miniters=1, leave=False, file=STDERR) as bar:

        def progress(done: int, total: int) -> None:
            if done < bar.n:
                bar.set_description(later.pop(0), refresh=False)
                bar.reset(total)
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def show_report(report: Report, options: argparse.Namespace) -> None:
    """Warnings on stderr; then JSON, the plan of a dry run, or a summary."""
    tell_warnings(report)
    if options.json:
        say(json.dumps(report.to_json()))
    elif report.plan is not None:
        _say_plan(report)
    elif not options.quiet:
        _say_summary(report, options.verbose)


def tell_warnings(report: Report) -> None:
    """What to know of a result that is complete, a line each."""
    for warning in report.warnings:
        where = f"{warning.tensor}: " if warning.tensor else ""
        tell(printable(f"streamconv: warning: {where}{warning.message}"))


def _say_plan(report: Report) -> None:
    assert report.plan is not None and report.memory is not None
    width = max((len(row.target) for row in report.plan), default=0)
    for row in report.plan:
        source = row.source[0] if row.source else "(computed)"
        if len(row.source) > 1:
            source += f" and {len(row.source) - 1} more"
        if row.changed_by:
            source += f" + {', '.join(row.changed_by)}"
        shape = "x".join(map(str, row.shape))
        say(f"{row.target:<{width}}  {row.type:<5} {shape:>14} {row.nbytes:>13,}  <- {source}")
    _say_totals(report, "would write")
    workers = report.memory["workers"]
    slab, peak, limit = (round(report.memory[name] / MIB, 1) for name in ("slab", "peak", "limit"))
    fixed = peak - workers * slab  # as rounded, so that what is printed adds up
    say(f"memory: {fixed:.1f} MiB fixed + {workers} workers x {slab:.1f} MiB -> peak {peak:.1f} MiB of {limit:.1f} MiB")


def _say_summary(report: Report, verbose: bool) -> None:
    _say_totals(report, "wrote")
    if verbose:
        for name, total in report.types.items():
            say(f"  {name:<5} {total.n_tensors:>6} tensors {total.nbytes:>16,} bytes")
        for output in report.outputs:
            say(f"  {output.path}: {output.nbytes:,} bytes" + (f", sha256 {output.sha256}" if output.sha256 else ""))
        went = [word for word, is_so in (("resumed", report.resumed), ("verified", report.verified)) if is_so]
        say(f"  {report.n_parameters:,} parameters, dialect {report.dialect}" + "".join(f", {word}" for word in went))
    speed = report.nbytes / max(report.seconds, 1e-9) / 1e6
    say(f"{report.seconds:.1f} s ({speed:,.0f} MB/s), peak resident memory {report.peak_rss_nbytes / MIB:.1f} MiB")


def _say_totals(report: Report, verb: str) -> None:
    types = ", ".join(f"{total.n_tensors} {name}" for name, total in report.types.items())
    parts = f" and {len(report.outputs) - 1} more" if len(report.outputs) > 1 else ""
    say(
        f"{verb} {report.output}{parts}: {report.nbytes:,} bytes, {report.n_tensors} tensors ({types}),"
        f" {report.architecture}"
    )
