"""The command line: the only module that prints, handles signals or decides an exit code.

Owns: options, help, progress bar, what people read. Does not own: any work (each command calls one function of the
library). Nothing heavy is imported before a command is known, so that --help is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from streamconv import __version__
from streamconv.errors import Interrupted, InterruptedByTerm, StreamconvError, UsageError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from streamconv.batch import Forecast
    from streamconv.job import RunKeywords
    from streamconv.report import Report
    from streamconv.split import SplitOptions

OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
DIALECTS = ("llama.cpp", "ollama-legacy")
EXIT_CODES = """exit codes:
  0 done   2 usage   3 something wrong with the sources   4 memory bound too small
  5 something wrong with the destination   6 verification mismatch   130/143 interrupted   1 a bug of ours"""


BATCH_HELP = """example of JOBS:
  [defaults]
  outtype = "q8_0"
  output = "out/{name}-{outtype}.gguf"
  [[job]]
  source = "models/*"

exit codes: 0 all done or up to date   7 some failed   8 none succeeded   130 interrupted   2 the file is wrong"""


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as any other error is reported, so that --json covers it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one call of the command; everything a user can cause is one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        with _signals():
            options = _parser().parse_args(arguments)
            return int(options.run(options))
    except StreamconvError as error:
        return _fail(error, as_json)
    except KeyboardInterrupt:
        return _fail(Interrupted("interrupted", hint="run it again with --resume to go on"), as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: say nothing more
        return 128 + signal.SIGPIPE
    except Exception as error:
        if "-v" in arguments or "--verbose" in arguments:
            raise
        what = f"a bug of ours: {type(error).__name__}: {error}".replace("\n", " ")
        return _fail(StreamconvError(what, hint="please report it, with what -v shows"), as_json)


def _fail(error: StreamconvError, as_json: bool) -> int:
    if as_json:
        from streamconv.report import error_to_json

        print(json.dumps(error_to_json(error)), flush=True)
    print(f"streamconv: {error}", file=sys.stderr)
    return error.exit_code


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM stops a run as Ctrl-C does."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise InterruptedByTerm("terminated", hint="run it again with --resume to go on")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------- options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="streamconv",
        description="Convert Hugging Face checkpoints and LoRA adapters to GGUF, streaming, in bounded memory.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"streamconv {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_convert, _add_lora, _add_verify, _add_batch, _add_inspect, _add_architectures, _add_draft):
        add(commands)
    return parser


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="a checkpoint becomes a GGUF file",
        description="Write the GGUF file of a Hugging Face checkpoint.",
        epilog="example:\n  streamconv convert LFM2-1.2B -o LFM2-1.2B-Q8_0.gguf --outtype q8_0\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "src", metavar="SRC", type=Path, help="the checkpoint: the folder of config.json and *.safetensors"
    )
    parser.add_argument("--pre", metavar="NAME", help="tokenizer.ggml.pre, where the tokenizer's structure is unknown")
    _add_output_options(parser)
    _add_split_options(parser)
    _add_run_options(parser)
    parser.set_defaults(run=_convert, command="convert")


def _add_lora(commands: Any) -> None:
    parser = commands.add_parser(
        "lora",
        help="a LoRA adapter becomes a GGUF adapter",
        description="Write the GGUF adapter of a PEFT or MLX LoRA adapter.",
        epilog="example:\n  streamconv lora my-adapter --base Llama-3.2-1B.gguf -o my-adapter.gguf\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", type=Path, help="the folder of adapter_config.json and its weights"
    )
    parser.add_argument(
        "--base", metavar="BASE", type=Path, required=True, help="the base model: its GGUF or its folder"
    )
    parser.add_argument("--scale", metavar="S", type=float, help="the scale of every module, instead of the config's")
    _add_output_options(parser)
    _add_run_options(parser)
    parser.set_defaults(run=_lora, command="lora")


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare a GGUF file, by whatever tool, with its source",
        description="Make every tensor again from its source and compare; exit 6 names the first difference.",
        epilog="example:\n  streamconv verify LFM2-1.2B-Q8_0.gguf --source LFM2-1.2B\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the GGUF file")
    parser.add_argument(
        "--source", metavar="SRC", type=Path, required=True, help="the checkpoint or adapter it was made of"
    )
    parser.add_argument("--base", metavar="BASE", type=Path, help="of an adapter: the base it was made for")
    parser.add_argument("--scale", metavar="S", type=float, help="of an adapter: the scale it was made with")
    parser.add_argument("--dialect", choices=DIALECTS, default=DIALECTS[0], help="the dialect it was made with")
    _add_shared_options(parser.add_argument_group("run"))
    parser.set_defaults(run=_verify, command="verify")


def _add_batch(commands: Any) -> None:
    parser = commands.add_parser(
        "batch",
        help="many conversions, unattended: each in its own process, resumed and retried",
        description="Run the jobs of a TOML or JSON-lines file; one JSON line on stdout for each that ends.",
        epilog=BATCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("jobs", metavar="JOBS", type=Path, help="the file: [[job]] tables, or one JSON object a line")
    parser.add_argument(
        "--jobs", dest="n_parallel", metavar="N", type=_positive, default=1, help="at a time; default: 1"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what an earlier batch left unfinished")
    parser.add_argument("--dry-run", action="store_true", help="what would run, its size, and the space needed in all")
    parser.add_argument("--array", metavar="I/N", help="every N-th job from the I-th on (from 1), for job arrays")
    parser.add_argument("--dask", metavar="ADDRESS", help="run on the Dask cluster of this scheduler (the dask extra)")
    parser.add_argument("--json", action="store_true", help="errors of the batch itself as JSON, too")
    parser.add_argument("--quiet", action="store_true", help="no summary table on stderr")
    parser.set_defaults(run=_batch, command="batch")
    commands.add_parser("batch-job").set_defaults(run=_batch_job, command="batch-job")  # a job's own process


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what is in a GGUF file, a checkpoint or an adapter",
        description="Show keys, types, tensors and problems; of a checkpoint or adapter, what it converts to.",
        epilog="example:\n  streamconv inspect LFM2-1.2B-Q8_0.gguf --tensors --head 20\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a .gguf or .safetensors file, or a folder")
    parser.add_argument("--tensors", action="store_true", help="a line for each tensor as well")
    parser.add_argument("--head", metavar="N", type=_positive, help="at most so many keys and tensors")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, with everything")
    parser.set_defaults(run=_inspect, command="inspect")


def _add_architectures(commands: Any) -> None:
    parser = commands.add_parser(
        "architectures",
        help="what is supported, with the names that config.json uses",
        description="List the supported architectures: GGUF's name, then Hugging Face's.",
    )
    parser.set_defaults(run=_architectures, command="architectures")


def _add_draft(commands: Any) -> None:
    parser = commands.add_parser(
        "draft",
        help="a starting recipe for an architecture that is not supported yet",
        description="Print a recipe module drafted from a checkpoint's names, shapes and config, with TODOs to settle.",
        epilog="example:\n  streamconv draft Some-New-1B > streamconv/recipes/new.py\n\n"
        "docs/adding-an-architecture.md says how to go on.\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", type=Path, help="the checkpoint")
    parser.set_defaults(run=_draft, command="draft")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="OUT", type=Path, help="default: Name-1.2B-BF16.gguf, in this folder")
    group.add_argument(
        "--outtype", choices=OUTTYPES, default="auto", help="default: auto, the source's own 16-bit type"
    )
    group.add_argument(
        "--dialect",
        choices=DIALECTS,
        default=DIALECTS[0],
        help="tensor names; the default is the one to use with Ollama too, ollama-legacy is for its first LFM2 release",
    )
    group.add_argument("--name", metavar="NAME", help="the model's name in the file")
    group.add_argument("--force", action="store_true", help="replace an existing OUT, once the new file is complete")


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several files, named OUT-00001-of-0000N.gguf; llama.cpp loads the first")
    group.add_argument("--split-max-size", metavar="SIZE", help="tensor data in a file, as 4G")
    group.add_argument("--split-max-tensors", metavar="N", type=_positive, help="tensors in a file")
    group.add_argument(
        "--only-part", metavar="K", type=_positive, help="make this one alone: each machine makes a part"
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    group.add_argument("--dry-run", action="store_true", help="print the plan and the memory proof, write nothing")
    group.add_argument("--verify", action="store_true", help="read the result back and compare it with the source")
    group.add_argument("--sha256", action="store_true", help="digest of the file, and a manifest of each tensor's")
    group.add_argument(
        "--profile", metavar="FILE", type=Path, help="write memory over time and seconds by phase as JSON"
    )
    _add_shared_options(group)


def _add_shared_options(group: Any) -> None:
    group.add_argument(
        "--max-memory", metavar="SIZE", help="ceiling of resident memory, as 96MiB or 1.5G; default 256MiB"
    )
    group.add_argument("--threads", metavar="N", type=_positive, help="workers; default: the cores, at most 4")
    group.add_argument("--json", action="store_true", help="one JSON object on stdout")
    group.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


# ---------------------------------------------------------------- commands


def _convert(options: argparse.Namespace) -> int:
    from streamconv.convert import convert

    return _run(
        options,
        lambda keywords: convert(
            options.src,
            options.output,
            outtype=options.outtype,
            dialect=options.dialect,
            name=options.name,
            pre=options.pre,
            split=_split(options),
            **keywords,
        ),
    )


def _split(options: argparse.Namespace) -> SplitOptions:
    from streamconv.memory import parse_size
    from streamconv.split import SplitOptions

    max_nbytes = parse_size(options.split_max_size) if options.split_max_size else None
    return SplitOptions(max_nbytes, options.split_max_tensors, options.only_part)


def _lora(options: argparse.Namespace) -> int:
    from streamconv.adapter import convert_adapter

    return _run(
        options,
        lambda keywords: convert_adapter(
            options.adapter,
            options.base,
            options.output,
            outtype=options.outtype,
            dialect=options.dialect,
            scale=options.scale,
            name=options.name,
            **keywords,
        ),
    )


def _verify(options: argparse.Namespace) -> int:
    from streamconv.memory import parse_size
    from streamconv.verify import verify

    limit = parse_size(options.max_memory) if options.max_memory else None
    report = verify(
        options.out,
        options.source,
        base=options.base,
        dialect=options.dialect,
        scale=options.scale,
        max_memory=limit,
        threads=options.threads,
    )
    if options.json:
        print(json.dumps(report.to_json()))
    elif not options.quiet:
        print(
            f"{report.output}: all {report.n_tensors} tensors are what {options.source} says ({report.seconds:.1f} s)"
        )
    return 0


def _batch(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from streamconv.batch import State, exit_code, expand_splits, forecast, run_batch, select_array
    from streamconv.jobs_file import read_jobs

    jobs = list(expand_splits(read_jobs(options.jobs)))
    if options.array:
        jobs = select_array(jobs, options.array)
    state = State(options.jobs.with_name(f"{options.jobs.name}.state.jsonl"))
    if options.dry_run:
        _print_forecast(list(forecast(jobs, state)), options)
        return 0
    with ExitStack() as stack:
        executor = stack.enter_context(_dask_executor(options.dask)) if options.dask else None
        results = run_batch(
            jobs,
            state,
            executor=executor,
            n_parallel=options.n_parallel,
            resume=options.resume,
            finished=lambda result: print(json.dumps(result.to_json()), flush=True),
        )
    if not options.quiet:
        width = max((len(result.job.name) for result in results), default=0)
        for result in results:
            what = f"  {result.error.get('message', '')}" if result.error else ""
            print(f"{result.status:<9}  {result.exit_code:>3}  {result.job.name:<{width}}{what}", file=sys.stderr)
        counts = Counter(result.status for result in results)
        print(", ".join(f"{n} {status}" for status, n in counts.items()), file=sys.stderr)
    return exit_code(results)


def _batch_job(options: argparse.Namespace) -> int:
    from streamconv.batch import perform, read_own_job

    job, resume = read_own_job()
    try:
        report = perform(job, resume=resume)
    except StreamconvError as error:
        return _fail(error, as_json=True)
    print(json.dumps(report.to_json()), flush=True)
    return 0


@contextmanager
def _dask_executor(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--dask needs the dask extra", hint='pip install "streamconv[dask]"') from None
    try:
        client = Client(address, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {address}: {error}") from None
    with client:
        yield client.get_executor()


def _print_forecast(rows: Sequence[Forecast], options: argparse.Namespace) -> None:
    if options.json:
        jobs = [
            {
                "job": row.job.to_json(),
                "name": row.job.name,
                "action": row.action,
                "nbytes": row.nbytes,
                "error": row.error,
            }
            for row in rows
        ]
        print(json.dumps({"schema": 1, "jobs": jobs, "nbytes": sum(row.nbytes for row in rows)}))
        return
    for row in rows:
        error = f"  ({row.error})" if row.error else ""
        print(f"{row.action:<5} {row.nbytes:>16,}  {row.job.name} -> {row.job.output}{error}")
    print(f"{'':<5} {sum(row.nbytes for row in rows):>16,}  bytes in all")


def _inspect(options: argparse.Namespace) -> int:
    from shutil import get_terminal_size

    from streamconv.inspect import inspect
    from streamconv.inspect_text import render

    found = inspect(options.path)
    if options.json:
        print(json.dumps(found.to_json()))
        return 0
    width = get_terminal_size().columns if sys.stdout.isatty() else None
    for line in render(found, width=width, tensors=options.tensors, head=options.head):
        print(line)
    return 0


def _architectures(options: argparse.Namespace) -> int:
    from streamconv.recipe import all_recipes

    rows = [(recipe.arch, ", ".join(recipe.hf_names), recipe.description) for recipe in all_recipes()]
    arch_width, names_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for arch, names, description in rows:
        print(f"{arch:<{arch_width}}  {names:<{names_width}}  {description}")
    return 0


def _draft(options: argparse.Namespace) -> int:
    from streamconv.draft import draft

    print(draft(options.src), end="")
    return 0


def _run(options: argparse.Namespace, work: Callable[[RunKeywords], Report]) -> int:
    """Do one conversion with the options that all of them share, and say what was done."""
    from contextlib import nullcontext

    from streamconv.memory import parse_size
    from streamconv.profile import Profile

    profile = Profile() if options.profile else None
    with _progress_bar(options) as progress, profile or nullcontext():
        report = work(
            {
                "max_memory": parse_size(options.max_memory) if options.max_memory else None,
                "threads": options.threads,
                "force": options.force,
                "resume": options.resume,
                "dry_run": options.dry_run,
                "sha256": options.sha256,
                "verify": options.verify,
                "progress": progress,
                "profile": profile,
            }
        )
    if profile is not None:
        profile.write(options.profile)
    for caution in report.warnings:
        where = f"{caution.tensor}: " if caution.tensor else ""
        print(f"streamconv: warning: {where}{caution.message}", file=sys.stderr)
    if options.json:
        print(json.dumps(report.to_json()))
    elif report.plan is not None:
        _print_plan(report)
    elif not options.quiet:
        _print_summary(report)
    return 0


@contextmanager
def _progress_bar(options: argparse.Namespace) -> Iterator[Callable[[int, int], None] | None]:
    """A tqdm bar in bytes on stderr, where that is a terminal and nobody asked for quiet."""
    if options.quiet or options.dry_run or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _print_plan(report: Report) -> None:
    assert report.plan is not None and report.memory is not None
    width = max((len(row.target) for row in report.plan), default=0)
    for row in report.plan:
        source = row.source[0] if row.source else "(computed)"
        if len(row.source) > 1:
            source += f" … {len(row.source)} tensors"
        print(
            f"{row.target:<{width}}  {row.type:<5} {'x'.join(map(str, row.shape)):>14} {row.nbytes:>13,}  <- {source}"
        )
    _print_totals(report, "would write")
    m = {name: value / (1 << 20) for name, value in report.memory.items()}
    print(
        f"memory: {m['fixed']:.1f} MiB fixed + {report.memory['workers']} workers x {m['slab']:.1f} MiB"
        f" -> peak {m['peak']:.1f} MiB of {m['limit']:.1f} MiB"
    )


def _print_summary(report: Report) -> None:
    _print_totals(report, "wrote")
    speed = report.nbytes / max(report.seconds, 1e-9) / 1e6
    print(
        f"{report.seconds:.1f} s ({speed:,.0f} MB/s), peak resident memory {report.peak_rss_nbytes / (1 << 20):.1f} MiB"
    )


def _print_totals(report: Report, verb: str) -> None:
    types = ", ".join(f"{total.n_tensors} {name}" for name, total in report.types.items())
    print(
        f"{verb} {report.output}: {report.nbytes:,} bytes, {report.n_tensors} tensors ({types}), {report.architecture}"
    )
