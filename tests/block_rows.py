"""Rows of every kind for the block types, and importance weights of every kind: made, random, always the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Maker = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.generic]]


def _by_block(rng: np.random.Generator, shape: tuple[int, int], scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian numbers whose blocks of 32 have `scales`, repeated at random."""
    factors = rng.choice(scales, (shape[0], shape[1] // 32, 1))
    return (rng.standard_normal((shape[0], shape[1] // 32, 32)) * factors).reshape(shape)


def _sparse(
    rng: np.random.Generator, shape: tuple[int, int], values: NDArray[np.generic], share: float
) -> NDArray[np.generic]:
    return np.where(rng.random(shape) < share, values, 0)


def _outliers(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.generic]:
    return rng.standard_normal(shape) * np.where(rng.random(shape) < 0.004, 10.0 ** rng.uniform(1, 6, shape), 0.02)


def _constant(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.generic]:
    """Whole blocks of 32, whole super-blocks, or whole rows of one number."""
    rows, columns = shape
    parts = [np.repeat(rng.standard_normal((rows, columns // n)), n, axis=1) for n in (16, 32, 256)]
    return np.choose(rng.integers(0, 3, (rows, 1)), parts)


def _nearly_constant(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.generic]:
    """Blocks of one number and a few neighbours of it in float32."""
    numbers = _constant(rng, shape).astype(np.float32)
    return (numbers.view(np.int32) + rng.integers(-2, 3, shape, dtype=np.int32)).view(np.float32)


def _negative_outliers(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.generic]:
    """Negative blocks, all but constant, with outliers: where those have little weight, a search moves its minimum
    beyond the largest element, and what it rounds leaves the range of the fast rounding."""
    numbers = np.repeat(-(10.0 ** rng.uniform(-3, 3, (shape[0], shape[1] // 32))), 32, axis=1).astype(np.float32)
    near = (numbers.view(np.int32) + rng.integers(-3, 4, shape, dtype=np.int32)).view(np.float32)
    return np.where(rng.random(shape) < 0.03, numbers * np.float32(1e7), near)


def _bf16(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.generic]:
    numbers = (rng.standard_normal(shape) * 0.02).astype(np.float32)
    return (numbers.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _zeros(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.generic]:
    """Zeros of both signs, and here and there a number."""
    return _sparse(rng, shape, rng.standard_normal(shape), 0.01) * rng.choice([-1.0, 1.0], shape)


def _zero_blocks(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.generic]:
    return rng.standard_normal(shape) * np.repeat(rng.integers(0, 2, (shape[0], shape[1] // 32)), 32, axis=1)


ROWS: dict[str, Maker] = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "student": lambda rng, shape: rng.standard_t(2.0, shape) * 0.05,
    "bf16": _bf16,
    "integers": lambda rng, shape: rng.integers(-4, 5, shape) / 8,
    "positive": lambda rng, shape: np.abs(rng.standard_normal(shape)) + 0.25,
    "negative": lambda rng, shape: -np.abs(rng.standard_normal(shape)) - 3,
    "constant": _constant,
    "nearly-constant": _nearly_constant,
    "zeros": _zeros,
    "zero-blocks": _zero_blocks,
    "outliers": _outliers,
    "negative-outliers": _negative_outliers,
    "extreme": lambda rng, shape: rng.choice([-1.0, 1.0], shape) * rng.uniform(1e38, 3.3e38, shape),
    "scales": lambda rng, shape: _by_block(rng, shape, 10.0 ** np.arange(-20, 3)),
    "tiny": lambda rng, shape: _by_block(rng, shape, 10.0 ** np.arange(-17, -5)),
    "subnormal": lambda rng, shape: _by_block(rng, shape, 2.0 ** np.arange(-149, -120)),
    "huge": lambda rng, shape: np.clip(_by_block(rng, shape, 10.0 ** np.arange(3, 37)), -3e38, 3e38),
}

WEIGHTS: dict[str, Callable[[np.random.Generator, int], NDArray[np.generic]]] = {
    "gamma": lambda rng, n: rng.gamma(0.5, 2.0, n),
    "ones": lambda rng, n: np.ones(n),
    "zeros": lambda rng, n: np.zeros(n),
    "some-zero": lambda rng, n: rng.gamma(0.5, 2.0, n) * (rng.random(n) < 0.4),
    "tiny": lambda rng, n: 10.0 ** rng.uniform(-45, -30, n),
    "huge": lambda rng, n: 10.0 ** rng.uniform(20, 38, n),
    "spread": lambda rng, n: 10.0 ** rng.uniform(-12, 12, n),
}


def rows(kind: str, shape: tuple[int, int], seed: int) -> Floats:
    """Finite numbers of `kind`, in rows whose length is a multiple of 256."""
    with np.errstate(all="ignore"):
        made = np.asarray(ROWS[kind](np.random.default_rng([seed, *kind.encode()]), shape)).astype(np.float32)
    return np.ascontiguousarray(made)


def weights(kind: str, n: int, seed: int) -> Floats:
    """`n` finite importances of `kind`, none negative."""
    with np.errstate(all="ignore"):
        return np.asarray(WEIGHTS[kind](np.random.default_rng([seed, *kind.encode()]), n)).astype(np.float32)
