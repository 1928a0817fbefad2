"""Which type each tensor of a file gets: a type policy, as data.

An outtype (outtypes.py) is llama.cpp's converter's, with one type for all matrices, or one of llama-quantize's mixes
(mix_rules.py). Tensors that stay F32 are named in the architecture's file (`f32` of a row), beside norms, vectors and
whatever is not a weight. A policy chooses for the whole list of tensors at once, since mixes count.

Source: ModelBase.prepare_tensors in llama.cpp's convert_hf_to_gguf.py, and measured on its output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType as T
from gguf.constants import LlamaFileType

from streamconv.errors import RunWarning, SourceError
from streamconv.ggml.element_types import TYPES, VERIFIABLE
from streamconv.ggml.mix_rules import asked, choice_warnings, choose_types, divisible, unused_overrides
from streamconv.ggml.mixes import MIXES, Choice, MixedTensor, MixOptions, ModelFacts
from streamconv.ggml.outtypes import OUTTYPES, Outtype, canonical
from streamconv.gguf.format import SCALAR_FORMATS, KeyValue, PackedArray
from streamconv.gguf.names import spellings
from streamconv.lazy import dtype
from streamconv.lazy.node import TensorSpec

# llama-quantize's names; Q4_K and the like are its short ones for Q4_K_M.
_MOSTLY: Final = [kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType if kind.name.startswith("MOSTLY_")]
_NEWER: Final = ("MXFP4_MOE", "Q2_0")  # of which gguf 0.18 does not know
_QUANTIZED: Final = frozenset(form for name in (*_MOSTLY, *_NEWER) for form in (name, name.replace("_K_M", "_K")))
_LAYER: Final = re.compile(r"\bblk\.(\d+)\.")


def outtype_hint(word: str, choices: Collection[str]) -> str | None:
    """The way out where `word` is not among the outtypes of a command: its small letters, or what does write it."""
    if canonical(word) in choices:
        return f"write {canonical(word)}"
    if canonical(word) in OUTTYPES:
        return f"streamconv convert makes {canonical(word)} of a checkpoint"
    if word.upper() in _QUANTIZED:
        return f"llama.cpp's llama-quantize makes {word.upper()} from a converted file"
    return None


def resolve_auto(specs: Iterable[TensorSpec]) -> str:
    """What `auto` means: the first tensor of two or more dimensions that is BF16 or F16 decides, F16 where none is."""
    for spec in specs:
        if len(spec.shape) >= 2 and spec.dtype in (dtype.BF16, dtype.F16):
            return "bf16" if spec.dtype == dtype.BF16 else "f16"
    return "f16"


# ---------------------------------------------------------------- what a policy sees


def _loses_nothing(type_: T) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class TensorRole:
    """A tensor as a policy sees it.

    Attributes:
        name: What llama.cpp calls it.
        shape: Row-major.
        is_f32: Whether its architecture keeps it F32 in files of every type ...
        or_f16: ... but those of F16, where it is F16.
        loss: What of the model a type would round beyond the source's own numbers, as a phrase; None where nothing.
    """

    name: str
    shape: tuple[int, ...]
    is_f32: bool = False
    or_f16: bool = False
    loss: Callable[[T], str | None] = _loses_nothing

    @property
    def layer(self) -> int | None:
        """The number of its layer; None of a tensor that has none."""
        match = _LAYER.search(self.name)
        return int(match[1]) if match else None

    @property
    def is_weight(self) -> bool:
        """Whether it may be of another type than F32: a matrix of weights, or a factor of one."""
        is_named_so = self.name.endswith((".weight", ".lora_a", ".lora_b")) and not self.name.endswith("_norm.weight")
        return len(self.shape) > 1 and is_named_so and not self.is_f32


def facts_of(arch: str, keys: Iterable[KeyValue]) -> ModelFacts:
    """The facts that a file's keys state."""
    values = {entry.key: _first(entry.value) for entry in keys if entry.key.startswith(f"{arch}.")}
    return ModelFacts.of_keys({"general.architecture": arch, **values}.get)


def _first(value: object) -> int:
    """A number, or the first of an array."""
    if isinstance(value, PackedArray) and value.element in SCALAR_FORMATS and value.length:
        first = np.frombuffer(value.payload, np.dtype(SCALAR_FORMATS[value.element]), count=1)
        return int(first[0])
    return value if isinstance(value, int) else 0


# ---------------------------------------------------------------- choosing


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
    def choose(self, roles: Sequence[TensorRole], facts: ModelFacts) -> list[T]:
        """The type of each tensor. SourceError where a type cannot hold its tensor."""
        ...

    def warnings(self, roles: Sequence[TensorRole], facts: ModelFacts) -> Iterator[RunWarning]:
        """What of the choice is not as the user asked."""
        ...


@dataclass(frozen=True, slots=True)
class OuttypePolicy:
    """The types of a file as llama.cpp's converter makes it: one for all matrices, but for what an option says.

    Raises:
        SourceError: A type would round what the model's operations made of a tensor (code "inexact-type").
    """

    outtype: str
    options: MixOptions = MixOptions()

    @property
    def file_type(self) -> int:
        return file_type_of(OUTTYPES[self.outtype])

    def choose(self, roles: Sequence[TensorRole], facts: ModelFacts) -> list[T]:
        own = T[OUTTYPES[self.outtype].type]
        wanted = {role.name: asked(role.name, self.options) for role in roles}  # None, or a type: F32 is 0
        return [_checked(role, settled(role, own if (type_ := wanted[role.name]) is None else type_)) for role in roles]

    def warnings(self, roles: Sequence[TensorRole], facts: ModelFacts) -> Iterator[RunWarning]:
        names = [role.name for role in roles]
        return unused_overrides(dict(zip(names, self.choose(roles, facts), strict=True)), self.options)


@dataclass(frozen=True, slots=True)
class MixPolicy:
    """The types of a file as llama-quantize makes it of the checkpoint's lossless file.

    Attributes:
        lossless: the outtype of that file, which tensors have that are not quantised.
        has_importance: whether an importance matrix is given.
    """

    outtype: str
    lossless: str
    options: MixOptions = MixOptions()
    has_importance: bool = False

    @property
    def file_type(self) -> int:
        return MIXES[self.outtype].file_type

    def choose(self, roles: Sequence[TensorRole], facts: ModelFacts) -> list[T]:
        chosen = self._choices(roles, facts)
        return [_checked(role, chosen[role.name].type) for role in roles]

    def warnings(self, roles: Sequence[TensorRole], facts: ModelFacts) -> Iterator[RunWarning]:
        return choice_warnings(self._choices(roles, facts), self.options)

    def _choices(self, roles: Sequence[TensorRole], facts: ModelFacts) -> Mapping[str, Choice]:
        own = OuttypePolicy(self.lossless).choose(roles, facts)
        tensors = [MixedTensor(role.name, role.shape, type_) for role, type_ in zip(roles, own, strict=True)]
        mix = MIXES[self.outtype]
        return choose_types(mix, tensors, facts, options=self.options, has_importance=self.has_importance)


@dataclass(frozen=True, slots=True)
class StoredTypes:
    """The types that the tensors of a finished file have, so that a job can be compared with it whatever made it.

    A tensor that the file lacks, or has in another shape or in a type that can neither be made nor was there before, is
    F32: the comparison names it.
    """

    outtype: str
    file_type: int
    types: Mapping[str, tuple[tuple[int, ...], T]]

    def choose(self, roles: Sequence[TensorRole], facts: ModelFacts) -> list[T]:
        return [self.of(role) for role in roles]

    def warnings(self, roles: Sequence[TensorRole], facts: ModelFacts) -> Iterator[RunWarning]:
        return iter(())

    def of(self, role: TensorRole | MixedTensor) -> T:
        """The type of one tensor."""
        found = (self.types[name] for name in spellings(role.name) if name in self.types)
        shape, type_ = next(found, ((), T.F32))
        kept = role.type if isinstance(role, MixedTensor) else None
        return type_ if shape == role.shape and (type_ == kept or type_ in VERIFIABLE) else T.F32


def file_type_of(outtype: Outtype) -> LlamaFileType:
    """general.file_type of a file of `outtype`."""
    own = TYPES[T[outtype.type]].file_type
    if outtype.file_type or own is None:
        return LlamaFileType[f"MOSTLY_{outtype.file_type}"]
    return own


def settled(role: TensorRole, type_: T) -> T:
    """`type_`, or what it falls back to; F32 of a tensor that is always that."""
    if role.or_f16 and type_ == T.F16:
        return type_
    if not role.is_weight:
        return T.F32
    return divisible(type_, role.shape[-1])


def _checked(role: TensorRole, type_: T) -> T:
    """The type, where it rounds nothing that the model's operations made; else SourceError."""
    if (what := role.loss(type_)) is not None:
        able = [name for name, row in OUTTYPES.items() if role.loss(settled(role, T[row.type])) is None][:2]
        raise SourceError(
            f"the model {what}, which {type_.name} cannot hold exactly",
            tensor=role.name,
            hint=f"--outtype {' or '.join(able)}",
            code="inexact-type",
        )
    return type_


def stored_outtype(file_type: int, nbytes: Mapping[str, int]) -> str:
    """The outtype of a file with `nbytes` of tensors by type: what it says where that is so, else its largest type."""
    with suppress(ValueError):
        said = LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        if any(said.startswith(name) for name in nbytes if name != "F32"):  # which all files have
            return said.lower()
    return max(nbytes, key=lambda name: nbytes[name], default="f32").lower()
