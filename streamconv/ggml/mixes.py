"""llama-quantize's mixes, and what a caller says of one: the model's facts, its tensors, the types asked for.

Which type each tensor gets follows from the rules in mix_rules.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from gguf.constants import GGMLQuantizationType, LlamaFileType

from streamconv.errors import UsageError
from streamconv.ggml.element_types import TYPES
from streamconv.ggml.outtypes import canonical

T = GGMLQuantizationType
F = LlamaFileType


@dataclass(frozen=True, slots=True)
class Mix:
    """One outtype.

    Attributes:
        name: llama-quantize's, in lower case.
        file_type: `general.file_type`.
        type: of the tensors for which no rule says otherwise.
    """

    name: str
    file_type: LlamaFileType
    type: GGMLQuantizationType


MIXES: Final[Mapping[str, Mix]] = MappingProxyType(
    {
        mix.name: mix
        for mix in (
            Mix("q4_0", F.MOSTLY_Q4_0, T.Q4_0),
            Mix("q4_1", F.MOSTLY_Q4_1, T.Q4_1),
            Mix("q5_0", F.MOSTLY_Q5_0, T.Q5_0),
            Mix("q5_1", F.MOSTLY_Q5_1, T.Q5_1),
            Mix("q8_0", F.MOSTLY_Q8_0, T.Q8_0),
            Mix("q2_k", F.MOSTLY_Q2_K, T.Q2_K),
            Mix("q2_k_s", F.MOSTLY_Q2_K_S, T.Q2_K),
            Mix("q3_k_s", F.MOSTLY_Q3_K_S, T.Q3_K),
            Mix("q3_k_m", F.MOSTLY_Q3_K_M, T.Q3_K),
            Mix("q3_k_l", F.MOSTLY_Q3_K_L, T.Q3_K),
            Mix("q4_k_s", F.MOSTLY_Q4_K_S, T.Q4_K),
            Mix("q4_k_m", F.MOSTLY_Q4_K_M, T.Q4_K),
            Mix("q5_k_s", F.MOSTLY_Q5_K_S, T.Q5_K),
            Mix("q5_k_m", F.MOSTLY_Q5_K_M, T.Q5_K),
            Mix("q6_k", F.MOSTLY_Q6_K, T.Q6_K),
            Mix("iq4_nl", F.MOSTLY_IQ4_NL, T.IQ4_NL),
            Mix("iq4_xs", F.MOSTLY_IQ4_XS, T.IQ4_XS),
            Mix("tq1_0", F.MOSTLY_TQ1_0, T.TQ1_0),
            Mix("tq2_0", F.MOSTLY_TQ2_0, T.TQ2_0),
        )
    }
)


def find_mix(name: str) -> Mix | None:
    """The mix of that name, in either case, or of that alias; None where there is none."""
    return MIXES.get(canonical(name))


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rules ask of a model.

    Attributes:
        architecture: `general.architecture`.
        n_layers: `block_count`.
        n_experts: `expert_count`, 0 where there are none.
        n_heads, n_kv_heads: of layer 0; a layer without attention has no KV heads.
    """

    architecture: str = ""
    n_layers: int = 0
    n_experts: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0

    @classmethod
    def of_keys(cls, get: Callable[[str], Any]) -> ModelFacts:
        """The facts in a file's keys: `get` has a key's value, a sequence for an array, None where there is none."""
        architecture = str(get("general.architecture"))

        def first(name: str, default: int) -> int:
            value = get(f"{architecture}.{name}")
            if value is None:
                return default
            return int(next(iter(value), 0)) if isinstance(value, Iterable) else int(value)

        n_heads = first("attention.head_count", 0)
        n_kv_heads = first("attention.head_count_kv", n_heads)
        return cls(architecture, first("block_count", 0), first("expert_count", 0), n_heads, n_kv_heads)

    @property
    def heads_per_kv_head(self) -> int:
        return self.n_heads // self.n_kv_heads if self.n_kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls the model 70B, by its number of layers."""
        if self.architecture == "llama" and (self.n_experts == 8 or self.n_heads == self.n_kv_heads):
            return False
        return (self.architecture, self.n_layers) in _70B


_70B: Final = {("llama", 80), ("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)}


@dataclass(frozen=True, slots=True)
class MixedTensor:
    """A tensor as it lies in the lossless file.

    Attributes:
        name: llama.cpp's.
        shape: row-major.
        type: the one that it keeps where it is not quantised.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class MixOptions:
    """What a user asks for beyond the mix.

    Attributes:
        overrides: (pattern, type): the first pattern found in a tensor's name decides.
        output_type: of output.weight, or of the embedding of a model without one.
        embedding_type: of token_embd.weight, whatever else is said.
        leave_output: keep output.weight as it is.
        pure: the mix's own type for all.
    """

    overrides: tuple[tuple[re.Pattern[str], GGMLQuantizationType], ...] = ()
    output_type: GGMLQuantizationType | None = None
    embedding_type: GGMLQuantizationType | None = None
    leave_output: bool = False
    pure: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The type of one tensor.

    Attributes:
        type: what it gets.
        wanted: what it would have got if its rows were divisible; the same where they are.
    """

    type: GGMLQuantizationType
    wanted: GGMLQuantizationType


def parse_override(text: str) -> tuple[re.Pattern[str], GGMLQuantizationType]:
    """REGEX=TYPE, cut at the first `=`, the pattern in lower case, as in llama-quantize. UsageError where it is not."""
    pattern, _, type_ = text.partition("=")
    if not pattern or not type_:
        raise UsageError(f"{text!r} is not REGEX=TYPE", hint="such as attn_v=q8_0", code="tensor-type-syntax")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # sets such as [[:digit:]], which mean something else here
            return re.compile(pattern.lower()), parse_type(type_)
    except (re.error, FutureWarning) as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}", code="tensor-type-syntax") from None


def parse_type(text: str) -> GGMLQuantizationType:
    """The element type of that name, in either case. UsageError where nobody here makes it."""
    type_ = T.__members__.get(text.upper())
    if type_ is None or type_ not in _MADE:
        able = ", ".join(sorted(known.name.lower() for known in _MADE))
        raise UsageError(f"{text!r} is not a type that can be made", hint=f"one of {able}", code="type-unknown")
    return type_


_MADE: Final = frozenset(id_ for id_, row in TYPES.items() if row.encoder)
