"""`make bench`: measure, print a table, keep the run. `python -m benchmarks.run --help`.

However the run ends, its measurements are kept. Options take their defaults from the environment, where
`make bench MODELS="350m 1.2b"` puts them: MODELS, OUTTYPES, PAIRS, SPARSE, CASES, BENCH_HOST, BENCH_CACHE, LLAMA_CPP,
LLAMA_CPP_PYTHON, LLAMA_QUANTIZE_PYTHON, EARLIER, CACHES.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import machine, plots, summary
from benchmarks.baselines import earlier, llama_cpp
from benchmarks.bench import CACHES, Bench, BenchError, Settings
from benchmarks.cases import CASES, rows
from benchmarks.shapes import SHAPES, cache_folder
from benchmarks.summary import Table

RUNS = Path(__file__).with_name("runs")
ALL_OUTTYPES = ("f32", "bf16", "f16", "q8_0")


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: `timeout` and CI end a run with it
    settings = _settings(options)
    try:
        environment = _environment(options, settings)
    except machine.Unavailable as why:
        sys.exit(f"make bench: {why}")
    folder = options.out or _new_folder(f"{time.strftime('%Y-%m-%d')}-{options.host}")
    with TemporaryDirectory(prefix="streamconv-bench-", dir=settings.cache) as made:
        bench = Bench(settings, Path(made))
        try:
            completed = _measure(bench, options.cases)
        finally:
            _keep_samples(folder, bench, environment)
    tables = [summary.figures(rows(bench.samples)), summary.conversions(bench.samples)]
    _keep_summary(folder, bench, tables, environment)
    print(*map(summary.as_text, tables), *bench.notes, f"kept in {folder}", sep="\n\n")
    return int(not completed)


def _measure(bench: Bench, names: Collection[str]) -> bool:
    """Whether all cases ran to their end."""
    completed = True
    for case in CASES:
        try:
            if case.NAME in names:
                case.measure(bench)
        except (BenchError, OSError) as error:
            completed = False
            bench.skip(case.NAME, f"it failed: {error}")
        except KeyboardInterrupt:
            bench.skip(case.NAME, "interrupted; what was measured until then is kept")
            return False
    return completed


def _new_folder(name: str) -> Path:
    """Where a run is kept: never in place of an earlier one."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(folder for each in names if not (folder := RUNS / each).exists())


def _keep_samples(folder: Path, bench: Bench, environment: dict[str, Any]) -> None:
    """What all else follows from, before anything else can fail."""
    folder.mkdir(parents=True, exist_ok=True)
    summary.write_raw(folder / "raw.csv", bench.samples)
    summary.write_timelines(folder / "timeline.csv", bench.samples)
    summary.write_json(folder / "env.json", environment)


def _keep_summary(folder: Path, bench: Bench, tables: list[Table], environment: dict[str, Any]) -> None:
    try:
        pictures = plots.draw(summary.succeeded(bench.samples), folder, environment["host"])
    except ImportError:
        bench.skip("plots", 'matplotlib is missing: pip install -e ".[bench]"')
        pictures = []
    (folder / "summary.md").write_text(summary.markdown(tables, environment, bench.notes, pictures), encoding="utf-8")


def _environment(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    asked = {
        "models": settings.models,
        "outtypes": settings.outtypes,
        "pairs": settings.n_pairs,
        "sparse": sorted(settings.sparse.intersection(settings.models)),
        "cases": options.cases,
        "caches": settings.caches,
    }
    peer_python = llama_cpp.python() if settings.peer else None
    return {"host": options.host, "settings": asked, **machine.environment(settings.cache, peer_python)}


def _settings(options: argparse.Namespace) -> Settings:
    settings = Settings(
        models=options.models,
        outtypes=options.outtypes,
        n_pairs=options.pairs,
        sparse=frozenset(options.sparse),
        cache=options.cache,
        peer=options.peer,
        earlier=options.earlier,
        caches=options.caches,
    )
    if options.smoke:
        return replace(settings, models=("tiny",), n_pairs=1, vocabulary_model="tiny-128k")
    return settings


def _options() -> argparse.Namespace:
    """Options; what make passes (MODELS and so on) is in the environment and serves as the default."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Measure streamconv beside cp and llama.cpp."
    )
    add = parser.add_argument
    add("--models", type=_some_names(SHAPES), default=os.environ.get("MODELS", "350m"), help=f"of {' '.join(SHAPES)}")
    add("--outtypes", type=_some_names(ALL_OUTTYPES), default=os.environ.get("OUTTYPES", "bf16 f16 q8_0"))
    add(
        "--pairs",
        type=_at_least_one,
        default=os.environ.get("PAIRS", "9"),
        help="samples of each kind (3 at most of the slow ones)",
    )
    add(
        "--sparse", type=_names(SHAPES), default=os.environ.get("SPARSE", "8b-a1b"), help="made with holes: memory only"
    )
    add("--cases", type=_names([case.NAME for case in CASES]), default=os.environ.get("CASES", ""), help="only these")
    add("--caches", type=_some_names(CACHES), default=os.environ.get("CACHES", "warm cold"), help="warm, cold or both")
    add("--host", default=os.environ.get("BENCH_HOST", machine.default_host()), help="what the run calls this machine")
    add("--cache", type=Path, default=cache_folder(), help="checkpoints (BENCH_CACHE)")
    add("--out", type=Path, help="the run's folder in place of benchmarks/runs/DATE-HOST")
    add("--smoke", action="store_true", help="every case once, on a tiny model: does it all still run?")
    options = parser.parse_args()
    try:
        options.cache.mkdir(parents=True, exist_ok=True)
        options.peer = llama_cpp.converter()
        options.earlier = earlier.converter()
    except OSError as error:
        parser.error(str(error))
    options.cases = options.cases or tuple(case.NAME for case in CASES)
    if options.smoke and options.out is None:
        options.out = options.cache / "smoke"
    return options


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a count of one or more")
    return int(text)


def _names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of names with spaces between, each taken once: a pair is told by its names and number."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split()))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return names

    return read


def _some_names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """As `_names`, at least one of them: a run that measures nothing would say that all went well."""

    def read(text: str) -> tuple[str, ...]:
        if names := _names(known)(text):
            return names
        raise argparse.ArgumentTypeError(f"none is named; there are {', '.join(known)}")

    return read


if __name__ == "__main__":
    sys.exit(main())
