"""An architecture as a value (`Recipe`, and an `Output` for each further file), and what it becomes with a checkpoint.

A recipe is data: all that it says of a tensor stands in one row, in the words of words.py and ops.py, and is checked
when it is loaded. bind makes a `Model` of it and a checkpoint; registry finds the recipe of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, cast

from gguf.constants import GGMLQuantizationType, GGUFValueType

from streamconv.checkpoint.config import Config
from streamconv.checkpoint.modules import NO_MODULES, Modules
from streamconv.errors import RunWarning
from streamconv.ggml.policy import TensorRole
from streamconv.gguf.format import KeyValue, PackedArray, Scalar
from streamconv.lazy.node import LazyTensor
from streamconv.recipe.defaults import common_defaults
from streamconv.recipe.dims import parse_extent
from streamconv.recipe.names import MAIN_STACK, Found, NameTable, number_after, stack_of
from streamconv.recipe.operation import applied, loss
from streamconv.recipe.validation import faults, faults_of_all
from streamconv.recipe.words import Alias, Caveat, Claim, Computed, Dim, Drop, Key, Refusal, SpecialTokens, Tensor

EMBEDDING = "token_embd.weight"  # GGUF's name of the token embedding

# ---------------------------------------------------------------- an architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One file that a checkpoint becomes: its dims, tensors and keys, as one row each.

    Attributes:
        role: What the file is to the model: "model", "mmproj".
        general_type: general.type, by which loaders tell them apart.
        axes: The ways in which layers differ, each with its kinds.
        claims: What the config says of the kinds; the tensors must agree.
        flags: Those that rows name in `required`, with the value that transformers gives them where the config is
            silent.
        stacks: The dims that count layers: of "{i}" that of "", of "{i:vision}" that of "vision".
        prefixes: How names begin in other checkpoints of the architecture, each with the beginning that rows have:
            {"model.language_model.": "model."}.
        config_root: The section of the config that is about this file: "vision_config". A Recipe's, "text_config" of a
            wrapper, is read together with what stands beside it.
        refusals: What the runtime cannot do for a model.
        caveats: What it does otherwise in some uses, said as warnings.
        tie_keys: The config's flags for a head that is the embedding; the first that is stated counts.
        head: The head's source; "" where there is none.
        aliases: What other programs call its sources, or in which shape they store them.
        tokens: What the runtime looks for, beside this file, as single tokens of the model's vocabulary.
        is_required: Whether a checkpoint without any of its tensors is incomplete. (A fine-tune of a model's text half
            may have been saved alone.)
    """

    role: str = "model"
    arch: str
    general_type: str = "model"
    dims: Mapping[str, Dim]
    tensors: tuple[Tensor, ...]
    keys: tuple[Key, ...]
    computed: tuple[Computed, ...] = ()
    drops: tuple[Drop, ...] = ()
    aliases: tuple[Alias, ...] = ()
    stacks: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({MAIN_STACK: "L"}))
    prefixes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    config_root: str = ""
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    claims: tuple[Claim, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    caveats: tuple[Caveat, ...] = ()
    flags: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))
    tie_keys: tuple[str, ...] = ("tie_word_embeddings",)
    tied_by_default: bool = False
    head: str = ""
    tokens: tuple[str, ...] = ()
    is_required: bool = False
    names: NameTable = field(init=False, repr=False, compare=False)  # of all sources
    alias_names: NameTable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """ValueError, naming the recipe, with all that it cannot mean."""
        if found := list(faults(self)):
            raise ValueError(f"the recipe of {self.arch}: {'; '.join(found)}")
        sources = [name for row in self.tensors for name in row.sources] + [
            drop.source for drop in self.drops if not drop.is_open
        ]
        object.__setattr__(self, "names", NameTable(sources))
        object.__setattr__(self, "alias_names", NameTable(alias.source for alias in self.aliases))

    @property
    def embedding(self) -> str:
        """The source of the token embedding."""
        return next((row.source for row in self.tensors if row.target == EMBEDDING), "")

    def config_of(self, config: Config) -> Config:
        """What a checkpoint's config says of this file; its parent is the whole one."""
        return config.whole.alone(self.config_root)

    def is_of_another(self, name: str) -> bool:
        """Whether the tensor `name` belongs to another file of the same checkpoint."""
        return False

    def canonical(self, name: str) -> str:
        """A checkpoint's name as rows are written."""
        if not self.prefixes:  # of most architectures, whose names may be tens of thousands
            return name
        found = max((prefix for prefix in self.prefixes if name.startswith(prefix)), key=len, default=None)
        return name if found is None else self.prefixes[found] + name.removeprefix(found)

    def find(self, name: str) -> Found | None:
        """Which template a checkpoint's name is of; None where it is of none."""
        return self.names.find(self.canonical(name))

    def drop_of(self, name: str, depths: Mapping[str, int]) -> Drop | None:
        """Why the tensor `name` is not needed, where that is known; `depths`: of the stacks, as the config states."""
        drops = [drop for drop in self.drops if drop.is_open]
        name = self.canonical(name) if drops else name
        return next((drop for drop in drops if _covers(drop, name, depths)), None)

    def stated_tie(self, config: Config) -> bool | None:
        """Whether the config says that the head is the embedding; None where it says nothing.

        Of a wrapper and its section either may: transformers 4 read the one and 5 reads the other.
        """
        of_each = (config,) if config.parent is None else (config, config.parent)
        said = [next((flag for key in self.tie_keys if (flag := one.flag(key)) is not None), None) for one in of_each]
        return any(said) if any(flag is not None for flag in said) else None

    def stack_of_axis(self, axis: str) -> str:
        """The stack whose layers differ on `axis`."""
        rows: tuple[Tensor | Computed, ...] = (*self.tensors, *self.computed)
        rows = tuple(row for row in rows if row.only.startswith(f"{axis}="))
        return next((stack for row in rows if (stack := stack_of(row.target)) is not None), MAIN_STACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Output):
    """An architecture: the file of its model, under which names it is known, and the files that come with it.

    Attributes:
        hf_names: As "architectures" of a config.json has them.
        model_type: As a config.json without them has it.
        bodies: What transformers calls the models without their head, as AutoModel saves them.
        text_types: Of a wrapper, the model types of its text section, which is what `config_root` names; "" is that of
            a section that does not say. Several recipes may be for one class, with other text models.
        outputs: Further files, as a projector; the tensors of each are its own.
        unrunnable: Related classes, or model types, that llama.cpp cannot run, each a regular expression, and why.
        default_pre: The pre-tokenizer of a model whose byte-level tokenizer has an unknown structure; None: there is
            no such guess.
        special_tokens: What the models mean by special tokens, beside the tokenizer's files.
        description: For `streamconv architectures`.
        origin: Where it comes from, for the identity of a run: "" of architectures/, else file and digest, or package
            and version; set by what loads it.
        templates: Chat templates that the runtime looks for by name and no file has.
        has_tokenizer: Whether it takes tokens of text. (A codec's decoder takes codes.)
        folders: Models of their own in folders of the checkpoint, by role; each has a recipe, and becomes a file that
            is written and sealed together with this one.
        reranker: The same architecture where it scores texts by the logits of two tokens (`Modules.answers`); None
            where the runtime does not rank with it.
    """

    hf_names: tuple[str, ...]
    model_type: str
    bodies: tuple[str, ...] = ()
    text_types: tuple[str, ...] = ()
    outputs: tuple[Output, ...] = ()
    unrunnable: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    default_pre: str | None = None
    special_tokens: SpecialTokens = field(default_factory=SpecialTokens)
    description: str = ""
    origin: str = field(default="", compare=False)
    templates: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    has_tokenizer: bool = True
    folders: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    reranker: Recipe | None = None
    head: str = "lm_head.weight"

    def __post_init__(self) -> None:
        """ValueError, naming the recipe, with all that it cannot mean."""
        Output.__post_init__(self)
        if found := list(faults_of_all(self)):
            raise ValueError(f"the recipe of {self.arch}: {'; '.join(found)}")

    def config_of(self, config: Config) -> Config:
        return config.within(self.config_root)

    def is_for(self, config: Config) -> bool:
        """Whether this is the recipe of a config.json."""
        names = config.list_of("architectures", str) or []
        model_type = (config.text("model_type") or "").replace("-", "_")  # mlx-vlm has lfm2-vl
        is_named = not set(names).isdisjoint((*self.hf_names, *self.bodies))
        return (is_named or (not names and model_type == self.model_type)) and (
            not self.text_types or self.text_type(config) in self.text_types
        )

    def text_type(self, config: Config) -> str:
        """The model type of the config's section of this recipe; "" where it has none."""
        section = config.section(self.config_root)
        return (section.text("model_type") if section else None) or ""

    def is_of_another(self, name: str) -> bool:
        return any(output.find(name) or output.drop_of(name, {}) for output in self.outputs)


# ---------------------------------------------------------------- a recipe that has met its checkpoint


class Stored(Protocol):
    """What is needed to know of a tensor on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def lazy(self) -> LazyTensor: ...


def _covers(drop: Drop, name: str, depths: Mapping[str, int]) -> bool:
    stack = stack_of(drop.source)
    if stack is None:
        return name.startswith(drop.source.removesuffix("*"))
    i = number_after(drop.source.removesuffix("*"), name)
    return i is not None and (not drop.beyond or i >= depths.get(stack, i + 1))


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the output, before its type is chosen: its logical name and how its rows are made."""

    name: str
    tensor: LazyTensor
    row: Tensor | Computed


@dataclass(slots=True)
class Model:
    """A recipe bound to a checkpoint: every dim known, every layer of one kind on each axis, every target made.

    `has_config`: whether `config` is the model's; a base that is a GGUF file has none, and not all of its dims. `main`:
    of a further output, the model that it comes with. `modules`: what sentence-transformers puts after it.
    """

    recipe: Output
    config: Config
    dims: dict[str, int]
    kinds: dict[str, list[str]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    warnings: list[RunWarning] = field(default_factory=list)
    has_config: bool = True
    main: Model | None = None
    stored: Mapping[str, Stored] = field(default_factory=dict, repr=False)  # by the recipe's names
    modules: Modules = NO_MODULES

    @property
    def n_layers(self) -> int:
        return self.dims["L"]

    @property
    def is_tied(self) -> bool:
        """Whether there is no head of its own."""
        return all(target.row.source != self.recipe.head for target in self.targets if isinstance(target.row, Tensor))

    def depth(self, stack: str) -> int:
        """How many layers a stack has."""
        return self.dims[self.recipe.stacks[stack]]

    def layers(self, row: Tensor | Computed) -> list[int]:
        """The layers that a row of a stack applies to."""
        if not row.only:
            return list(range(self.depth(stack_of(row.target) or MAIN_STACK)))
        axis, kind = row.only.split("=")
        return [i for i, found in enumerate(self.kinds[axis]) if found == kind]

    def value(self, extent: str) -> int:
        """An extent in dims ("A*D") in numbers. KeyError where a dim is not known."""
        value = parse_extent(extent).value(self.dims)
        if value is None:
            raise KeyError(extent)
        return value

    def made(self, row: Tensor, sources: Sequence[LazyTensor]) -> LazyTensor:
        """The target of a row, of its sources or its stack of experts."""
        if len(sources) == 1:
            return applied(row.ops, sources[0], self)
        return applied(row.ops[1:], row.ops[0].join(sources, self), self)

    def role(self, target: Target) -> TensorRole:
        """A target as a type policy sees it."""

        def lost(type_: GGMLQuantizationType) -> str | None:
            return loss(target.row.ops, type_, self)

        return TensorRole(target.name, target.tensor.spec.shape, target.row.f32, target.row.or_f16, lost)

    def defaults(self) -> dict[str, tuple[Scalar, ...]]:
        """By key, the values that mean the same as its absence does to llama.cpp, its default first."""
        arch = self.recipe.arch
        found = common_defaults(arch, {entry.key: entry.value for entry in self.keys()}, self.dims.get("V"))
        for key in self.recipe.keys:
            default = key.default(self) if callable(key.default) else key.default
            if default is not None:
                found[key.name.format(arch=arch)] = default if isinstance(default, tuple) else (default,)
        return found

    def keys(self) -> list[KeyValue]:
        """The architecture's own keys, in the recipe's order."""
        result = []
        for key in self.recipe.keys:
            value = self.value(key.value) if isinstance(key.value, str) else key.value(self) if key.value else None
            name = key.name.format(arch=self.recipe.arch)
            if value is None:
                continue
            if isinstance(value, str | int | float):
                result.append(KeyValue(name, key.type, value))
            elif key.type == GGUFValueType.STRING:
                result.append(KeyValue.array(name, PackedArray.of_strings([str(one) for one in value])))
            else:
                result.append(KeyValue.array(name, PackedArray.of_numbers(key.type, cast(Sequence[float], value))))
        if self.modules.pooling_type is not None:  # which llama.cpp reads of every architecture
            result.append(KeyValue.u32(f"{self.recipe.arch}.pooling_type", self.modules.pooling_type))
        return result
