"""What an architecture is: a table of tensors with shapes, a table of keys; and the binding of both to a checkpoint.

Owns: the vocabulary recipes are written in, finding the recipe of a config, and `bind`, which accounts for every source
tensor or lists every disagreement at once. Does not own: any one architecture (recipes/), output types, dialects.
Invariants: a source tensor that no row names is an error, and so is a row that matches nothing, a shape that disagrees,
a gap in {i} or {e}. A value that the config states explicitly must agree with the tensors; one that is absent or null
yields to them.

Shapes are written in dims, row-major: "A*D H" is [heads * head size, hidden]. A dim that the config does not state is
solved from the shapes that mention it.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from streamconv import graph
from streamconv.errors import Caution, SourceError
from streamconv.gguf_format import KeyValue, PackedArray, Scalar

U32, I32, F32, BOOL, STRING = (
    GGUFValueType.UINT32,
    GGUFValueType.INT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.BOOL,
    GGUFValueType.STRING,
)

MAX_LAYERS = 10_000  # no checkpoint has more; bounds what a hostile config can make us list
MAX_PROBLEMS_SHOWN = 12


# ---------------------------------------------------------------- what recipes are written in


class Config:
    """A config.json with typed access: None where a key is absent or null, SourceError where it holds nonsense."""

    def __init__(self, raw: Mapping[str, Any], file: Path) -> None:
        self.raw, self.file = raw, file

    def integer(self, key: str, minimum: int = 1) -> int | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if type(value) is not int or not minimum <= value < 1 << 31:
            raise self.wrong(key, f"a whole number of at least {minimum}")
        return value

    def number(self, key: str) -> float | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(key, "a finite number")
        return float(value)

    def flag(self, key: str) -> bool | None:
        value = self.raw.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.wrong(key, "true or false")

    def text(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.wrong(key, "a string")

    def list_of(self, key: str, kind: type) -> list[Any] | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.wrong(key, f"a list of {kind.__name__}")
        return value

    def section(self, key: str) -> Config | None:
        """The object under `key`."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Config(value, self.file)

    def wrong(self, key: str, expected: str) -> SourceError:
        shown = repr(self.raw.get(key))
        return SourceError(f"{key} is {shown[:60]}, expected {expected}", file=self.file, hint="correct the config")


@dataclass(frozen=True, slots=True)
class Dim:
    """Where a dim's value comes from: a config key (or a rule over the config), else the shapes, else `default`."""

    config: str | Callable[[Config], int | None]
    default: Callable[[Mapping[str, int]], int | None] | int | None = None

    def stated(self, config: Config) -> int | None:
        return config.integer(self.config) if isinstance(self.config, str) else self.config(config)

    @property
    def label(self) -> str:
        return self.config if isinstance(self.config, str) else (self.config.__doc__ or self.config.__name__)


@dataclass(frozen=True, slots=True)
class PairHalves:
    """Row operation of Q and K: each of `heads` (a dim) heads from half-split to interleaved RoPE."""

    heads: str


@dataclass(frozen=True, slots=True)
class Part:
    """Of a fused source: block `index` of `count` equal blocks of rows in each expert."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A row of the table: source name, target name, shape of the source. {i} is the layer, {e} the expert.

    `only` ("axis=kind") limits the row to the layers of that kind. Rows with the same target are alternatives. Ones in
    a shape are squeezed out. `scale` multiplies every element by a factor that the model's config asks for.
    """

    source: str
    target: str
    shape: str
    rows: PairHalves | None = None
    part: Part | None = None
    only: str = ""
    required: bool = True
    scale: Callable[[Model], float] | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """A target that no source holds: made from the config, for each layer (or once). None: the model has none.

    Where a row of the table gives the same target, that comes first.
    """

    target: str
    value: Callable[[Model], NDArray[np.float32] | None]
    only: str = ""


@dataclass(frozen=True, slots=True)
class Drop:
    """A source that is known, and not needed."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Key:
    """One metadata key. `value`: a dim's name, or a rule; None means that the key is not written."""

    name: str
    value: str | Callable[[Model], Scalar | Sequence[int] | None]
    type: GGUFValueType = U32


@dataclass(frozen=True, slots=True)
class PerLayer:
    """A Key's value: a number for each layer, by its kind on `axis`; a dim's name or a number for each kind."""

    axis: str
    by_kind: Mapping[str, str | int]

    def __call__(self, model: Model) -> list[int]:
        values = {kind: model.dims[v] if isinstance(v, str) else v for kind, v in self.by_kind.items()}
        return [values[kind] for kind in model.kinds[self.axis]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """An architecture: its names, dims, tensors and keys. `claims` reads what the config says of each layer's kind."""

    arch: str
    hf_names: tuple[str, ...]
    dims: Mapping[str, Dim]
    tensors: tuple[Tensor, ...]
    keys: tuple[Key, ...]
    computed: tuple[Computed, ...] = ()
    drops: tuple[Drop, ...] = ()
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    claims: Callable[[Config, int], Mapping[str, Sequence[str] | None]] = lambda config, n_layers: {}
    refuse: Callable[[Config], Iterable[str]] = lambda config: ()
    tie_keys: tuple[str, ...] = ("tie_word_embeddings",)
    tied_by_default: bool = False
    head: str = "lm_head.weight"
    default_pre: str | None = None
    description: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the output, before its type is chosen: its logical name and how its rows are made."""

    name: str
    tensor: graph.LazyTensor
    row: Tensor | Computed


@dataclass(slots=True)
class Model:
    """A recipe bound to a config: every dim known, every layer of one kind on each axis."""

    recipe: Recipe
    config: Config
    dims: dict[str, int]
    kinds: dict[str, list[str]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    cautions: list[Caution] = field(default_factory=list)

    @property
    def n_layers(self) -> int:
        return self.dims["L"]

    def layers(self, only: str) -> list[int]:
        """The layers that a row with this `only` applies to."""
        if not only:
            return list(range(self.n_layers))
        axis, kind = only.split("=")
        return [i for i, found in enumerate(self.kinds[axis]) if found == kind]

    def keys(self) -> list[KeyValue]:
        """The architecture's own keys, in the recipe's order."""
        result = []
        for key in self.recipe.keys:
            value = self.dims[key.value] if isinstance(key.value, str) else key.value(self)
            name = key.name.format(arch=self.recipe.arch)
            if value is None:
                continue
            if isinstance(value, str | int | float):
                result.append(KeyValue(name, key.type, value))
            else:
                result.append(KeyValue.array(name, PackedArray.of_numbers(key.type, value)))
        return result


# ---------------------------------------------------------------- finding a recipe


@cache
def all_recipes() -> tuple[Recipe, ...]:
    """Every file of recipes/, by name."""
    package = importlib.import_module("streamconv.recipes")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(importlib.import_module(f"streamconv.recipes.{name}").RECIPE for name in names)


def find_recipe(config: Config) -> Recipe:
    """The recipe for a config.json; SourceError, saying what is supported, where there is none."""
    quantization = config.raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise SourceError(
            f"the checkpoint is quantised ({method})", file=config.file, hint="convert the original 16-bit checkpoint"
        )
    names = config.list_of("architectures", str) or []
    for recipe in all_recipes():
        if any(name in recipe.hf_names for name in names) or (
            not names and config.raw.get("model_type") == recipe.arch
        ):
            return recipe
    supported = ", ".join(name for recipe in all_recipes() for name in recipe.hf_names)
    wrapped = [key for key in ("text_config", "vision_config", "audio_config") if key in config.raw]
    what = f"{', '.join(names) or 'a model without a name'} is not supported"
    if wrapped:
        what += f" (a wrapper with {', '.join(wrapped)}: convert the text model's own checkpoint)"
    raise SourceError(what, file=config.file, hint=f"supported: {supported}")


def recipe_of(arch: str) -> Recipe | None:
    """The recipe of a GGUF architecture name."""
    return next((recipe for recipe in all_recipes() if recipe.arch == arch), None)


# ---------------------------------------------------------------- dims


@dataclass(frozen=True, slots=True)
class _Equation:
    """An extent found on disk: the product of `factors` is `extent`."""

    factors: tuple[str, ...]
    extent: int

    def product(self, dims: Mapping[str, int]) -> int | None:
        values = [int(factor) if factor.isdigit() else dims.get(factor) for factor in self.factors]
        return None if None in values else math.prod(v for v in values if v is not None)

    def solve(self, dims: dict[str, int]) -> bool:
        """Fill in the one unknown dim, where there is just one and it comes out whole."""
        unknown = [factor for factor in self.factors if not factor.isdigit() and factor not in dims]
        if len(unknown) != 1:
            return False
        rest = math.prod(int(f) if f.isdigit() else dims[f] for f in self.factors if f != unknown[0])
        if self.extent == 0 or rest == 0 or self.extent % rest:
            return False
        dims[unknown[0]] = self.extent // rest
        return True


@cache
def parse_shape(shape: str) -> tuple[tuple[str, ...], ...]:
    """ "A*D H" as (("A", "D"), ("H",))."""
    return tuple(tuple(extent.split("*")) for extent in shape.split())


def solve_dims(recipe: Recipe, stated: Mapping[str, int], equations: Iterable[_Equation] = ()) -> dict[str, int]:
    """Every dim that follows: those stated, then those the shapes settle, then the defaults."""
    dims = dict(stated)
    pending = list(dict.fromkeys(equations))
    while solved := [equation for equation in pending if equation.solve(dims)]:
        pending = [equation for equation in pending if equation not in solved]
    for name, dim in recipe.dims.items():
        if name not in dims:
            value = dim.default(dims) if callable(dim.default) else dim.default
            if value is not None:
                dims[name] = value
    return dims


def stated_dims(recipe: Recipe, config: Config) -> dict[str, int]:
    """The dims that the config states explicitly."""
    return {name: value for name, dim in recipe.dims.items() if (value := dim.stated(config)) is not None}


# ---------------------------------------------------------------- binding


class Stored(Protocol):
    """What bind needs to know of a tensor on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def lazy(self) -> graph.LazyTensor: ...


_NUMBER = re.compile(r"(?<=\.)(0|[1-9]\d{0,5})(?=\.)")


def match_name(name: str) -> tuple[str, tuple[int, ...]]:
    """A tensor's name as template and numbers: layers.3.experts.7.w1 as layers.{i}.experts.{e}.w1 and (3, 7)."""
    numbers: list[int] = []

    def placeholder(match: re.Match[str]) -> str:
        numbers.append(int(match[0]))
        return ("{i}", "{e}", "{?}")[min(len(numbers) - 1, 2)]

    return _NUMBER.sub(placeholder, name), tuple(numbers)


class _Binding:
    """One run of `bind`; exists to collect problems."""

    def __init__(self, recipe: Recipe, config: Config, stored: Mapping[str, Stored]) -> None:
        self.recipe, self.config, self.stored = recipe, config, stored
        self.problems: list[str] = []
        self.found: dict[str, dict[tuple[int, ...], str]] = defaultdict(dict)  # template -> numbers -> source name

    @cached_property
    def rows_of(self) -> Mapping[str, list[Tensor]]:
        rows = defaultdict(list)
        for row in self.recipe.tensors:
            rows[row.source].append(row)
        return rows

    def bind(self) -> Model:
        self._match_names()
        model = Model(self.recipe, self.config, self._solve())
        if not self.problems:
            self._settle_kinds(model)
        if not self.problems:
            for target in self._targets(model):
                model.targets.append(target)
            self._check_head(model)
        self.problems += [f"config.json: {problem}" for problem in self.recipe.refuse(self.config)]
        if self.problems:
            raise self._error()
        return model

    def _match_names(self) -> None:
        drops = {drop.source for drop in self.recipe.drops}
        unknown = []
        for name in self.stored:
            template, numbers = match_name(name)
            if template in self.rows_of:
                self.found[template][numbers] = name
            elif template not in drops:
                unknown.append(name)
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            self.problems.append(f"unknown tensors: {', '.join(unknown[:3])}{more}")

    def _solve(self) -> dict[str, int]:
        """All dims, layers counted; what config and shapes disagree on is a problem."""
        stated = stated_dims(self.recipe, self.config)
        layers = {numbers[0] for template, by in self.found.items() if "{i}" in template for numbers in by}
        experts = {numbers[1] for template, by in self.found.items() if "{e}" in template for numbers in by}
        counted = dict(stated)
        counted.setdefault("L", max(layers, default=-1) + 1)
        if experts:
            counted.setdefault("E", max(experts) + 1)
        if counted["L"] > MAX_LAYERS:
            raise SourceError(f"{counted['L']} layers are more than any model has", file=self.config.file)
        beyond = sorted(i for i in layers if i >= counted["L"])
        if beyond:
            self.problems.append(f"num_hidden_layers is {counted['L']} and there are tensors of layer {beyond[-1]}")
        equations = []
        for template, by_numbers in self.found.items():
            for row in self.rows_of[template]:
                extents = parse_shape(row.shape)
                for shape in {self.stored[name].shape for name in by_numbers.values()}:
                    if len(shape) == len(extents):
                        equations += [_Equation(f, n) for f, n in zip(extents, shape, strict=True)]
        dims = solve_dims(self.recipe, counted, equations)
        for name, dim in self.recipe.dims.items():
            if name not in dims and any(name in e.factors for e in equations):
                self.problems.append(f"{dim.label} is not in config.json and does not follow from the tensors")
        self._check_shapes(dims, stated)
        return dims

    def _check_shapes(self, dims: Mapping[str, int], stated: Mapping[str, int]) -> None:
        for template, by_numbers in self.found.items():
            for row in self.rows_of[template]:
                expected = tuple(_Equation(factors, 0).product(dims) for factors in parse_shape(row.shape))
                wrong = [name for name in by_numbers.values() if self.stored[name].shape != expected]
                if wrong and None not in expected:
                    used = sorted({f for factors in parse_shape(row.shape) for f in factors if f in stated})
                    origin = ", ".join(f"{self.recipe.dims[f].label}={dims[f]}" for f in used)
                    also = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
                    self.problems.append(
                        f"{wrong[0]} has shape {list(self.stored[wrong[0]].shape)}, expected {list(expected)}"
                        + (f" from {origin}" if origin else "")
                        + also
                    )
                    break

    def _settle_kinds(self, model: Model) -> None:
        """Each layer's kind on each axis, by the tensors it has; checked against what the config claims."""
        claims = self.recipe.claims(self.config, model.n_layers)
        for axis, kinds in self.recipe.axes.items():
            evidence: dict[str, set[int]] = {kind: set() for kind in kinds}
            for row in self.recipe.tensors:
                if row.only.startswith(f"{axis}="):
                    evidence[row.only.partition("=")[2]].update(n[0] for n in self.found.get(row.source, ()))
            settled = []
            for i in range(model.n_layers):
                present = [kind for kind in kinds if i in evidence[kind]]
                if len(present) != 1:
                    what = (
                        f"tensors of both {' and '.join(present)}" if present else f"no tensors of {' or '.join(kinds)}"
                    )
                    self.problems.append(f"layer {i} has {what}")
                settled.append(present[0] if present else kinds[0])
            claimed = claims.get(axis)
            if claimed is not None and list(claimed) != settled and not self.problems:
                differ = [i for i, kind in enumerate(settled) if i >= len(claimed) or claimed[i] != kind]
                self.problems.append(
                    f"config.json claims another {axis} for layer{'s' if len(differ) > 1 else ''} "
                    f"{', '.join(map(str, differ[:8]))} than the tensors show"
                    + (
                        f" (it lists {len(claimed)} of {model.n_layers} layers)"
                        if len(claimed) != model.n_layers
                        else ""
                    )
                )
            model.kinds[axis] = settled

    def _targets(self, model: Model) -> Iterator[Target]:
        """The targets in the recipe's order, rows of the layers layer by layer."""
        by_target: dict[str, list[Tensor | Computed]] = {}
        rows: tuple[Tensor | Computed, ...] = (*self.recipe.tensors, *self.recipe.computed)
        for row in rows:
            by_target.setdefault(row.target, []).append(row)
        names = list(by_target)
        position = 0
        while position < len(names):
            end = position
            while end < len(names) and "{i}" in names[end]:
                end += 1
            for i in range(model.n_layers) if end > position else ():
                for name in names[position:end]:
                    yield from self._target(model, by_target[name], i)
            if end == position:
                yield from self._target(model, by_target[names[position]], None)
                end += 1
            position = end

    def _target(self, model: Model, rows: Sequence[Tensor | Computed], i: int | None) -> Iterator[Target]:
        rows = [row for row in rows if i is None or i in model.layers(row.only)]
        numbers = () if i is None else (i,)
        made: list[Target] = []
        for row in rows:
            if isinstance(row, Computed):
                if not made and (array := row.value(model)) is not None:
                    made.append(Target(row.target.format(i=i), graph.Resident(array), row))
            elif any(n[: len(numbers)] == numbers for n in self.found.get(row.source, ())):
                tensor = self._lazy(model, row, numbers)
                if tensor is not None:
                    made.append(Target(row.target.format(i=i), tensor, row))
        if len(made) > 1:
            self.problems.append(f"{made[0].name} has {len(made)} sources")
        missing = [row for row in rows if isinstance(row, Tensor)]
        if not made and missing and missing[0].required and len(missing) == len(rows):
            self.problems.append(f"missing tensor {missing[0].source.format(i=i, e='0')}")
        yield from made[:1]

    def _lazy(self, model: Model, row: Tensor, numbers: tuple[int, ...]) -> graph.LazyTensor | None:
        """The node chain of one target: stack, squeeze, take a part, permute, scale."""
        by_numbers = self.found[row.source]
        if "{e}" in row.source:
            sources = [by_numbers.get((*numbers, e)) for e in range(model.dims["E"])]
            gaps = [e for e, name in enumerate(sources) if name is None]
            if gaps:
                self.problems.append(f"missing tensor {row.source.format(i=numbers[0], e=gaps[0])}")
                return None
            tensor: graph.LazyTensor = graph.Stack([self.stored[name].lazy() for name in sources if name is not None])
        else:
            tensor = self.stored[by_numbers[numbers]].lazy()
        return apply_row(model, row, tensor)

    def _check_head(self, model: Model) -> None:
        """A head that is stored is always written; a config that promises one must have it."""
        has_head = self.recipe.head in self.stored
        stated = next((flag for key in self.recipe.tie_keys if (flag := self.config.flag(key)) is not None), None)
        tied = self.recipe.tied_by_default if stated is None else stated
        if not has_head and not tied and stated is not None:
            self.problems.append(f"the config says untied and there is no {self.recipe.head}: an incomplete checkpoint")
        elif not has_head and not tied:
            model.cautions.append(
                Caution("head-missing", f"no {self.recipe.head} in the checkpoint: written as a tied model")
            )
        elif has_head and stated:
            model.cautions.append(
                Caution("head-on-tied", "the config says tied and a head is stored: it is written", self.recipe.head)
            )

    def _error(self) -> SourceError:
        shown = "; ".join(self.problems[:MAX_PROBLEMS_SHOWN])
        if len(self.problems) > MAX_PROBLEMS_SHOWN:
            shown += f"; and {len(self.problems) - MAX_PROBLEMS_SHOWN} more"
        return SourceError(
            f"not a complete {self.recipe.arch} checkpoint: {shown}",
            file=self.config.file.parent,
            hint="the checkpoint and its config.json must belong together",
        )


def apply_row(model: Model, row: Tensor, tensor: graph.LazyTensor) -> graph.LazyTensor:
    """The nodes that a row asks for on top of its (stacked) source: squeeze, part, permutation, scale."""
    extents = parse_shape(row.shape)
    if ("1",) in extents and len(tensor.spec.shape) == len(extents):
        kept = tuple(n for factors, n in zip(extents, tensor.spec.shape, strict=True) if factors != ("1",))
        tensor = graph.Reshape(tensor, kept)
    if row.part is not None:
        period = tensor.spec.shape[-2]
        size = period // row.part.count
        tensor = graph.RowBlocks(tensor, period, row.part.index * size, size)
    if row.rows is not None:
        tensor = graph.PairHalves(tensor, model.dims[row.rows.heads])
    if row.scale is not None and (factor := row.scale(model)) != 1.0:
        tensor = graph.Scale(tensor, factor)
    return tensor


def bind(recipe: Recipe, config: Config, stored: Mapping[str, Stored]) -> Model:
    """The recipe with every dim, kind and tensor of a checkpoint; SourceError listing all disagreements at once."""
    return _Binding(recipe, config, stored).bind()
