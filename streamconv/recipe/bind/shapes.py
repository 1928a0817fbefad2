"""The dims of a checkpoint, from its config and from the shapes of its tensors, which must agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from streamconv.checkpoint.config import Config
from streamconv.errors import SourceError
from streamconv.recipe.bind.sources import Sources
from streamconv.recipe.dims import (
    MAX_LAYERS,
    Equation,
    extents,
    parse_extent,
    parse_shape,
    solve_dims,
    stated_dims,
)
from streamconv.recipe.language import Model, Output
from streamconv.recipe.mismatch import Problem
from streamconv.recipe.names import NONE, has_experts, stack_of
from streamconv.recipe.operation import first_fault
from streamconv.recipe.words import Tensor


def find_dims(recipe: Output, config: Config, sources: Sources) -> tuple[dict[str, int], list[Problem]]:
    """Determine the dims; the numbers of layers and experts are counted if the config does not give them.

    Returns:
        The dims, and a problem for each one that cannot be determined.

    Raises:
        SourceError: The number of layers is too small, or larger than MAX_LAYERS (`layer-count`).
    """
    counted = stated_dims(recipe, config)
    for stack, count in recipe.stacks.items():
        if count not in recipe.dims:
            continue
        layers = (max(by) for template, by in sources.found.items() if by and stack_of(template) == stack)
        counted.setdefault(count, 1 + max(layers, default=NONE))
        if not recipe.dims[count].minimum <= counted[count] <= MAX_LAYERS:
            raise SourceError(
                f"{counted[count]} is not a valid number of layers", file=config.file.parent, code="layer-count"
            )
    experts = (e for by_layer in sources.found.values() for by_expert in by_layer.values() for e in by_expert)
    if n_experts := 1 + max(experts, default=NONE):
        counted.setdefault("E", n_experts)
    dims = solve_dims(recipe, counted, _equations(sources))
    return dims, [
        Problem("dim-unknown", f"{dim.label} is not in config.json and does not follow from the tensors")
        for name, dim in recipe.dims.items()
        if name not in dims
    ]


def _equations(sources: Sources) -> Iterator[Equation]:
    for template in sources.found:
        shapes = dict.fromkeys(sources.stored[name].shape for name in sources.names(template))
        for row in sources.rows[template]:
            extents_ = parse_shape(row.shape)
            for shape in shapes:
                if len(shape) == len(extents_):
                    yield from map(Equation, extents_, shape)


class Misfit(NamedTuple):
    """A mismatch between a row and its sources.

    Attributes:
        problem: The problem to report.
        sizes: The dims for which the config and the shape differ, such as "hidden_size=64, the tensors 96".
    """

    problem: Problem
    sizes: tuple[str, ...] = ()


def check_shapes(model: Model, sources: Sources) -> list[Misfit]:
    """Check all tensors of each template against its rows, and return the first mismatch for each template."""
    stated = stated_dims(model.recipe, model.config)
    misfits = []
    for template in sources.found:
        named = {name: sources.stored[name].shape for name in sources.names(template)}
        of_rows = (_misfit(model, row, named, stated) for row in sources.rows[template])
        if (first := next(filter(None, of_rows), None)) is not None:
            misfits.append(first)
    return misfits


def _misfit(
    model: Model, row: Tensor, shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, int]
) -> Misfit | None:
    """Return the mismatch between a row and its sources, whose `shapes` are by name, or None."""
    expected = extents(row.shape, model.dims)
    if expected is None:
        return None
    wrong = [name for name, shape in shapes.items() if shape != expected]
    if wrong:
        shape = shapes[wrong[0]]
        used = dict.fromkeys(name for one in parse_shape(row.shape) for name in one.names if name in stated)
        origin = ", ".join(f"{model.recipe.dims[name].label}={stated[name]}" for name in used)
        what = (
            f"{wrong[0]} has shape {list(shape)}, expected {list(expected)}"
            + (f" from {origin}" if origin else "")
            + (f" (and {len(wrong) - 1} more like this)" if len(wrong) > 1 else "")
        )
        return Misfit(Problem("shape-mismatch", what), tuple(_contradicted(model.recipe, row, shape, stated)))
    if (fault := _op_fault(model, row, expected, len(shapes))) is not None:
        return Misfit(Problem("op-shape", f"{next(iter(shapes))} {fault}"))
    return None


def _contradicted(recipe: Output, row: Tensor, shape: tuple[int, ...], stated: Mapping[str, int]) -> Iterator[str]:
    """Yield the dims of a row for which the config and a tensor of this shape differ."""
    extents_ = parse_shape(row.shape)
    if len(shape) == len(extents_):
        for extent, found in zip(extents_, shape, strict=True):
            if stated.get(extent.text, found) != found:
                yield f"{recipe.dims[extent.text].label}={stated[extent.text]}, the tensors {found}"


def _op_fault(model: Model, row: Tensor, shape: tuple[int, ...], n_names: int) -> str | None:
    """Return why the row's operations cannot be applied to sources of `shape`; None if they can or a dim is unknown."""
    if any(name not in model.dims for op in row.ops for text in op.dims() for name in parse_extent(text).names):
        return None
    stacked = (min(model.dims.get("E", 1), n_names), *shape) if has_experts(row.source) else shape
    return first_fault(row.ops, stacked, model)
