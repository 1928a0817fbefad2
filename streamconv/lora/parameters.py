"""Factors of stacked parameters: PEFT's `target_parameters`, LoRA on a tensor that holds all experts of a layer.

PEFT wraps the module that holds a parameter [E, d1, d2] once for each parameter, in nested wrappers, and saves the A
and B of a wrapper under the module's name with `.base_layer` for each wrapper around it. Since 0.19.0, A is [E*r, d2]
and B [d1, r*E]; before, dimension 1 was taken as the input, so A is [E*r, d1], B [d2, r*E], and the product is added
transposed.
Source: ParamWrapper in PEFT 0.21.2 and 0.18.0, tuners/lora/layer.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from streamconv.checkpoint.safetensors import SourceTensor
from streamconv.errors import RunWarning
from streamconv.lazy.indexing import IndexColumns
from streamconv.lazy.node import LazyTensor
from streamconv.lazy.views import Reshape, Stack, Transpose
from streamconv.lora.base import BaseModel, Slot
from streamconv.lora.config import LoraConfig, Problem
from streamconv.recipe.spelling import Speller

WRAPPER = ".base_layer"
SWAPPED_SINCE = (0, 19)  # the version of PEFT that swapped input and output

WAY_OUT = "merge it with PEFT (model.merge_and_unload()), save the model and convert that"


@dataclass(frozen=True, slots=True)
class Choice:
    """A parameter that a pair of factors fits, and whether its product is added transposed."""

    name: str
    slot: Slot
    is_old: bool


@dataclass(frozen=True, slots=True)
class Stacked:
    """Factors for all experts of a parameter: a [E, r, d2] and b [E, d1, r]."""

    name: str
    slot: Slot
    a: LazyTensor
    b: LazyTensor
    is_old: bool


@dataclass(slots=True)
class Found:
    """The matched pairs, problems with the others, and warnings about assumptions."""

    stacked: list[Stacked]
    problems: list[Problem]
    warnings: list[RunWarning]


Pairs = Mapping[str, tuple[SourceTensor, SourceTensor]]  # A and B by the module's name


def is_wrapped(name: str, config: LoraConfig) -> bool:
    """Return whether PEFT saves factors of a parameter under this module name."""
    return any(f".{holder(name)}.".endswith(f".{target.rpartition('.')[0]}.") for target in config.target_parameters)


def holder(name: str) -> str:
    """Return the name of the module that holds the parameter."""
    while name.endswith(WRAPPER):
        name = name.removesuffix(WRAPPER)
    return name


def stacked_factors(pairs: Pairs, base: BaseModel, config: LoraConfig, speller: Speller) -> Found:
    """Match each pair with the parameter of its module and the layout that its shapes fit.

    One version of PEFT wrote the whole file: a pair that fits both layouts has the layout of the others, and if all
    pairs do, that of `peft_version`.
    """
    found = Found([], [], [])
    choices = {name: list(_choices(name, *pair, base, config, speller)) for name, pair in pairs.items()}
    layouts = [{choice.is_old for choice in fitting} for fitting in choices.values() if fitting]
    certain = {layout for one in layouts if len(one) == 1 for layout in one}
    is_old = next(iter(certain)) if len(certain) == 1 else _is_old_version(config)
    if any(len(one) > 1 for one in layouts) and not certain and _version(config) is None:
        stated = config.config.raw.get("peft_version")
        said = "there is no peft_version" if stated is None else f"peft_version {stated!r} is not a number"
        what = f"the parameters are square and {said}: assumed to be stored as by PEFT 0.18 and earlier"
        found.warnings.append(RunWarning("peft-version", what))
    for name, (a, b) in pairs.items():
        fitting = choices[name]
        if len({choice.is_old for choice in fitting}) > 1:
            fitting = [choice for choice in fitting if choice.is_old == is_old]
        if len(fitting) == 1:
            found.stacked.append(_stacked(fitting[0], a.lazy(), b.lazy()))
        elif not any(isinstance(slot, Slot) for _, slot in _slots(name, base, config, speller)):
            what = f"the base ({base.recipe.arch}) does not have the parameter named in target_parameters"
            found.problems.append(Problem("no-module", what, (name,)))
        else:
            shapes = f"target_parameters: lora_A {list(a.shape)} and lora_B {list(b.shape)}"
            what = "fit several of the base's parameters" if fitting else "fit no stacked parameter of the base"
            found.problems.append(Problem("parameters", f"{shapes} {what}; {WAY_OUT}", (name,)))
    return found


def missing(names: Iterable[str], base: BaseModel, config: LoraConfig) -> Iterator[Problem]:
    """Yield a problem for each targeted parameter of the base without factors in the modules `names`."""
    wrapped: dict[str, int] = Counter(holder(name) for name in names)
    for target in dict.fromkeys(config.target_parameters):
        parent = target.rpartition(".")[0]
        of_it = {module: n for module, n in wrapped.items() if f".{module}.".endswith(f".{parent}.")}
        few = [module for module, n in of_it.items() if n < sum(1 for _ in _parameters(module, config))]
        if few or (not of_it and _has_parameter(base, target)):
            what = f"target_parameters has {target}, but its factors are missing: the adapter is incomplete"
            yield Problem("parameters", what, tuple(few))


def _has_parameter(base: BaseModel, target: str) -> bool:
    """Whether the base has a parameter whose name ends in `target`."""
    return any(f".{row.source}".endswith(f".{target}") for row in base.recipe.tensors)


def _choices(
    name: str, a: SourceTensor, b: SourceTensor, base: BaseModel, config: LoraConfig, speller: Speller
) -> Iterator[Choice]:
    """The parameters of the module that the pair fits."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        return
    for parameter, slot in _slots(name, base, config, speller):
        if not isinstance(slot, Slot) or not slot.n_experts or a.shape[0] % slot.n_experts or None in slot.shape:
            continue
        if (b.shape[0], a.shape[1]) == slot.shape:
            yield Choice(parameter, slot, is_old=False)
        if (a.shape[1], b.shape[0]) == slot.shape:
            yield Choice(parameter, slot, is_old=True)


def _slots(
    name: str, base: BaseModel, config: LoraConfig, speller: Speller
) -> Iterator[tuple[str, Slot | Problem | None]]:
    """The targeted parameters of the module, with their slots in the base."""
    for parameter in _parameters(holder(name), config):
        spelled = speller.find(parameter)
        yield parameter, base.slot_of(spelled) if spelled is not None else None


def _parameters(module: str, config: LoraConfig) -> Iterator[str]:
    """The full names of the parameters of `module` that the configuration targets."""
    for target in dict.fromkeys(config.target_parameters):
        parent, _, last = target.rpartition(".")
        if f".{module}.".endswith(f".{parent}."):
            yield f"{module}.{last}"


def _stacked(choice: Choice, a: LazyTensor, b: LazyTensor) -> Stacked:
    n_experts = choice.slot.n_experts
    rank = a.spec.n_rows // n_experts
    of_a = Reshape(a, (n_experts, rank, a.spec.n_columns))
    of_b = Stack([IndexColumns(b, np.arange(e, rank * n_experts, n_experts)) for e in range(n_experts)])
    if choice.is_old:  # the transpose of b @ a is a's transpose @ b's transpose
        return Stacked(choice.name, choice.slot, Transpose(of_b), Transpose(of_a), is_old=True)
    return Stacked(choice.name, choice.slot, of_a, of_b, is_old=False)


def _is_old_version(config: LoraConfig) -> bool:
    version = _version(config)
    return version is None or version < SWAPPED_SINCE


def _version(config: LoraConfig) -> tuple[int, int] | None:
    """Major and minor version of PEFT, which adapters state since 0.18.0; None if it is not stated."""
    text = config.config.raw.get("peft_version")
    match = re.match(r"(\d{1,6})\.(\d{1,6})", text) if isinstance(text, str) else None
    return None if match is None else (int(match[1]), int(match[2]))
