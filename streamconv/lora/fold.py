"""Choose one alpha for a whole adapter; if a module needs another scale, fold the ratio into its lora_b.

For every pair, alpha / rank * b @ a is the trained change, in the row order of the base's GGUF tensor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.ggml.element_types import TYPE_OF
from streamconv.lazy.arithmetic import Scale, widened
from streamconv.lazy.dtype import BF16, F16, F32, Dtype
from streamconv.lazy.leaves import Zeros
from streamconv.lazy.node import LazyTensor, TensorSpec, description
from streamconv.lazy.views import Stack, transposed
from streamconv.lora.base import Landing
from streamconv.lora.config import Problem
from streamconv.lora.factors import slabs
from streamconv.lora.resolve import LoraModule
from streamconv.recipe.language import Model
from streamconv.recipe.operation import CannotAdapt, factors_through, total_factor

# Range of an alpha, a float32 that must not become 0 (full strength in llama.cpp), and of a ratio folded into B.
MIN_SCALE, MAX_SCALE = 1e-30, 1e30
SIGNIFICANT_DIGITS = 12  # of an alpha: s * r is rounded to them, so that alpha / r * r gives alpha again


@dataclass(frozen=True, slots=True)
class Pair:
    """lora_a and lora_b of one target, with types that hold them exactly.

    Attributes:
        origin: Every input that determines their values, for the identity of a run.
    """

    target: str
    a: LazyTensor
    b: LazyTensor
    a_type: GGMLQuantizationType
    b_type: GGMLQuantizationType
    changed: TensorSpec  # spec of the base's tensor
    origin: str


@dataclass(frozen=True, slots=True)
class Folded:
    """An adapter with one alpha."""

    alpha: float
    pairs: tuple[Pair, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Landed:
    """A module's change to one GGUF tensor: the factors in that tensor's rows and columns."""

    module: LoraModule
    landing: Landing
    a: LazyTensor
    b: LazyTensor
    alpha: float  # that this pair alone needs


def landed(modules: Sequence[LoraModule], model: Model) -> tuple[list[Landed], list[Problem]]:
    """Return the changes in the order of the base's tensors, and problems for those that an operation cannot carry."""
    found, problems = [], []
    for module in modules:
        for landing in module.slot.landings:
            try:
                a, b = _through(module, landing, model)
                wanted = _rounded(module.scale * total_factor(landing.ops, model) * module.rank)
            except CannotAdapt as error:
                problems.append(Problem(error.code, error.message, (module.name,)))
            else:
                found.append(Landed(module, landing, a, b, wanted))
    found.sort(key=lambda one: one.landing.order)
    return found, problems


def _through(module: LoraModule, landing: Landing, model: Model) -> tuple[LazyTensor, LazyTensor]:
    """The factors (a, b) after the operations between the stored matrix and the GGUF tensor."""
    if not module.slot.is_embedding:
        return factors_through(landing.ops, module.a, module.b, model)
    # The change of an embedding is the transpose of b @ a, while operations apply to the embedding itself.
    b, a = factors_through(landing.ops, transposed(module.b), transposed(module.a), model)
    return transposed(a), transposed(b)


def fold(modules: Sequence[LoraModule], model: Model) -> Folded:
    """Return the pairs in order, with the experts of a layer stacked, and the common alpha.

    Factors are read only if a scale has to be folded into them.
    """
    changes, problems = landed(modules, model)
    alpha = choose_alpha([one.alpha for one in changes]) or float(modules[0].rank if modules else 0)
    by_target: dict[str, list[tuple[LoraModule, Pair]]] = defaultdict(list)
    for one in changes:
        pair, problem = _pair(one, alpha)
        by_target[one.landing.target].append((one.module, pair))
        problems += [problem] if problem else []
    pairs = []
    for target, made in by_target.items():
        if made[0][0].slot.expert is None:
            pairs.append(made[0][1])
        elif len({module.rank for module, _ in made}) > 1:
            problems.append(Problem("experts", f"the experts of {target} have different ranks"))
        else:
            pairs.append(_stacked({module.slot.expert or 0: pair for module, pair in made}, made[0][0].slot.n_experts))
    return Folded(alpha, tuple(pairs), tuple(problems))


def choose_alpha(needed: Sequence[float]) -> float:
    """Return the alpha that leaves the fewest modules with an inexact fold, then the most without any fold.

    0 if no module needs one.
    """
    candidates = dict.fromkeys(value for value in needed if value)
    return max(
        candidates,
        key=lambda alpha: (sum(is_power_of_two(value / alpha) for value in needed), sum(v == alpha for v in needed)),
        default=0.0,
    )


def is_power_of_two(ratio: float) -> bool:
    """Return whether multiplying by `ratio` changes only the exponent. True for 0, which is exact as well."""
    return abs(math.frexp(ratio)[0]) in (0.0, 0.5)


# ---------------------------------------------------------------- pairs


def _pair(one: Landed, alpha: float) -> tuple[Pair, Problem | None]:
    """The pair of one change with the common alpha, or a problem if its B would exceed float32."""
    module, landing, a, b, wanted = one.module, one.landing, one.a, one.b, one.alpha
    b_type, problem, ratio = TYPE_OF[b.spec.dtype].id, None, wanted / alpha
    changed = TensorSpec((*b.spec.shape[:-1], a.spec.shape[-1]), F32)
    if wanted == 0:
        b = Zeros(b.spec)
    elif not all(MIN_SCALE <= abs(value) <= MAX_SCALE for value in (wanted, ratio)):
        what = f"alpha {wanted:g}, while the common one is {alpha:g}" if ratio != 1 else f"alpha {wanted:g}"
        problem = Problem("alpha", f"needs {what}, which float32 cannot represent", (module.name,))
    elif ratio != 1:
        is_exact, overflows = _try_scale(b, ratio)
        b_type = b_type if is_exact else GGMLQuantizationType.F32
        b = Scale(b, ratio)
        if overflows:
            problem = Problem("overflow", f"its lora_B times {ratio:g} exceeds float32", (module.name,))
    if module.slot.is_embedding:
        a, changed = transposed(a), TensorSpec(changed.shape[::-1], F32)
    origin = f"{landing.target} {description(a)} {description(b)}"
    return Pair(landing.target, a, b, TYPE_OF[a.spec.dtype].id, b_type, changed, origin), problem


def _stacked(pairs: dict[int, Pair], n_experts: int) -> Pair:
    """The pairs of a layer's experts as one; an expert that the adapter does not change gets zeros."""
    one = next(iter(pairs.values()))
    chosen = [pairs.get(e) for e in range(n_experts)]
    a = _stack([pair.a if pair else None for pair in chosen], one.a.spec)
    b = _stack([pair.b if pair else None for pair in chosen], one.b.spec)
    types = [{pair.a_type for pair in pairs.values()}, {pair.b_type for pair in pairs.values()}]
    a_type, b_type = (kinds.pop() if len(kinds) == 1 else GGMLQuantizationType.F32 for kinds in types)
    origin = "\n".join(f"{e} {pair.origin}" for e, pair in pairs.items())
    return Pair(one.target, a, b, a_type, b_type, TensorSpec((n_experts, *one.changed.shape), F32), origin)


def _stack(parts: Sequence[LazyTensor | None], spec: TensorSpec) -> LazyTensor:
    tensors = [part or Zeros(spec) for part in parts]
    alike = len({tensor.spec.dtype for tensor in tensors}) == 1
    return Stack(tensors if alike else [widened(tensor) for tensor in tensors])


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def _try_scale(b: LazyTensor, ratio: float) -> tuple[bool, bool]:
    """Whether b's own type holds every product with `ratio` exactly, and whether one exceeds float32."""
    factor = np.float32(ratio)
    is_exact = is_power_of_two(ratio)
    overflows = False
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for values in slabs(b):
            values = values[np.isfinite(values)]
            scaled = values * factor
            overflows = overflows or not np.isfinite(scaled).all()
            is_exact = is_exact and bool((_narrowed(scaled, b.spec.dtype) / factor == values).all())
    return is_exact, overflows


def _narrowed(values: NDArray[np.float32], dtype: Dtype) -> NDArray[np.float32]:
    """The values rounded to `dtype`; a value that it cannot hold exactly changes."""
    if dtype == F16:
        return values.astype(np.float16).astype(np.float32)
    if dtype == BF16:
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return values
