"""The plots of a run: memory over time, peak against size, wall time against cp.

A converter has the same colour in all plots.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.baselines.cp import CP
from benchmarks.bench import Sample
from benchmarks.cases import convert, memory
from benchmarks.converters import STREAMCONV, STREAMCONV_NUMPY
from benchmarks.shapes import SHAPES
from benchmarks.summary import MIB, ratios

COLOURS: Final = {
    STREAMCONV.name: "#0b6e4f",
    STREAMCONV_NUMPY.name: "#6bbf59",
    "llama.cpp": "#c1440e",
    CP.name: "#555555",
}
MARKERS: Final = {"bf16": "o", "f16": "s", "q8_0": "^", "f32": "D"}


def draw(samples: Sequence[Sample], folder: Path, host: str) -> list[Path]:
    """Write the pictures that `samples` (none that failed) allow into `folder`.

    Raises ImportError without the `bench` extra.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for name, paint, place, n_columns in (
        ("memory-over-time", _memory_over_time, "lower right", 1),
        ("peak-against-size", _peak_against_size, "center right", 2),
        ("wall-against-cp", _wall_against_cp, "upper left", 1),
    ):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        if paint(axes, samples):
            _finish(axes, host, place, n_columns)
            figure.savefig(folder / f"{name}.png", dpi=120)
            made.append(folder / f"{name}.png")
        pyplot.close(figure)
    return made


def _finish(axes: Any, host: str, place: str, n_columns: int) -> None:
    axes.annotate(host, (1, 1.01), xycoords="axes fraction", ha="right", fontsize=8, color="#777777")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc=place, ncols=n_columns, frameon=False, fontsize=8)


def _mib_axis(axes: Any) -> None:
    axes.axhline(
        convert.PEAK_BAR_MIB, color="#999999", linewidth=0.8, linestyle="--", label=f"{convert.PEAK_BAR_MIB} MiB"
    )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_ylabel("MiB")


def _largest(samples: Sequence[Sample]) -> str:
    return max((sample.model for sample in samples), key=lambda name: SHAPES[name].nbytes)


def _memory_over_time(axes: Any, samples: Sequence[Sample]) -> bool:
    """Of each converter the first warm sample on the largest model: all that is resident, and mapped files of it."""
    warm = [s for s in samples if (s.case, s.cache, s.pair) == (convert.NAME, "warm", 0) and s.timeline]
    if not warm:
        return False
    model = _largest(warm)
    outtype = next(s.outtype for s in reversed(warm) if s.model == model)
    for sample in sorted(warm, key=lambda sample: [*COLOURS].index(sample.converter)):
        if (sample.model, sample.outtype) != (model, outtype):
            continue
        seconds = [point.seconds for point in sample.timeline]
        colour = COLOURS[sample.converter]
        total = [max(point.anon_nbytes + point.file_nbytes, MIB) / MIB for point in sample.timeline]
        mapped = [max(point.file_nbytes, MIB) / MIB for point in sample.timeline]
        axes.plot(seconds, total, color=colour, label=sample.converter)
        if sample.converter != CP.name:
            axes.plot(seconds, mapped, color=colour, linestyle=":", linewidth=1, label="mapped files of it")
    _mib_axis(axes)
    axes.set(title=f"Resident memory, {model} to {outtype}", xlabel="seconds")
    return True


def _peak_against_size(axes: Any, samples: Sequence[Sample]) -> bool:
    peaks: dict[tuple[str, str], dict[str, int]] = {}
    for sample in samples:
        if sample.case in (convert.NAME, memory.NAME) and sample.converter != CP.name:
            of_model = peaks.setdefault((sample.converter, sample.outtype), {})
            of_model[sample.model] = max(of_model.get(sample.model, 0), sample.peak_rss_nbytes)
    if not peaks:
        return False
    for (converter, outtype), of_model in sorted(peaks.items()):
        sizes = sorted((SHAPES[model].nbytes / 1e9, peak / MIB) for model, peak in of_model.items())
        axes.plot(
            *zip(*sizes, strict=True),
            color=COLOURS[converter],
            marker=MARKERS.get(outtype, "x"),
            linewidth=1,
            label=f"{converter} {outtype}",
        )
    _mib_axis(axes)
    axes.set_ylim(16, max(256, 2 * max(peak / MIB for of_model in peaks.values() for peak in of_model.values())))
    axes.set_xscale("log")
    models = sorted({model for of_model in peaks.values() for model in of_model}, key=lambda name: SHAPES[name].nbytes)
    axes.set_xticks([SHAPES[model].nbytes / 1e9 for model in models], models)
    axes.minorticks_off()
    axes.set(title="Peak resident memory against the size of the checkpoint")
    return True


def _wall_against_cp(axes: Any, samples: Sequence[Sample]) -> bool:
    warm = [sample for sample in samples if (sample.case, sample.cache) == (convert.NAME, "warm")]
    if not warm:
        return False
    model = _largest(warm)
    outtypes = list(dict.fromkeys(sample.outtype for sample in warm if sample.model == model))
    against_cp = _ratios_of([sample for sample in warm if sample.model == model], outtypes)
    if not against_cp:
        return False
    width = 0.8 / len(against_cp)
    for index, (name, each) in enumerate(against_cp.items()):
        medians = [statistics.median(values) for values in each.values()]
        below = [median - min(values) for median, values in zip(medians, each.values(), strict=True)]
        above = [max(values) - median for median, values in zip(medians, each.values(), strict=True)]
        places = [outtypes.index(outtype) + (index - (len(against_cp) - 1) / 2) * width for outtype in each]
        axes.errorbar(places, medians, yerr=(below, above), fmt="o", color=COLOURS[name], label=name, capsize=3)
        for place, median in zip(places, medians, strict=True):
            axes.annotate(f"{median:.2f}", (place, median), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axhline(1, color=COLOURS[CP.name], linewidth=1, linestyle="--", label="cp + sync")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(outtypes)), outtypes)
    axes.set_xlim(-0.6, len(outtypes) - 0.4)
    axes.set(title=f"Wall time against cp + sync, {model}, warm source", ylabel="times cp")
    return True


def _ratios_of(samples: Sequence[Sample], outtypes: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Converter -> outtype -> its ratios to cp, where it has any."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in COLOURS:
        for outtype in outtypes:
            values = ratios([sample for sample in samples if sample.outtype == outtype], name, CP.name)
            if values and name != CP.name:
                found.setdefault(name, {})[outtype] = values
    return found
