"""From samples to figures: rows with a median, a spread and a bar, as a table, Markdown and CSV.

A ratio is computed for each pair, then its median taken; a peak is the highest of all samples, since it is compared
with an upper bound. Every row can be computed from raw.csv alone.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from benchmarks.bench import Sample

MIB: Final = 1 << 20
_RAW: Final = [field.name for field in fields(Sample) if field.name != "timeline"]
Table = list[tuple[str, ...]]
_HEAD: Final = ("case", "model", "type", "cache", "what", "figure", "value", "spread", "n", "bar")
_CONVERSIONS_HEAD: Final = (
    *("case", "model", "type", "cache", "converter", "wall / cp", "seconds", "CPU seconds"),
    *("peak MiB", "anonymous", "mapped files", "n"),
)
_READING: Final = (
    "Times and ratios are medians, with the lowest and the highest; ratios are taken pair by pair. A peak is the"
    " highest of all samples: of the kernel's high-water mark, and of what was anonymous or mapped at any moment."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `bar` is the highest value that is good enough, where there is such a promise."""

    case: str
    model: str
    outtype: str
    cache: str
    what: str
    figure: str
    value: float
    low: float
    high: float
    n: int
    bar: float | None = None

    def cells(self) -> tuple[str, ...]:
        spread = f"{_digits(self.low)}-{_digits(self.high)}" if self.n > 1 else ""
        verdict = "" if self.bar is None else f"<= {self.bar:g} {'held' if self.value <= self.bar else 'MISSED'}"
        name = (self.case, self.model, self.outtype, self.cache, self.what, self.figure)
        return (*name, _digits(self.value), spread, str(self.n), verdict)


def succeeded(samples: Iterable[Sample]) -> list[Sample]:
    """Without those that failed: their times and peaks mean nothing."""
    return [sample for sample in samples if not sample.exit_code]


def middle(values: Sequence[float]) -> tuple[float, float, float, int]:
    """(median, lowest, highest, count): the last fields of a Row."""
    return statistics.median(values), min(values), max(values), len(values)


def highest(values: Sequence[float]) -> tuple[float, float, float, int]:
    """(highest, lowest, highest, count)."""
    return max(values), min(values), max(values), len(values)


def paired(samples: Iterable[Sample], of: str, to: str) -> list[tuple[Sample, Sample]]:
    """The samples of two converters that ran in the same pair."""
    by_pair = {(sample.converter, sample.pair): sample for sample in samples}
    pairs = sorted(pair for converter, pair in by_pair if converter == of and (to, pair) in by_pair)
    return [(by_pair[of, pair], by_pair[to, pair]) for pair in pairs]


def ratios(samples: Iterable[Sample], of: str, to: str) -> list[float]:
    """Wall time of one converter as a ratio to another's in the same pair."""
    return [one.wall_seconds / other.wall_seconds for one, other in paired(samples, of, to)]


def figures(rows: Iterable[Row]) -> Table:
    """The rows, each with its bar and whether that held."""
    return [_HEAD, *(row.cells() for row in rows)]


def conversions(samples: Iterable[Sample]) -> Table:
    """What every converter cost, by model, type and state of the cache."""
    made: Table = [_CONVERSIONS_HEAD]
    groups: dict[tuple[str, str, str, str], list[Sample]] = {}
    for sample in succeeded(samples):
        if sample.model:
            groups.setdefault((sample.case, sample.model, sample.outtype, sample.cache), []).append(sample)
    for key, same in groups.items():
        for name in sorted({sample.converter for sample in same}):
            own = [sample for sample in same if sample.converter == name]
            made.append(
                (
                    *(*key, name, _spread(ratios(same, name, "cp"))),
                    _spread([sample.wall_seconds for sample in own]),
                    _spread([sample.user_seconds + sample.system_seconds for sample in own]),
                    *(
                        f"{max(getattr(sample, field) for sample in own) / MIB:.1f}"
                        for field in ("peak_rss_nbytes", "peak_anon_nbytes", "peak_file_nbytes")
                    ),
                    str(len(own)),
                )
            )
    return made


def as_text(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def as_markdown(table: Table) -> str:
    head, *lines = ("| " + " | ".join(line) + " |" for line in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *lines])


def markdown(tables: Iterable[Table], environment: dict[str, Any], notes: Sequence[str], plots: Sequence[Path]) -> str:
    """summary.md."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    lines = [
        f"# {environment['date']}, {environment['host']}",
        f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_nbytes'] / 2**30:.0f} GiB,"
        f" {environment['kernel']}, {environment['filesystem']['type']}; Python {environment['python']}, {versions};"
        f" streamconv {environment['streamconv']['commit']} ({environment['streamconv']['kernels']} kernels).",
        _settings(environment["settings"]),
        *(f"**{note}**" for note in notes),
        *map(as_markdown, tables),
        _READING,
        *(f"![{path.stem}]({path.name})" for path in plots),
    ]
    return "\n\n".join(lines) + "\n"


def _settings(settings: dict[str, Any]) -> str:
    models = [
        f"{name} (holes in place of weights)" if name in settings["sparse"] else name for name in settings["models"]
    ]
    return (
        f"Models: {', '.join(models)}; those of startup and vocabulary have holes too. Output types:"
        f" {', '.join(settings['outtypes'])}. Pairs: {settings['pairs']}. Cases: {', '.join(settings['cases'])}."
    )


def write_raw(path: Path, samples: Iterable[Sample]) -> None:
    """raw.csv: every sample, one a line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_RAW)
        writer.writerows([_short(getattr(sample, name)) for name in _RAW] for sample in samples)


def write_timelines(path: Path, samples: Iterable[Sample]) -> None:
    """timeline.csv: memory over time of the first sample of its kind, at most some 200 points each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "model", "outtype", "cache", "converter", "seconds", "anon_nbytes", "file_nbytes"])
        for sample in samples:
            if sample.pair or not sample.model:
                continue
            name = (sample.case, sample.model, sample.outtype, sample.cache, sample.converter)
            step = len(sample.timeline) // 200 + 1
            writer.writerows([*name, f"{point.seconds:.3f}", *point[1:]] for point in sample.timeline[::step])


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    around = f" ({_digits(min(values))}-{_digits(max(values))})" if len(values) > 1 else ""
    return _digits(statistics.median(values)) + around


def _digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _short(value: object) -> object:
    return f"{value:.6f}" if isinstance(value, float) else value
