"""Match the tensors of a checkpoint to the templates of a recipe."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from streamconv.checkpoint.config import Config
from streamconv.recipe.dims import stated_dims
from streamconv.recipe.language import Output, Stored
from streamconv.recipe.mismatch import Problem
from streamconv.recipe.words import Tensor


@dataclass(frozen=True, slots=True)
class Sources:
    """The tensors of a checkpoint, matched to the rows of a recipe.

    Attributes:
        stored: All tensors by name.
        found: The names by template, layer and expert; NONE if a template has no layer or no expert.
        unknown: The names that match no template.
        rows: The rows by the templates of their sources, without rows that the config excludes.
        ignored: The names that match only excluded rows.
    """

    stored: Mapping[str, Stored]
    found: Mapping[str, Mapping[int, Mapping[int, str]]]
    unknown: Sequence[str]
    rows: Mapping[str, Sequence[Tensor]]
    ignored: Sequence[str] = ()

    def names(self, template: str) -> Iterator[str]:
        """Return the names of a template, in the order of the checkpoint."""
        return (name for by_expert in self.found[template].values() for name in by_expert.values())

    def of_layer(self, template: str, i: int) -> Mapping[int, str]:
        """Return the names of a template in a layer, by expert."""
        return self.found.get(template, {}).get(i, {})


def match_names(recipe: Output, config: Config, stored: Mapping[str, Stored]) -> tuple[Sources, list[Problem]]:
    """Match every stored tensor to a template.

    Args:
        recipe: The architecture.
        config: The config that describes the output.
        stored: The tensors by the recipe's names.

    Returns:
        The matches, and a problem for each tensor that is stored twice.
    """
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for row in recipe.tensors:
        if not callable(row.required) or row.required(config):
            for source in row.sources:
                rows[source].append(row)
    ruled_out = {source for row in recipe.tensors for source in row.sources} - rows.keys()
    stated = stated_dims(recipe, config)
    depths = {stack: stated[dim] for stack, dim in recipe.stacks.items() if dim in stated}
    found: dict[str, dict[int, dict[int, str]]] = {}
    unknown, ignored, problems = [], [], []
    for name in stored:
        if recipe.drop_of(name, depths) is not None:
            continue
        place = recipe.find(name)
        if place is None:
            if not recipe.is_of_another(name):
                unknown.append(name)
        elif place.template in rows:
            by_expert = found.setdefault(place.template, {}).setdefault(place.i, {})
            other = by_expert.setdefault(place.e, name)
            if other is not name:
                problems.append(Problem("tensor-twice", f"{other} and {name} are the same tensor"))
        elif place.template in ruled_out:
            ignored.append(name)
    return Sources(stored, found, unknown, rows, ignored), problems
