"""The text of a drafted recipe module."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES

from streamconv.recipe.draft.dims import TODO, DraftDims
from streamconv.recipe.draft.sources import Source
from streamconv.recipe.registry import all_recipes

ROTATED = (MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K)

# Keys of nearly every GGUF architecture whose value is a dim ...
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
# ... and, by config key, the keys whose value is read from the config by a rule.
RULE_KEYS = {
    "max_position_embeddings": '"{arch}.context_length", lambda m: m.config.integer("max_position_embeddings")',
    "rms_norm_eps": '"{arch}.attention.layer_norm_rms_epsilon", lambda m: m.config.positive("rms_norm_eps"), F32',
    "norm_eps": '"{arch}.attention.layer_norm_rms_epsilon", lambda m: m.config.positive("norm_eps"), F32',
    "layer_norm_eps": '"{arch}.attention.layer_norm_epsilon", lambda m: m.config.positive("layer_norm_eps"), F32',
    "rope_theta": '"{arch}.rope.freq_base", lambda m: m.config.rope_base(10_000.0), F32',
    "rope_parameters": '"{arch}.rope.freq_base", lambda m: m.config.rope_base(10_000.0), F32',
}
DEFAULTS = {"A": "H/D", "K": "A", "D": "H/A"}

# Config keys that are read for every architecture, or that do not affect the calculations of a model.
COMMON = frozenset(
    """architectures model_type dtype torch_dtype transformers_version use_cache initializer_range tie_word_embeddings
    bos_token_id eos_token_id pad_token_id attention_dropout""".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Draft:
    """The facts and guesses about an architecture from which the module is written.

    Attributes:
        config: The contents of config.json.
        hf_name: The class name in "architectures" of the config, or TODO.
        model_type: The model type in the config, or TODO.
        arch: gguf's name of the architecture, or the model type.
        sources: The tensors by template.
        unsayable: The templates that recipes cannot express.
        n_layers: The number of layers.
        dims: The dims, with config keys and values.
        axes: The two kinds of layers on each axis.
        only: By template, the kind of the layers that have it, such as "axis1=conv".
    """

    config: Mapping[str, Any]
    hf_name: str
    model_type: str
    arch: str
    sources: Sequence[Source]
    unsayable: Sequence[str]
    n_layers: int
    dims: DraftDims
    axes: Mapping[str, tuple[str, str]]
    only: Mapping[str, str]


def module_text(draft: Draft) -> str:
    """Return a Python module with the recipe, and a TODO for everything that a person must decide."""
    supported = next((recipe.arch for recipe in all_recipes() if draft.hf_name in recipe.hf_names), None)
    squeezes = any(1 in source.shapes[0] for source in draft.sources)
    lines = [
        f'"""{_plain(draft.hf_name)}: TODO say what it is, and which sources say so.',
        "",
        f"Drafted from {len(draft.sources)} names of tensors in {draft.n_layers} layers. Settle every TODO.",
        *([f"There is a recipe already: architectures/{supported}.py"] if supported else []),
        '"""',
        "",
        "from __future__ import annotations",
        "",
        f"from streamconv.recipe import F32, Dim, Key, Recipe, {'Squeeze, ' if squeezes else ''}Tensor",
        "",
        "RECIPE = Recipe(",
        *([] if draft.arch in MODEL_ARCH_NAMES.values() else ["    # TODO gguf has no architecture of this name"]),
        f"    arch={_quoted(draft.arch)},",
        f"    hf_names=({_quoted(draft.hf_name)},),",
        f"    model_type={_quoted(draft.model_type)},",
        *_dim_lines(draft.dims, draft.n_layers),
        *_tensor_lines(draft),
        *_key_lines(draft.config, draft.dims),
        *_axis_lines(draft.axes),
        ")",
    ]
    return "\n".join(lines) + "\n"


def _dim_lines(dims: DraftDims, n_layers: int) -> Iterator[str]:
    yield "    dims={"
    for letter, key in dims.config_keys.items():
        default = f", {_quoted(DEFAULTS[letter])}" if letter in DEFAULTS else ""
        note = f"  # TODO what config.json calls {dims.values.get(letter, n_layers)}" if key == TODO else ""
        if letter == "V" and letter not in dims.values:
            default, note = ", 1", "  # TODO the number of tokens: none of the names is an embedding's"
        yield f"        {_quoted(letter)}: Dim({_quoted(key)}{default}),{note}"
    yield "    },"


def _tensor_lines(draft: Draft) -> Iterator[str]:
    yield "    tensors=("
    for template in draft.unsayable:
        yield f"        # TODO recipes cannot express a name like {_plain(template)}"
    taken: dict[str, list[Source]] = defaultdict(list)
    for source in draft.sources:
        target, note = _target(source)
        rivals = [other for other in taken[target] if other.layers & source.layers or not source.layers]
        taken[target].append(source)
        yield from _row_lines(draft, source, target, note, rivals)
    yield "    ),"


def _row_lines(draft: Draft, source: Source, target: str, note: str, rivals: Sequence[Source]) -> Iterator[str]:
    """Yield the questions about a source as TODO comments, then its row.

    Args:
        draft: The draft.
        source: The source of the row.
        target: Its target.
        note: A question about the target, or "".
        rivals: Earlier sources with the same target.
    """
    shape, notes = draft.dims.spelled(source)
    if rivals:
        notes.append(f"looks like {target} as well: of {_plain(rivals[0].template)} or of this?")
        target = _unknown_target(source)
    ops = ", (Squeeze(),)" if 1 in source.shapes[0] else ""
    limit = f", only={_quoted(draft.only[source.template])}" if source.template in draft.only else ""
    is_partial = bool(source.layers) and not limit and len(source.layers) < draft.n_layers
    if is_partial:
        note = f"only in layers {_ranges(source.layers)}"
    if source.tensor == MODEL_TENSOR.OUTPUT or is_partial:
        limit = ", required=False"
    for text in (*notes, note):
        if text:
            yield f"        # TODO {text}"
    yield f"        Tensor({_quoted(source.template)}, {_quoted(target)}, {_quoted(shape)}{ops}{limit}),"


def _target(source: Source) -> tuple[str, str]:
    """Return the name of a source's target, and a question about it or ""."""
    ending = next((end for end in (".weight", ".bias") if source.template.endswith(end)), "")
    if source.tensor is None:
        return _unknown_target(source), "the target's name"
    target = TENSOR_NAMES[source.tensor].replace("{bid}", "{i}")
    if not ending:
        return target + (".bias" if len(source.shapes[0]) == 1 else ".weight"), "is it .weight or .bias?"
    if source.tensor in ROTATED:
        heads = "A" if source.tensor == MODEL_TENSOR.ATTN_Q else "K"
        note = f'(Permute("{heads}"),) after the shape, if llama.cpp permutes this model\'s Q and K'
        return target + ending, note
    return target + ending, ""


def _unknown_target(source: Source) -> str:
    place = "blk.{i}." if "{i}" in source.template else ""
    return f"{place}TODO.{source.template.replace('{i}.', '').replace('{e}.', '')}"


def _key_lines(config: Mapping[str, Any], dims: DraftDims) -> Iterator[str]:
    rules = {rule: key for key, rule in RULE_KEYS.items() if config.get(key) is not None}
    yield "    keys=("
    for name, letter in DIM_KEYS.items():
        if letter in dims.config_keys:
            yield f'        Key("{{arch}}.{name}", "{letter}"),'
    for rule in rules:
        yield f"        Key({rule}),"
    yield "    ),"
    for key in sorted(config.keys() - set(dims.config_keys.values()) - RULE_KEYS.keys() - COMMON):
        yield f"    # TODO nothing reads {_plain(key)}: {_plain(repr(config[key])[:60])}"


def _axis_lines(axes: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    if axes:
        yield "    # TODO better names, and claims= for what config.json says of them"
        yield "    axes={"
        for axis, (one, other) in axes.items():
            yield f"        {_quoted(axis)}: ({_quoted(one)}, {_quoted(other)}),"
        yield "    },"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=True)


def _plain(text: str) -> str:
    """Return text of an untrusted file for a comment or docstring: on one line, without quotes that would end it."""
    return _quoted(text)[1:-1].replace('"', "'").replace("\\", "/")


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ranges: "1-3, 5" for 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
