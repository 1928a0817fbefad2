"""What a checkpoint would become in each outtype: how large the file, and how many bits a weight takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gguf.constants import GGMLQuantizationType

from streamconv.api.convert_model import plan_model, policy_of, prepare
from streamconv.api.quantize_file import plan_quantized, read_model
from streamconv.budget import Budget, default_limit_nbytes
from streamconv.checkpoint.folder import Checkpoint
from streamconv.engine.layout import memory_failures
from streamconv.errors import StreamconvError
from streamconv.files.hub import Source, find_source, is_gguf
from streamconv.files.local import noting_files
from streamconv.ggml.element_types import TYPES, tensor_nbytes
from streamconv.ggml.mix_rules import choose_types
from streamconv.ggml.mixes import MIXES, MixedTensor, MixOptions, ModelFacts
from streamconv.ggml.outtypes import OUTTYPES
from streamconv.ggml.policy import TensorRole, facts_of
from streamconv.gguf.format import align
from streamconv.gguf.splits import GGUFSet
from streamconv.lazy.dtype import FLOATS
from streamconv.lora.specs import AdapterSpec, open_adapters
from streamconv.options import OutputOptions, public
from streamconv.recipe.language import Model
from streamconv.recipe.registry import RecipeSource, using_recipes

SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class Quant:
    """One outtype of a model.

    Attributes:
        outtype: the word for `convert`.
        nbytes: of the model's file, 0 where it would be refused.
        bits_per_weight: of all tensors, in the mean.
        types: number of tensors by type.
        problem: why it would be refused; None where it would not.
    """

    outtype: str
    nbytes: int = 0
    bits_per_weight: float = 0.0
    types: Mapping[str, int] | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Quants:
    """What a checkpoint would become, by outtype, the most precise first."""

    source: str
    architecture: str
    n_parameters: int
    quants: Sequence[Quant]

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "architecture": self.architecture,
            "n_parameters": self.n_parameters,
            "quants": [
                {
                    "outtype": one.outtype,
                    "nbytes": one.nbytes,
                    "bits_per_weight": round(one.bits_per_weight, 3),
                    "types": dict(one.types or {}),
                    "problem": one.problem,
                }
                for one in self.quants
            ],
        }


@public()
@noting_files()
@memory_failures()
def quants(src: Source, *, adapters: Sequence[AdapterSpec] = (), recipes: Sequence[RecipeSource] = ()) -> Quants:
    """The size of a model's file in every outtype. No weights are read.

    Args:
        src: as for `convert`; or a GGUF file, or the first part of a split, as for `quantize`.
        adapters: the adapters that would be merged.
        recipes: recipes, or Python files that define them (their code is run).

    Returns:
        One entry for each outtype, the most precise first, with the size in bytes and the bits per weight.

    Raises:
        StreamconvError: the checkpoint cannot be converted at all, or the file cannot be quantised.
    """
    budget = Budget(default_limit_nbytes())
    if is_gguf(src) and not adapters:
        return _of_file(src, budget)
    with (
        using_recipes(recipes),
        open_adapters(adapters, budget) as opened,
        Checkpoint.open(find_source(src), budget=budget) as checkpoint,
    ):
        prepared = prepare(checkpoint, budget, opened)
        job = plan_model(checkpoint, None, OutputOptions(outtype="q8_0"), budget, opened, prepared=prepared)
        model = prepared.merged.model
        header = job.parts[0].layout.header.nbytes  # the same size for all types
        n_parameters = sum(math.prod(target.tensor.spec.shape) for target in model.targets)
        found = [_quant(model, outtype, header, n_parameters) for outtype in OUTTYPES]
    return Quants(str(src), job.architecture, n_parameters, found)


def _quant(model: Model, outtype: str, header_nbytes: int, n_parameters: int) -> Quant:
    roles = [model.role(target) for target in model.targets]
    try:
        policy = policy_of(model, outtype, MixOptions())
        types = policy.choose(roles, facts_of(model.recipe.arch, model.keys()))
    except StreamconvError as error:
        return Quant(outtype, problem=error.message)
    return _sized(outtype, roles, types, header_nbytes, n_parameters)


def _of_file(src: Source, budget: Budget) -> Quants:
    """Of a GGUF file, in the outtypes of `quantize`."""
    with GGUFSet.open(find_source(src), budget) as files:
        tensors, facts = read_model(files)
        job = plan_quantized(files, None, OutputOptions(outtype="q8_0", allow_requantize=True), budget)
    header, n_parameters = job.parts[0].layout.header.nbytes, sum(math.prod(one.shape) for one in tensors)
    found = [_mixed(outtype, tensors, facts, header, n_parameters) for outtype in OUTTYPES if outtype in MIXES]
    return Quants(str(src), facts.architecture, n_parameters, found)


def _mixed(
    outtype: str, tensors: Sequence[MixedTensor], facts: ModelFacts, header_nbytes: int, n_parameters: int
) -> Quant:
    types = [choice.type for choice in choose_types(MIXES[outtype], tensors, facts).values()]
    for one, type_ in zip(tensors, types, strict=True):
        if type_ != one.type and TYPES[one.type].dtype not in FLOATS:
            return Quant(outtype, problem=f"{one.name} is {one.type.name} already: only with --allow-requantize")
    return _sized(outtype, tensors, types, header_nbytes, n_parameters)


def _sized(
    outtype: str,
    tensors: Sequence[TensorRole | MixedTensor],
    types: Sequence[GGMLQuantizationType],
    header_nbytes: int,
    n_parameters: int,
) -> Quant:
    sizes = [tensor_nbytes(one.shape, type_) for one, type_ in zip(tensors, types, strict=True)]
    nbytes = header_nbytes + sum(map(align, sizes))
    return Quant(outtype, nbytes, 8 * sum(sizes) / max(n_parameters, 1), Counter(type_.name for type_ in types))
