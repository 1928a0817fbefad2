"""Which type each tensor of the output gets: one table, llama.cpp's rules.

Source: ModelBase.prepare_tensors in llama.cpp's convert_hf_to_gguf.py, and measured on its output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from gguf.constants import GGMLQuantizationType, LlamaFileType

from streamconv.errors import SourceError
from streamconv.ggml.element_types import TYPES, VERIFIABLE
from streamconv.gguf.names import spellings
from streamconv.lazy import dtype
from streamconv.lazy.arithmetic import Scale
from streamconv.lazy.node import LazyTensor, TensorSpec

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

# Below it a Q8_0 block whose largest weight is 0.03 has a scale of less than 8 bits, and errs by that more than by its
# quants (F16's subnormals are multiples of 2**-24).
LEAST_F16_FACTOR: Final = 2.0**-4

# Small and sensitive: norms, routers, convolution kernels, and whatever is no weight matrix (biases, tables).
_ALWAYS_F32 = re.compile(r".*(_norm|ffn_gate_inp|shortconv\.conv)\.weight|.*(?<!\.weight)(?<!\.lora_a)(?<!\.lora_b)")


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


def choose_type(target: str, shape: tuple[int, ...], outtype: str) -> GGMLQuantizationType:
    """The type that the tensor `target` of row-major `shape` gets in a file of `outtype`."""
    if len(shape) <= 1 or _ALWAYS_F32.fullmatch(target):
        return F32
    wanted = OUTTYPES[outtype]
    if shape[-1] % TYPES[wanted].dtype.block:
        return F16
    return wanted


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
    def choose(self, target: str, tensor: LazyTensor) -> GGMLQuantizationType:
        """The type of the tensor that llama.cpp calls `target`. SourceError where that cannot hold it."""
        ...


@dataclass(frozen=True, slots=True)
class PlainTypes:
    """One of OUTTYPES for all weight matrices, as llama.cpp's converter does."""

    outtype: str

    @property
    def file_type(self) -> int:
        return FILE_TYPES[OUTTYPES[self.outtype]]

    def choose(self, target: str, tensor: LazyTensor) -> GGMLQuantizationType:
        return type_of(target, tensor, self.outtype)


@dataclass(frozen=True, slots=True)
class StoredTypes:
    """The types that the tensors of a finished file have, so that a job can be compared with it whatever made it.

    A tensor that the file lacks, or has in another shape or in a type that cannot be made here, is F32: the comparison
    names it.
    """

    outtype: str
    file_type: int
    types: Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType]]

    def choose(self, target: str, tensor: LazyTensor) -> GGMLQuantizationType:
        found = (self.types[name] for name in spellings(target) if name in self.types)
        shape, type_ = next(found, ((), F32))
        return type_ if shape == tensor.spec.shape and type_ in VERIFIABLE else F32


def stored_outtype(file_type: int, nbytes: Mapping[str, int]) -> str:
    """The outtype of a file with `nbytes` of tensors by type: what it says where that is so, else its largest type."""
    with suppress(ValueError):
        said = LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        if any(said.startswith(name) for name in nbytes if name != "F32"):  # which all files have
            return said.lower()
    return max(nbytes, key=lambda name: nbytes[name], default="f32").lower()


def type_of(target: str, tensor: LazyTensor, outtype: str) -> GGMLQuantizationType:
    """`choose_type` for `tensor`; SourceError where a factor folded into it would be rounded by that type alone."""
    shape = tensor.spec.shape
    type_ = choose_type(target, shape, outtype)
    factor = float(tensor.factor) if isinstance(tensor, Scale) else 1.0
    if not _holds(type_, factor):
        able = [name for name in OUTTYPES if _holds(choose_type(target, shape, name), factor)]
        raise SourceError(
            f"the model scales these weights by {factor:g}, which {type_.name} cannot hold exactly",
            tensor=target,
            hint=f"--outtype {' or '.join(able)}",
        )
    return type_


def _holds(type_: GGMLQuantizationType, factor: float) -> bool:
    """Whether weights times `factor` lose no more in this type than the weights themselves.

    A power of two moves exponents alone; another factor costs F32 one rounding, as it does the run time that multiplies
    by it, and Q8_0 nothing, whose scales are free; but 16-bit weights that were stored exactly would all be rounded.
    F16, and Q8_0 whose scales are F16, have few exponents: a small factor leaves their numbers subnormal.
    """
    is_power = math.frexp(factor)[0] in (0.5, -0.5, 0.0)
    if type_ in (F16, Q8_0) and 0 < abs(factor) < LEAST_F16_FACTOR:
        return False
    return is_power or type_ not in (F16, BF16)
