"""Choose the row and the stored tensors for each target, and check that every stored tensor is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from streamconv.errors import RunWarning
from streamconv.recipe.bind.sources import Sources
from streamconv.recipe.language import Model
from streamconv.recipe.mismatch import Problem, closest, first_few, listed
from streamconv.recipe.names import NONE, fill, has_experts, match_name, stack_of
from streamconv.recipe.words import Computed, Tensor

Row = Tensor | Computed


@dataclass(frozen=True, slots=True)
class Choice:
    """The row and the sources of one target.

    Attributes:
        name: The name of the target.
        row: The row that makes it; None if its source is missing.
        sources: The names of the stored tensors; experts are in order of their numbers.
        missing: The name of a required source, or of the first expert, that is missing.
        rivals: The first source of each row, if several rows make the target.
    """

    name: str
    row: Row | None
    sources: tuple[str, ...] = ()
    missing: str | None = None
    rivals: tuple[str, ...] = ()


def choose(model: Model, sources: Sources) -> list[Choice]:
    """Return a choice for each target, in the recipe's order; adjacent targets of a stack are grouped by layer."""
    by_target: dict[str, list[Row]] = {}
    rows: tuple[Row, ...] = (*model.recipe.tensors, *model.recipe.computed)
    for row in rows:
        by_target.setdefault(row.target, []).append(row)
    choices: list[Choice] = []
    for stack, targets in groupby(by_target, stack_of):
        of_targets = [by_target[target] for target in targets]
        if stack is None:
            for of_target in of_targets:
                choices += _choose(model, sources, of_target, None)
        else:
            choices += _choices_of_layers(model, sources, stack, of_targets)
    return choices


def _choices_of_layers(
    model: Model, sources: Sources, stack: str, of_targets: Sequence[Sequence[Row]]
) -> Iterator[Choice]:
    layers_of = [[(row, set(model.layers(row))) for row in rows] for rows in of_targets]
    for i in range(model.depth(stack)):
        for rows in layers_of:
            yield from _choose(model, sources, [row for row, layers in rows if i in layers], i)


def _choose(model: Model, sources: Sources, rows: Sequence[Row], i: int | None) -> Iterator[Choice]:
    """Yield the choice for a target (of layer `i`): a stored row, or the missing source if one is required."""
    tensors = [row for row in rows if isinstance(row, Tensor) and row.unless not in sources.found]
    stored = [(row, names) for row in tensors if (names := sources.of_layer(row.source, NONE if i is None else i))]
    if stored:
        row, names = stored[0]
        taken, missing = _in_order(model, row, i, names)
        if row.also:
            beside = {source: sources.of_layer(source, NONE if i is None else i).get(NONE) for source in row.also}
            missing = missing or next((fill(source, i) for source, name in beside.items() if name is None), None)
            taken = (*taken, *(name for name in beside.values() if name is not None))
        rivals = tuple(next(iter(names.values())) for _, names in stored) if len(stored) > 1 else ()
        yield Choice(fill(row.target, i), row, taken, missing, rivals)
        return
    if tensors and _is_due(model, tensors[0]):
        yield Choice(fill(tensors[0].target, i), None, missing=fill(tensors[0].source, i, 0))
    for computed in rows:
        if isinstance(computed, Computed):
            yield Choice(fill(computed.target, i), computed)


def _is_due(model: Model, row: Tensor) -> bool:
    if callable(row.required):
        return row.required(model.config)
    return model.config.flag(row.required) is True if isinstance(row.required, str) else row.required


def _in_order(
    model: Model, row: Tensor, i: int | None, by_expert: Mapping[int, str]
) -> tuple[tuple[str, ...], str | None]:
    """Return the sources of one target, experts in order of their numbers, and the first missing expert."""
    n_experts = model.dims.get("E", 0) if has_experts(row.source) else 0
    present = {e: name for e, name in sorted(by_expert.items()) if e < n_experts or not n_experts}
    gap = None
    if len(present) < n_experts:
        gap = fill(row.source, i, next((e for e, found in enumerate(present) if e != found), len(present)))
    return tuple(present.values()), gap


# ---------------------------------------------------------------- all choices together


def check_choices(model: Model, sources: Sources, choices: Sequence[Choice]) -> list[Problem]:
    """Return a problem for each kind of fault: tensors with rivals, and unknown, missing or unused tensors."""
    problems = [
        Problem("tensor-sources", f"{one.name} has {len(one.rivals)} sources: {first_few(one.rivals)}")
        for one in choices
        if one.rivals
    ]
    missing = [*dict.fromkeys(one.missing for one in choices if one.missing is not None)]
    if sources.unknown:
        known = [match_name(name)[0] for name in missing] or [row.source for row in model.recipe.tensors]
        shown = listed(sources.unknown, closest(sources.unknown, known))
        problems.append(Problem("tensors-unknown", f"unknown tensors: {shown}"))
    if missing:
        problems.append(Problem("tensors-missing", f"missing tensors: {listed(missing)}"))
    for flag, names in _by_flag(choices).items():
        if model.config.flag(flag) is False:
            what = f"config.json says that {flag} is false, but the checkpoint has {listed(names)}"
            problems.append(Problem("config-contradiction", what))
    return problems + _misplaced(model, sources, choices)


def _misplaced(model: Model, sources: Sources, choices: Sequence[Choice]) -> list[Problem]:
    taken = {source for choice in choices for source in choice.sources}
    left = [name for template in sources.found for name in sources.names(template) if name not in taken]
    if not left:
        return []
    counting = {*model.recipe.stacks.values(), "E"} & model.dims.keys()
    counts = [f"{dim.label}={model.dims[n]}" for n, dim in model.recipe.dims.items() if n in counting]
    what = f"unexpected tensors ({', '.join(counts)}): {listed(left)}"
    return [Problem("tensors-misplaced", what)]


def _by_flag(choices: Sequence[Choice]) -> dict[str, list[str]]:
    """Return the stored tensors of rows whose `required` is a flag of the config, by flag."""
    found: dict[str, list[str]] = {}
    for one in choices:
        if isinstance(one.row, Tensor) and isinstance(one.row.required, str):
            found.setdefault(one.row.required, []).extend(one.sources)
    return found


def ignored_tensors(sources: Sources) -> Iterator[RunWarning]:
    """Warn about stored tensors that the config says the model does not have."""
    if sources.ignored:
        what = f"the config says that the model has no {listed(sources.ignored)}; left out, as in transformers"
        yield RunWarning("tensors-ignored", what)


def missing_flags(model: Model, choices: Sequence[Choice]) -> Iterator[RunWarning]:
    """Warn about stored tensors that transformers ignores because the config does not set their flag."""
    for flag, names in _by_flag(choices).items():
        if model.config.flag(flag) is None and model.recipe.flags.get(flag) is False:
            what = f"config.json has no {flag}, but the checkpoint has {listed(names)}: written, unlike in transformers"
            yield RunWarning("flag-missing", what)


def check_head(model: Model, sources: Sources, *, is_body: bool) -> tuple[list[Problem], list[RunWarning]]:
    """Check that a head is stored if the config says that it is not tied. A stored head is always written.

    A model that outputs embeddings needs no head; a reranker uses rows of it.

    Args:
        model: The model, without targets.
        sources: The stored tensors.
        is_body: Whether the model was saved without its head.

    Returns:
        Problems and warnings.
    """
    recipe = model.recipe
    if not recipe.head:
        return [], []
    has_head, stated = recipe.head in sources.found, recipe.stated_tie(model.config)
    tied = recipe.is_tied_by(model.config)
    if not has_head and model.modules.is_given and model.modules.answers is None:
        return [], []
    if not has_head and not tied and (stated is not None or is_body):
        what = f"the config says untied, but there is no {recipe.head}: the checkpoint is incomplete"
        return [Problem("head-missing", what)], []
    if not has_head and not tied:
        what = f"the checkpoint has no {recipe.head}: written as a tied model"
        return [], [RunWarning("head-missing", what)]
    if has_head and stated:
        return [], [
            RunWarning("head-on-tied", "the config says tied, but a head is stored: it was written", recipe.head)
        ]
    return [], []
