"""An architecture as data (`Recipe`, with an `Output` for each further file), and a recipe bound to a checkpoint.

Each tensor is described by one row, made of the classes in words.py and ops.py; the recipe is checked when it is
loaded. registry.py finds the recipe for a checkpoint; bind combines the two into a `Model`.
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
    """One GGUF file made from a checkpoint: its dims, tensors and keys.

    Attributes:
        role: The purpose of the file: "model", "mmproj". File names are derived from it.
        arch: The value of general.architecture.
        general_type: The value of general.type, by which loaders distinguish models from projectors.
        dims: The sizes of a model by their names, such as "H" for the hidden size.
        tensors: A row for each tensor of the file that is made from stored tensors.
        keys: The metadata keys of the architecture.
        computed: Tensors that are computed from the config.
        drops: Stored tensors that are known and not needed.
        aliases: Names and shapes that other programs use for the sources of rows.
        stacks: The dim that counts the layers of each stack: "" is the stack of "{i}", "vision" that of "{i:vision}".
        prefixes: Prefixes of names in other checkpoints of the architecture, each with the prefix that rows use
            instead: {"model.language_model.": "model."}.
        config_root: The section of the config that describes this file, such as "vision_config". For a Recipe it is
            the text section of a wrapper, such as "text_config", which is read together with the keys outside it.
        axes: The properties in which layers differ, each with its kinds: {"ffn": ("dense", "moe")}.
        claims: The config keys that list the kinds of layers; the tensors must agree with them.
        refusals: Features of a model that the runtime does not support; such a model is not converted.
        caveats: Differences of the runtime in some uses of a model, reported as warnings.
        flags: The config flags that rows name in `required`, with the value that transformers uses if the config does
            not set them.
        tie_keys: The config flags for a head that is tied to the embedding; the first one that is set is used.
        tied_by_default: Whether the head is tied if the config sets none of them.
        head: The source of the head; "" if the architecture has none.
        tokens: Texts that the runtime, when it uses this file, must find as single tokens in the model's vocabulary.
        is_required: Whether a checkpoint is incomplete without the tensors of this file. (It need not be: a fine-tune
            may have saved only the text model.)
        names: The names of all sources and of drops.
        alias_names: The names of all aliases.
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
    names: NameTable = field(init=False, repr=False, compare=False)
    alias_names: NameTable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the recipe, and raise ValueError with its name and every error in it."""
        if found := list(faults(self)):
            raise ValueError(f"the recipe of {self.arch}: {'; '.join(found)}")
        sources = [name for row in self.tensors for name in row.sources] + [
            drop.source for drop in self.drops if not drop.is_open
        ]
        object.__setattr__(self, "names", NameTable(sources))
        object.__setattr__(self, "alias_names", NameTable(alias.source for alias in self.aliases))

    @property
    def embedding(self) -> str:
        """The source of the token embedding, or ""."""
        return next((row.source for row in self.tensors if row.target == EMBEDDING), "")

    def config_of(self, config: Config) -> Config:
        """Return the section of a checkpoint's config that describes this file; its parent is the whole config."""
        return config.whole.alone(self.config_root)

    def is_of_another(self, name: str) -> bool:
        """Whether the tensor `name` belongs to another file of the same checkpoint."""
        return False

    def canonical(self, name: str) -> str:
        """Return the name of a stored tensor with the prefix that rows use."""
        if not self.prefixes:  # most architectures; a checkpoint may have tens of thousands of names
            return name
        found = max((prefix for prefix in self.prefixes if name.startswith(prefix)), key=len, default=None)
        return name if found is None else self.prefixes[found] + name.removeprefix(found)

    def find(self, name: str) -> Found | None:
        """Return the template, layer and expert of the name of a stored tensor; None if no source matches."""
        return self.names.find(self.canonical(name))

    def drop_of(self, name: str, depths: Mapping[str, int]) -> Drop | None:
        """Return the open-ended drop that matches the tensor `name`, or None.

        Args:
            name: The name of a stored tensor.
            depths: The number of layers of each stack that the config gives.
        """
        drops = [drop for drop in self.drops if drop.is_open]
        name = self.canonical(name) if drops else name
        return next((drop for drop in drops if _covers(drop, name, depths)), None)

    def stated_tie(self, config: Config) -> bool | None:
        """Whether the config says that the head is tied to the embedding; None if it sets no such flag.

        Either a wrapper or its text section may set it: transformers 4 read one of them, version 5 reads the other.
        """
        of_each = (config,) if config.parent is None else (config, config.parent)
        said = [next((flag for key in self.tie_keys if (flag := one.flag(key)) is not None), None) for one in of_each]
        return any(said) if any(flag is not None for flag in said) else None

    def is_tied_by(self, config: Config) -> bool:
        """Whether the head is tied to the embedding: what the config says, else the architecture's default."""
        stated = self.stated_tie(config)
        return self.tied_by_default if stated is None else stated

    def stack_of_axis(self, axis: str) -> str:
        """Return the stack whose layers differ on `axis`."""
        rows: tuple[Tensor | Computed, ...] = (*self.tensors, *self.computed)
        rows = tuple(row for row in rows if row.only.startswith(f"{axis}="))
        return next((stack for row in rows if (stack := stack_of(row.target)) is not None), MAIN_STACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Output):
    """An architecture: the GGUF file of its model, the names by which a config identifies it, and its further files.

    Attributes:
        hf_names: The class names in "architectures" of config.json.
        model_type: The "model_type" of config.json, used if it has no "architectures".
        bodies: The class names of the model without its head, as AutoModel saves it.
        text_types: For a wrapper, the model types of its text section (`config_root`); "" matches a section without a
            model type. Several recipes may share a wrapper class and differ in these. Empty if any type matches.
        outputs: Further files, such as a projector; none shares a source tensor with another.
        unrunnable: Regular expressions for related class names or model types that llama.cpp cannot run, each with
            the reason.
        default_pre: The pre-tokenizer to use if the structure of a byte-level tokenizer is unknown; None if there is
            no default.
        special_tokens: Special tokens that the architecture defines besides the tokenizer files.
        description: A description for `streamconv architectures`.
        origin: The origin of the recipe, which is part of the identity of a run: "" for architectures/, otherwise file
            and digest, or package and version. It is set when the recipe is loaded.
        templates: Chat templates, by name, that the runtime looks for but no file of a checkpoint has.
        has_tokenizer: Whether the input is text tokens. (A codec's decoder takes codes.)
        folders: Subfolders of the checkpoint that have separate models, by role. Each model has its own recipe, and
            becomes a file that is completed together with this one.
        reranker: The recipe for a model of this architecture that scores texts by the logits of two tokens
            (`Modules.answers`); None if the runtime cannot rank with it.
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
        """Check the recipe, and raise ValueError with its name and every error in it."""
        Output.__post_init__(self)
        if found := list(faults_of_all(self)):
            raise ValueError(f"the recipe of {self.arch}: {'; '.join(found)}")

    def config_of(self, config: Config) -> Config:
        return config.within(self.config_root)

    def is_for(self, config: Config) -> bool:
        """Whether this recipe is for the model of a config.json."""
        names = config.list_of("architectures", str) or []
        model_type = (config.text("model_type") or "").replace("-", "_")  # mlx-vlm has lfm2-vl
        is_named = not set(names).isdisjoint((*self.hf_names, *self.bodies))
        return (is_named or (not names and model_type == self.model_type)) and (
            not self.text_types or self.text_type(config) in self.text_types
        )

    def text_type(self, config: Config) -> str:
        """Return the model type of the text section (`config_root`) of a config; "" if it has none."""
        section = config.section(self.config_root)
        return (section.text("model_type") if section else None) or ""

    def is_of_another(self, name: str) -> bool:
        return any(output.find(name) or output.drop_of(name, {}) for output in self.outputs)


# ---------------------------------------------------------------- a recipe bound to a checkpoint


class Stored(Protocol):
    """A tensor on disk: its shape, and a lazy tensor that reads it."""

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
    """A tensor of an output, before its type is chosen.

    Attributes:
        name: The name in the GGUF file.
        tensor: The lazy tensor that makes its rows.
        row: The row of the recipe that defines it.
    """

    name: str
    tensor: LazyTensor
    row: Tensor | Computed


@dataclass(slots=True)
class Model:
    """A recipe bound to a checkpoint, with the values of its dims and the tensors of the output.

    Attributes:
        recipe: The architecture, or one of its further outputs.
        config: The config, or the section of it, that describes the file.
        dims: The values of the dims; all of them, unless `has_config` is false.
        kinds: For each axis, the kind of each layer.
        targets: The tensors of the output, in the recipe's order.
        warnings: Warnings from binding.
        has_config: Whether `config` is that of the model. A base that is a GGUF file has no config, and may not define
            all dims.
        main: For a further output, the model that it belongs to.
        stored: The checkpoint's tensors by the recipe's names.
        modules: The sentence-transformers modules after the model.
    """

    recipe: Output
    config: Config
    dims: dict[str, int]
    kinds: dict[str, list[str]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    warnings: list[RunWarning] = field(default_factory=list)
    has_config: bool = True
    main: Model | None = None
    stored: Mapping[str, Stored] = field(default_factory=dict, repr=False)
    modules: Modules = NO_MODULES

    @property
    def n_layers(self) -> int:
        return self.dims["L"]

    @property
    def is_tied(self) -> bool:
        """Whether the head is tied to the embedding: no target is made from a separate head."""
        return all(target.row.source != self.recipe.head for target in self.targets if isinstance(target.row, Tensor))

    def depth(self, stack: str) -> int:
        """Return the number of layers of a stack."""
        return self.dims[self.recipe.stacks[stack]]

    def layers(self, row: Tensor | Computed) -> list[int]:
        """Return the layers that a row with "{i}" applies to."""
        if not row.only:
            return list(range(self.depth(stack_of(row.target) or MAIN_STACK)))
        axis, kind = row.only.split("=")
        return [i for i, found in enumerate(self.kinds[axis]) if found == kind]

    def value(self, extent: str) -> int:
        """Return the value of an extent in dims, such as "A*D".

        Raises:
            KeyError: A dim is unknown.
        """
        value = parse_extent(extent).value(self.dims)
        if value is None:
            raise KeyError(extent)
        return value

    def made(self, row: Tensor, sources: Sequence[LazyTensor]) -> LazyTensor:
        """Return the lazy tensor that a row makes from its sources, or from its stack of experts."""
        if len(sources) == 1:
            return applied(row.ops, sources[0], self)
        return applied(row.ops[1:], row.ops[0].join(sources, self), self)

    def role(self, target: Target) -> TensorRole:
        """Return the properties of a target by which a type policy chooses its type."""

        def lost(type_: GGMLQuantizationType) -> str | None:
            return loss(target.row.ops, type_, self)

        return TensorRole(target.name, target.tensor.spec.shape, target.row.f32, target.row.or_f16, lost)

    def defaults(self) -> dict[str, tuple[Scalar, ...]]:
        """Return, by key, the values that llama.cpp treats like a missing key; the first one is its default."""
        arch = self.recipe.arch
        found = common_defaults(arch, {entry.key: entry.value for entry in self.keys()}, self.dims.get("V"))
        for key in self.recipe.keys:
            default = key.default(self) if callable(key.default) else key.default
            if default is not None:
                found[key.name.format(arch=arch)] = default if isinstance(default, tuple) else (default,)
        return found

    def keys(self) -> list[KeyValue]:
        """Return the metadata keys of the architecture with their values, in the recipe's order."""
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
        if self.modules.pooling_type is not None:  # llama.cpp reads it for every architecture
            result.append(KeyValue.u32(f"{self.recipe.arch}.pooling_type", self.modules.pooling_type))
        return result
