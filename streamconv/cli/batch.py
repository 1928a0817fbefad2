"""The command that runs many jobs (batch), and the command of each job's process (batch-job)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from streamconv.cli.batch_progress import MAX_NAME_CHARS, shown_batch
from streamconv.cli.options import add_command, add_report_options, add_resume_options, dst_path, positive, src_path
from streamconv.cli.output import from_here, print_stderr, progress_of, say
from streamconv.errors import StreamconvError, UsageError, printable

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from streamconv.batch.child import JobResult
    from streamconv.batch.jobs_file import JobSpec
    from streamconv.batch.run import Forecast

PROGRESS_SECONDS = 0.2  # between two progress messages of a job
EPILOG = """example of JOBS:
  [defaults]
  outtype = "q8_0"
  output = "out/{name}-{outtype}.gguf"
  [[job]]
  source = "models/*"

exit codes:
  0 all done or up to date    7 some failed          8 none succeeded
  2 the file is wrong         130/143 interrupted"""


def add_batch(commands: Any) -> None:
    parser = add_command(
        commands,
        "batch",
        help="run many conversions, each in its own process, with retries and resuming",
        description="Run the jobs of a TOML or JSON-lines file; a line on stdout for each finished job.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "jobs", metavar="JOBS", type=src_path, help="the file: [[job]] tables, or one JSON object a line"
    )
    parser.add_argument(
        "--jobs", dest="n_parallel", metavar="N", type=positive, default=1, help="jobs at a time; default: 1"
    )
    add_resume_options(parser, "what an earlier batch left unfinished")
    parser.add_argument(
        "--dry-run", action="store_true", help="show which jobs would run, their sizes, and the space needed"
    )
    parser.add_argument(
        "--state", metavar="FILE", type=dst_path, help="file that records finished jobs; default: JOBS.state.jsonl"
    )
    parser.add_argument(
        "--array", metavar="I/N", help="run every N-th job, starting from the I-th (from 1), for job arrays"
    )
    parser.add_argument("--dask", metavar="ADDRESS", help="run on the Dask cluster of this scheduler (the dask extra)")
    json = "a JSON object on stdout for each job that ends, and the lines on stderr"
    add_report_options(parser, json=json, elsewhere="plain (with --json none)")
    parser.set_defaults(run=_batch)


def add_batch_job(commands: Any) -> None:
    """Add the command of a job's process, without help since only `batch` calls it."""
    commands.add_parser("batch-job").set_defaults(run=_batch_job, command="batch-job")


def _batch(options: argparse.Namespace) -> int:
    from streamconv.batch.jobs_file import read_jobs
    from streamconv.batch.run import exit_code, expand_splits, forecast, run_batch, select_array
    from streamconv.batch.state import State

    jobs = list(expand_splits(read_jobs(options.jobs)))
    if options.array:
        jobs = select_array(jobs, options.array)
    state = State(options.state or options.jobs.with_name(f"{options.jobs.name}.state.jsonl"))
    if options.dry_run:
        rows = list(forecast(jobs, state, n_parallel=options.n_parallel))
        _say_forecast(rows, options.json)
        return exit_code(rows)
    place: AbstractContextManager[_Where] = _dask(options.dask) if options.dask else nullcontext(_Where())
    lines = _Lines(options, jobs)
    how = progress_of(options, elsewhere="none" if options.json else "plain")
    with place as where, shown_batch(how, len(jobs)) as shown:

        def finished(result: JobResult) -> None:
            if shown is not None:
                shown.ended(result)
            with shown.aside() if shown is not None else nullcontext():
                lines.say(result)

        results = run_batch(
            jobs,
            state,
            **where,
            n_parallel=options.n_parallel,
            restart=options.restart,
            finished=finished,
            progress=shown.progress if shown is not None else None,
        )
    lines.sum_up(results)
    return exit_code(results)


def _batch_job(options: argparse.Namespace) -> int:
    from streamconv.batch.child import obey, read_order
    from streamconv.batch.jobs_file import in_jobs_file
    from streamconv.report import error_to_json

    try:
        order = read_order(sys.stdin)
        report = obey(order, _spaced() if order.progress else None)
    except StreamconvError as error:
        error.hint = in_jobs_file(error.hint) if error.hint else None
        say(json.dumps(error_to_json(error)), flush=True)
        return error.exit_code
    report.warnings = [replace(warning, message=in_jobs_file(warning.message)) for warning in report.warnings]
    say(json.dumps(report.to_json()), flush=True)
    return 0


def _spaced() -> Callable[[int, int], None]:
    """Progress as JSON lines on stdout, at most one in PROGRESS_SECONDS and one at each end."""
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            say(json.dumps({"progress": [done, total]}), flush=True)

    return progress


class _Where(TypedDict, total=False):
    """The keywords of run_batch that say where jobs run."""

    executor: Executor
    stop: Callable[[], object]


@contextmanager
def _dask(address: str) -> Iterator[_Where]:
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--dask needs the dask extra", hint='pip install ".[dask]"', code="extra-missing") from None
    from streamconv.batch.child import end_jobs

    try:
        client = Client(address, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {address}: {error}", code="dask-unreachable") from None
    with client:
        # An executor cannot stop a job that a worker has started.
        yield {"executor": client.get_executor(), "stop": lambda: client.run(end_jobs)}


def _say_forecast(rows: Sequence[Forecast], as_json: bool) -> None:
    if as_json:
        jobs = [row.to_json() for row in rows]
        say(json.dumps({"schema": 1, "jobs": jobs, "nbytes": sum(row.nbytes for row in rows)}))
        return
    for row in rows:
        error = f"  ({row.error})" if row.error else ""
        say(f"{row.action:<5} {row.nbytes:>16,}  {row.job.name} -> {row.job.output}{error}")
    say(f"{'':<5} {sum(row.nbytes for row in rows):>16,}  bytes in all")


class _Lines:
    """Prints a line for each finished job and a summary to stdout, or with --json to stderr beside the JSON."""

    def __init__(self, options: argparse.Namespace, jobs: Sequence[JobSpec]) -> None:
        self._options = options
        self._width = min(MAX_NAME_CHARS, max((len(job.name) for job in jobs), default=0))

    def say(self, result: JobResult) -> None:
        if self._options.json:
            say(json.dumps(result.to_json()), flush=True)
        line = f"{result.status:<9}  {result.exit_code:>3}  {result.job.name:<{self._width}}  {_outcome(result)}"
        self._print(line.rstrip(), is_needed=result.is_failed)
        for warning in (result.report or {}).get("warnings", ()):
            where = f"{warning['tensor']}: " if warning["tensor"] else ""
            print_stderr(printable(f"streamconv: warning: {result.job.name}: {where}{warning['message']}"))

    def sum_up(self, results: Sequence[JobResult]) -> None:
        counts = Counter(result.status for result in results)
        self._print(", ".join(f"{n} {status}" for status, n in counts.items()) or "no jobs")
        if counts["cancelled"]:
            self._print("run the same command again to continue; --restart starts over", is_needed=True)

    def _print(self, line: str, *, is_needed: bool = False) -> None:
        if self._options.json or self._options.quiet:
            if is_needed or not self._options.quiet:
                print_stderr(line)
        else:
            say(from_here(line), flush=True)


def _outcome(result: JobResult) -> str:
    from streamconv.batch.child import in_words

    if result.error is not None:
        return in_words(result.error)
    if result.report is None:
        return ""
    nbytes = sum(output["nbytes"] for output in result.report["outputs"])
    tries = f", try {result.attempts}" if result.attempts > 1 else ""
    return f"{nbytes:,} bytes, {result.report['seconds']:.1f} s{tries}"
