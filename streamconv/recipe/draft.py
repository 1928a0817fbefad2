"""Draft a recipe for a checkpoint that has none, from its tensor names, its shapes and its config.

Guesses dims, kinds of layers and targets, and marks the rest with TODO: no file says how rows are permuted, what the
runtime computes, or what a config's flags mean. The text is a Python module whose RECIPE binds to the checkpoint, if
all tensors with one name pattern have one shape and no name has braces or a third number.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS, TENSOR_NAMES
from gguf.tensor_mapping import TensorNameMap

from streamconv.checkpoint.folder import Checkpoint
from streamconv.files.store import Place
from streamconv.recipe.language import all_recipes
from streamconv.recipe.names import match_name

FUSED = (2, 3, 4)  # parts that one tensor holds: gate and up, the three of a short convolution, and the like
SPARE_LETTERS = "BCGIJNOPQRSTWXYZ"  # none that DIM_KEYS gives a meaning

# Where a dim is seen in a shape, if the config has no key of the usual name for it.
LOCATED = {"V": (MODEL_TENSOR.TOKEN_EMBD, 0), "H": (MODEL_TENSOR.TOKEN_EMBD, 1), "F": (MODEL_TENSOR.FFN_UP, 0)}

# Where a product of dims is meant although a single dim has the same value: the position in the shape, and the product.
PRODUCTS = {
    MODEL_TENSOR.ATTN_Q: (0, "A*D"),
    MODEL_TENSOR.ATTN_K: (0, "K*D"),
    MODEL_TENSOR.ATTN_V: (0, "K*D"),
    MODEL_TENSOR.ATTN_OUT: (1, "A*D"),
}
ROTATED = (MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K)

# Keys of nearly every GGUF architecture, with the dim that they hold ...
DIM_KEYS = {
    "vocab_size": "V",
    "block_count": "L",
    "embedding_length": "H",
    "feed_forward_length": "F",
    "attention.head_count": "A",
    "attention.head_count_kv": "K",
    "attention.key_length": "D",
    "attention.value_length": "D",
    "expert_count": "E",
    "expert_used_count": "U",
    "expert_feed_forward_length": "M",
}
# ... or, by the config's key, how they are read from it.
RULE_KEYS = {
    "max_position_embeddings": '"{arch}.context_length", lambda m: m.config.integer("max_position_embeddings")',
    "rms_norm_eps": '"{arch}.attention.layer_norm_rms_epsilon", lambda m: m.config.positive("rms_norm_eps"), F32',
    "norm_eps": '"{arch}.attention.layer_norm_rms_epsilon", lambda m: m.config.positive("norm_eps"), F32',
    "layer_norm_eps": '"{arch}.attention.layer_norm_epsilon", lambda m: m.config.positive("layer_norm_eps"), F32',
    "rope_theta": '"{arch}.rope.freq_base", lambda m: m.config.rope_base(10_000.0), F32',
    "rope_parameters": '"{arch}.rope.freq_base", lambda m: m.config.rope_base(10_000.0), F32',
}
DEFAULTS = {"A": "H/D", "K": "A", "D": "H/A"}

# What of a config is read for every architecture, or says nothing of how a model computes.
COMMON = frozenset(
    """architectures model_type dtype torch_dtype transformers_version use_cache initializer_range tie_word_embeddings
    bos_token_id eos_token_id pad_token_id attention_dropout""".split()  # noqa: SIM905
)


def draft(directory: Place) -> str:
    """The text of a recipe module for the checkpoint in `directory`. SourceError where that cannot be opened."""
    with Checkpoint.open(directory) as checkpoint:
        return _Draft(checkpoint.config.raw, {name: one.shape for name, one in checkpoint.tensors.items()}).text()


@dataclass(slots=True)
class _Source:
    """All tensors of one template, and what gguf takes them for."""

    template: str
    tensor: MODEL_TENSOR | None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    n_experts: int = 0

    @property
    def order(self) -> int:
        return 1 if "{i}" in self.template else 0 if self.tensor == MODEL_TENSOR.TOKEN_EMBD else 2


class _Draft:
    """One run of `draft`."""

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.config = config
        names = config.get("architectures")
        self.hf_name = next((n for n in names if isinstance(n, str)), "TODO") if isinstance(names, list) else "TODO"
        self.model_type = str(config.get("model_type") or "TODO")
        self.arch = _gguf_arch(self.model_type)
        self.unsayable: list[str] = []  # templates that no recipe can have
        self.sources = self._collect(shapes)
        self.n_layers = 1 + max((i for source in self.sources for i in source.layers), default=-1)
        self.values: dict[str, int] = {}
        self.dims = self._known_dims()
        self._name_the_rest()
        self.axes, self.only = self._kinds()

    def _collect(self, shapes: Mapping[str, tuple[int, ...]]) -> list[_Source]:
        by_template: dict[str, _Source] = {}
        tables = _name_tables(self.arch)
        for name, shape in shapes.items():
            template, numbers = match_name(name)
            if len(numbers) > 2 or set("{}") & set(name):
                self.unsayable.append(template)
                continue
            source = by_template.setdefault(template, _Source(template, _meaning(template, tables)))
            if shape not in source.shapes:
                source.shapes.append(shape)
            source.layers.update(numbers[:1])
            source.n_experts = max(source.n_experts, numbers[1] + 1 if len(numbers) > 1 else 0)
        return sorted(by_template.values(), key=lambda source: source.order)

    # -- dims

    def _known_dims(self) -> dict[str, str]:
        """Letters and the config keys that they stand for, as in the recipes that there are."""
        keys = [(letter, dim.config) for recipe in all_recipes() for letter, dim in recipe.dims.items()]
        dims = {letter: key for letter, key in keys if isinstance(key, str) and self._number(key)}
        dims.setdefault("L", self._key_of(self.n_layers, "layer"))
        for letter, (tensor, axis) in LOCATED.items():
            shape = next((s.shapes[0] for s in self.sources if s.tensor == tensor and len(s.shapes[0]) == 2), None)
            if letter not in dims and shape is not None:
                dims[letter], self.values[letter] = self._key_of(shape[axis], ""), shape[axis]
        dims.setdefault("V", "TODO")
        if n_experts := max((source.n_experts for source in self.sources), default=0):
            dims.setdefault("E", self._key_of(n_experts, "expert"))
            self.values["E"] = n_experts
        self.values |= {letter: self._number(key) for letter, key in dims.items() if self._number(key)}
        if "D" not in dims and self.values.get("H", 0) >= self.values.get("A", 0) > 0:
            dims["D"], self.values["D"] = "head_dim", self.values["H"] // self.values["A"]
        return dims

    def _name_the_rest(self) -> None:
        """A letter for every extent that no dim explains, with the config's key of that value where there is one."""
        for extent in sorted({n for source in self.sources for shape in source.shapes for n in shape if n > 1}):
            free = [letter for letter in SPARE_LETTERS if letter not in self.dims]
            if not self._spellings(extent) and free:
                self.dims[free[0]], self.values[free[0]] = self._key_of(extent, ""), extent

    def _number(self, key: str) -> int:
        value = self.config.get(key)
        return value if type(value) is int and value > 0 else 0

    def _key_of(self, value: int, word: str) -> str:
        """The config key that holds `value`, with `word` in its name; "TODO" where there is none."""
        return next((key for key in self.config if word in key and value > 1 and self._number(key) == value), "TODO")

    def _spellings(self, extent: int, product: str = "") -> list[str]:
        """How an extent may be written in dims; several where dims have the same value."""
        known = {letter: value for letter, value in self.values.items() if letter not in "LU"}
        products = [f"{a}*D" for a in "AK" if known.get(a, 0) * known.get("D", 0) == extent]
        if product in products:
            return [product]
        fused = [f"{n}*{letter}" for letter in "HMF" for n in FUSED if known.get(letter, 0) * n == extent]
        return [letter for letter, value in known.items() if value == extent] or products or fused

    # -- kinds of layers

    def _kinds(self) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
        """Where two groups of tensors share the layers between them: the axes, and each template's kind."""
        groups: dict[frozenset[int], list[str]] = defaultdict(list)
        for source in self.sources:
            if source.layers and len(source.layers) < self.n_layers:
                groups[frozenset(source.layers)].append(source.template)
        axes: dict[str, tuple[str, str]] = {}
        only: dict[str, str] = {}
        for layers, templates in groups.items():
            rest = self.n_layers - len(layers)  # a count, no set of all layers: names may have an index of 999,999
            others = next((groups[one] for one in groups if len(one) == rest and one.isdisjoint(layers)), None)
            if others is None or templates[0] in only:
                continue
            axis = f"axis{len(axes) + 1}"
            axes[axis] = _telling_part(templates, others), _telling_part(others, templates)
            for kind, members in zip(axes[axis], (templates, others), strict=True):
                only |= dict.fromkeys(members, f"{axis}={kind}")
        return axes, only

    # -- text

    def text(self) -> str:
        supported = next((recipe.arch for recipe in all_recipes() if self.hf_name in recipe.hf_names), None)
        lines = [
            f'"""{_plain(self.hf_name)}: TODO say what it is, and which sources say so.',
            "",
            f"Drafted from {len(self.sources)} names of tensors in {self.n_layers} layers. Settle every TODO.",
            *([f"There is a recipe already: architectures/{supported}.py"] if supported else []),
            '"""',
            "",
            "from __future__ import annotations",
            "",
            f"from streamconv.recipe import F32, Dim, Key, Recipe, {'Squeeze, ' if self._squeezes() else ''}Tensor",
            "",
            "RECIPE = Recipe(",
            *([] if self.arch in MODEL_ARCH_NAMES.values() else ["    # TODO gguf knows no architecture of this name"]),
            f"    arch={_quoted(self.arch)},",
            f"    hf_names=({_quoted(self.hf_name)},),",
            f"    model_type={_quoted(self.model_type)},",
            *self._dim_lines(),
            *self._tensor_lines(),
            *self._key_lines(),
            *self._axis_lines(),
            ")",
        ]
        return "\n".join(lines) + "\n"

    def _squeezes(self) -> bool:
        return any(1 in source.shapes[0] for source in self.sources)

    def _dim_lines(self) -> Iterator[str]:
        yield "    dims={"
        for letter, key in self.dims.items():
            default = f", {_quoted(DEFAULTS[letter])}" if letter in DEFAULTS else ""
            note = f"  # TODO what config.json calls {self.values.get(letter, self.n_layers)}" if key == "TODO" else ""
            if letter == "V" and letter not in self.values:
                default, note = ", 1", "  # TODO the number of tokens: none of the names is an embedding's"
            yield f"        {_quoted(letter)}: Dim({_quoted(key)}{default}),{note}"
        yield "    },"

    def _tensor_lines(self) -> Iterator[str]:
        yield "    tensors=("
        for template in dict.fromkeys(self.unsayable):
            yield f"        # TODO recipes have no words for a name like {_plain(template)}"
        taken: dict[str, list[_Source]] = defaultdict(list)
        for source in self.sources:
            shape, notes = self._shape(source)
            target, note = self._target(source)
            rivals = [other for other in taken[target] if other.layers & source.layers or not source.layers]
            taken[target].append(source)
            if rivals:
                notes.append(f"looks like {target} as well: of {_plain(rivals[0].template)} or of this?")
                target = _unknown_target(source)
            ops = ", (Squeeze(),)" if 1 in source.shapes[0] else ""
            limit = f", only={_quoted(self.only[source.template])}" if source.template in self.only else ""
            if source.layers and not limit and len(source.layers) < self.n_layers:
                note = f"in layers {_ranges(source.layers)} alone"
            if source.tensor == MODEL_TENSOR.OUTPUT or (source.layers and not limit and note.startswith("in layers")):
                limit = ", required=False"
            for text in (*notes, note):
                if text:
                    yield f"        # TODO {text}"
            yield f"        Tensor({_quoted(source.template)}, {_quoted(target)}, {_quoted(shape)}{ops}{limit}),"
        yield "    ),"

    def _shape(self, source: _Source) -> tuple[str, list[str]]:
        position, product = PRODUCTS.get(source.tensor, (-1, "")) if source.tensor else (-1, "")
        spelled, notes = [], []
        for i, extent in enumerate(source.shapes[0]):
            spellings = self._spellings(extent, product if i == position else "") if extent > 1 else []
            spelled.append(spellings[0] if spellings else str(extent))
            if len(spellings) > 1:
                notes.append(f"is {extent} {' or '.join(spellings)}?")
        if len(source.shapes) > 1:
            notes.append(f"shapes differ: {', '.join(map(str, source.shapes[:3]))}")
        return " ".join(spelled), list(dict.fromkeys(notes))

    def _target(self, source: _Source) -> tuple[str, str]:
        """A target's name, and what is to be checked about it."""
        ending = next((end for end in (".weight", ".bias") if source.template.endswith(end)), "")
        if source.tensor is None:
            return _unknown_target(source), "the target's name"
        target = TENSOR_NAMES[source.tensor].replace("{bid}", "{i}")
        if not ending:
            return target + (".bias" if len(source.shapes[0]) == 1 else ".weight"), "is it .weight or .bias?"
        if source.tensor in ROTATED:
            heads = "A" if source.tensor == MODEL_TENSOR.ATTN_Q else "K"
            return (
                target + ending,
                f'(Permute("{heads}"),) after the shape, if llama.cpp permutes this model\'s Q and K',
            )
        return target + ending, ""

    def _key_lines(self) -> Iterator[str]:
        rules = {rule: key for key, rule in RULE_KEYS.items() if self.config.get(key) is not None}
        yield "    keys=("
        for name, letter in DIM_KEYS.items():
            if letter in self.dims:
                yield f'        Key("{{arch}}.{name}", "{letter}"),'
        for rule in rules:
            yield f"        Key({rule}),"
        yield "    ),"
        for key in sorted(self.config.keys() - set(self.dims.values()) - RULE_KEYS.keys() - COMMON):
            yield f"    # TODO nothing reads {_plain(key)}: {_plain(repr(self.config[key])[:60])}"

    def _axis_lines(self) -> Iterator[str]:
        if self.axes:
            yield "    # TODO better names, and claims= for what config.json says of them"
            yield "    axes={"
            for axis, (one, other) in self.axes.items():
                yield f"        {_quoted(axis)}: ({_quoted(one)}, {_quoted(other)}),"
            yield "    },"


def _unknown_target(source: _Source) -> str:
    place = "blk.{i}." if "{i}" in source.template else ""
    return f"{place}TODO.{source.template.replace('{i}.', '').replace('{e}.', '')}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=True)


def _plain(text: str) -> str:
    """Text of an untrusted file for a comment or docstring: one line, and nothing that ends it."""
    return _quoted(text)[1:-1].replace('"', "'").replace("\\", "/")


def _gguf_arch(model_type: str) -> str:
    """gguf's name for a model type, or the model type itself."""
    known = {name.replace("-", ""): name for name in MODEL_ARCH_NAMES.values()}
    return known.get(model_type.replace("_", "").replace("-", ""), model_type)


def _name_tables(arch: str) -> Mapping[str, MODEL_TENSOR]:
    """Source names without their endings, as gguf knows them in this architecture; else as in any."""
    found = next((key for key, name in MODEL_ARCH_NAMES.items() if name == arch), None)
    own = set() if found is None else set(MODEL_TENSORS[found])
    tables: dict[str, MODEL_TENSOR] = {}
    arch_tables = TensorNameMap.arch_block_mappings_cfg.values()
    for table in (TensorNameMap.mappings_cfg, TensorNameMap.block_mappings_cfg, *arch_tables):
        for tensor, names in table.items():
            for name in names:
                if name not in tables or (tensor in own and tables[name] not in own):
                    tables[name] = tensor
    return tables


def _meaning(template: str, tables: Mapping[str, MODEL_TENSOR]) -> MODEL_TENSOR | None:
    """What gguf takes a source for; its tables have experts under the name that they get when stacked."""
    stem = template.removesuffix(".weight").removesuffix(".bias").replace("{e}.", "").replace("{i}", "{bid}")
    return tables.get(stem) or tables.get(stem.removeprefix("model."))


def _telling_part(templates: Sequence[str], others: Iterable[str]) -> str:
    """The first part of these names that none of the others has."""
    common = {part for other in others for part in other.split(".")}
    parts = (part for template in templates for part in template.split("."))
    return next((part for part in parts if part not in common and part.isidentifier()), "other")


def _ranges(numbers: Iterable[int]) -> str:
    """1-3, 5 for 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
