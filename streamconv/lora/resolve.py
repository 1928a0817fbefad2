"""Match an adapter with its base: the two factors of every module in the right orientation, and their exact scale.

Detects which factors are stored transposed, and reports all problems at once. The result is W' = W + scale * b @ a with
a [r, in] and b [out, r], in the rows and columns of the stored W, or an error; an ambiguous orientation is never
guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from streamconv.checkpoint.safetensors import SourceTensor
from streamconv.errors import RunWarning, SourceError
from streamconv.files.hub import is_repo_id
from streamconv.files.store import Place
from streamconv.lazy.node import LazyTensor
from streamconv.lazy.views import Transpose
from streamconv.lora.base import BaseModel, Slot
from streamconv.lora.config import LoraConfig, Problem, stated_base
from streamconv.lora.factors import is_zero
from streamconv.lora.files import LoraFile
from streamconv.lora.parameters import is_wrapped, missing, stacked_factors
from streamconv.recipe.spelling import Speller

MAX_PROBLEMS_SHOWN = 6
SAVE_ENDS = (
    "save the enlarged embedding and head with the adapter (save_embedding_layers=True, or modules_to_save),"
    " or give the base with the larger vocabulary"
)

Shape = Sequence[int]
Orientation = tuple[bool, bool]  # whether A is stored transposed, whether B is
EVERY: frozenset[Orientation] = frozenset((a, b) for a in (False, True) for b in (False, True))
STRAIGHT, TURNED = (False, False), (True, True)


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The change of one module, scale * b @ a. For all experts of a layer, both have one more leading dimension.

    For an embedding [V, H], a is [r, V] and b [H, r]: the change is the transpose of scale * b @ a.
    """

    name: str
    slot: Slot
    a: LazyTensor
    b: LazyTensor
    scale: float
    turned: Orientation = (False, False)  # whether A, whether B was stored transposed

    @property
    def rank(self) -> int:
        return self.b.spec.shape[-1]


@dataclass(slots=True)
class Resolved:
    """All modules in the order of the base, problems and warnings."""

    modules: list[LoraModule] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[RunWarning] = field(default_factory=list)

    @property
    def sound(self) -> list[LoraModule]:
        """Return the modules without a problem."""
        named = {name for problem in self.problems for name in problem.modules}
        return [module for module in self.modules if module.name not in named]


def resolve(adapter: LoraFile, base: BaseModel, config: LoraConfig) -> Resolved:
    """Match the adapter's modules with `base`; all faults are in the result's `problems`.

    Factors are read only to check that at least one product is not zero.
    """
    problems = [*adapter.problems, *config.problems, *_whole_problems(adapter, base, config)]
    placed, is_taken = [], _Taken()
    pairs: dict[str, tuple[SourceTensor, SourceTensor]] = {}
    speller = Speller(base.recipe, (f"{name}.weight" for name in adapter.factors))
    for name, factors in adapter.factors.items():
        slot = base.slot((speller.spell(f"{name}.weight") or name).removesuffix(".weight"))
        problems += config.module_problems(name)
        if factors.a is None or factors.b is None:
            problems.append(Problem("partner", f"has no lora_{'A' if factors.a is None else 'B'}", (name,)))
        elif 0 in (*factors.a.shape, *factors.b.shape):
            what = "its factors are empty, because ZeRO-3 or FSDP had partitioned them: gather them when saving"
            problems.append(Problem("empty-tensors", f"{what} (stage3_gather_16bit_weights_on_model_save)", (name,)))
        elif isinstance(slot, Problem) and is_wrapped(name, config):
            pairs[name] = factors.a, factors.b
        elif isinstance(slot, Problem):
            problems.append(slot)
        elif is_taken(slot):
            problems.append(Problem("twice", f"another module also changes {slot.target}", (name,)))
        else:
            placed.append(_Placed(name, factors.a, factors.b, slot))
    modules = []
    fitting = orientations([(one.a.shape, one.b.shape, one.slot) for one in placed])
    for one, ways in zip(placed, fitting, strict=True):
        try:
            modules.append(one.module(ways, config))
        except SourceError as error:
            problems.append(Problem("dtype", error.message, (one.name,)))
        except _Unfit as error:
            problems.append(error.problem)
    parameters = stacked_factors(pairs, base, config, speller)
    problems += [*parameters.problems, *missing(adapter.factors, base, config)]
    if any(config.token_rows.values()) and not any(problem.code == "tokens" for problem in adapter.problems):
        what = "the adapter is incomplete: it has trainable_token_indices, but no rows (trainable_tokens_delta)"
        problems.append(Problem("tokens-missing", what))
    for stack in parameters.stacked:
        if is_taken(stack.slot):
            problems.append(Problem("twice", f"another module also changes {stack.slot.target}", (stack.name,)))
        scale = config.scale(stack.name, stack.b.spec.n_columns)
        modules.append(LoraModule(stack.name, stack.slot, stack.a, stack.b, scale, (stack.is_old, stack.is_old)))
    for module in modules:
        problems += _misfits(module, base, config)
    modules.sort(key=lambda module: module.slot.order)
    warnings = [*base.warnings, *config.warnings, *speller.warnings, *parameters.warnings]
    if modules and not problems and all(is_zero(module.b) or is_zero(module.a) for module in modules):
        message = f"{adapter.directory}: every product of factors is zero, so the adapter changes nothing"
        warnings.append(RunWarning("adapter-zero", f"{message}: was it saved before it was trained?"))
    return Resolved(modules, problems, warnings)


def refuse(problems: Sequence[Problem], adapter: LoraFile, base: BaseModel) -> None:
    """Raise SourceError with all of `problems`, if there are any. The hint suggests a merge if that would work."""
    merges = all(_is_mergeable(problem, base) for problem in problems)
    is_formula = all(problem.code in _BEYOND_ADAPTERS for problem in problems)
    what = "a GGUF adapter cannot hold this exactly" if is_formula else "cannot be converted"
    hint = f"streamconv convert BASE --adapter {adapter.directory}" if merges else base_hint(problems)
    if lacking := [problem for problem in problems if problem.code == "vocabulary"]:
        has_rows = all(adapter.has_rows(module) for problem in lacking for module in problem.modules)
        hint = hint if has_rows else SAVE_ENDS
    refuse_all(f"{what}{other_base(problems, adapter)}", problems, adapter.directory, hint, code="adapter-unsupported")


# Codes of problems of adapters that compute more than pairs of factors in llama.cpp can.
_BEYOND_ADAPTERS = frozenset(
    (
        "dora",
        "weight",
        "norm",
        "bias",
        "lora-bias",
        "kasa",
        "arrow",
        "bd-lora",
        "tokens",
        "init",
        "peft-type",
        "tied",
        "other-output",
    )
)


def other_base(problems: Sequence[Problem], adapter: LoraFile) -> str:
    """Return the likely cause if the problems look like those of a wrong base, else an empty string."""
    if not _is_other_base(problems):
        return ""
    name = stated_base(adapter.config.raw)
    says = f" ({adapter.config.file.name} names {name:.200})" if name and is_repo_id(name) else ""
    return f": the adapter was made for another base{says}"


def base_hint(problems: Sequence[Problem]) -> str | None:
    return "give the base that it was trained on" if _is_other_base(problems) else None


def _is_other_base(problems: Sequence[Problem]) -> bool:
    return any(problem.code in ("no-module", "shape") for problem in problems)


def refuse_all(what: str, found: Sequence[Problem], file: Place, hint: str | None = None, *, code: str) -> None:
    """Raise SourceError with all problems `found`, if any: shortened in its message, in full in its `problems`."""
    if not found:
        return
    problems = grouped(found)
    in_short = [*_in_short(problems)]
    shown = "; ".join(in_short[:MAX_PROBLEMS_SHOWN])
    if len(in_short) > MAX_PROBLEMS_SHOWN:
        shown += f"; and {len(in_short) - MAX_PROBLEMS_SHOWN} more"
    listed = [{"code": one.code, "message": one.message, "modules": list(one.modules)} for one in problems]
    raise SourceError(f"{what}: {shown}", file=file, hint=hint, problems=listed, code=code)


def _in_short(problems: Sequence[Problem]) -> Iterator[str]:
    """The problems as text; of those about shapes, the first and the number of further modules."""
    shapes = [problem for problem in problems if problem.code == "shape"]
    n_modules = sum(len(problem.modules) for problem in shapes)
    for problem in problems:
        if problem.code != "shape":
            yield str(problem)
        elif problem is shapes[0]:
            more = f" (and {n_modules - 1} more)" if n_modules > 1 else ""
            yield f"{replace(problem, modules=problem.modules[:1])}{more}"


# Codes of problems that a merge does not have, each with the tensor of a module that the base needs for it.
_MERGEABLE = {
    "dora": "weight",
    "other-output": "weight",
    "weight": "weight",
    "norm": "weight",
    "bias": "bias",
    "tied": "weight",
    "vocabulary": "weight",
    "tokens": "weight",
}


def _is_mergeable(problem: Problem, base: BaseModel) -> bool:
    """Whether a merge while converting works for all modules of the problem."""
    what = _MERGEABLE.get(problem.code)
    names = [f"{module}.{what}" for module in problem.modules]
    return bool(what and names) and all(base.has(name) or base.has(f"model.{name}") for name in names)


class _Taken:
    """Records which targets already have a module: one for each expert of a target, or one for all."""

    def __init__(self) -> None:
        self._experts: dict[str, set[int | None]] = {}

    def __call__(self, slot: Slot) -> bool:
        clashes = False
        for landing in slot.landings:
            experts = self._experts.setdefault(landing.target, set())
            clashes |= slot.expert in experts or None in experts or (slot.expert is None and bool(experts))
            experts.add(slot.expert)
        return clashes


def _whole_problems(adapter: LoraFile, base: BaseModel, config: LoraConfig) -> Iterator[Problem]:
    """Problems with the adapter as a whole."""
    if config.is_dora and not any(problem.code == "dora" for problem in adapter.problems):
        yield Problem("dora", "the adapter is incomplete: DoRA without magnitudes")
    if config.replicated_layers(base.n_layers):
        yield Problem(
            "replication", "layer_replication: the adapter is for a model with replicated layers, unlike the base"
        )
    if not adapter.factors and not adapter.problems:
        yield Problem("empty", "the adapter has no factors")


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

    def module(self, fitting: frozenset[Orientation], config: LoraConfig) -> LoraModule:
        """The module, if exactly one orientation fits; else `_Unfit` is raised."""
        if not fitting:
            raise self._unfit()
        if len(fitting) > 1:
            what = f"lora_A {list(self.a.shape)} and lora_B {list(self.b.shape)} fit either way round"
            raise _Unfit("ambiguous", f"{what}, so it is unclear whether they are stored transposed", self.name)
        ((a_turned, b_turned),) = fitting
        a, b = self.a.lazy(), self.b.lazy()
        rank = self.a.shape[-1] if a_turned else self.a.shape[-2]
        return LoraModule(
            self.name,
            self.slot,
            Transpose(a) if a_turned else a,
            Transpose(b) if b_turned else b,
            config.scale(self.name, rank),
            (a_turned, b_turned),
        )

    def _unfit(self) -> _Unfit:
        shapes = f"lora_A {list(self.a.shape)} and lora_B {list(self.b.shape)}"
        for a, b in product(*((shape, shape[::-1]) for shape in (self.a.shape, self.b.shape))):
            if len(a) == len(b) == 2 and _fit((b[1], a[1]), b, self.slot):
                return _Unfit("rank", f"the ranks disagree: {shapes}", self.name)
        if (n_rows := self._other_vocabulary()) is not None:
            known = f", but the base's has {self.slot.shape[0]}" if self.slot.shape[0] is not None else ""
            return _Unfit("vocabulary", f"the adapter's vocabulary has {n_rows} rows{known}", self.name)
        expected = ["?" if extent is None else extent for extent in self.slot.shape]
        return _Unfit("shape", f"{shapes} do not fit the base's {self.slot.target} {expected}", self.name)

    def _other_vocabulary(self) -> int | None:
        """The number of rows of the embedding or head that the factors fit if only the vocabulary differs."""
        if not (self.slot.is_embedding or self.slot.is_head):
            return None
        slot = replace(self.slot, shape=(None, self.slot.shape[1]))
        fitting = _fitting(self.a.shape, self.b.shape, slot)  # empty if the factors are not matrices
        ways = sorted(fitting & _longer(self.a.shape, self.b.shape, slot)) if fitting else []
        if not ways:
            return None
        (a_turned, b_turned), is_embedding = ways[0], self.slot.is_embedding
        factor, is_turned = (self.a, a_turned) if is_embedding else (self.b, b_turned)
        return factor.shape[0 if is_turned == is_embedding else 1]


def orientations(pairs: Sequence[tuple[Shape, Shape, Slot]]) -> list[frozenset[Orientation]]:
    """Return the possible orientations of each module of a file, from the stored shapes of A and B.

    One program wrote the whole file, so an orientation that fits all modules is that of each. If several do, a factor
    whose extents the base does not give is taken as longer than wide, and then both factors as stored alike. If no
    orientation fits all modules, each keeps all that fit it.
    """
    found = [_fitting(*pair) for pair in pairs]
    heard = [n for n, (_, _, slot) in enumerate(pairs) if found[n] and not _is_stack(slot)]
    left = _agreeing([found[n] for n in heard])
    left = _agreeing([ways & _longer(*pairs[n]) or ways for n, ways in zip(heard, left, strict=True)])
    alike = EVERY.intersection((STRAIGHT, TURNED), *left)
    for n, ways in zip(heard, left, strict=True):
        found[n] = ways & alike or ways
    return found


def _agreeing(found: Sequence[frozenset[Orientation]]) -> list[frozenset[Orientation]]:
    common = EVERY.intersection(*found)
    return [ways & common or ways for ways in found]


def _is_stack(slot: Slot) -> bool:
    """Whether a slot is all experts of a layer; mlx-lm's LoRASwitchLinear does not transpose those."""
    return bool(slot.n_experts) and slot.expert is None


def _fitting(a: Shape, b: Shape, slot: Slot) -> frozenset[Orientation]:
    """The orientations in which A and B agree on the rank, and with the base's extents if known."""
    if _is_stack(slot):
        is_stacked = len(a) == len(b) == 3 and a[0] == b[0] == slot.n_experts
        return frozenset({STRAIGHT} if is_stacked and _fit(a[1:], b[1:], slot) else ())
    return frozenset(
        (a_turned, b_turned)
        for a_turned, b_turned in EVERY
        if _fit(a[::-1] if a_turned else a, b[::-1] if b_turned else b, slot)
    )


def _longer(a: Shape, b: Shape, slot: Slot) -> frozenset[Orientation]:
    """The orientations in which factors with an unknown extent, unless square, are longer than wide."""
    decided = None in slot.shape and a[0] != a[1] and b[0] != b[1]
    return frozenset({(a[0] > a[1], b[0] < b[1])}) if decided else EVERY


def _fit(a: Shape, b: Shape, slot: Slot) -> bool:
    n_out, n_in = slot.shape[::-1] if slot.is_embedding else slot.shape
    return len(a) == len(b) == 2 and a[0] == b[1] > 0 and n_in in (None, a[1]) and n_out in (None, b[0])


# ---------------------------------------------------------------- checks of a matched module


def _misfits(module: LoraModule, base: BaseModel, config: LoraConfig) -> Iterator[Problem]:
    slot, names = module.slot, (module.name,)
    stated = config.rank(module.name)
    if stated is not None and stated != module.rank:
        yield Problem("rank", f"has rank {module.rank}, but adapter_config.json says {stated}", names)
    if slot.is_embedding and base.is_tied:
        yield Problem(
            "tied",
            "the base is tied, and llama.cpp crashes on an adapter for an embedding that is also the head",
            names,
        )
    if (slot.is_embedding or slot.is_head) and base.is_tied is None:
        yield Problem(
            "tied", "it is unknown whether the base is tied: give its complete GGUF file, or its folder", names
        )


def grouped(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems with those of equal code and message joined into one with all modules."""
    together: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        together.setdefault((problem.code, problem.message), []).extend(problem.modules)
    return [Problem(code, message, tuple(modules)) for (code, message), modules in together.items()]
