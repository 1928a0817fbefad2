"""llama-quantize's mixes, and the inputs of their rules: facts about the model, its tensors, and the user's choices.

The rules that choose the type of each tensor are in mix_rules.py.
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
from streamconv.ggml.outtypes import OUTTYPES, Outtype, canonical
from streamconv.lazy.dtype import FLOATS

T = GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class Mix:
    """One outtype of llama-quantize.

    Attributes:
        name: llama-quantize's name, in lower case.
        file_type: `general.file_type`.
        type: The type of tensors to which no rule applies.
    """

    name: str
    file_type: LlamaFileType
    type: GGMLQuantizationType


def file_type_of(outtype: Outtype) -> LlamaFileType:
    """general.file_type of a file with this outtype."""
    own = TYPES[GGMLQuantizationType[outtype.type]].file_type
    if outtype.file_type or own is None:
        return LlamaFileType[f"MOSTLY_{outtype.file_type}"]
    return own


# Of all quantised types; also of Q8_0, which llama.cpp's converter makes as well.
MIXES: Final[Mapping[str, Mix]] = MappingProxyType(
    {
        row.name: Mix(row.name, file_type_of(row), GGMLQuantizationType[row.type])
        for row in OUTTYPES.values()
        if TYPES[GGMLQuantizationType[row.type]].dtype not in FLOATS
    }
)


def find_mix(name: str) -> Mix | None:
    """The mix with this name or alias, in upper or lower case; None if there is none."""
    return MIXES.get(canonical(name))


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts about a model on which the rules depend.

    Attributes:
        architecture: `general.architecture`.
        n_layers: `block_count`.
        n_experts: `expert_count`; 0 without experts.
        n_heads, n_kv_heads: Those of layer 0; a layer without attention has 0 KV heads.
    """

    architecture: str = ""
    n_layers: int = 0
    n_experts: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0

    @classmethod
    def of_keys(cls, get: Callable[[str], Any]) -> ModelFacts:
        """The facts in a file's keys.

        Args:
            get: Returns the value of a key: a sequence for an array, None if there is no such key.
        """
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
        """Attention heads that share a KV head; 0 without KV heads."""
        return self.n_heads // self.n_kv_heads if self.n_kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp considers the model a 70B one, by its number of layers."""
        if self.architecture == "llama" and (self.n_experts == 8 or self.n_heads == self.n_kv_heads):
            return False
        return (self.architecture, self.n_layers) in _70B


_70B: Final = {("llama", 80), ("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)}


@dataclass(frozen=True, slots=True)
class MixedTensor:
    """A tensor of the file before quantisation.

    Attributes:
        name: llama.cpp's name.
        shape: Row-major.
        type: Its type, which it keeps if it is not quantised.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class MixOptions:
    """The user's choices in addition to the mix.

    Attributes:
        overrides: (pattern, type): the first pattern found in a tensor's name decides.
        output_type: The type of output.weight, or of the embedding of a model without one.
        embedding_type: The type of token_embd.weight; it takes precedence over all others.
        leave_output: Whether output.weight is not quantised.
        pure: Whether all tensors get the mix's own type.
    """

    overrides: tuple[tuple[re.Pattern[str], GGMLQuantizationType], ...] = ()
    output_type: GGMLQuantizationType | None = None
    embedding_type: GGMLQuantizationType | None = None
    leave_output: bool = False
    pure: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The type chosen for one tensor.

    Attributes:
        type: The type.
        wanted: The type before fallbacks for rows that do not divide into blocks.
    """

    type: GGMLQuantizationType
    wanted: GGMLQuantizationType


def parse_override(text: str) -> tuple[re.Pattern[str], GGMLQuantizationType]:
    """The pattern and type of "REGEX=TYPE", split at the first `=`; as in llama-quantize, the pattern is lower-cased.

    Raises:
        UsageError: It does not have this form, or there is no such type.
    """
    pattern, _, type_ = text.partition("=")
    if not pattern or not type_:
        raise UsageError(f"{text!r} is not REGEX=TYPE", hint="such as attn_v=q8_0", code="tensor-type-syntax")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", FutureWarning
            )  # for sets such as [[:digit:]], which Python reads differently
            return re.compile(pattern.lower()), parse_type(type_)
    except (re.error, FutureWarning) as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}", code="tensor-type-syntax") from None


def parse_type(text: str) -> GGMLQuantizationType:
    """The element type with this name, in upper or lower case.

    Raises:
        UsageError: There is no such type, or it can only be read.
    """
    type_ = T.__members__.get(text.upper())
    if type_ is None or type_ not in _MADE:
        able = ", ".join(sorted(known.name.lower() for known in _MADE))
        raise UsageError(f"{text!r} is not a type that can be made", hint=f"one of {able}", code="type-unknown")
    return type_


_MADE: Final = frozenset(id_ for id_, row in TYPES.items() if row.encoder)
