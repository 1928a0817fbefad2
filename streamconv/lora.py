"""An adapter that has met its base: every module's two factors the right way round, with one exact scale.

Owns: which factor is stored transposed, and what cannot be carried, all of it told at once. Does not own: what becomes
of the factors (adapter.py writes them as an adapter).
Invariant: W' = W + scale * b @ a with a [r, in] and b [out, r] in the rows and columns of the source's W, or an error;
an orientation that shapes leave open is never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from streamconv.base_model import BaseModel, Slot
from streamconv.checkpoint import SourceTensor
from streamconv.errors import Caution, SourceError
from streamconv.graph import LazyTensor, Transpose
from streamconv.lora_config import LoraConfig, Problem
from streamconv.lora_file import LoraFile

MAX_PROBLEMS_SHOWN = 12

Orientation = tuple[bool, bool]  # whether A, whether B is stored transposed
STRAIGHT, TURNED = (False, False), (True, True)


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One module's change, scale * b @ a. Of all experts of a layer at once, both have one more dimension before.

    Of an embedding [V, H], a is [r, V] and b [H, r]: the change is the transpose of scale * b @ a.
    """

    name: str
    slot: Slot
    a: LazyTensor
    b: LazyTensor
    scale: float

    @property
    def rank(self) -> int:
        return self.b.spec.shape[-1]


@dataclass(slots=True)
class Resolved:
    """All modules in the base's order, and why there may be no adapter of them."""

    modules: list[LoraModule] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    cautions: list[Caution] = field(default_factory=list)


def resolve(adapter: LoraFile, base: BaseModel, config: LoraConfig) -> Resolved:
    """The adapter's modules on `base`. Nothing is raised: what is wrong is in `problems`, alike ones together."""
    problems = [*adapter.problems, *config.problems, *_whole_problems(adapter, base, config)]
    placed, is_taken = [], _Taken()
    for name, factors in adapter.factors.items():
        slot = _find_slot(name, base)
        problems += config.module_problems(name)
        if factors.a is None or factors.b is None:
            problems.append(Problem("partner", f"has no lora_{'A' if factors.a is None else 'B'}", (name,)))
        elif isinstance(slot, Problem):
            problems.append(slot)
        elif is_taken(slot):
            problems.append(Problem("twice", f"another module changes {slot.target} as well", (name,)))
        else:
            placed.append(_Placed(name, factors.a, factors.b, slot))
    certain = {placed.candidates[0] for placed in placed if len(placed.candidates) == 1}
    modules = []
    for one in placed:
        try:
            modules.append(one.module(certain, config))
        except SourceError as error:
            problems.append(Problem("dtype", error.message, (one.name,)))
        except _Unfit as error:
            problems.append(error.problem)
    for module in modules:
        problems += _misfits(module, base, config)
    modules.sort(key=lambda module: module.slot.order)
    return Resolved(modules, _grouped(problems), [*base.cautions, *config.cautions])


def refuse(problems: Sequence[Problem], adapter: LoraFile) -> None:
    """SourceError with all of `problems`, if there are any."""
    if not problems:
        return
    shown = "; ".join(map(str, problems[:MAX_PROBLEMS_SHOWN]))
    if len(problems) > MAX_PROBLEMS_SHOWN:
        shown += f"; and {len(problems) - MAX_PROBLEMS_SHOWN} more"
    hint = f"streamconv convert BASE --adapter {adapter.directory}" if all(p.is_mergeable for p in problems) else None
    raise SourceError(f"no GGUF adapter can carry this exactly: {shown}", file=adapter.directory, hint=hint)


def _find_slot(name: str, base: BaseModel) -> Slot | Problem:
    """The slot of a module. One of a model without a head (transformers' AutoModel) is named without "model."."""
    slot = base.slot(name)
    other = base.slot(f"model.{name}") if isinstance(slot, Problem) else slot
    return other if isinstance(other, Slot) else slot


class _Taken:
    """Which targets have their module already; experts of one target have one each, or one together."""

    def __init__(self) -> None:
        self._experts: dict[str, set[int | None]] = {}

    def __call__(self, slot: Slot) -> bool:
        experts = self._experts.setdefault(slot.target, set())
        clashes = slot.expert in experts or None in experts or (slot.expert is None and bool(experts))
        experts.add(slot.expert)
        return clashes


def _whole_problems(adapter: LoraFile, base: BaseModel, config: LoraConfig) -> Iterator[Problem]:
    """What is wrong with the adapter as a whole."""
    if config.is_dora and not any(problem.code == "dora" for problem in adapter.problems):
        yield Problem("dora", "DoRA, and its magnitudes are missing: the adapter is not complete")
    if config.replicated_layers(base.n_layers):
        yield Problem("replication", "layer_replication: the adapter is for another stack of layers than the base's")
    if not adapter.factors and not adapter.problems:
        yield Problem("empty", "there is no factor in it")


# ---------------------------------------------------------------- orientation


class _Unfit(Exception):
    """A pair of factors that does not fit its module."""

    def __init__(self, code: str, message: str, name: str) -> None:
        self.problem = Problem(code, message, (name,))


@dataclass(slots=True)
class _Placed:
    """A pair of stored factors and the slot it belongs to."""

    name: str
    a: SourceTensor
    b: SourceTensor
    slot: Slot

    @property
    def candidates(self) -> list[Orientation]:
        return orientations(self.a.shape, self.b.shape, self.slot)

    def module(self, certain: set[Orientation], config: LoraConfig) -> LoraModule:
        """The module, once its orientation is known; `certain` are those of the other modules of the file."""
        candidates = self.candidates
        if not candidates:
            raise self._unfit()
        if len(candidates) > 1:
            # One program wrote the whole file, so what all other modules show holds for this one.
            candidates = [turned for turned in candidates if certain == {turned}]
            if not candidates:
                what = f"lora_A {list(self.a.shape)} and lora_B {list(self.b.shape)} fit either way round"
                raise _Unfit("ambiguous", f"{what}: whether they are stored transposed cannot be told", self.name)
        a_turned, b_turned = candidates[0]
        a, b = self.a.lazy(), self.b.lazy()
        rank = self.a.shape[-1] if a_turned else self.a.shape[-2]
        return LoraModule(
            self.name,
            self.slot,
            Transpose(a) if a_turned else a,
            Transpose(b) if b_turned else b,
            config.scale(self.name, rank),
        )

    def _unfit(self) -> _Unfit:
        shapes = f"lora_A {list(self.a.shape)} and lora_B {list(self.b.shape)}"
        for a, b in product(_both_ways(self.a.shape), _both_ways(self.b.shape)):
            if len(a) == len(b) == 2 and _fit((b[1], a[1]), b, self.slot):
                return _Unfit("rank", f"the ranks disagree: {shapes}", self.name)
        expected = ["?" if extent is None else extent for extent in self.slot.shape]
        return _Unfit("shape", f"{shapes} do not fit the base's {self.slot.target} {expected}", self.name)


def _both_ways(shape: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return shape, shape[::-1]


def orientations(a: Sequence[int], b: Sequence[int], slot: Slot) -> list[Orientation]:
    """How A and B of these stored shapes can lie: as [r, in] and [out, r], or either of them turned.

    Both agree on the rank, and on the base's extents where those are known. Where they are not, a factor is longer than
    it is wide. Both turned alike come before one alone.
    """
    if slot.n_experts and slot.expert is None:  # mlx-lm's LoRASwitchLinear stores them straight
        is_stacked = len(a) == len(b) == 3 and a[0] == b[0] == slot.n_experts
        return [STRAIGHT] if is_stacked and _fit(a[1:], b[1:], slot) else []
    fitting = [
        (bool(a_turned), bool(b_turned))
        for (a_turned, one), (b_turned, other) in product(enumerate(_both_ways(a)), enumerate(_both_ways(b)))
        if _fit(one, other, slot)
    ]
    if None in slot.shape and len(fitting) > 1 and a[0] != a[1] and b[0] != b[1]:
        fitting = [turned for turned in fitting if turned == (a[0] > a[1], b[0] < b[1])] or fitting
    return [turned for turned in fitting if turned in (STRAIGHT, TURNED)] or fitting


def _fit(a: Sequence[int], b: Sequence[int], slot: Slot) -> bool:
    n_out, n_in = slot.shape[::-1] if slot.is_embedding else slot.shape
    return len(a) == len(b) == 2 and a[0] == b[1] > 0 and n_in in (None, a[1]) and n_out in (None, b[0])


# ---------------------------------------------------------------- what a placed module may still lack


def _misfits(module: LoraModule, base: BaseModel, config: LoraConfig) -> Iterator[Problem]:
    slot, names = module.slot, (module.name,)
    stated = config.rank(module.name)
    if stated is not None and stated != module.rank:
        yield Problem("rank", f"has rank {module.rank}, adapter_config.json gives it {stated}", names)
    n_out = module.b.spec.shape[-2]
    if slot.heads is None:
        yield Problem("heads", "the base does not tell its number of heads", names)
    elif slot.heads and n_out % (2 * slot.heads):
        yield Problem("heads", f"its {n_out} rows are not {slot.heads} heads of two halves", names)
    if slot.factor is None:
        yield Problem("factor", "a GGUF does not tell how its experts were scaled: give the base's folder", names)
    if slot.is_embedding and base.is_tied:
        yield Problem(
            "tied", "the base is tied, and llama.cpp dies of an adapter on an embedding that is the head", names
        )
    if (slot.is_embedding or slot.is_head) and base.is_tied is None:
        yield Problem("tied", "whether the base is tied is not known: give its complete GGUF, or its folder", names)


def _grouped(problems: Iterable[Problem]) -> list[Problem]:
    """Problems of the same kind and words as one, with all their modules."""
    together: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        together.setdefault((problem.code, problem.message), []).extend(problem.modules)
    return [Problem(code, message, tuple(modules)) for (code, message), modules in together.items()]
