"""Bind a recipe to a checkpoint: every source tensor is accounted for, or every disagreement is listed at once.

The steps are: names (sources.py), dims and shapes (shapes.py), kinds of layers (kinds.py), the tensors of each target
(choices.py). Each step returns a value for the next steps, and the problems that it found.

Errors are: a source that no row uses, a row without a source, a second source for one target, a wrong shape, a gap in
{i} or {e}. A value in the config must agree with the tensors; if it is absent or null, it is derived from the tensors.
The work is bounded by the number of stored tensors, not by numbers in the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from streamconv.checkpoint.config import Config
from streamconv.checkpoint.modules import NO_MODULES, Modules
from streamconv.errors import RunWarning
from streamconv.lazy.arithmetic import widened
from streamconv.lazy.leaves import Resident
from streamconv.lazy.views import Stack
from streamconv.recipe.bind.choices import Choice, check_choices, check_head, choose, ignored_tensors, missing_flags
from streamconv.recipe.bind.kinds import settle_kinds
from streamconv.recipe.bind.shapes import check_shapes, find_dims
from streamconv.recipe.bind.sources import match_names
from streamconv.recipe.language import Model, Output, Recipe, Stored, Target
from streamconv.recipe.mismatch import Problem, mismatch
from streamconv.recipe.names import has_experts
from streamconv.recipe.words import Caveat, Computed


def bind(
    recipe: Output,
    config: Config,
    stored: Mapping[str, Stored],
    main: Model | None = None,
    *,
    is_body: bool = False,
    modules: Modules = NO_MODULES,
) -> Model:
    """Return a model: the recipe with every dim, kind and tensor of a checkpoint.

    Args:
        recipe: The architecture, or one of its further outputs.
        config: The checkpoint's config.
        stored: The checkpoint's tensors by the recipe's names.
        main: For a further output, the model that it belongs to.
        is_body: The model was saved without its head, so it is incomplete unless it is tied.
        modules: The sentence-transformers modules after the model, which then needs no head.

    Raises:
        SourceError: The checkpoint disagrees with the recipe; the error lists everything.
    """
    config = recipe.config_of(config)
    sources, of_names = match_names(recipe, config, stored)
    dims, of_dims = find_dims(recipe, config, sources)
    model = Model(recipe, config, dims, main=main, modules=modules)
    misfits = check_shapes(model, sources)
    kinds, of_kinds = settle_kinds(model, sources)
    model = replace(model, kinds=kinds)
    choices = choose(model, sources)
    of_head, warnings = check_head(model, sources, is_body=is_body)
    refusals, caveats = _limits(model)
    problems = [
        *of_names,
        *of_dims,
        *(misfit.problem for misfit in misfits),
        *of_kinds,
        *check_choices(model, sources, choices),
        *of_head,
    ]
    if problems or refusals:
        sizes = dict.fromkeys(size for misfit in misfits for size in misfit.sizes)
        raise mismatch(recipe.arch, config, problems, [*sizes], refusals)
    targets = [target for choice in choices if (target := _made(model, choice, stored))]
    said = [*warnings, *ignored_tensors(sources), *missing_flags(model, choices), *caveats]
    return replace(model, targets=targets, warnings=said)


def bind_outputs(recipe: Recipe, model: Model, stored: Mapping[str, Stored]) -> list[Model]:
    """Bind the further outputs of a checkpoint, such as a projector.

    Args:
        recipe: The architecture.
        model: The main model, already bound.
        stored: The checkpoint's tensors by the recipe's names.

    Returns:
        A model for each output that is required or has stored tensors.

    Raises:
        SourceError: The checkpoint disagrees with the recipe.
    """
    found = []
    for output in recipe.outputs:
        own = {name: tensor for name, tensor in stored.items() if output.find(name) or output.drop_of(name, {})}
        if own or output.is_required:
            found.append(replace(bind(output, model.config, own, model), stored=own))
    return found


def _limits(model: Model) -> tuple[list[Problem], list[RunWarning]]:
    """Return the refusals and the caveats that apply to a model; none if a dim is unknown."""
    refusals: list[Problem] = []
    caveats: list[RunWarning] = []
    if model.dims.keys() >= model.recipe.dims.keys():
        for one in (*model.recipe.refusals, *model.recipe.caveats):
            said = one.of(model)
            if said is not None and isinstance(one, Caveat):
                caveats.append(RunWarning(one.code, said))
            elif said is not None:
                refusals.append(Problem("unrunnable", said))
    return refusals, caveats


def _made(model: Model, choice: Choice, stored: Mapping[str, Stored]) -> Target | None:
    """Return the target of a choice; None if the choice has no row, or if a computed target has no value."""
    row = choice.row
    if row is None:
        return None
    if isinstance(row, Computed):
        array = row.value(model)
        return None if array is None else Target(choice.name, Resident(array), row)
    lazy = [stored[name].lazy() for name in choice.sources]
    if has_experts(row.source):
        if len({tensor.spec.dtype for tensor in lazy}) > 1:
            lazy = [widened(tensor) for tensor in lazy]
        lazy = [Stack(lazy)]
    return Target(choice.name, model.made(row, lazy), row)
