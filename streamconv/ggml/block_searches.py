"""ggml's searches for the scales of block types, in numpy: the reference with which compiled kernels are compared.

An array of shape [n, lanes] holds one sub-block per column, so that sums over a sub-block go from its first element to
its last, as in ggml: the order affects the last bit of a sum, and thereby the bytes. Every operation is a single IEEE
F32 operation. Functions have the names of ggml's (ggml/src/ggml-quants.c) without `make_` and `_quants`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Mask = NDArray[np.bool_]

ROUNDER: Final = np.float32(12582912)  # 1.5 * 2^23: adding it rounds to an integer, half to even
LEAST_MAGNITUDE: Final = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: smaller magnitudes count as zero


def nearest(numbers: Floats) -> Ints:
    """ggml's `nearest_int`, with the same results for infinities, NaNs and numbers beyond 2^22."""
    bits = (numbers + ROUNDER).view(np.int32)
    bits &= 0x007F_FFFF
    bits -= 0x0040_0000
    return bits


def sum_in_order(terms: Floats) -> Floats:
    """The sums of the columns of [n, lanes], each added from its first element to its last."""
    total = np.zeros(terms.shape[1:], dtype=np.float32)
    for row in terms:
        total += row
    return total


def first_largest(x: Floats) -> Floats:
    """The element with the largest magnitude of each column (the first of several); +0 if all are zeros or NaNs."""
    x = np.where(np.isnan(x), np.float32(0), x)
    place = np.argmax(np.abs(x), axis=0)
    top: Floats = np.take_along_axis(x, place[None], axis=0)[0]
    return top + np.float32(0)  # ggml starts from +0


@dataclass(frozen=True, slots=True)
class Affine:
    """The parameters of `qkx`: step i tries a range of n_max + first + step * i.

    Attributes:
        n_max: The largest quant.
        first, step, n_steps: The steps of the search.
        absolute: Whether the error is the sum of absolute instead of squared differences.
        weighted: Whether there is an importance matrix.
    """

    n_max: int
    first: float
    step: float
    n_steps: int
    absolute: bool = False
    weighted: bool = False


def qkx(x: Floats, w: Floats, how: Affine) -> tuple[Floats, Floats, Ints]:
    """Scales [lanes], minima [lanes] (negated, as in ggml) and quants [n, lanes].

    This is `make_qkx2_quants`, or `make_qkx3_quants` with an importance matrix (`how.weighted`).
    """
    n_max = np.float32(how.n_max)
    high: Floats = x.max(axis=0)
    low: Floats = x[0].copy()
    for row in x[1:]:
        np.copyto(low, row, where=row < low)
    sum_w, wx = sum_in_order(w), w * x
    sum_x = sum_in_order(wx)
    np.copyto(low, np.float32(0), where=low > 0)
    flat = high <= low
    inverse: Floats = n_max / (high - low)
    scale: Floats = np.float32(1) / inverse
    quants = np.clip(nearest(inverse * (x - low)), 0, how.n_max)
    best = _error(x, w, quants.astype(np.float32), scale, low, how)
    for i in range(how.n_steps + 1):
        inverse = ((np.float32(how.first) + np.float32(how.step) * np.float32(i)) + n_max) / (high - low)
        new = _affine_quants(inverse * (x - low), how)
        level = new.astype(np.float32)
        wl = w * level
        sum_l, sum_l2, sum_xl = sum_in_order(wl), sum_in_order(wl * level), sum_in_order(wl * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale: Floats = np.divide(sum_w * sum_xl - sum_x * sum_l, determinant)
        new_low: Floats = np.divide(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        positive = new_low > 0
        np.copyto(new_scale, sum_xl / sum_l2, where=positive)
        np.copyto(new_low, np.float32(0), where=positive)
        error = _error(x, w, level, new_scale, new_low, how)
        accepted = (determinant > 0) & (error < best)
        for kept, found in ((quants, new), (best, error), (scale, new_scale), (low, new_low)):
            np.copyto(kept, found, where=accepted & ~flat)
    np.copyto(scale, np.float32(0), where=flat)
    np.copyto(quants, 0, where=flat)
    return scale, -low, quants


def _affine_quants(f: Floats, how: Affine) -> Ints:
    if not how.weighted:
        return np.clip(nearest(f), 0, how.n_max)
    positive = f > 0
    return np.where(positive, nearest(np.where(f < how.n_max, f, np.float32(how.n_max))), 0)


def _error(x: Floats, w: Floats, level: Floats, scale: Floats, low: Floats, how: Affine) -> Floats:
    difference = (scale * level + low) - x
    return sum_in_order(w * (np.abs(difference) if how.absolute else difference * difference))


def qx(x: Floats, w: Floats, n_max: int) -> tuple[Floats, Ints]:
    """Scales [lanes] and quants [n, lanes] from 0 to 2 * n_max - 1: `make_qx_quants` with rmse_type 1."""
    top = first_largest(x)
    zero = np.abs(top) < LEAST_MAGNITUDE
    wx = w * x
    scale = best = accepted_inverse = np.zeros_like(top)
    for i in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(n_max) + np.float32(0.1) * np.float32(i)) / top
        level = np.clip(nearest(inverse * x), -n_max, n_max - 1).astype(np.float32)
        sum_xl, sum_l2 = sum_in_order(wx * level), sum_in_order((w * level) * level)
        ratio = sum_xl / sum_l2
        if i == 0:
            scale = np.where(sum_l2 != 0, ratio, np.float32(0))
            best, accepted_inverse = scale * sum_xl, inverse
            continue
        accepted = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        scale = np.where(accepted, ratio, scale)
        best = np.where(accepted, ratio * sum_xl, best)
        accepted_inverse = np.where(accepted, inverse, accepted_inverse)
    quants = n_max + np.clip(nearest(accepted_inverse * x), -n_max, n_max - 1)
    return np.where(zero, np.float32(0), scale), np.where(zero, 0, quants)


def q3(x: Floats) -> tuple[Floats, Ints]:
    """Scales [lanes] and quants [n, lanes] from 0 to 7: `make_q3_quants`, each quant improved in turn."""
    top = first_largest(x)
    zero = np.abs(top) < LEAST_MAGNITUDE
    level = np.clip(nearest(np.float32(-4) / top * x), -4, 3).astype(np.float32)
    w = x * x
    wx = w * x
    sum_xl, sum_l2 = sum_in_order(wx * level), sum_in_order((w * level) * level)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            without_xl = sum_xl - wx[i] * level[i]
            without_l2 = sum_l2 - (w[i] * level[i]) * level[i]
            new = np.clip(nearest((x[i] * without_l2) / without_xl), -4, 3).astype(np.float32)
            new_xl, new_l2 = without_xl + wx[i] * new, without_l2 + (w[i] * new) * new
            accepted = (without_xl > 0) & (new != level[i]) & (new_l2 > 0)
            accepted &= (new_xl * new_xl) * sum_l2 > (sum_xl * sum_xl) * new_l2
            for kept, found in ((level[i], new), (sum_xl, new_xl), (sum_l2, new_l2)):
                np.copyto(kept, found, where=accepted)
            changed |= bool(accepted.any())
        if not changed:
            break
    scale = np.where(zero | ~(sum_l2 > 0), np.float32(0), sum_xl / sum_l2)
    return scale, np.where(zero, 0, level.astype(np.int32) + 4)


def qp(x: Floats, w: Floats, n_max: int) -> tuple[Floats, Ints]:
    """Scales [lanes] and quants [n, lanes], which are bytes, so negative ones wrap around: `make_qp_quants`."""
    top = np.zeros(x.shape[1], dtype=np.float32)
    for row in x:
        top = np.where(top > row, top, row)
    zero = top < LEAST_MAGNITUDE
    inverse = np.float32(n_max) / top
    best = _positive_error(x, w, nearest(inverse * x) & 255, inverse)
    for i in (*range(-4, 0), *range(1, 5)):
        new_inverse = (np.float32(0.1) * np.float32(i) + np.float32(n_max)) / top
        error = _positive_error(x, w, np.minimum(nearest(new_inverse * x), n_max), new_inverse)
        accepted = error < best
        best, inverse = np.where(accepted, error, best), np.where(accepted, new_inverse, inverse)
    quants = np.minimum(nearest(inverse * x), n_max)
    level, wx = quants.astype(np.float32), w * x
    sum_xl, sum_l2 = sum_in_order(wx * level), sum_in_order((w * level) * level)
    quants &= 255
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            level = quants[i].astype(np.float32)
            without_xl, without_l2 = sum_xl - wx[i] * level, sum_l2 - (w[i] * level) * level
            new = np.minimum(nearest((x[i] * without_l2) / without_xl), n_max)
            level = new.astype(np.float32)
            new_xl, new_l2 = without_xl + wx[i] * level, without_l2 + (w[i] * level) * level
            accepted = (without_xl > 0) & (without_l2 > 0) & (new != quants[i])
            accepted &= (new_xl * new_xl) * sum_l2 > (sum_xl * sum_xl) * new_l2
            pairs: tuple[tuple[NDArray[Any], NDArray[Any]], ...]
            pairs = ((quants[i], new & 255), (sum_xl, new_xl), (sum_l2, new_l2))
            for kept, found in pairs:
                np.copyto(kept, found, where=accepted)
            changed |= bool(accepted.any())
        if not changed:
            break
    scale = np.where(zero | ~(sum_l2 > 0), np.float32(0), sum_xl / sum_l2)
    return scale, np.where(zero, 0, quants)


def _positive_error(x: Floats, w: Floats, quants: Ints, inverse: Floats) -> Floats:
    difference = x - (np.float32(1) / inverse) * quants.astype(np.float32)
    return sum_in_order((w * difference) * difference)


IQ4_VALUES: Final = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def _iq4_table() -> NDArray[np.uint8]:
    """The index of the value nearest to f, by floor(2 * f) + 256; midpoints are multiples of 0.5 and round up."""
    values = IQ4_VALUES.astype(np.int32)
    return np.searchsorted(values[:-1] + values[1:], np.arange(-256, 257), side="right").astype(np.uint8)


_IQ4_PLACES: Final = _iq4_table()


def iq4_places(f: Floats) -> NDArray[np.uint8]:
    """The indices of the nearest IQ4_VALUES; for a NaN, the last index."""
    doubled = np.fmin(np.fmax(np.floor(f * np.float32(2)), np.float32(-256)), np.float32(256))
    np.copyto(doubled, np.float32(256), where=np.isnan(f))
    places: NDArray[np.uint8] = _IQ4_PLACES[doubled.astype(np.int32) + 256]
    return places


def iq4(x: Floats, w: Floats) -> Floats:
    """Scales [lanes] of blocks of 32: the first half of `quantize_row_iq4_nl_impl`."""
    values = IQ4_VALUES.astype(np.float32)
    top = first_largest(x)
    zero = np.abs(top) < LEAST_MAGNITUDE
    scale = best = np.zeros_like(top)
    for i in (None, *range(-7, 8)):
        inverse = np.float32(1) / (top / -values[0]) if i is None else (np.float32(i) + values[0]) / top
        q = values[iq4_places(inverse * x)]
        wq = w * q
        sum_xq, sum_q2 = sum_in_order(wq * x), sum_in_order(wq * q)
        accepted = sum_q2 > 0
        if i is not None:
            accepted &= sum_xq * sum_xq > best * sum_q2
        scale = np.where(accepted, sum_xq / sum_q2, scale)
        best = np.where(accepted, scale * sum_xq, best)
    return np.where(zero, np.float32(0), scale)
