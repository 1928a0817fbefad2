"""Type policies: which type each tensor of a file gets.

An outtype (outtypes.py) is either one of llama.cpp's converter, with one type for all matrices, or one of
llama-quantize's mixes (mix_rules.py). Norms, vectors, tensors that are not weights, and those that an architecture
marks (`f32` of a row) stay F32. A policy chooses for all tensors at once, since mixes count tensors.

Source: ModelBase.prepare_tensors in llama.cpp's convert_hf_to_gguf.py, checked against its output.
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
from streamconv.ggml.element_types import VERIFIABLE
from streamconv.ggml.mix_rules import asked, choice_warnings, choose_types, divisible
from streamconv.ggml.mixes import MIXES, Choice, MixedTensor, MixOptions, ModelFacts, file_type_of
from streamconv.ggml.outtypes import OUTTYPES, canonical
from streamconv.gguf.format import SCALAR_FORMATS, KeyValue, PackedArray
from streamconv.gguf.names import spellings
from streamconv.lazy import dtype
from streamconv.lazy.node import TensorSpec

# llama-quantize's names, including its short ones, such as Q4_K for Q4_K_M.
_MOSTLY: Final = [kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType if kind.name.startswith("MOSTLY_")]
_NEWER: Final = ("MXFP4_MOE", "Q2_0")  # gguf 0.18 does not know them
_QUANTIZED: Final = frozenset(form for name in (*_MOSTLY, *_NEWER) for form in (name, name.replace("_K_M", "_K")))
_LAYER: Final = re.compile(r"\bblk\.(\d+)\.")


def outtype_hint(word: str, choices: Collection[str]) -> str | None:
    """The hint for a word that is not an outtype of a command: its spelling in lower case, or a program that makes it.

    Args:
        word: The word.
        choices: The outtypes of the command.

    Returns:
        None if there is no hint.
    """
    if canonical(word) in choices:
        return f"write {canonical(word)}"
    if canonical(word) in OUTTYPES:
        return f"streamconv convert makes {canonical(word)} from a checkpoint"
    if word.upper() in _QUANTIZED:
        return f"llama.cpp's llama-quantize makes {word.upper()} from a converted file"
    return None


def resolve_auto(specs: Iterable[TensorSpec]) -> str:
    """The outtype for `auto`: that of the first BF16 or F16 tensor with two or more dimensions; else f16."""
    for spec in specs:
        if len(spec.shape) >= 2 and spec.dtype in (dtype.BF16, dtype.F16):
            return "bf16" if spec.dtype == dtype.BF16 else "f16"
    return "f16"


# ---------------------------------------------------------------- the inputs of a policy


def _loses_nothing(type_: T) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class TensorRole:
    """The properties of a tensor on which its type depends.

    Attributes:
        name: llama.cpp's name.
        shape: Row-major.
        is_f32: Whether its architecture keeps it F32 in files of every type.
        or_f16: Whether it is F16 in F16 files, although `is_f32`.
        loss: Returns the operation of the model whose result a type would round, as a phrase for an error; None if the
            type holds it exactly.
    """

    name: str
    shape: tuple[int, ...]
    is_f32: bool = False
    or_f16: bool = False
    loss: Callable[[T], str | None] = _loses_nothing

    @property
    def layer(self) -> int | None:
        """The number of its layer; None if it has none."""
        match = _LAYER.search(self.name)
        return int(match[1]) if match else None

    @property
    def is_weight(self) -> bool:
        """Whether it can have another type than F32: a weight matrix, or a factor of one."""
        is_named_so = self.name.endswith((".weight", ".lora_a", ".lora_b")) and not self.name.endswith("_norm.weight")
        return len(self.shape) > 1 and is_named_so and not self.is_f32


def facts_of(arch: str, keys: Iterable[KeyValue]) -> ModelFacts:
    """The facts about a model in its file's keys."""
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
    """Chooses the type of each tensor in a file.

    Attributes:
        outtype: The file's type: llama-quantize's name, in lower case.
        file_type: general.file_type.
    """

    @property
    def outtype(self) -> str: ...
    @property
    def file_type(self) -> int: ...
    def choose(self, roles: Sequence[TensorRole], facts: ModelFacts) -> list[T]:
        """The type of each tensor.

        Raises:
            SourceError: A type cannot hold its tensor.
        """
        ...

    def warnings(self, roles: Sequence[TensorRole], facts: ModelFacts) -> Iterator[RunWarning]:
        """A warning for each way in which the types differ from the user's choice."""
        ...


@dataclass(frozen=True, slots=True)
class OuttypePolicy:
    """The types in a file of llama.cpp's converter: one for all matrices, except where an option chooses another.

    `choose` raises SourceError (`inexact-type`) if a type would round the result of one of the model's operations.
    """

    outtype: str
    options: MixOptions = MixOptions()

    @property
    def file_type(self) -> int:
        return file_type_of(OUTTYPES[self.outtype])

    def choose(self, roles: Sequence[TensorRole], facts: ModelFacts) -> list[T]:
        return [_checked(role, self._choice(role).type) for role in roles]

    def warnings(self, roles: Sequence[TensorRole], facts: ModelFacts) -> Iterator[RunWarning]:
        return choice_warnings({role.name: self._choice(role) for role in roles}, self.options)

    def _choice(self, role: TensorRole) -> Choice:
        wanted = asked(role.name, self.options)
        if wanted is None:  # F32 is 0
            wanted = T[OUTTYPES[self.outtype].type]
        type_ = settled(role, wanted)
        return Choice(type_, wanted if role.is_weight else type_)


@dataclass(frozen=True, slots=True)
class MixPolicy:
    """The types in a file that llama-quantize makes from the converted, unquantised file.

    Attributes:
        lossless: The outtype of the unquantised file: the type of tensors that are not quantised.
        has_importance: Whether there is an importance matrix.
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
    """The types of the tensors in a finished file, so that any file can be compared with its source.

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


def settled(role: TensorRole, type_: T) -> T:
    """`type_`, or its fallback if rows do not divide into its blocks; F32 if the tensor always has that type."""
    if role.or_f16 and type_ == T.F16:
        return type_
    if not role.is_weight:
        return T.F32
    return divisible(type_, role.shape[-1])


def _checked(role: TensorRole, type_: T) -> T:
    """`type_`; SourceError if it would round the result of one of the model's operations."""
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
    """The outtype of a file: that of its general.file_type if its tensors agree, else the type with the most bytes.

    Args:
        file_type: The file's general.file_type.
        nbytes: The size of all tensors of a type, by GGML's name of the type.
    """
    with suppress(ValueError):
        stated = LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        if any(stated.startswith(name) for name in nbytes if name != "F32"):  # all files have F32 tensors
            return stated.lower()
    return max(nbytes, key=lambda name: nbytes[name], default="f32").lower()
