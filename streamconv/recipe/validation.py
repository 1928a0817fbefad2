"""Find errors in a recipe when it is loaded, independently of any checkpoint."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from streamconv.gguf.format import MAX_NAME_NBYTES
from streamconv.recipe.dims import parse_extent
from streamconv.recipe.names import MAIN_STACK, fill, has_experts, stack_of, template_fault
from streamconv.recipe.operation import N_EXPERTS, Op
from streamconv.recipe.words import Computed, Key, PerLayer, Tensor

if TYPE_CHECKING:
    from streamconv.recipe.language import Output, Recipe

MAX_EXTENTS = 4  # GGML_MAX_DIMS


def faults(recipe: Output) -> Iterator[str]:
    """Yield every error in one output: undefined dims, axes, kinds and flags, invalid names, repetitions."""
    if not recipe.arch or not recipe.role:
        yield "it has no arch, or no role"
    if recipe.head and (missing := {"L", "V"} - recipe.dims.keys()):
        yield f"no dim {' and '.join(sorted(missing))}"
    sources = {source for row in recipe.tensors for source in row.sources}
    used = set(map(stack_of, sources))
    for stack, dim_name in recipe.stacks.items():
        if dim_name not in recipe.dims and (stack != MAIN_STACK or stack in used):
            yield f"stack {stack!r}: there is no dim {dim_name}"
    for name, dim in recipe.dims.items():
        if not dim.config:
            yield f"dim {name} has no key of the config"
        if isinstance(dim.default, str):
            yield from _extent_faults(recipe, [dim.default], f"the default of dim {name}")
            if dim.default == name:
                yield f"the default of dim {name} is the dim itself"
    for key in recipe.keys:
        yield from _key_faults(recipe, key)
    for claim in recipe.claims:
        if claim.axis not in recipe.axes:
            yield f"{claim.key}: there is no axis {claim.axis!r}"
    for axis in recipe.axes:
        yield from (f"axis {axis}: {fault}" for fault in _axis_faults(recipe, axis))
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
    yield from _repetitions(recipe)
    yield from _idle_words(recipe)
    for drop in recipe.drops:
        if fault := template_fault(drop.source):
            yield f"{drop.source}: {fault}"
        if drop.beyond and not (drop.is_open and stack_of(drop.source) is not None):
            yield f"{drop.source}: beyond= is for names of layers that end in *"


def _repetitions(recipe: Output) -> Iterator[str]:
    """Yield entries that are given twice, of which only one would have an effect."""
    sources = {source for row in recipe.tensors for source in row.sources}
    aliases = Counter(alias.source for alias in recipe.aliases)
    drops = Counter(drop.source for drop in recipe.drops)
    keys = Counter(key.name for key in recipe.keys if isinstance(key.value, str))
    for what, names in (("an alias", aliases), ("dropped", drops), ("a key", keys)):
        yield from (f"{name}: {what} {n} times" for name, n in names.items() if n > 1)
    yield from (f"{name} is a row and a drop" for name in drops if name in sources)
    same = {alias.source for alias in recipe.aliases if alias.shape is None} & sources
    yield from (f"{name} is a row and an alias" for name in sorted(same))


def _idle_words(recipe: Output) -> Iterator[str]:
    """Yield flags, stacks and prefixes that no row uses."""
    sources = [source for row in recipe.tensors for source in row.sources]
    flags = {row.required for row in recipe.tensors if isinstance(row.required, str)}
    yield from (f"no row names the flag {flag!r}" for flag in recipe.flags if flag not in flags)
    stacks = {stack_of(source) for source in sources}
    yield from (f"no row counts the layers of {one!r}" for one in recipe.stacks if one not in {MAIN_STACK, *stacks})
    for prefix, beginning in recipe.prefixes.items():
        if prefix == beginning:
            yield f"prefix {prefix!r} becomes itself"
        elif not any(source.startswith(beginning) for source in sources):
            yield f"prefix {prefix!r}: no row begins with {beginning!r}"


def faults_of_all(recipe: Recipe) -> Iterator[str]:
    """Yield errors in the combination of a recipe's outputs, and in its `unrunnable` patterns."""
    outputs = (recipe, *recipe.outputs)
    roles = Counter([*(output.role for output in outputs), *recipe.folders])
    yield from (f"{n} outputs are {role}" for role, n in roles.items() if n > 1)  # the role is part of the file name
    sources = Counter(source for output in outputs for source in {one for row in output.tensors for one in row.sources})
    yield from (f"{source} is of {n} outputs" for source, n in sources.items() if n > 1)
    for pattern in recipe.unrunnable:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"unrunnable {pattern!r}: {error}"


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
    if not key.name:
        yield "a key without a name"
    if key.value is None and key.default is None:
        yield f"{key.name}: is not written, and has no default"
    if isinstance(key.value, str):
        yield from _extent_faults(recipe, [key.value], key.name)
    elif isinstance(key.value, PerLayer):
        axis, by_kind = key.value.axis, key.value.by_kind
        if set(recipe.axes.get(axis, ())) != set(by_kind):
            yield f"{key.name}: {', '.join(by_kind)} are not the kinds of an axis {axis!r}"
        yield from _extent_faults(recipe, [value for value in by_kind.values() if isinstance(value, str)], key.name)
    elif key.value is not None and not callable(key.value):
        yield f"{key.name}: {key.value!r} is neither an extent nor a rule"


def _row_faults(recipe: Output, row: Tensor) -> Iterator[str]:
    if fault := template_fault(row.source):
        yield fault
    if stack_of(row.source) != stack_of(row.target):
        yield f"its target {row.target} counts other layers"
    yield from _also_faults(row)
    if (stack := stack_of(row.source)) is not None and stack not in recipe.stacks:
        yield f"there is no stack {stack!r}"
    if has_experts(row.source) and "E" not in recipe.dims:
        yield "no dim E, which counts the experts"
    if isinstance(row.required, str) and row.required not in recipe.flags:
        yield f"required={row.required!r}, but there is no such flag"
    if not row.shape.split():
        yield "it has no shape"
    yield from _extent_faults(recipe, row.shape.split(), f"shape {row.shape!r}")
    if row.or_f16 and not row.f32:
        yield "or_f16 is for tensors that stay F32"
    if row.unless and row.unless not in {other.source for other in recipe.tensors}:
        yield f"unless={row.unless!r}, and no row has that source"
    yield from _ops_faults(recipe, row)
    yield from _target_faults(recipe, row)


def _also_faults(row: Tensor) -> Iterator[str]:
    for source in row.also:
        if fault := template_fault(source):
            yield f"{source}: {fault}"
        if stack_of(source) != stack_of(row.source):
            yield f"{source} counts other layers"
        if has_experts(source) or has_experts(row.source):
            yield f"{source}: experts are stacked, and have no other sources"


def _ops_faults(recipe: Output, row: Tensor) -> Iterator[str]:
    if not isinstance(row.ops, tuple):
        yield f"ops={row.ops!r} is not a tuple: write ({row.ops!r},)"
        return
    shape = (*(N_EXPERTS,) * has_experts(row.source), *row.shape.split())
    if row.also and not row.ops:
        yield "also= and no operation that takes several sources"
    for number, op in enumerate(row.ops):
        if not isinstance(op, Op):
            yield f"{op!r} is not an operation"
            return
        name = type(op).__name__
        if op.n_sources != (n := len(row.sources) if number == 0 else 1):
            yield f"{name} takes {op.n_sources}, and has {n} source{'s' if n > 1 else ''} here"
            return
        if faults := list(_extent_faults(recipe, op.dims(), name)):
            yield from faults
            return
        try:
            shape = op.extents(shape)
        except ValueError as error:
            yield f"{name}: {error}"
            return
    if len(shape) > MAX_EXTENTS:
        yield f"it has {len(shape)} extents, and GGUF {MAX_EXTENTS}"


def _target_faults(recipe: Output, row: Tensor | Computed) -> Iterator[str]:
    if fault := template_fault(row.target):
        yield fault
    if len(fill(row.target, i=0).encode()) > MAX_NAME_NBYTES:
        yield f"its target is longer than the {MAX_NAME_NBYTES} bytes of a name in GGUF"
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
        if not names and (parse_extent(text).value({}) or 0) < 1:
            yield f"{where}: {text} is not a size"
        if unknown := [name for name in names if name not in recipe.dims]:
            yield f"{where}: there is no dim {', '.join(unknown)}"
