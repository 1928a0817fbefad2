"""The command that runs many jobs, and the one that each of them is: batch, batch-job."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from streamconv.cli.options import add_command, add_resume_options, add_verbose, dst_path, positive, src_path
from streamconv.cli.output import say, tell
from streamconv.errors import StreamconvError, UsageError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from streamconv.batch.child import JobResult
    from streamconv.batch.run import Forecast

EPILOG = """example of JOBS:
  [defaults]
  outtype = "q8_0"
  output = "out/{name}-{outtype}.gguf"
  [[job]]
  source = "models/*"

exit codes:
  0 all done or up to date   7 some failed   8 none succeeded   130/143 interrupted   2 the file is wrong"""


def add_batch(commands: Any) -> None:
    parser = add_command(
        commands,
        "batch",
        help="many conversions, unattended: each in its own process, resumed and retried",
        description="Run the jobs of a TOML or JSON-lines file; one JSON line on stdout for each that ends.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "jobs", metavar="JOBS", type=src_path, help="the file: [[job]] tables, or one JSON object a line"
    )
    parser.add_argument(
        "--jobs", dest="n_parallel", metavar="N", type=positive, default=1, help="at a time; default: 1"
    )
    add_resume_options(parser, "what an earlier batch left unfinished")
    parser.add_argument("--dry-run", action="store_true", help="what would run, its size, and the space needed in all")
    parser.add_argument(
        "--state", metavar="FILE", type=dst_path, help="where what is done is remembered; default: JOBS.state.jsonl"
    )
    parser.add_argument("--array", metavar="I/N", help="every N-th job from the I-th on (from 1), for job arrays")
    parser.add_argument("--dask", metavar="ADDRESS", help="run on the Dask cluster of this scheduler (the dask extra)")
    parser.add_argument("--json", action="store_true", help="errors of the batch itself as JSON, too")
    parser.add_argument(
        "--quiet", action="store_true", help="no summary table on stderr; stdout has a line for each job"
    )
    add_verbose(parser)
    parser.set_defaults(run=_batch)


def add_batch_job(commands: Any) -> None:
    """A job's own process: a command without help, since only `batch` calls it."""
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
    with place as where:
        results = run_batch(
            jobs,
            state,
            **where,
            n_parallel=options.n_parallel,
            restart=options.restart,
            finished=lambda result: say(json.dumps(result.to_json()), flush=True),
        )
    if not options.quiet:
        _print_table(results)
    return exit_code(results)


def _batch_job(options: argparse.Namespace) -> int:
    from streamconv.batch.child import obey, read_order
    from streamconv.batch.jobs_file import in_jobs_file
    from streamconv.report import error_to_json

    try:
        report = obey(read_order(sys.stdin))
    except StreamconvError as error:
        error.hint = in_jobs_file(error.hint) if error.hint else None
        say(json.dumps(error_to_json(error)), flush=True)
        return error.exit_code
    report.warnings = [replace(warning, message=in_jobs_file(warning.message)) for warning in report.warnings]
    say(json.dumps(report.to_json()), flush=True)
    return 0


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
        # What a worker has begun is out of an executor's reach.
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


def _print_table(results: Sequence[JobResult]) -> None:
    width = max((len(result.job.name) for result in results), default=0)
    for result in results:
        what = _outcome(result)
        line = f"{result.status:<9}  {result.exit_code:>3}  {result.job.name:<{width}}  {what}"
        tell(line.rstrip())
    counts = Counter(result.status for result in results)
    tell(", ".join(f"{n} {status}" for status, n in counts.items()) or "no jobs")


def _outcome(result: JobResult) -> str:
    from streamconv.batch.child import in_words

    if result.error is not None:
        return in_words(result.error)
    if result.report is None:
        return ""
    nbytes = sum(output["nbytes"] for output in result.report["outputs"])
    tries = f", try {result.attempts}" if result.attempts > 1 else ""
    return f"{nbytes:,} bytes, {result.report['seconds']:.1f} s{tries}"
