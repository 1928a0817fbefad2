"""The type of each tensor in a quantised file: llama-quantize's rules, as tables.

A "q4_k_m" file is mostly Q4_K; some tensors get more bits, depending on their role, their layer and the model. Layers
are counted as in llama-quantize: over the tensors in the order in which it writes them, without those for which the
user chose a type.
Source of the rules: src/llama-quant.cpp of llama.cpp as in llama-cpp-python 0.3.36; tests/tools/make_mix_goldens.py
records the choices of the library itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Final

from gguf.constants import GGMLQuantizationType

from streamconv.errors import RunWarning, SourceError, UsageError
from streamconv.ggml.element_types import TYPES
from streamconv.ggml.mixes import Choice, Mix, MixedTensor, MixOptions, ModelFacts

T = GGMLQuantizationType


# --- tensors that are never quantised -----------------------------------------------------------------------------

# Names that contain one of these: small and sensitive tensors, and those that the runtime reads in a fixed type.
_KEPT: Final = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight",
    "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_KEPT_WHOLE: Final = frozenset({"position_embd.weight", "token_types.weight"})


def is_quantised(name: str, shape: tuple[int, ...], options: MixOptions) -> bool:
    """Whether a mix quantises a tensor with this name and row-major shape."""
    if sum(extent > 1 for extent in shape[:-1]) == 0:  # leading ones do not make a dimension
        return False
    if options.leave_output and name == _OUTPUT:
        return False
    return name.endswith("weight") and name not in _KEPT_WHOLE and not any(part in name for part in _KEPT)


# --- roles and rules ----------------------------------------------------------------------------------------------


class Role(Enum):
    """The role of a tensor in the rules."""

    OUTPUT = "output"
    EMBEDDING = "token embedding"
    VALUE = "attention value, alone or in a fused tensor"
    KEY = "attention key"
    ATTENTION_OUTPUT = "attention output"
    UP = "feed-forward up or gate"
    DOWN = "feed-forward down"
    OTHER = "other"


_OUTPUT: Final = "output.weight"
EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")
# The first entry that is contained in a tensor's name decides.
_ROLES: Final = (
    ("attn_qkv.weight", Role.VALUE),
    ("attn_kv_b.weight", Role.VALUE),
    ("attn_v.weight", Role.VALUE),
    ("attn_k.weight", Role.KEY),
    ("attn_q.weight", Role.OTHER),
    ("attn_output.weight", Role.ATTENTION_OUTPUT),
    ("ffn_up", Role.UP),
    ("ffn_gate", Role.UP),
    ("ffn_down", Role.DOWN),
)


def role_of(name: str) -> Role:
    """The role of a tensor by llama.cpp's name."""
    if name == _OUTPUT:
        return Role.OUTPUT
    if name in EMBEDDINGS:
        return Role.EMBEDDING
    return next((role for part, role in _ROLES if part in name), Role.OTHER)


@dataclass(frozen=True, slots=True)
class _Place:
    """The position of a tensor: number `i` of `n` with its role (or in layer `i` of `n`), and the model."""

    i: int
    n: int
    model: ModelFacts
    has_importance: bool

    def within(self, part: int) -> bool:
        """Whether it is in the first 1/part of the layers."""
        return self.i < self.n // part

    @property
    def more_bits(self) -> bool:
        """Whether it is in the first or last eighth of the layers, or every third one between."""
        return self.within(8) or self.i >= 7 * self.n // 8 or (self.i - self.n // 8) % 3 == 2

    @property
    def gqa(self) -> bool:
        return self.model.heads_per_kv_head >= 4

    @property
    def falcon(self) -> bool:
        return self.model.architecture == "falcon"

    @property
    def eight(self) -> bool:
        return self.model.n_experts == 8


def _always(_: _Place) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class _Rule:
    role: Role
    mixes: str  # names, or * for all
    type: GGMLQuantizationType
    when: Callable[[_Place], bool] = _always

    def fits(self, role: Role, mix: Mix, place: _Place) -> bool:
        return role is self.role and (self.mixes == "*" or mix.name in self.mixes.split()) and self.when(place)


# The first rule that applies decides; without one, a tensor gets the mix's own type.
_RULES: Final = (
    _Rule(Role.EMBEDDING, "tq1_0 tq2_0", T.Q4_K),
    _Rule(Role.VALUE, "q2_k", T.Q4_K, lambda at: at.gqa),
    _Rule(Role.VALUE, "q2_k", T.Q3_K),
    _Rule(Role.VALUE, "q2_k_s", T.Q4_K, lambda at: at.gqa),
    _Rule(Role.VALUE, "q3_k_m", T.Q5_K, lambda at: at.i < 2),
    _Rule(Role.VALUE, "q3_k_m", T.Q4_K),
    _Rule(Role.VALUE, "q3_k_l", T.Q5_K),
    _Rule(Role.VALUE, "iq4_nl iq4_xs", T.Q5_K, lambda at: at.gqa),
    _Rule(Role.VALUE, "q4_k_m q5_k_m", T.Q6_K, lambda at: at.more_bits),
    _Rule(Role.VALUE, "q4_k_s", T.Q5_K, lambda at: at.i < 4),
    _Rule(Role.KEY, "*", T.Q8_0, lambda at: at.eight),
    _Rule(Role.DOWN, "q2_k", T.Q3_K),
    _Rule(Role.DOWN, "q2_k_s", T.Q4_K, lambda at: at.within(8)),
    _Rule(Role.DOWN, "q3_k_m", T.Q5_K, lambda at: at.within(16)),
    _Rule(Role.DOWN, "q3_k_m", T.Q4_K, lambda at: not at.falcon or at.more_bits),
    _Rule(Role.DOWN, "q3_k_l", T.Q4_K, lambda at: at.falcon),
    _Rule(Role.DOWN, "q3_k_l", T.Q5_K),
    _Rule(Role.DOWN, "q4_k_m", T.Q6_K, lambda at: at.within(16) if at.falcon else at.more_bits),
    _Rule(Role.DOWN, "q4_k_m", T.Q5_K, lambda at: at.falcon and at.more_bits),
    _Rule(Role.DOWN, "iq4_nl iq4_xs", T.Q5_K, lambda at: at.within(8) and not at.has_importance),
    _Rule(Role.DOWN, "q5_k_m", T.Q6_K, lambda at: at.more_bits),
    _Rule(Role.DOWN, "q4_k_s", T.Q5_K, lambda at: at.within(8) and not at.falcon),
    _Rule(Role.DOWN, "q4_0", T.Q4_1, lambda at: at.within(8) and at.has_importance),
    _Rule(Role.DOWN, "q5_0", T.Q5_1, lambda at: at.within(8) and at.has_importance),
    _Rule(Role.ATTENTION_OUTPUT, "q3_k_l", T.Q4_K, lambda at: at.falcon),
    _Rule(Role.ATTENTION_OUTPUT, "q2_k q3_k_s q3_k_m q4_k_s q4_k_m iq4_nl iq4_xs", T.Q5_K,
          lambda at: at.eight and not at.falcon),
    _Rule(Role.ATTENTION_OUTPUT, "q2_k", T.Q3_K, lambda at: not at.eight and not at.falcon),
    _Rule(Role.ATTENTION_OUTPUT, "q3_k_m", T.Q4_K, lambda at: not at.eight and not at.falcon),
    _Rule(Role.ATTENTION_OUTPUT, "q3_k_l", T.Q5_K, lambda at: not at.eight and not at.falcon),
)  # fmt: skip

# The type, with blocks of 32, for rows that do not divide into the blocks of another. If they do not fit either: F16.
_FALLBACKS: Final[Mapping[GGMLQuantizationType, GGMLQuantizationType]] = MappingProxyType(
    {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0, T.IQ4_XS: T.IQ4_NL}
    | dict.fromkeys((T.TQ1_0, T.TQ2_0), T.Q4_0)
)


@dataclass(slots=True)
class _Counters:
    """How many tensors of each role the rules have been applied to."""

    n_values: int
    seen: dict[Role, int] = field(default_factory=dict)

    def next(self, role: Role) -> int:
        i = self.seen.get(role, 0)
        self.seen[role] = i + 1
        return i


def choose_types(
    mix: Mix,
    tensors: Iterable[MixedTensor],
    model: ModelFacts,
    *,
    options: MixOptions = MixOptions(),
    has_importance: bool = False,
) -> dict[str, Choice]:
    """Choose the type of each tensor in a file.

    Args:
        mix: One of MIXES.
        tensors: All tensors of the model, in any order; as in llama-quantize, they are counted by layer and name.
        model: The facts about the model.
        options: The user's choices.
        has_importance: Whether there is an importance matrix, for any of the tensors.

    Returns:
        A choice for each name, in the order of `tensors`. A tensor that is not quantised keeps its type.

    Raises:
        UsageError: A tensor's rows do not divide into blocks of the type that an option chooses (code `type-row`).
        SourceError: The name of a feed-forward tensor in a model with experts has no layer, or one that the model does
            not have (code `mix-layer`).
    """
    tensors = list(tensors)
    roles = {tensor.name: role_of(tensor.name) for tensor in tensors}
    tied = Role.OUTPUT not in roles.values()
    counters = _Counters(n_values=sum(role is Role.VALUE for role in roles.values()))
    chosen: dict[str, Choice] = {}
    for tensor in sorted(tensors, key=lambda tensor: _order(tensor.name)):
        role = roles[tensor.name]
        if not is_quantised(tensor.name, tensor.shape, options):
            chosen[tensor.name] = Choice(tensor.type, tensor.type)
        elif (asked := _asked(tensor.name, role, options)) is not None:
            if divisible(asked, tensor.shape[-1]) != asked:
                raise _notdivisible(tensor, asked)
            chosen[tensor.name] = Choice(asked, asked)
        else:
            wanted = _wanted(mix, tensor, role, tied, model, options, counters, has_importance)
            chosen[tensor.name] = Choice(divisible(wanted, tensor.shape[-1]), wanted)
    return {tensor.name: chosen[tensor.name] for tensor in tensors}


def choice_warnings(choices: Mapping[str, Choice], options: MixOptions) -> Iterator[RunWarning]:
    """Warnings for choices that differ from the user's: tensors with a fallback type, and patterns without effect."""
    fallen = [choice for choice in choices.values() if choice.type != choice.wanted]
    if fallen:
        wanted, made = (
            " and ".join(sorted({type_.name for type_ in types}))
            for types in ((choice.wanted for choice in fallen), (choice.type for choice in fallen))
        )
        what = f"{len(fallen)} of {len(choices)} tensors have rows that do not divide into blocks of {wanted}"
        yield RunWarning("type-fallback", f"{what}: they are {made} instead")
    yield from _unused_overrides({name: choice.type for name, choice in choices.items()}, options)
    if options.leave_output and _OUTPUT not in choices:
        what = f"the model has no {_OUTPUT}: its output is {EMBEDDINGS[0]}, which is quantised"
        yield RunWarning("leave-output-unused", f"--leave-output-tensor: {what}")


def _unused_overrides(types: Mapping[str, GGMLQuantizationType], options: MixOptions) -> Iterator[RunWarning]:
    """A warning for each pattern of `options` that gives no tensor its type."""
    for pattern, wanted in options.overrides:
        found = [type_ for name, type_ in types.items() if pattern.search(name)]
        if wanted not in found:
            what = (
                f"it matches {len(found)} tensors, but none of them is"
                if found
                else "it matches no tensor's name, so none is"
            )
            yield RunWarning("tensor-type-unused", f"--tensor-type {pattern.pattern}: {what} {wanted.name}")


def requires_importance(mix: Mix, name: str, type_: GGMLQuantizationType) -> bool:
    """Whether llama-quantize refuses to make this tensor without an importance matrix."""
    return mix.name == "q2_k_s" and type_ == T.Q2_K and role_of(name) not in (Role.OUTPUT, Role.EMBEDDING)


def _order(name: str) -> tuple[int, bytes]:
    """The key to sort tensors by layer (those without one first), then by name."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name.encode())


def _asked(name: str, role: Role, options: MixOptions) -> GGMLQuantizationType | None:
    """The type that an option chooses for this very tensor; it is used without a fallback."""
    if options.embedding_type is not None and role is Role.EMBEDDING:
        if name != EMBEDDINGS[0] and _override(name, options) is not None:
            return None
        return options.embedding_type
    return options.output_type if role is Role.OUTPUT else None


def asked(name: str, options: MixOptions) -> GGMLQuantizationType | None:
    """The type that an option chooses for a tensor, in a file that is not a mix; None if there is no such option."""
    if name == EMBEDDINGS[0] and options.embedding_type is not None:
        return options.embedding_type
    if name == _OUTPUT and options.output_type is not None:
        return options.output_type
    return _override(name, options)


def _override(name: str, options: MixOptions) -> GGMLQuantizationType | None:
    return next((type_ for pattern, type_ in options.overrides if pattern.search(name)), None)


def _wanted(
    mix: Mix,
    tensor: MixedTensor,
    role: Role,
    tied: bool,
    model: ModelFacts,
    options: MixOptions,
    counters: _Counters,
    has_importance: bool,
) -> GGMLQuantizationType:
    override = _override(tensor.name, options)
    if override is not None:
        return override
    if options.pure:
        return mix.type
    if role is Role.OUTPUT or (tied and role is Role.EMBEDDING):
        if options.output_type is not None:  # F32 is 0, so not truthy
            return options.output_type
        return _output_type(mix, tensor.shape[-1], model)
    i, n = counters.next(role), counters.n_values
    if role in (Role.UP, Role.DOWN):
        i, n = _layer(tensor.name, i, model), model.n_layers
    place = _Place(i, n, model, has_importance)
    wanted = next((rule.type for rule in _RULES if rule.fits(role, mix, place)), mix.type)
    if role is Role.VALUE:
        if place.eight:
            return T.Q8_0
        if model.is_70b and wanted in (T.Q3_K, T.Q4_K):
            return T.Q5_K
    return wanted


def _output_type(mix: Mix, n_columns: int, model: ModelFacts) -> GGMLQuantizationType:
    if model.architecture == "falcon" or n_columns % TYPES[mix.type].dtype.block or mix.type == T.Q8_0:
        return T.Q8_0
    return T.Q6_K


def _layer(name: str, i: int, model: ModelFacts) -> int:
    """The number by which a feed-forward tensor is counted: a running number, but its layer in a model with experts."""
    if model.n_experts <= 1:
        return i
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer is None or int(layer[1]) >= model.n_layers:
        message = f"is not in one of the model's {model.n_layers} layers, which determine its type"
        raise SourceError(message, tensor=name, hint="choose its type with --tensor-type", code="mix-layer")
    return int(layer[1])


def _notdivisible(tensor: MixedTensor, asked: GGMLQuantizationType) -> UsageError:
    block, able = TYPES[asked].dtype.block, divisible(asked, tensor.shape[-1])
    message = f"{asked.name} needs rows of a multiple of {block} elements, but these have {tensor.shape[-1]}"
    return UsageError(message, tensor=tensor.name, hint=f"use {able.name.lower()}", code="type-row")


def divisible(wanted: GGMLQuantizationType, n_columns: int) -> GGMLQuantizationType:
    """`wanted`, or its fallback if rows of `n_columns` elements do not divide into its blocks."""
    for type_ in (wanted, _FALLBACKS.get(wanted, wanted)):
        if n_columns % TYPES[type_].dtype.block == 0:
            return type_
    return T.F16
