"""Plot a file's errors: one point per tensor, by layer, and a line for each kind of tensor.

Uses matplotlib (the `plot` extra) without pyplot, which would keep state and look for a display.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from importlib.util import find_spec
from typing import Any, Final

from streamconv.budget import MIB
from streamconv.errors import UsageError
from streamconv.report import RelativeErrors, TensorRelativeError

# What matplotlib and a figure add to the resident set. Measured: 38 MiB, of 90 tensors as of 5,000.
PICTURE_NBYTES: Final = 64 * MIB

_LAYER: Final = re.compile(r"(?:^|\.)blk\.(\d+)\.(.*)")
_MARKERS: Final = "os^Dv<>pP*Xh"
_NO_LAYER: Final = -1.5  # position of tensors outside of layers


def require_matplotlib() -> None:
    """Raise UsageError if the `plot` extra is missing."""
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs the plot extra", hint='pip install ".[plot]"', code="extra-missing")


def draw_errors(errors: RelativeErrors, title: str) -> bytes:
    """Return the picture as PNG. Tensors without an error are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [one for one in errors.tensors if one.relative_rms]
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    _draw(axes, shown)
    total = "not finite" if errors.relative_rms is None else f"{errors.relative_rms:.3g}"
    axes.set_title(f"{title}: relative RMS error {total}, {errors.bits_per_weight:.2f} bits per weight", fontsize=10)
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _draw(axes: Any, shown: list[TensorRelativeError]) -> None:
    by_kind: dict[str, list[tuple[float, TensorRelativeError]]] = defaultdict(list)
    for one in shown:
        layer = _LAYER.search(one.name)
        place, kind = (float(layer[1]), layer[2]) if layer else (_NO_LAYER, one.name)
        by_kind[kind.removesuffix(".weight")].append((place, one))
    markers = dict(zip(sorted({one.type for one in shown}), _MARKERS * 4, strict=False))
    for number, (kind, points) in enumerate(sorted(by_kind.items())):
        points.sort(key=lambda point: point[0])
        colour = f"C{number % 10}"
        heights = [one.relative_rms for _, one in points]
        axes.plot([place for place, _ in points], heights, color=colour, linewidth=0.8, alpha=0.6)
        axes.plot([], [], color=colour, linewidth=3, label=kind)
        for type_ in sorted({one.type for _, one in points}):  # few lines, since each takes 10 KiB
            of_type = [(place, one.relative_rms) for place, one in points if one.type == type_]
            axes.plot(*zip(*of_type, strict=True), color=colour, marker=markers[type_], markersize=5, linestyle="")
    for type_, marker in markers.items():
        axes.plot([], [], color="#555555", marker=marker, linestyle="", label=type_)
    axes.set_xlabel(f"layer (at {_NO_LAYER:g}: tensors outside of layers)")
    axes.set_ylabel("relative RMS error")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if shown:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
