"""`make bench`: measure, print a table, keep the run. `python -m benchmarks.run --help`.

Owns: options and files of a run. Does not own: what is measured (cases/). The settings that make passes come as
options; LLAMA_CPP, LLAMA_CPP_PYTHON and BENCH_CACHE from the environment.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import machine, plots, summary
from benchmarks.baselines import llama_cpp
from benchmarks.bench import Bench, BenchError, Settings
from benchmarks.cases import CASES
from benchmarks.shapes import SHAPES, cache_folder
from benchmarks.summary import Row

RUNS = Path(__file__).with_name("runs")
OUTTYPES = ("bf16", "f16", "q8_0")


def main() -> int:
    options = _options()
    names = options.cases or [case.NAME for case in CASES]
    bench = Bench(_settings(options))
    peer_python = llama_cpp.python() if bench.settings.peer else None
    environment = {"host": options.host, **machine.environment(bench.settings.cache, peer_python)}
    try:
        for case in CASES:
            if case.NAME in names:
                case.measure(bench)
    except (BenchError, OSError) as error:
        print(f"benchmark stopped: {error}", file=sys.stderr)
        return 1
    rows = [
        row
        for case in CASES
        for row in case.rows([sample for sample in bench.samples if sample.case.startswith(case.NAME)])
    ]
    folder = options.out or RUNS / f"{time.strftime('%Y-%m-%d')}-{options.host}"
    _keep(folder, bench, rows, environment)
    print(summary.table(rows))
    print(*bench.notes, f"kept in {folder}", sep="\n")
    return 0


def _keep(folder: Path, bench: Bench, rows: list[Row], environment: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    summary.write_raw(folder / "raw.csv", bench.samples)
    summary.write_timelines(folder / "timeline.csv", bench.samples)
    summary.write_json(folder / "env.json", environment)
    try:
        pictures = plots.draw(bench.samples, folder, str(environment["host"]))
    except ImportError:
        bench.skip("plots", 'matplotlib is missing: pip install -e ".[bench]"')
        pictures = []
    (folder / "summary.md").write_text(summary.markdown(rows, environment, bench.notes, pictures), encoding="utf-8")


def _settings(options: argparse.Namespace) -> Settings:
    settings = Settings(
        models=tuple(options.models),
        outtypes=tuple(options.outtypes),
        n_pairs=options.pairs,
        sparse=frozenset(options.sparse),
        cache=options.cache,
        peer=llama_cpp.converter(),
    )
    if options.smoke:
        return replace(settings, models=("tiny",), n_pairs=1, vocabulary_model="tiny-128k")
    return settings


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Measure streamconv beside cp and llama.cpp."
    )
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["350m"], metavar="MODEL")
    parser.add_argument("--outtypes", nargs="+", choices=("f32", *OUTTYPES), default=OUTTYPES, metavar="TYPE")
    parser.add_argument("--pairs", type=int, default=9, help="samples of each kind (3 at most for the slow ones)")
    parser.add_argument(
        "--sparse",
        nargs="*",
        choices=sorted(SHAPES),
        default=["8b-a1b"],
        metavar="MODEL",
        help="made with holes: memory only",
    )
    parser.add_argument("--cases", nargs="+", choices=[case.NAME for case in CASES], help="only these")
    parser.add_argument("--host", default=machine.default_host(), help="how the run's folder names this machine")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="checkpoints (BENCH_CACHE)")
    parser.add_argument("--out", type=Path, help="the run's folder in place of benchmarks/runs/DATE-HOST")
    parser.add_argument("--smoke", action="store_true", help="every case once, on a tiny model: does it all still run?")
    options = parser.parse_args()
    if options.smoke and options.out is None:
        options.out = options.cache / "smoke"
    return options


if __name__ == "__main__":
    sys.exit(main())
