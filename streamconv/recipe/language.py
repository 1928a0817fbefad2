"""What an architecture is: a table of tensors with their shapes, a table of keys, and the few rules beside them.

Owns: the vocabulary that recipes are written in, and finding the recipe of a config. Does not own: any one
architecture (architectures/), holding a recipe against a checkpoint (recipe/bind.py), output types, dialects.
Invariant: a recipe is data; what it says of a tensor (source, target, shape, row operation) is said in one row.

Shapes are written in dims, row-major: "A*D H" is [heads * head size, hidden]. Three dims have a meaning here: L counts
the layers ({i} in a name), E the experts ({e}), V the tokens; every recipe has L and V.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from streamconv.checkpoint.config import Config
from streamconv.errors import Caution, SourceError
from streamconv.gguf.format import KeyValue, PackedArray, Scalar
from streamconv.lazy.node import LazyTensor

__all__ = [
    "BOOL",
    "F32",
    "I32",
    "QUANTIZATION_KEYS",
    "STRING",
    "U32",
    "Claim",
    "Computed",
    "Config",
    "Dim",
    "Drop",
    "Key",
    "Model",
    "PairHalves",
    "Part",
    "PerLayer",
    "Recipe",
    "Refusal",
    "Scalar",
    "Target",
    "Tensor",
    "all_recipes",
    "find_recipe",
    "recipe_of",
]

QUANTIZATION_KEYS = ("quantization_config", "quantization")  # of transformers, of mlx-lm

U32, I32, F32, BOOL, STRING = (
    GGUFValueType.UINT32,
    GGUFValueType.INT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.BOOL,
    GGUFValueType.STRING,
)

# ---------------------------------------------------------------- what recipes are written in


@dataclass(frozen=True, slots=True)
class Dim:
    """Where a dim's value comes from: a config key (or a rule over the config), else the shapes, else `default`.

    `default` is a number, another dim ("A"), or a quotient of two ("H/A"). `rule` names a rule in messages.
    """

    config: str | Callable[[Config], int | None]
    default: int | str | None = None
    rule: str = ""

    def stated(self, config: Config) -> int | None:
        return config.integer(self.config) if isinstance(self.config, str) else self.config(config)

    @property
    def label(self) -> str:
        return self.config if isinstance(self.config, str) else self.rule


@dataclass(frozen=True, slots=True)
class PairHalves:
    """Row operation of Q and K: each of `heads` (a dim) heads from half-split to interleaved RoPE."""

    heads: str


@dataclass(frozen=True, slots=True)
class Part:
    """Of a fused source [..., rows, columns]: block `index` of `count` equal blocks of its rows."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A row of the table: source name, target name, shape of the source. {i} is the layer, {e} the expert.

    `rows` and `part` change rows; ones in a shape are squeezed out; `scale` multiplies every element by a factor of the
    model's. `only` ("axis=kind") limits the row to the layers of that kind. `required` may name a flag of the config:
    the tensor is then stored just where the flag is true, and either way where the config does not say (Recipe.flags).
    Rows with the same target are alternatives.
    """

    source: str
    target: str
    shape: str
    rows: PairHalves | None = None
    part: Part | None = None
    only: str = ""
    required: bool | str = True
    scale: Callable[[Model], float] | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """A target made from the config, for each layer (or once), where no source holds it. None: the model has none."""

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
class Claim:
    """What the config's `key` says of the layers: the kind of each on `axis`, None where it says nothing."""

    key: str
    axis: str
    kinds: Callable[[Config, int], Sequence[str] | None]


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the GGUF architecture or its run time cannot do: `what`, told of every model for which `applies`.

    `what` may have dims, keys of the config and `rope_type` in braces.
    """

    what: str
    applies: Callable[[Model], bool]

    def of(self, model: Model) -> str | None:
        """The sentence for `model`; None where the model is fine."""
        if not self.applies(model):
            return None
        return self.what.format_map(ChainMap({"rope_type": model.config.rope_type}, model.dims, dict(model.config.raw)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """An architecture: its names, dims, tensors and keys.

    `axes` are the ways in which layers differ, each with its kinds; `claims` are what the config says of them, all of
    which the tensors must bear out. `flags` are those that rows name in `required`, with the value that transformers
    gives them where the config does not say. `tie_keys` are the config's flags for a head that is the embedding, the
    first that is stated wins. `default_pre` is the pre-tokenizer of a model whose byte-level tokenizer has an unknown
    structure; None: there is no such guess.
    """

    arch: str
    hf_names: tuple[str, ...]
    model_type: str
    dims: Mapping[str, Dim]
    tensors: tuple[Tensor, ...]
    keys: tuple[Key, ...]
    computed: tuple[Computed, ...] = ()
    drops: tuple[Drop, ...] = ()
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    claims: tuple[Claim, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    flags: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))
    tie_keys: tuple[str, ...] = ("tie_word_embeddings",)
    tied_by_default: bool = False
    head: str = "lm_head.weight"
    default_pre: str | None = None
    description: str = ""

    def __post_init__(self) -> None:
        if missing := {"L", "V"} - self.dims.keys():
            raise ValueError(f"the recipe of {self.arch} has no dim {' and '.join(sorted(missing))}")


# ---------------------------------------------------------------- a recipe that has met its checkpoint


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the output, before its type is chosen: its logical name and how its rows are made."""

    name: str
    tensor: LazyTensor
    row: Tensor | Computed


@dataclass(slots=True)
class Model:
    """A recipe bound to a checkpoint: every dim known, every layer of one kind on each axis, every target made."""

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
    """Every file of architectures/, by name."""
    package = importlib.import_module("streamconv.architectures")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(importlib.import_module(f"streamconv.architectures.{name}").RECIPE for name in names)


def find_recipe(config: Config) -> Recipe:
    """The recipe for a config.json; SourceError, saying what is supported, where there is none."""
    for key in QUANTIZATION_KEYS:
        if settings := config.raw.get(key):
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            what = f"the checkpoint is quantised ({method or key})"
            raise SourceError(what, file=config.file, hint="convert the original 16-bit checkpoint")
    names = config.list_of("architectures", str) or []
    for recipe in all_recipes():
        if set(names) & set(recipe.hf_names) or (not names and config.text("model_type") == recipe.model_type):
            return recipe
    what = f"{', '.join(names) or 'a model without a name'} is not supported"
    wrapped = [key for key in ("text_config", "vision_config", "audio_config") if key in config.raw]
    if wrapped:
        what += f" (a wrapper with {', '.join(wrapped)}: convert the text model's own checkpoint)"
    supported = ", ".join(name for recipe in all_recipes() for name in recipe.hf_names)
    raise SourceError(what, file=config.file, hint=f"supported: {supported}")


def recipe_of(arch: str) -> Recipe | None:
    """The recipe of a GGUF architecture name."""
    return next((recipe for recipe in all_recipes() if recipe.arch == arch), None)
