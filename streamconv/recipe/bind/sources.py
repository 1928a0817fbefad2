"""The tensors of a checkpoint by the templates of a recipe, each with its layer and expert."""

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
    """A checkpoint's tensors as a recipe finds them.

    Attributes:
        stored: All of them, by name.
        found: The names by template, layer and expert; a name without such a number has NONE in its place.
        unknown: Names that no row takes.
        rows: The recipe's rows by their template, without those that the config rules out.
        ignored: Names of those.
    """

    stored: Mapping[str, Stored]
    found: Mapping[str, Mapping[int, Mapping[int, str]]]
    unknown: Sequence[str]
    rows: Mapping[str, Sequence[Tensor]]
    ignored: Sequence[str] = ()

    def names(self, template: str) -> Iterator[str]:
        """The names of a template, in the order of the checkpoint."""
        return (name for by_expert in self.found[template].values() for name in by_expert.values())

    def of_layer(self, template: str, i: int) -> Mapping[int, str]:
        """The names of a template in a layer, by expert."""
        return self.found.get(template, {}).get(i, {})


def match_names(recipe: Output, config: Config, stored: Mapping[str, Stored]) -> tuple[Sources, list[Problem]]:
    """Every stored tensor under the template that it is of."""
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
