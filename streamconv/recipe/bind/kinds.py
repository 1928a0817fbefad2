"""Determine the kind of each layer from its tensors, and check that the config agrees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streamconv.recipe.bind.sources import Sources
from streamconv.recipe.language import Model
from streamconv.recipe.mismatch import Problem, first_few


def settle_kinds(model: Model, sources: Sources) -> tuple[dict[str, list[str]], list[Problem]]:
    """Determine the kinds of layers.

    Returns:
        For each axis the kind of each layer, "" if its tensors do not determine one; and the problems.
    """
    recipe = model.recipe
    settled: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for axis, kinds in recipe.axes.items():
        evidence: dict[str, set[int]] = {kind: set() for kind in kinds}
        for row in recipe.tensors:
            if row.only.startswith(f"{axis}="):
                evidence[row.only.partition("=")[2]].update(sources.found.get(row.source, ()))
        n_layers = model.depth(recipe.stack_of_axis(axis))
        present = [[kind for kind in kinds if i in evidence[kind]] for i in range(n_layers)]
        problems += _of_layers([i for i, p in enumerate(present) if not p], f"no tensors of {' or '.join(kinds)}")
        problems += _of_layers([i for i, p in enumerate(present) if len(p) > 1], f"tensors of {' and '.join(kinds)}")
        settled[axis] = [p[0] if p else "" for p in present]
    for claim in recipe.claims:
        found = settled[claim.axis]
        if (claimed := claim.kinds(model.config, len(found))) is not None:
            problems += _contradictions(claim.key, claimed, found)
    return settled, problems


def _of_layers(layers: Sequence[int], what: str) -> Iterator[Problem]:
    if layers:
        yield Problem("layer-tensors", f"layer{'s' if len(layers) > 1 else ''} {first_few(layers)} with {what}")


def _contradictions(key: str, claimed: Sequence[str], settled: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem if a config key lists kinds of layers that differ from those of the tensors."""
    if len(claimed) != len(settled):
        what = f"{key} in config.json lists {len(claimed)} layers, but there are {len(settled)}"
        yield Problem("config-contradiction", what)
    wrong = [i for i, (said, found) in enumerate(zip(claimed, settled, strict=False)) if found and said != found]
    if wrong:
        i = wrong[0]
        what = (
            f"{key} in config.json says that layer {i} is {claimed[i]!r}, but its tensors are those of {settled[i]!r}"
        )
        more = f" (and {len(wrong) - 1} more like this)" if len(wrong) > 1 else ""
        yield Problem("config-contradiction", what + more)
