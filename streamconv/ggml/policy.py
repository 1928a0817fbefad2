"""Which type each tensor of the output gets: one table, llama.cpp's rules.

Source: ModelBase.prepare_tensors in llama.cpp's convert_hf_to_gguf.py, and measured on its output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from gguf.constants import GGMLQuantizationType, LlamaFileType

from streamconv.errors import SourceError
from streamconv.ggml.element_types import TYPES, VERIFIABLE
from streamconv.gguf.names import spellings
from streamconv.lazy import dtype
from streamconv.lazy.node import TensorSpec

F32, F16, BF16, Q8_0 = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
)

OUTTYPES: Final[Mapping[str, GGMLQuantizationType]] = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}

FILE_TYPES: Final[Mapping[GGMLQuantizationType, LlamaFileType]] = {
    F32: LlamaFileType.ALL_F32,
    F16: LlamaFileType.MOSTLY_F16,
    BF16: LlamaFileType.MOSTLY_BF16,
    Q8_0: LlamaFileType.MOSTLY_Q8_0,
}

# llama-quantize's names; Q4_K and the like are its short ones for Q4_K_M.
_MOSTLY: Final = [kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType if kind.name.startswith("MOSTLY_")]
_QUANTIZED: Final = frozenset(form for name in _MOSTLY for form in (name, name.replace("_K_M", "_K")))

# Norms, and whatever is not a weight matrix: biases, tables. What else an architecture keeps in F32 its rows say.
_ALWAYS_F32 = re.compile(r".*_norm\.weight|.*(?<!\.weight)(?<!\.lora_a)(?<!\.lora_b)")


def outtype_hint(word: str) -> str | None:
    """The way out where `word` is no outtype: its small letters, or llama-quantize for what only llama.cpp writes."""
    if word.lower() in ("auto", *OUTTYPES):
        return f"write {word.lower()}"
    if word.upper() in _QUANTIZED:
        return f"llama.cpp's llama-quantize makes {word.upper()} of a converted model"
    return None


def resolve_auto(specs: Iterable[TensorSpec]) -> str:
    """What `auto` means: the first tensor of two or more dimensions that is BF16 or F16 decides, F16 where none is."""
    for spec in specs:
        if len(spec.shape) >= 2 and spec.dtype in (dtype.BF16, dtype.F16):
            return "bf16" if spec.dtype == dtype.BF16 else "f16"
    return "f16"


def choose_type(role: TensorRole, outtype: str) -> GGMLQuantizationType:
    """The type that a tensor gets in a file of `outtype`."""
    if role.is_f32 or len(role.shape) <= 1 or _ALWAYS_F32.fullmatch(role.name):
        return F32
    wanted = OUTTYPES[outtype]
    if role.shape[-1] % TYPES[wanted].dtype.block:
        return F16
    return wanted


def _loses_nothing(type_: GGMLQuantizationType) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class TensorRole:
    """A tensor as a policy sees it.

    Attributes:
        name: What llama.cpp calls it.
        shape: Row-major.
        is_f32: Whether its architecture keeps it in F32 in every outtype.
        loss: What of the model a type would round beyond the source's own numbers, as a phrase; None where nothing.
    """

    name: str
    shape: tuple[int, ...]
    is_f32: bool = False
    loss: Callable[[GGMLQuantizationType], str | None] = _loses_nothing


class TypePolicy(Protocol):
    """Which type each tensor of a file gets.

    Attributes:
        outtype: the file's type in llama-quantize's words, in lower case.
        file_type: general.file_type.
    """

    @property
    def outtype(self) -> str: ...
    @property
    def file_type(self) -> int: ...
    def choose(self, role: TensorRole) -> GGMLQuantizationType:
        """The type of a tensor. SourceError where that cannot hold it."""
        ...


@dataclass(frozen=True, slots=True)
class PlainTypes:
    """One of OUTTYPES for all weight matrices, as llama.cpp's converter does."""

    outtype: str

    @property
    def file_type(self) -> int:
        return FILE_TYPES[OUTTYPES[self.outtype]]

    def choose(self, role: TensorRole) -> GGMLQuantizationType:
        return type_of(role, self.outtype)


@dataclass(frozen=True, slots=True)
class StoredTypes:
    """The types that the tensors of a finished file have, so that a job can be compared with it whatever made it.

    A tensor that the file lacks, or has in another shape or in a type that cannot be made here, is F32: the comparison
    names it.
    """

    outtype: str
    file_type: int
    types: Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType]]

    def choose(self, role: TensorRole) -> GGMLQuantizationType:
        found = (self.types[name] for name in spellings(role.name) if name in self.types)
        shape, type_ = next(found, ((), F32))
        return type_ if shape == role.shape and type_ in VERIFIABLE else F32


def stored_outtype(file_type: int, nbytes: Mapping[str, int]) -> str:
    """The outtype of a file with `nbytes` of tensors by type: what it says where that is so, else its largest type."""
    with suppress(ValueError):
        said = LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        if any(said.startswith(name) for name in nbytes if name != "F32"):  # which all files have
            return said.lower()
    return max(nbytes, key=lambda name: nbytes[name], default="f32").lower()


def type_of(role: TensorRole, outtype: str) -> GGMLQuantizationType:
    """`choose_type`, where the type rounds nothing that the model's operations made; else SourceError."""
    type_ = choose_type(role, outtype)
    if (what := role.loss(type_)) is not None:
        able = [name for name in OUTTYPES if role.loss(choose_type(role, name)) is None]
        raise SourceError(
            f"the model {what}, which {type_.name} cannot hold exactly",
            tensor=role.name,
            hint=f"--outtype {' or '.join(able)}",
            code="inexact-type",
        )
    return type_
