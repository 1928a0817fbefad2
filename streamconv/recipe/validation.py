"""What is wrong with a recipe by itself, found when it is loaded: before any checkpoint, and whichever is converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from streamconv.recipe.dims import parse_extent
from streamconv.recipe.names import MAIN_STACK, has_experts, stack_of, template_fault
from streamconv.recipe.operation import N_EXPERTS, Op
from streamconv.recipe.words import Computed, Key, PerLayer, Tensor

if TYPE_CHECKING:
    from streamconv.recipe.language import Output


def faults(recipe: Output) -> Iterator[str]:
    """Every word of a recipe that means nothing: letters, axes, kinds, placeholders."""
    if recipe.head and (missing := {"L", "V"} - recipe.dims.keys()):
        yield f"no dim {' and '.join(sorted(missing))}"
    used = {stack_of(row.source) for row in recipe.tensors}
    for stack, dim_name in recipe.stacks.items():
        if dim_name not in recipe.dims and (stack != MAIN_STACK or stack in used):
            yield f"stack {stack!r}: there is no dim {dim_name}"
    for name, dim in recipe.dims.items():
        if isinstance(dim.default, str):
            yield from _extent_faults(recipe, [dim.default], f"the default of dim {name}")
    for key in recipe.keys:
        yield from _key_faults(recipe, key)
    for claim in recipe.claims:
        if claim.axis not in recipe.axes:
            yield f"{claim.key}: there is no axis {claim.axis!r}"
    for axis in recipe.axes:
        yield from (f"axis {axis}: {fault}" for fault in _axis_faults(recipe, axis))
    sources = {row.source for row in recipe.tensors}
    for alias in recipe.aliases:
        if alias.name not in sources:
            yield f"{alias.source}: no row has the name {alias.name}"
    for (source, target, only), n in Counter((row.source, row.target, row.only) for row in recipe.tensors).items():
        if n > 1:
            yield f"{source}: {n} rows make {target} from it" + (f" for {only}" if only else "")
    for row in recipe.tensors:
        yield from (f"{row.source}: {fault}" for fault in _row_faults(recipe, row))
    for computed in recipe.computed:
        yield from (f"{computed.target}: {fault}" for fault in _target_faults(recipe, computed))
    for drop in recipe.drops:
        if fault := template_fault(drop.source):
            yield f"{drop.source}: {fault}"
        if drop.beyond and not (drop.is_open and stack_of(drop.source) is not None):
            yield f"{drop.source}: beyond= is for names of layers that end in *"


def _axis_faults(recipe: Output, axis: str) -> Iterator[str]:
    targets = {
        row.target for rows in (recipe.tensors, recipe.computed) for row in rows if row.only.startswith(f"{axis}=")
    }
    if len({stack_of(target) for target in targets}) > 1:
        yield "its rows belong to several stacks"
    for kind in recipe.axes[axis]:
        if all(row.only != f"{axis}={kind}" for row in recipe.tensors):
            yield f"no tensor occurs only in {kind}, so such a layer cannot be recognised"


def _key_faults(recipe: Output, key: Key) -> Iterator[str]:
    if "{" in key.name.replace("{arch}", ""):
        yield f"{key.name}: has braces that are not {{arch}}"
    if isinstance(key.value, str):
        yield from _extent_faults(recipe, [key.value], key.name)
    elif isinstance(key.value, PerLayer):
        axis, by_kind = key.value.axis, key.value.by_kind
        if set(recipe.axes.get(axis, ())) != set(by_kind):
            yield f"{key.name}: {', '.join(by_kind)} are not the kinds of an axis {axis!r}"
        yield from _extent_faults(recipe, [value for value in by_kind.values() if isinstance(value, str)], key.name)


def _row_faults(recipe: Output, row: Tensor) -> Iterator[str]:
    if fault := template_fault(row.source):
        yield fault
    if stack_of(row.source) != stack_of(row.target):
        yield f"its target {row.target} counts other layers"
    if (stack := stack_of(row.source)) is not None and stack not in recipe.stacks:
        yield f"there is no stack {stack!r}"
    if has_experts(row.source) and "E" not in recipe.dims:
        yield "no dim E, which counts the experts"
    if isinstance(row.required, str) and row.required not in recipe.flags:
        yield f"required={row.required!r}, but there is no such flag"
    if not row.shape.split():
        yield "it has no shape"
    yield from _extent_faults(recipe, row.shape.split(), f"shape {row.shape!r}")
    yield from _ops_faults(recipe, row)
    yield from _target_faults(recipe, row)


def _ops_faults(recipe: Output, row: Tensor) -> Iterator[str]:
    if not isinstance(row.ops, tuple):
        yield f"ops={row.ops!r} is not a tuple: write ({row.ops!r},)"
        return
    shape = (*(N_EXPERTS,) * has_experts(row.source), *row.shape.split())
    for op in row.ops:
        if not isinstance(op, Op):
            yield f"{op!r} is not an operation"
            return
        name = type(op).__name__
        if faults := list(_extent_faults(recipe, op.dims(), name)):
            yield from faults
            return
        try:
            shape = op.extents(shape)
        except ValueError as error:
            yield f"{name}: {error}"
            return


def _target_faults(recipe: Output, row: Tensor | Computed) -> Iterator[str]:
    if fault := template_fault(row.target):
        yield fault
    if has_experts(row.target):
        yield f"its target {row.target} counts experts, which are stacked"
    if row.only:
        axis, equals, kind = row.only.partition("=")
        if not equals or axis not in recipe.axes:
            yield f"only={row.only!r}, but there is no axis {axis!r}"
        elif kind not in recipe.axes[axis]:
            yield f"only={row.only!r}, but the kinds of {axis} are {', '.join(recipe.axes[axis])}"
        if stack_of(row.target) is None:
            yield f"only={row.only!r}, but it has no layers"


def _extent_faults(recipe: Output, texts: Iterable[str], where: str) -> Iterator[str]:
    for text in texts:
        try:
            names = parse_extent(text).names
        except ValueError as error:
            yield f"{where}: {error}"
            continue
        if unknown := [name for name in names if name not in recipe.dims]:
            yield f"{where}: there is no dim {', '.join(unknown)}"
