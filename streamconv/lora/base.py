"""What an adapter needs to know of its base: its tensors, their shapes and its heads. No weights are read.

A base is a GGUF file (keys and tensor list) or a Hugging Face folder (config.json and, if present, the headers of the
weights). Both are read through the architecture's recipe, so every architecture with a recipe supports adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from streamconv.budget import Budget
from streamconv.checkpoint.config import Config
from streamconv.checkpoint.quantisation import quantised_names
from streamconv.errors import RunWarning, SourceError
from streamconv.files.hub import ADAPTER_CONFIG, CONFIG, Source, find_path, find_source, is_repo_id, source_failures
from streamconv.files.store import Place
from streamconv.files.strict_json import MAX_CONFIG_NBYTES, load_object
from streamconv.gguf.format import KeyValue, PackedArray
from streamconv.gguf.reader import GGUFKey, Span, refuse
from streamconv.gguf.splits import GGUFSet
from streamconv.lora.config import Problem, stated_base
from streamconv.recipe.dims import MAX_LAYERS, Equation, parse_extent, parse_shape, solve_dims, stated_dims
from streamconv.recipe.language import EMBEDDING, Model, Output, Recipe
from streamconv.recipe.names import MAIN_STACK, NONE, Found, fill, has_experts, stack_of
from streamconv.recipe.operation import Op
from streamconv.recipe.recognise import bound, open_checkpoint, recipe_of_checkpoint, recognise_architecture
from streamconv.recipe.registry import recipe_of, supported_hint
from streamconv.recipe.words import Key, PerLayer, Tensor

COPIED_KEYS = ("{arch}.attention.head_count", "{arch}.attention.head_count_kv")
N_LAYERS, N_EXPERTS, N_VOCAB = "L", "E", "V"  # dims that have these names in every recipe

# Tensors that llama.cpp's runtime uses without asking for an adapter (llama-adapter.cpp, llama-graph.cpp).
_IGNORED_TARGETS = {"_norm.weight": "a norm, for which llama.cpp asks no adapter"}


@dataclass(frozen=True, slots=True)
class Landing:
    """A tensor of the GGUF that a module's change arrives in, and the operations it goes through on its way."""

    target: str
    order: tuple[int, int, int]  # its place among the base's tensors
    ops: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """One matrix of the base that a pair of factors may change; of stacked experts one, or all where `expert` is None.

    landings: what it becomes in the GGUF, several where a fused matrix is split. shape: row-major [out, in] as stored,
    None where the base does not tell.
    """

    landings: tuple[Landing, ...]
    shape: tuple[int | None, int | None]
    expert: int | None = None
    n_experts: int = 0
    is_embedding: bool = False
    is_head: bool = False

    @property
    def target(self) -> str:
        return self.landings[0].target

    @property
    def order(self) -> tuple[int, int, int]:
        return self.landings[0].order


@dataclass(slots=True)
class BaseModel:
    """A base as adapters see it.

    model: its dims and kinds, as far as the base gives them. targets: the names of its tensors in GGUF, None where it
    does not list them all. shapes: of those whose shapes it gives itself; the others follow from dims. is_tied: None
    where the base does not tell. is_merged: whether adapters change it before it is written, so that it does not matter
    for which tensors llama.cpp asks adapters.
    """

    path: Place
    model: Model
    is_tied: bool | None
    keys: Sequence[KeyValue]
    targets: frozenset[str] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    warnings: list[RunWarning] = field(default_factory=list)
    is_merged: bool = False

    @property
    def recipe(self) -> Output:
        return self.model.recipe

    @property
    def dims(self) -> Mapping[str, int]:
        return self.model.dims

    @property
    def n_layers(self) -> int:
        return self.model.n_layers

    def has(self, name: str) -> bool:
        """Whether the model has a tensor of this name in its checkpoint; a tied base's head counts."""
        return self.recipe.canonical(name) == self.recipe.head or any(self._rows(name))

    def slot(self, module: str) -> Slot | Problem:
        """What `module` (as model.layers.0.self_attn.q_proj) is in this base, or why no adapter can change it."""
        return self.slot_of(f"{module}.weight")

    def slot_of(self, name: str) -> Slot | Problem:
        """As `slot`, of a tensor by its own name, which need not end in .weight."""
        module = name.removesuffix(".weight")
        if self.is_tied and self.recipe.canonical(name) == self.recipe.head:
            return Problem("tied", "the base is tied: it has no head of its own that llama.cpp could adapt", (module,))
        rows = list(self._rows(name))
        if not rows:
            return Problem("no-module", f"the base ({self.recipe.arch}) has no such module", (module,))
        found, row = rows[0][1:]
        reason = next(filter(None, (_no_matrix(row, is_merged=self.is_merged) for _, _, row in rows)), "")
        if reason:
            return Problem("no-matrix", reason, (module,))
        landings = [Landing(fill(row.target, found.i), (found.i, n, found.e), row.ops) for n, found, row in rows]
        is_stack = has_experts(row.source) or _is_stack(row)
        return Slot(
            landings=tuple(landings),
            shape=self._shape(landings[0], row),
            expert=None if found.e == NONE else found.e,
            n_experts=self.dims.get(N_EXPERTS, 0) if is_stack else 0,
            is_embedding=landings[0].target == EMBEDDING,
            is_head=row.source == self.recipe.head,
        )

    def _rows(self, name: str) -> Iterator[tuple[int, Found, Tensor]]:
        """The recipe's rows that take the tensor `name`, each with its number, as far as this base has them."""
        found = self.recipe.find(name)
        if found is not None:
            for number, row in enumerate(self.recipe.tensors):
                if row.source == found.template and row.unless not in self.model.stored and self._has(row, found):
                    yield number, found, row

    def _has(self, row: Tensor, found: Found) -> bool:
        stack = stack_of(row.source)
        if found.e >= self.dims.get(N_EXPERTS, 0):
            return False
        if self.targets is not None:
            return fill(row.target, found.i) in self.targets
        if stack is not None and found.i >= self.dims.get(self.recipe.stacks[stack], 0):
            return False
        axis, _, kind = row.only.partition("=")
        return stack is None or axis not in self.model.kinds or self.model.kinds[axis][found.i] == kind

    def _shape(self, landing: Landing, row: Tensor) -> tuple[int | None, int | None]:
        """[out, in] of a row's source: as the base has the target, where the operations leave it as it is."""
        known = self.shapes.get(landing.target, ())
        if len(known) > 1 and all(op.keeps_shape for op in row.ops):
            return known[-2], known[-1]
        n_out, n_in = (extent.value(self.dims) for extent in parse_shape(row.shape)[-2:])
        return n_out, n_in


def _is_stack(row: Tensor) -> bool:
    """Whether the source of a row is all experts of a layer in one tensor."""
    first, *matrix = (extent.text for extent in parse_shape(row.shape))
    return first == N_EXPERTS and len(matrix) == 2


def _no_matrix(row: Tensor, *, is_merged: bool) -> str:
    """Why a row of the recipe is nothing that a pair of factors could change; empty where it is."""
    if row.no_adapter and not is_merged:
        return row.no_adapter
    for ending, what in _IGNORED_TARGETS.items():
        if row.target.endswith(ending):
            return f"it is {what}"
    if len(parse_shape(row.shape)) - _is_stack(row) == 2:
        return ""
    return f"it is {next((op.refuses for op in row.ops if op.refuses), 'no matrix')}"


@source_failures()
def open_base(source: Source, budget: Budget) -> BaseModel:
    """The base at `source`: a GGUF file, or the first of a split, or a folder with a config.json.

    SourceError where it cannot be read, or where its architecture has no recipe.
    """
    path = find_source(source)
    if not path.is_dir():
        return _from_gguf(path)
    if not (path / CONFIG).is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"name the file itself, as {path / ggufs[0]}" if ggufs else "give the base's GGUF, or its folder"
        raise SourceError(f"no {CONFIG}", file=path, hint=hint, code="config-missing")
    return _from_folder(path, budget)


def stated_source(config: Config) -> Source:
    """The base that an adapter's configuration names, where it is in the local Hugging Face cache. SourceError else."""
    name = stated_base(config.raw)
    if name is not None and Path(name).is_absolute() and Path(name).is_dir():
        return name
    if name is None or not is_repo_id(name):  # such as a path of the machine that it was trained on
        what = "does not say by a repo id which base it is for"
        raise SourceError(what, file=config.file, hint="give --base", code="base-missing")
    try:
        return str(find_path(name))
    except SourceError as error:
        error.hint = f"{error.hint}; or give --base"
        raise


def stated_source_of(adapter: Source) -> Source:
    """The base that the configuration of the adapter at `adapter` names, as `stated_source`."""
    place = find_source(adapter)
    file = (place if place.is_dir() else place.parent) / ADAPTER_CONFIG
    return stated_source(Config(load_object(file, MAX_CONFIG_NBYTES), file))


# ---------------------------------------------------------------- a GGUF


def _from_gguf(path: Place) -> BaseModel:
    with GGUFSet.open(path) as file:
        refuse(file.problems, ignore=("truncated", "split-missing"))  # only names and shapes are needed
        shapes = {name: tensor.shape for name, (_, tensor) in file.tensors.items()}
        is_whole = bool(shapes) and not any(problem.code == "split-missing" for problem in file.problems)
        facts = _GGUFFacts(path, file.keys, shapes if is_whole else ())
        dims = facts.dims()
        head = next((row.target for row in facts.recipe.tensors if row.source == facts.recipe.head), None)
        warnings = []
        if not is_whole:
            what = "some of its parts are missing" if shapes else "it lists no tensors"
            warnings.append(RunWarning("base-metadata-only", f"{path.name}: {what}, shapes were taken from its keys"))
        return BaseModel(
            path=path,
            model=Model(facts.recipe, Config({}, path), dims, facts.kinds, has_config=False),
            is_tied=head not in shapes if is_whole else None,
            keys=tuple(facts.copied_keys()),
            targets=frozenset(shapes) if is_whole else None,
            shapes=shapes,
            warnings=warnings,
        )


class _GGUFFacts:
    """A recipe's keys read backwards: from the values in a file to dims and kinds of layers."""

    def __init__(self, path: Place, keys: Mapping[str, GGUFKey], tensors: Collection[str]) -> None:
        self.path, self.keys, self.tensors = path, keys, tensors
        self.kinds: dict[str, list[str]] = {}
        if self._value("general.type") == "adapter":
            raise SourceError(
                "is an adapter, not a base",
                file=path,
                hint="--base names the model it was trained on",
                code="is-adapter",
            )
        arch = self._value("general.architecture")
        recipe = recipe_of(arch, tensors) if isinstance(arch, str) else None
        if recipe is None:
            raise SourceError(
                f"architecture {arch!r} is not supported",
                file=path,
                hint=supported_hint([str(arch)]),
                code="architecture-unsupported",
            )
        self.recipe = recipe

    def dims(self) -> dict[str, int]:
        """The dims that the keys give, and their defaults; `kinds` is known then too."""
        stated = {N_LAYERS: self._n_layers()}  # first, since a list for each layer must be as long
        equations: list[Equation] = []
        self._settle_kinds(stated[N_LAYERS])
        for key in self.recipe.keys:
            values = self._integers(key) if isinstance(key.value, str | PerLayer) else []
            if isinstance(key.value, PerLayer) and values:
                equations += self._read_per_layer(key, key.value, values, stated[N_LAYERS])
            elif isinstance(key.value, str) and any(values):
                if len(set(values)) > 1:
                    raise self._wrong(key, "differs between layers, which this architecture's recipe does not know")
                extent = parse_extent(key.value)
                if extent.names == (key.value,):
                    stated.setdefault(key.value, values[0])
                else:
                    equations.append(Equation(extent, values[0]))
        if N_VOCAB not in stated and isinstance(tokens := self._value("tokenizer.ggml.tokens"), Span):
            stated[N_VOCAB] = len(tokens)
        return solve_dims(self.recipe, stated, equations)

    def _n_layers(self) -> int:
        key = next(key for key in self.recipe.keys if key.value == N_LAYERS)
        n_layers = (self._integers(key) or [0])[0]
        if not 1 <= n_layers <= MAX_LAYERS:
            raise self._wrong(key, f"is {n_layers}, no number of layers" if n_layers else "is missing")
        return n_layers

    def copied_keys(self) -> Iterator[KeyValue]:
        """The head counts, as the base has them."""
        for template in COPIED_KEYS:
            key = self.keys.get(template.format(arch=self.recipe.arch))
            if key is None:
                continue
            if isinstance(key.value, Span):
                numbers = [value for value in key.value.first(MAX_LAYERS) if isinstance(value, int)]
                yield KeyValue.array(key.name, PackedArray.of_numbers(key.value.element, numbers))
            else:
                yield KeyValue(key.name, key.type, key.value)

    def _settle_kinds(self, n_layers: int) -> None:
        """The kinds of the layers, by the tensors that the file has of them."""
        rows = [row for row in self.recipe.tensors if stack_of(row.target) == MAIN_STACK and row.only]
        for axis, kinds in self.recipe.axes.items():
            targets = {kind: [row.target for row in rows if row.only == f"{axis}={kind}"] for kind in kinds}
            found = [
                [kind for kind in kinds if any(fill(target, i) in self.tensors for target in targets[kind])]
                for i in range(n_layers if self.tensors else 0)
            ]
            if found and all(len(one) == 1 for one in found):
                self.kinds[axis] = [one[0] for one in found]

    def _read_per_layer(self, key: Key, rule: PerLayer, values: list[int], n_layers: int) -> Iterator[Equation]:
        """What the numbers of the layers say of dims, each by the kind of its layer."""
        values = values * n_layers if len(values) == 1 else values
        if len(values) != n_layers:
            raise self._wrong(key, f"lists {len(values)} of {n_layers} layers")
        kinds = self.kinds.get(rule.axis) or self._kinds_by_number(key, rule, values)
        self.kinds[rule.axis] = kinds
        for kind, number in rule.by_kind.items():
            found = {value for value, one in zip(values, kinds, strict=True) if one == kind}
            if len(found) > 1 or (found and isinstance(number, int) and found != {number}):
                raise self._wrong(key, "differs between layers, which this architecture's recipe does not know")
            if isinstance(number, str):
                yield from (Equation(parse_extent(number), value) for value in found)

    def _kinds_by_number(self, key: Key, rule: PerLayer, values: Sequence[int]) -> list[str]:
        """A layer's kind is the one whose fixed number it has, else the only one whose number is a dim."""
        fixed = {number: kind for kind, number in rule.by_kind.items() if not isinstance(number, str)}
        free = [kind for kind, number in rule.by_kind.items() if isinstance(number, str)]
        if len(free) != 1:
            raise self._wrong(key, "differs between layers, which this architecture's recipe does not know")
        return [fixed.get(value, free[0]) for value in values]

    def _integers(self, key: Key) -> list[int]:
        """The value of a recipe's key as a list: one number, or one for each layer. Empty where there is none."""
        value = self._value(key.name.format(arch=self.recipe.arch))
        values = value.first(MAX_LAYERS + 1) if isinstance(value, Span) else [] if value is None else [value]
        integers = [v for v in values if type(v) is int and 0 <= v < 1 << 31]
        if len(integers) < len(values):
            raise self._wrong(key, "is not a whole number")
        return integers

    def _value(self, name: str) -> object:
        key = self.keys.get(name)
        return None if key is None else key.value

    def _wrong(self, key: Key, what: str) -> SourceError:
        return SourceError(f"{key.name.format(arch=self.recipe.arch)} {what}", file=self.path, code="base-key")


# ---------------------------------------------------------------- a Hugging Face folder


def _from_folder(path: Place, budget: Budget) -> BaseModel:
    config = Config(load_object(path / CONFIG, MAX_CONFIG_NBYTES), path / CONFIG)
    recipe = recognise_architecture(config)
    if not any(path.glob("*.safetensors")):
        return _from_config(path, recipe, config)
    with open_checkpoint(path, budget) as checkpoint:
        if any(quantised_names(checkpoint.tensors)):
            # As QLoRA trains on: other shapes on disk; its config.json gives the real ones.
            return _from_config(path, recipe, config)
        model = bound(checkpoint, recipe_of_checkpoint(checkpoint))
        targets = frozenset(target.name for target in model.targets)
        base = _of_model(path, model, model.is_tied, targets)
        base.warnings += checkpoint.warnings
        return base


def _from_config(path: Place, recipe: Recipe, config: Config) -> BaseModel:
    config = config.within(recipe.config_root)
    model = Model(recipe, config, solve_dims(recipe, stated_dims(recipe, config)))
    if not 1 <= model.dims.get(N_LAYERS, 0) <= MAX_LAYERS:
        name = recipe.dims[N_LAYERS].label
        raise SourceError(
            f"{name} is {model.dims.get(N_LAYERS)}, no number of layers", file=config.file, code="layer-count"
        )
    for claim in recipe.claims:
        kinds = claim.kinds(config, model.n_layers)
        if kinds is not None and len(kinds) != model.n_layers:
            what = f"{claim.key} is of {len(kinds)} layers, and there are {model.n_layers}"
            raise SourceError(what, file=config.file, code="config-contradiction")
        if kinds is not None and model.kinds.setdefault(claim.axis, list(kinds)) != list(kinds):
            raise SourceError(
                f"{claim.key} contradicts the config's other word on the layers",
                file=config.file,
                code="config-contradiction",
            )
    stated = recipe.stated_tie(config)
    return _of_model(path, model, recipe.tied_by_default if stated is None else stated, None)


def _of_model(path: Place, model: Model, is_tied: bool, targets: frozenset[str] | None) -> BaseModel:
    copied = tuple(key for key in model.recipe.keys if key.name in COPIED_KEYS and _has_value(key, model))
    return BaseModel(
        path=path,
        model=model,
        is_tied=is_tied,
        keys=replace(model, recipe=replace(model.recipe, keys=copied)).keys(),
        targets=targets,
    )


def _has_value(key: Key, model: Model) -> bool:
    """Whether a key can be written of a model whose weights were not seen."""
    if isinstance(key.value, PerLayer):
        return key.value.axis in model.kinds
    return isinstance(key.value, str) and parse_extent(key.value).value(model.dims) is not None
