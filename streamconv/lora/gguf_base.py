"""Read a base from a GGUF file: a recipe's keys are inverted, from their values to dims and kinds of layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gguf.constants import Keys

from streamconv.budget import Budget
from streamconv.checkpoint.config import Config
from streamconv.errors import RunWarning, SourceError
from streamconv.files.store import Place
from streamconv.gguf.entries import GGUFKey, Span, refuse
from streamconv.gguf.format import KeyValue, PackedArray
from streamconv.gguf.splits import GGUFSet
from streamconv.lora.base import N_LAYERS, N_VOCAB, BaseModel
from streamconv.recipe.dims import MAX_LAYERS, Equation, parse_extent, solve_dims
from streamconv.recipe.language import Model, Recipe
from streamconv.recipe.names import MAIN_STACK, fill, stack_of
from streamconv.recipe.registry import recipe_of, supported_hint
from streamconv.recipe.words import Key, PerLayer

COPIED_KEYS = ("{arch}.attention.head_count", "{arch}.attention.head_count_kv")


def base_of_gguf(path: Place, budget: Budget) -> BaseModel:
    """Open the GGUF file, or first part of a split, at `path` as a base.

    Raises:
        SourceError: The file is malformed or an adapter, or its architecture has no recipe.
    """
    with GGUFSet.open(path, budget) as file:
        refuse(file.problems, ignore=("truncated", "split-missing"))  # only names and shapes are needed
        shapes = {name: tensor.shape for name, (_, tensor) in file.tensors.items()}
        is_whole = bool(shapes) and not any(problem.code == "split-missing" for problem in file.problems)
        tensors = shapes if is_whole else {}
        header = _Header(path, file.keys, _recipe_of_file(path, file.keys, tensors))
        dims, kinds = _dims_and_kinds(header, tensors)
        head = next((row.target for row in header.recipe.tensors if row.source == header.recipe.head), None)
        warnings = []
        if not is_whole:
            what = "some of its parts are missing" if shapes else "it lists no tensors"
            warnings.append(
                RunWarning("base-metadata-only", f"{path.name}: {what}, so shapes were derived from its keys")
            )
        template = file.keys.get(Keys.Tokenizer.CHAT_TEMPLATE)
        return BaseModel(
            path=path,
            model=Model(header.recipe, Config({}, path), dims, kinds, has_config=False),
            is_tied=head not in shapes if is_whole else None,
            keys=tuple(_copied_keys(header)),
            targets=frozenset(shapes) if is_whole else None,
            shapes=shapes,
            warnings=warnings,
            template=template.value if template is not None and isinstance(template.value, str) else "",
        )


def _recipe_of_file(path: Place, keys: Mapping[str, GGUFKey], tensors: Collection[str]) -> Recipe:
    values = {name: key.value for name, key in keys.items()}
    if values.get("general.type") == "adapter":
        raise SourceError(
            "is an adapter, not a base",
            file=path,
            hint="pass the model on which it was trained with --base",
            code="is-adapter",
        )
    arch = values.get("general.architecture")
    recipe = recipe_of(arch, tensors) if isinstance(arch, str) else None
    if recipe is None:
        hint = supported_hint([str(arch)])
        raise SourceError(
            f"architecture {arch!r} is not supported", file=path, hint=hint, code="architecture-unsupported"
        )
    return recipe


@dataclass(frozen=True, slots=True)
class _Header:
    """A file's keys, and the recipe that interprets them."""

    path: Place
    keys: Mapping[str, GGUFKey]
    recipe: Recipe

    def integers(self, key: Key) -> list[int]:
        """Return the value of a recipe's key as a list: one number, or one per layer. Empty if the key is missing."""
        found = self.keys.get(key.name.format(arch=self.recipe.arch))
        if found is None:
            return []
        values = found.value.first(MAX_LAYERS + 1) if isinstance(found.value, Span) else [found.value]
        integers = [v for v in values if type(v) is int and 0 <= v < 1 << 31]
        if len(integers) < len(values):
            raise self.wrong(key, "is not a whole number")
        return integers

    def wrong(self, key: Key, what: str) -> SourceError:
        return SourceError(f"{key.name.format(arch=self.recipe.arch)} {what}", file=self.path, code="base-key")

    def differs(self, key: Key) -> SourceError:
        return self.wrong(key, "differs between layers, which this architecture's recipe does not support")


def _dims_and_kinds(header: _Header, tensors: Collection[str]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """The dims that the keys give, with their defaults, and the kinds of layers by axis."""
    n_layers = _n_layers(header)  # first, since a list for each layer must be as long
    stated = {N_LAYERS: n_layers}
    equations: list[Equation] = []
    kinds = _kinds_by_tensors(header.recipe, tensors, n_layers)
    for key in header.recipe.keys:
        rule = key.value
        values = header.integers(key) if isinstance(rule, str | PerLayer) else []
        if isinstance(rule, PerLayer) and values:
            values = values * n_layers if len(values) == 1 else values
            if len(values) != n_layers:
                raise header.wrong(key, f"lists {len(values)} layers of {n_layers}")
            kinds[rule.axis] = kinds.get(rule.axis) or _kinds_by_number(header, key, rule, values)
            equations += _of_layers(header, key, rule, values, kinds[rule.axis])
        elif isinstance(rule, str) and any(values):
            if len(set(values)) > 1:
                raise header.differs(key)
            extent = parse_extent(rule)
            if extent.names == (rule,):
                stated.setdefault(rule, values[0])
            else:
                equations.append(Equation(extent, values[0]))
    tokens = header.keys.get("tokenizer.ggml.tokens")
    if N_VOCAB not in stated and tokens is not None and isinstance(tokens.value, Span):
        stated[N_VOCAB] = len(tokens.value)
    return solve_dims(header.recipe, stated, equations), kinds


def _n_layers(header: _Header) -> int:
    key = next(key for key in header.recipe.keys if key.value == N_LAYERS)
    n_layers = (header.integers(key) or [0])[0]
    if not 1 <= n_layers <= MAX_LAYERS:
        raise header.wrong(key, f"is {n_layers}, which is not a valid number of layers" if n_layers else "is missing")
    return n_layers


def _kinds_by_tensors(recipe: Recipe, tensors: Collection[str], n_layers: int) -> dict[str, list[str]]:
    """The kinds of the layers on each axis, if the tensors of the file determine one for each layer."""
    rows = [row for row in recipe.tensors if stack_of(row.target) == MAIN_STACK and row.only]
    settled = {}
    for axis, kinds in recipe.axes.items():
        targets = {kind: [row.target for row in rows if row.only == f"{axis}={kind}"] for kind in kinds}
        found = [
            [kind for kind in kinds if any(fill(target, i) in tensors for target in targets[kind])]
            for i in range(n_layers if tensors else 0)
        ]
        if found and all(len(one) == 1 for one in found):
            settled[axis] = [one[0] for one in found]
    return settled


def _kinds_by_number(header: _Header, key: Key, rule: PerLayer, values: Sequence[int]) -> list[str]:
    """Kinds of layers: the one with the layer's number as a constant, else the only one whose number is a dim."""
    fixed = {number: kind for kind, number in rule.by_kind.items() if not isinstance(number, str)}
    free = [kind for kind, number in rule.by_kind.items() if isinstance(number, str)]
    if len(free) != 1:
        raise header.differs(key)
    return [fixed.get(value, free[0]) for value in values]


def _of_layers(
    header: _Header, key: Key, rule: PerLayer, values: Sequence[int], kinds: Sequence[str]
) -> Iterator[Equation]:
    """The dims that the numbers of the layers give, each by the kind of its layer."""
    for kind, number in rule.by_kind.items():
        found = {value for value, one in zip(values, kinds, strict=True) if one == kind}
        if len(found) > 1 or (found and isinstance(number, int) and found != {number}):
            raise header.differs(key)
        if isinstance(number, str):
            yield from (Equation(parse_extent(number), value) for value in found)


def _copied_keys(header: _Header) -> Iterator[KeyValue]:
    """The head counts, copied from the base."""
    for template in COPIED_KEYS:
        key = header.keys.get(template.format(arch=header.recipe.arch))
        if key is None:
            continue
        if isinstance(key.value, Span):
            numbers = [value for value in key.value.first(MAX_LAYERS) if isinstance(value, int)]
            yield KeyValue.array(key.name, PackedArray.of_numbers(key.value.element, numbers))
        else:
            yield KeyValue(key.name, key.type, key.value)
