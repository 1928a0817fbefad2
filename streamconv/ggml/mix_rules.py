"""Which type each tensor of a quantised file gets: llama-quantize's rules, as tables.

A file of "q4_k_m" is mostly Q4_K; some tensors get more bits, by their role, by where they stand among the layers and
by what the model is. Layers are counted as llama-quantize counts them: over the tensors in the order in which it writes
them, without those for which a type was asked.
Source of the rules: src/llama-quant.cpp of llama.cpp as in llama-cpp-python 0.3.36; tests/tools/make_mix_goldens.py
asks the library itself.
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


# --- what is never quantised --------------------------------------------------------------------------------------

# In any name. Small and sensitive, or read in a fixed type.
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
    """Whether a mix changes the type of such a tensor at all."""
    if sum(extent > 1 for extent in shape[:-1]) == 0:  # leading ones do not make a dimension
        return False
    if options.leave_output and name == _OUTPUT:
        return False
    return name.endswith("weight") and name not in _KEPT_WHOLE and not any(part in name for part in _KEPT)


# --- roles and rules ----------------------------------------------------------------------------------------------


class Role(Enum):
    """What a tensor is to the rules."""

    OUTPUT = "output"
    EMBEDDING = "token embedding"
    VALUE = "attention value, alone or in a fused tensor"
    KEY = "attention key"
    ATTENTION_OUTPUT = "attention output"
    UP = "feed-forward up or gate"
    DOWN = "feed-forward down"
    OTHER = "other"


_OUTPUT: Final = "output.weight"
_EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")
# The first that is found in the name.
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
    if name == _OUTPUT:
        return Role.OUTPUT
    if name in _EMBEDDINGS:
        return Role.EMBEDDING
    return next((role for part, role in _ROLES if part in name), Role.OTHER)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor stands: number `i` of the `n` of its role (or in layer `i` of `n`), in which model."""

    i: int
    n: int
    model: ModelFacts
    has_importance: bool

    def within(self, part: int) -> bool:
        """In the first 1/part of the layers."""
        return self.i < self.n // part

    @property
    def more_bits(self) -> bool:
        """In the first eighth, the last eighth, or a third of those between."""
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


# The first that fits decides; without one a tensor gets the mix's own type.
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

# Where a row does not divide into blocks: a type with blocks of 32. Where it does not divide into those either: F16.
_FALLBACKS: Final[Mapping[GGMLQuantizationType, GGMLQuantizationType]] = MappingProxyType(
    {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0, T.IQ4_XS: T.IQ4_NL}
    | dict.fromkeys((T.TQ1_0, T.TQ2_0), T.Q4_0)
)


@dataclass(slots=True)
class _Counters:
    """Tensors of each role that the rules have seen."""

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
    """The type of each tensor in a file of `mix`.

    Args:
        mix: one of MIXES.
        tensors: all of the model, in any order: counts go by layer and name, as llama-quantize's do.
        model: its facts.
        options: what the user asks for.
        has_importance: whether an importance matrix is given, for whichever tensors.

    Returns:
        A choice for each name, in the order of `tensors`. A tensor that is not quantised keeps its type.

    Raises:
        UsageError: the type that an option asks for does not divide the tensor's rows (code `type-row`).
        SourceError: a feed-forward tensor of a model with experts does not have its layer in its name, or one that the
            model does not have (code `mix-layer`).
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
    """What is not as the outtype or an option says: tensors that fell back, and patterns that changed nothing."""
    fallen = [choice for choice in choices.values() if choice.type != choice.wanted]
    if fallen:
        wanted, made = (
            " and ".join(sorted({type_.name for type_ in types}))
            for types in ((choice.wanted for choice in fallen), (choice.type for choice in fallen))
        )
        what = f"{len(fallen)} of {len(choices)} tensors have rows that do not divide into blocks of {wanted}"
        yield RunWarning("type-fallback", f"{what}: they become {made}")
    yield from unused_overrides({name: choice.type for name, choice in choices.items()}, options)


def unused_overrides(types: Mapping[str, GGMLQuantizationType], options: MixOptions) -> Iterator[RunWarning]:
    """A warning for each pattern of `options` that gives none of the tensors its type."""
    for pattern, wanted in options.overrides:
        found = [type_ for name, type_ in types.items() if pattern.search(name)]
        if wanted not in found:
            what = (
                f"of the {len(found)} tensors that it matches none becomes"
                if found
                else "no tensor's name has it, so none becomes"
            )
            yield RunWarning("tensor-type-unused", f"--tensor-type {pattern.pattern}: {what} {wanted.name}")


def requires_importance(mix: Mix, name: str, type_: GGMLQuantizationType) -> bool:
    """Whether llama-quantize refuses to make this without an importance matrix."""
    return mix.name == "q2_k_s" and type_ == T.Q2_K and role_of(name) not in (Role.OUTPUT, Role.EMBEDDING)


def _order(name: str) -> tuple[int, bytes]:
    """By layer, those without one first; then by name."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name.encode())


def _asked(name: str, role: Role, options: MixOptions) -> GGMLQuantizationType | None:
    """What an option says of just this tensor; such a type is taken as it is."""
    if options.embedding_type is not None and role is Role.EMBEDDING:
        if name != _EMBEDDINGS[0] and _override(name, options) is not None:
            return None
        return options.embedding_type
    return options.output_type if role is Role.OUTPUT else None


def asked(name: str, options: MixOptions) -> GGMLQuantizationType | None:
    """The type that an option asks for, of a tensor in a file that is not a mix."""
    if name == _EMBEDDINGS[0] and options.embedding_type is not None:
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
        if options.output_type is not None:  # F32 is 0
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
    """The number of a feed-forward tensor: a running one, but by its layer where there are experts."""
    if model.n_experts <= 1:
        return i
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer is None or int(layer[1]) >= model.n_layers:
        message = f"is not in one of the model's {model.n_layers} layers, by which its type is chosen"
        raise SourceError(message, tensor=name, hint="name its type with --tensor-type", code="mix-layer")
    return int(layer[1])


def _notdivisible(tensor: MixedTensor, asked: GGMLQuantizationType) -> UsageError:
    block, able = TYPES[asked].dtype.block, divisible(asked, tensor.shape[-1])
    message = f"{asked.name} takes rows of a multiple of {block} elements, these have {tensor.shape[-1]}"
    return UsageError(message, tensor=tensor.name, hint=f"ask for {able.name.lower()}", code="type-row")


def divisible(wanted: GGMLQuantizationType, n_columns: int) -> GGMLQuantizationType:
    """`wanted`, or what takes its place where rows of `n_columns` do not divide into its blocks."""
    for type_ in (wanted, _FALLBACKS.get(wanted, wanted)):
        if n_columns % TYPES[type_].dtype.block == 0:
            return type_
    return T.F16
