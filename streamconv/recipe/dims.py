"""Symbolic shapes: evaluate extents such as "(A+2*K)*D", solve them for a dim, and check them.

A dim is a size of a model, such as H for the hidden size; an extent is one size of a shape, an expression of dims and
whole numbers. "(A+2*K)*D H" is a matrix of (A + 2 * K) * D rows and H columns. The value of a dim comes from the
config, otherwise from stored shapes, otherwise from its default. Values from the config are never changed; a dim whose
value cannot be determined is left out.
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

MAX_LAYERS = 10_000  # more than any checkpoint has; bounds the work that a hostile config can cause
_PRIMES = (10_007, 20_011, 30_011, 40_009, 50_021, 60_013, 70_001, 80_021)  # test values of dims
_NOT_WHOLE = 0  # the value of a quotient that is not a whole number: no tensor has this extent


@dataclass(frozen=True, slots=True)
class Extent:
    """One extent of a shape.

    Attributes:
        text: The expression, such as "(A+2*K)*D".
        names: The dims in it, in order of appearance.
    """

    text: str
    names: tuple[str, ...]
    _tree: ast.expr

    def value(self, dims: Mapping[str, int]) -> int | None:
        """Return the extent as a number: None if a dim is unknown, 0 if a quotient is not a whole number."""
        if any(name not in dims for name in self.names):
            return None
        try:
            value = _evaluate(self._tree, dims)
        except ZeroDivisionError:
            return _NOT_WHOLE
        return int(value) if value.denominator == 1 else _NOT_WHOLE

    def solve(self, extent: int, dims: Mapping[str, int]) -> tuple[str, int] | None:
        """Solve for the only unknown dim, given the extent as a number.

        Args:
            extent: The number that this extent must equal.
            dims: The known dims.

        Returns:
            The dim and its value. None if there is not exactly one unknown dim, if the extent is not linear in it, or
            if the value is not a positive whole number.
        """
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
    from fractions import Fraction  # takes several ms to import; most models divide without a remainder

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
    """Parse one extent.

    Raises:
        ValueError: `text` has something other than +, -, *, / of dims and whole numbers.
    """
    try:
        tree = ast.parse(text, mode="eval").body
        found = sorted(
            (node for node in ast.walk(tree) if isinstance(node, ast.Name)), key=lambda node: node.col_offset
        )
        names = tuple(dict.fromkeys(node.id for node in found))
        with suppress(ZeroDivisionError):  # A/(A-B) with every dim 1; real dims may be valid
            _evaluate(tree, dict.fromkeys(names, 1))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} cannot be read: {error}") from None
    return Extent(text, names, tree)


@cache
def parse_shape(shape: str) -> tuple[Extent, ...]:
    """Parse the extents of a row-major shape such as "A*D H".

    Raises:
        ValueError: An extent cannot be parsed.
    """
    return tuple(parse_extent(extent) for extent in shape.split())


def extents(shape: str, dims: Mapping[str, int]) -> tuple[int, ...] | None:
    """Return the row-major shape in numbers, or None if a dim is unknown."""
    values = [extent.value(dims) for extent in parse_shape(shape)]
    return None if None in values else tuple(value for value in values if value is not None)


def differ(one: Iterable[str], other: Iterable[str]) -> bool:
    """Whether two products of extents are different expressions of the same dims, evaluated at distinct primes.

    False if they use different dims, or if an extent is unknown ("?"), because they may then be equal for a model.
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
    """`left` (in dims) must equal `extent`, which was found in a stored shape."""

    left: Extent
    extent: int


def solve_dims(recipe: Output, stated: Mapping[str, int], equations: Iterable[Equation] = ()) -> dict[str, int]:
    """Return all dims that can be determined.

    Args:
        recipe: The architecture, for its defaults.
        stated: The dims that the config gives; they are not changed.
        equations: The extents of stored tensors, solved before defaults are used.
    """
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
    """Return the dims that the config gives.

    Raises:
        SourceError: A value is smaller than the minimum of its dim (`config-value`).
    """
    stated = {name: value for name, dim in recipe.dims.items() if (value := dim.stated(config)) is not None}
    for name, value in stated.items():
        if value < recipe.dims[name].minimum:
            what = f"{recipe.dims[name].label} is {value}"
            raise SourceError(what, file=config.file, hint="correct the config", code="config-value")
    return stated
