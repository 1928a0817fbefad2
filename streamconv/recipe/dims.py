"""Shapes in dims: an extent is a sum of products of dims and numbers, evaluated, solved for a dim, and checked.

"(A+2*K)*D H" is a matrix of (A + 2 * K) * D rows and H columns. Dims come from the config, else from stored shapes,
else from defaults; one that the config states is never changed, and one that follows from nothing is left out.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from streamconv.checkpoint.config import Config
from streamconv.errors import SourceError

if TYPE_CHECKING:
    from fractions import Fraction

    from streamconv.recipe.language import Output

MAX_LAYERS = 10_000  # no checkpoint has more; bounds what a hostile config can make us list
_PRIMES = (10_007, 20_011, 30_011, 40_009, 50_021, 60_013, 70_001, 80_021)  # by which extents are told apart
_NOT_WHOLE = 0  # the extent of a quotient that does not come out whole: no tensor has it


@dataclass(frozen=True, slots=True)
class Extent:
    """One extent of a shape, as "(A+2*K)*D"; `names` are its dims."""

    text: str
    names: tuple[str, ...]
    _tree: ast.expr

    def value(self, dims: Mapping[str, int]) -> int | None:
        """The extent in numbers; None where a dim is not known, 0 where a quotient does not come out whole."""
        if any(name not in dims for name in self.names):
            return None
        try:
            value = _evaluate(self._tree, dims)
        except ZeroDivisionError:
            return _NOT_WHOLE
        return int(value) if value.denominator == 1 else _NOT_WHOLE

    def solve(self, extent: int, dims: Mapping[str, int]) -> tuple[str, int] | None:
        """The one dim that is not known and its value, where this is `extent`, linear in it, and it comes out whole."""
        unknown = [name for name in self.names if name not in dims]
        if len(unknown) != 1:
            return None
        (name,) = unknown
        try:
            at = [_evaluate(self._tree, {**dims, name: x}) for x in (1, 2, 3)]
        except ZeroDivisionError:
            return None
        slope = at[1] - at[0]
        if not slope or at[2] - at[1] != slope:
            return None
        value = 1 + _quotient(extent - at[0], slope)
        return (name, int(value)) if value.denominator == 1 and value > 0 else None


def _quotient(dividend: int | Fraction, divisor: int | Fraction) -> int | Fraction:
    if isinstance(dividend, int) and isinstance(divisor, int) and not dividend % divisor:
        return dividend // divisor
    from fractions import Fraction  # several ms, and the dims of most models divide

    return Fraction(dividend) / divisor


def _evaluate(node: ast.expr, dims: Mapping[str, int]) -> int | Fraction:
    match node:
        case ast.Constant(value=int(number)) if number is not True and number is not False:
            return number
        case ast.Name(id=name):
            return dims[name]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left, dims) + _evaluate(right, dims)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _evaluate(left, dims) - _evaluate(right, dims)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _evaluate(left, dims) * _evaluate(right, dims)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _quotient(_evaluate(left, dims), _evaluate(right, dims))
    raise ValueError("only +, -, *, / of dims and whole numbers are allowed")


@cache
def parse_extent(text: str) -> Extent:
    """ValueError where `text` is not a sum of products."""
    try:
        tree = ast.parse(text, mode="eval").body
        found = sorted(
            (node for node in ast.walk(tree) if isinstance(node, ast.Name)), key=lambda node: node.col_offset
        )
        names = tuple(dict.fromkeys(node.id for node in found))
        with suppress(ZeroDivisionError):  # of A/(A-B) at ones; what it is of real dims is seen then
            _evaluate(tree, dict.fromkeys(names, 1))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} cannot be read: {error}") from None
    return Extent(text, names, tree)


@cache
def parse_shape(shape: str) -> tuple[Extent, ...]:
    """The extents of "A*D H", row-major. ValueError where one cannot be read."""
    return tuple(parse_extent(extent) for extent in shape.split())


def extents(shape: str, dims: Mapping[str, int]) -> tuple[int, ...] | None:
    """The row-major shape in numbers; None where a dim is not known."""
    values = [extent.value(dims) for extent in parse_shape(shape)]
    return None if None in values else tuple(value for value in values if value is not None)


def differ(one: Iterable[str], other: Iterable[str]) -> bool:
    """Whether two products of extents, in the same dims, are different numbers whatever the dims are.

    Extents in other dims may be equal for a model, and those that are not known ("?") as well.
    """
    extents = [list(texts) for texts in (one, other)]
    if any(text == "?" for texts in extents for text in texts):
        return False
    parsed = [[parse_extent(text) for text in texts] for texts in extents]
    names = [{name for extent in each for name in extent.names} for each in parsed]
    if names[0] != names[1]:
        return False
    dims = dict(zip(sorted(names[0]), _PRIMES, strict=False))
    if len(dims) < len(names[0]):
        return False
    products = [math.prod(extent.value(dims) or 0 for extent in each) for each in parsed]
    return 0 not in products and products[0] != products[1]


@dataclass(frozen=True, slots=True)
class Equation:
    """An extent found on disk: `left` (in dims) is `extent`."""

    left: Extent
    extent: int


def solve_dims(recipe: Output, stated: Mapping[str, int], equations: Iterable[Equation] = ()) -> dict[str, int]:
    """Every dim that follows: those stated, then those that the equations settle, then the defaults."""
    dims = dict(stated)
    pending = list(dict.fromkeys(equations))
    while solved := [one for one in pending if _solve(one, dims)]:
        pending = [one for one in pending if one not in solved]
    for name, dim in recipe.dims.items():
        if name not in dims and dim.default is not None:
            value = parse_extent(str(dim.default)).value(dims)
            if value is not None and value >= dim.minimum:
                dims[name] = value
    return dims


def _solve(equation: Equation, dims: dict[str, int]) -> bool:
    found = equation.left.solve(equation.extent, dims)
    if found is not None:
        dims[found[0]] = found[1]
    return found is not None


def stated_dims(recipe: Output, config: Config) -> dict[str, int]:
    """The dims that the config states; SourceError where one is not a size."""
    stated = {name: value for name, dim in recipe.dims.items() if (value := dim.stated(config)) is not None}
    for name, value in stated.items():
        if value < recipe.dims[name].minimum:
            what = f"{recipe.dims[name].label} is {value}"
            raise SourceError(what, file=config.file, hint="correct the config", code="config-value")
    return stated
