"""The names and shapes of a recipe's rows in numbers: which layer and expert a name is of, how large each dim is.

Owns: reading names and shapes as recipes write them, and solving dims from a config, from stored shapes and from
defaults. Does not own: what a recipe says (recipe/language.py), whether a checkpoint agrees with it (recipe/bind.py).
Invariant: a dim that the config states is never changed; one that does not follow from anything is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from streamconv.checkpoint.config import Config
from streamconv.errors import SourceError
from streamconv.recipe.language import Recipe

_NUMBER = re.compile(r"(?<=\.)(0|[1-9]\d{0,5})(?=\.)")


def match_name(name: str) -> tuple[str, tuple[int, ...]]:
    """A tensor's name as template and numbers: layers.3.experts.7.w1 as layers.{i}.experts.{e}.w1 and (3, 7)."""
    numbers: list[int] = []

    def placeholder(match: re.Match[str]) -> str:
        numbers.append(int(match[0]))
        return ("{i}", "{e}", "{?}")[min(len(numbers) - 1, 2)]

    return _NUMBER.sub(placeholder, name), tuple(numbers)


@cache
def parse_shape(shape: str) -> tuple[tuple[str, ...], ...]:
    """ "A*D H" as (("A", "D"), ("H",))."""
    return tuple(tuple(extent.split("*")) for extent in shape.split())


@dataclass(frozen=True, slots=True)
class Equation:
    """An extent found on disk: the product of `factors` (dims or numbers) is `extent`."""

    factors: tuple[str, ...]
    extent: int

    def solve(self, dims: dict[str, int]) -> bool:
        """Fill in the one unknown dim, where there is just one and it comes out whole."""
        unknown = [factor for factor in self.factors if not factor.isdigit() and factor not in dims]
        if len(unknown) != 1:
            return False
        rest = math.prod(int(f) if f.isdigit() else dims[f] for f in self.factors if f != unknown[0])
        if self.extent == 0 or self.extent % rest:
            return False
        dims[unknown[0]] = self.extent // rest
        return True


def extents(shape: str, dims: Mapping[str, int]) -> tuple[int, ...] | None:
    """The row-major shape in numbers; None where a dim is not known."""
    factors = parse_shape(shape)
    if any(not f.isdigit() and f not in dims for extent in factors for f in extent):
        return None
    return tuple(math.prod(int(f) if f.isdigit() else dims[f] for f in extent) for extent in factors)


def solve_dims(recipe: Recipe, stated: Mapping[str, int], equations: Iterable[Equation] = ()) -> dict[str, int]:
    """Every dim that follows: those stated, then those the shapes settle, then the defaults."""
    dims = dict(stated)
    pending = list(dict.fromkeys(equations))
    while solved := [equation for equation in pending if equation.solve(dims)]:
        pending = [equation for equation in pending if equation not in solved]
    for name, dim in recipe.dims.items():
        if name not in dims and (value := _default(dim.default, dims)) is not None:
            dims[name] = value
    return dims


def _default(default: int | str | None, dims: Mapping[str, int]) -> int | None:
    """A Dim's default in numbers: as it is, of another dim, or a quotient that comes out whole."""
    if not isinstance(default, str):
        return default
    whole, _, divisor = default.partition("/")
    if whole not in dims or (divisor and divisor not in dims):
        return None
    quotient, rest = divmod(dims[whole], dims[divisor] if divisor else 1)
    return None if rest else quotient


def stated_dims(recipe: Recipe, config: Config) -> dict[str, int]:
    """The dims that the config states explicitly; SourceError where one is no size."""
    stated = {name: value for name, dim in recipe.dims.items() if (value := dim.stated(config)) is not None}
    for name, value in stated.items():
        if value < 1:
            what = f"{recipe.dims[name].label} comes to {value}"
            raise SourceError(what, file=config.file, hint="correct the config")
    return stated
