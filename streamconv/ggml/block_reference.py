"""ggml's block types in numpy: F32 rows are encoded as the bytes that llama-quantize writes, without a compiler.

This is the reference with which compiled kernels are compared. Verification also uses it if the plain C kernel was not
built. For each type, one function makes whole blocks from F32 [blocks, elements] and, with an importance matrix, the
weights of these elements.
Source of every rule: ggml/src/ggml-quants.c and ggml-common.h of llama.cpp, as built for x86-64 without FMA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streamconv.ggml.block_searches import (
    LEAST_MAGNITUDE,
    Affine,
    Floats,
    Ints,
    first_largest,
    iq4,
    iq4_places,
    nearest,
    q3,
    qkx,
    qp,
    qx,
    sum_in_order,
)

Bytes = NDArray[np.uint8]
Quantizer = Callable[[Floats, Floats | None], Bytes]

SUPER: Final = 256


def _lanes(x: Floats, n: int) -> Floats:
    """[blocks, elements] as [n, lanes]: sub-blocks of n elements, one per column."""
    return np.ascontiguousarray(x.reshape(-1, n).T)


def _f16(numbers: Floats) -> Bytes:
    """The numbers rounded to F16, to nearest even, as bytes [blocks, 2]."""
    return numbers.astype("<f2").view(np.uint8).reshape(-1, 2)


def _f16_read(packed: Bytes) -> Floats:
    """The numbers in bytes from `_f16`, as F32 [blocks, 1]."""
    return np.ascontiguousarray(packed).view("<f2").astype(np.float32)


def _narrow(levels: NDArray[Any]) -> Bytes:
    return levels.astype(np.uint8)


def _requantise(x: Floats, searched: Ints, scale: Floats, minimum: Floats | np.float32, low: int, high: int) -> Ints:
    """Quants [blocks, sub-blocks, n], from 0 to high - low, for the rounded scales that are stored.

    If a scale is 0, the quants of the search (`searched`, [n, lanes]) are kept.
    """
    x = x.reshape(*scale.shape, -1)
    divisor = scale[..., None]
    if isinstance(minimum, np.ndarray):
        x = x + minimum[..., None]
    levels = np.clip(nearest(x / divisor), low, high) - low
    return np.where(divisor != 0, levels, searched.T.reshape(levels.shape))


def _largest_positive(numbers: Floats) -> Floats:
    """The largest positive number of each row; +0 if there is none."""
    largest: Floats = np.fmax.reduce(numbers, axis=1, initial=np.float32(0))
    return largest + np.float32(0)


# --- 32 elements, one scale ---------------------------------------------------------------------------------------


def _pack_legacy(levels: NDArray[Any], head: list[Bytes], five_bits: bool) -> Bytes:
    """Blocks of `head`, then the fifth bits if the type has them, then the low nibbles of levels [blocks, 32]."""
    levels = levels.astype(np.uint8)
    parts = [*head, np.packbits(levels >> 4 & 1, axis=1, bitorder="little")] if five_bits else head
    return np.concatenate([*parts, levels[:, :16] & 15 | levels[:, 16:] << 4], axis=1)


def _truncated(numbers: Floats, n_max: int) -> NDArray[np.int32]:
    """Integers like those of the C casts in ggml: truncated towards zero; numbers beyond int32 become 0."""
    inside = np.abs(numbers) < 2**31
    return np.minimum(np.where(inside, numbers, np.float32(0)).astype(np.int32), n_max)


def _symmetric_32(n_max: int) -> Quantizer:
    def quantize(x: Floats, w: Floats | None) -> Bytes:
        half = (n_max + 1) // 2
        if w is not None:
            scale, levels = qx(_lanes(x, 32), _lanes(w, 32), half)
            return _pack_legacy(levels.T, [_f16(scale)], n_max == 31)
        top = first_largest(np.ascontiguousarray(x.T))
        scale = top / np.float32(-half)
        inverse = np.where(scale != 0, np.float32(1) / scale, np.float32(0))
        levels = _truncated(x * inverse[:, None] + np.float32(half + 0.5), n_max)
        return _pack_legacy(np.where(np.isfinite(inverse)[:, None], levels, 0), [_f16(scale)], n_max == 31)

    return quantize


def _affine_32(n_max: int) -> Quantizer:
    def quantize(x: Floats, w: Floats | None) -> Bytes:
        if w is not None:
            how = Affine(n_max, -0.9, 0.05, 36, weighted=True)
            scale, minimum, quants = qkx(_lanes(x, 32), _lanes(w, 32), how)
            return _pack_legacy(quants.T, [_f16(scale), _f16(-minimum)], n_max == 31)
        # argmin returns the first minimum; the sign of a zero is kept.
        low, high = (np.take_along_axis(x, f(x, axis=1)[:, None], axis=1) for f in (np.argmin, np.argmax))
        scale = (high - low) / np.float32(n_max)
        inverse = np.where(scale != 0, np.float32(1) / scale, np.float32(0))
        levels = _truncated((x - low) * inverse + np.float32(0.5), n_max)
        return _pack_legacy(
            np.where(np.isfinite(inverse), levels, 0), [_f16(scale), _f16(np.ascontiguousarray(low))], n_max == 31
        )

    return quantize


def _iq4_nl(x: Floats, w: Floats | None) -> Bytes:
    scale = iq4(_lanes(x, 32), _lanes(x * x if w is None else w, 32))
    inverse = np.where(scale != 0, np.float32(1) / scale, np.float32(0))
    places = iq4_places(x * inverse[:, None])
    return np.concatenate([_f16(scale), places[:, :16] | places[:, 16:] << 4], axis=1)


# --- super-blocks of 256 ------------------------------------------------------------------------------------------


def _iq4_xs(x: Floats, w: Floats | None) -> Bytes:
    scales = iq4(_lanes(x, 32), _lanes(x * x if w is None else w, 32)).reshape(-1, 8)
    top = first_largest(np.ascontiguousarray(scales.T))
    d = -top / np.float32(32)
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    codes = np.clip(nearest(inverse[:, None] * scales), -32, 31)
    step = d[:, None] * codes.astype(np.float32)
    inverse = np.where(step != 0, np.float32(1) / step, np.float32(0))
    places = iq4_places(x.reshape(-1, 8, 32) * inverse[..., None])
    codes += 32
    high = (codes >> 4 << 2 * np.arange(8)).sum(axis=1).astype("<u2").view(np.uint8).reshape(-1, 2)
    low = _narrow(codes[:, ::2] & 15 | (codes[:, 1::2] & 15) << 4)
    quants = places[..., :16] | places[..., 16:] << 4
    return np.concatenate([_f16(d), high, low, quants.reshape(len(x), 128)], axis=1)


def _spread(x: Floats) -> Floats:
    """Weights of the elements of sub-blocks [n, lanes]: sqrt(mean square) + |x|."""
    weights: Floats = np.sqrt(sum_in_order(x * x) / np.float32(len(x))) + np.abs(x)
    return weights


def _search_with_minima(
    x: Floats, w: Floats | None, n: int, n_max: int, top: int, plain: Affine
) -> tuple[Ints, Ints, Floats, Floats, Ints]:
    """Codes of scales and minima [blocks, sub-blocks] (bytes), d and dmin [blocks], and quants [n, lanes]."""
    lanes = _lanes(x, n)
    if w is not None:
        weights = _lanes(w, n)
        scale, minimum, quants = qkx(lanes, weights, Affine(n_max, -0.9, 0.05, 36, weighted=True))
        sums = sum_in_order(weights)
        per_block = [np.ascontiguousarray(part.reshape(len(x), -1).T) for part in (scale, minimum, sums)]
        d, codes = qp(per_block[0], per_block[2], top)
        d_minimum, minimum_codes = qp(per_block[1], per_block[2], top)
        return codes.T, minimum_codes.T, d, d_minimum, quants
    weights = np.abs(lanes) if plain.absolute else _spread(lanes)
    scale, minimum, quants = qkx(lanes, weights, plain)
    found = []
    for part in (scale.reshape(len(x), -1), minimum.reshape(len(x), -1)):
        largest = _largest_positive(part)
        inverse = np.where(largest > 0, np.float32(top) / largest, np.float32(0))
        found.append((nearest(inverse[:, None] * part) & 255, largest / np.float32(top)))
    return found[0][0], found[1][0], found[0][1], found[1][1], quants


def _with_six_bit_scales(n_max: int, plain: Affine) -> Quantizer:
    """Q4_K and Q5_K."""

    def quantize(x: Floats, w: Floats | None) -> Bytes:
        codes, minimum_codes, d, d_minimum, searched = _search_with_minima(x, w, 32, n_max, 63, plain)
        if w is None or n_max == 31:
            codes, minimum_codes = np.minimum(codes, 63), np.minimum(minimum_codes, 63)
        s, m = _narrow(codes), _narrow(minimum_codes)
        packed = np.concatenate(
            [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], axis=1
        )
        # Unpacked again, since a code above 63 spills into another one.
        first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
        s = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
        m = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
        head = [_f16(d), _f16(d_minimum)]
        scale, minimum = _f16_read(head[0]) * s.astype(np.float32), _f16_read(head[1]) * m.astype(np.float32)
        levels = _narrow(_requantise(x, searched, scale, minimum, 0, n_max))
        if n_max == 31:
            bits = np.packbits((levels >> 4).transpose(0, 2, 1), axis=2, bitorder="little").reshape(-1, 32)
            return np.concatenate([*head, packed, bits, _nibbles(levels)], axis=1)
        return np.concatenate([*head, packed, _nibbles(levels)], axis=1)

    return quantize


def _nibbles(levels: Bytes) -> Bytes:
    """Levels [blocks, 8, 32] as 128 bytes: of each two sub-blocks, the first is in the low nibbles."""
    return _narrow(levels[:, ::2] & 15 | (levels[:, 1::2] & 15) << 4).reshape(-1, 128)


def _two_bits(levels: Bytes) -> Bytes:
    """The low two bits of 256 levels as 64 bytes."""
    four = levels.reshape(-1, 2, 4, 32) & 3
    return _narrow(four[:, :, 0] | four[:, :, 1] << 2 | four[:, :, 2] << 4 | four[:, :, 3] << 6).reshape(-1, 64)


def _q2_k(x: Floats, w: Floats | None) -> Bytes:
    plain = Affine(3, -0.5, 0.1, 15, absolute=True)
    codes, minimum_codes, d, d_minimum, searched = _search_with_minima(x, w, 16, 3, 15, plain)
    packed = _narrow(codes | minimum_codes << 4)
    ends = [_f16(d), _f16(d_minimum)]
    scale = _f16_read(ends[0]) * (packed & 15).astype(np.float32)
    minimum = _f16_read(ends[1]) * (packed >> 4).astype(np.float32)
    levels = _requantise(x, searched, scale, minimum, 0, 3)
    return np.concatenate([packed, _two_bits(_narrow(levels)), *ends], axis=1)


def _as_int8(codes: Ints) -> Ints:
    return codes.astype(np.int8).astype(np.int32)


def _q3_k(x: Floats, w: Floats | None) -> Bytes:
    if w is None:
        scales, searched = q3(_lanes(x, 16))
        per_block = np.ascontiguousarray(scales.reshape(-1, 16).T)
        top = first_largest(per_block)
        inverse = np.float32(-32) / top
        codes = np.clip(_as_int8(nearest(inverse * per_block)), -32, 31) + 32
        codes = np.where(top != 0, codes, 0)
        d = np.where(top != 0, np.float32(1) / inverse, np.float32(0))
    else:
        weights = _lanes(w, 16)
        scales, searched = qx(_lanes(x, 16), weights, 4)
        sums = sum_in_order(weights).reshape(-1, 16)
        d, codes = qx(np.ascontiguousarray(scales.reshape(-1, 16).T), np.ascontiguousarray(sums.T), 32)
    codes = codes.T
    low = _narrow(codes[:, :8] & 15 | (codes[:, 8:] & 15) << 4)
    top_bits = (codes >> 4 & 3).reshape(-1, 4, 4)
    high = _narrow(top_bits[:, 0] | top_bits[:, 1] << 2 | top_bits[:, 2] << 4 | top_bits[:, 3] << 6)
    end = _f16(d)
    scale = _f16_read(end) * (codes - 32).astype(np.float32)
    levels = _narrow(_requantise(x, searched, scale, np.float32(0), -4, 3))
    mask = np.packbits((levels >> 2).reshape(-1, 8, 32).transpose(0, 2, 1), axis=2, bitorder="little").reshape(-1, 32)
    return np.concatenate([mask, _two_bits(levels), low, high, end], axis=1)


def _q6_k(x: Floats, w: Floats | None) -> Bytes:
    lanes = _lanes(x, 16)
    scales, searched = qx(lanes, lanes * lanes if w is None else _lanes(w, 16), 32)
    per_block = scales.reshape(-1, 16)
    top = first_largest(np.ascontiguousarray(per_block.T))
    inverse = np.float32(-128) / top
    codes = _as_int8(np.minimum(nearest(inverse[:, None] * per_block), 127))
    end = _f16(np.float32(1) / inverse)
    scale = _f16_read(end) * codes.astype(np.float32)
    levels = _narrow(_requantise(x, searched, scale, np.float32(0), -32, 31)).reshape(-1, 2, 4, 32)
    first, second, third, fourth = (levels[:, :, k] for k in range(4))
    low = np.concatenate([first & 15 | (third & 15) << 4, second & 15 | (fourth & 15) << 4], axis=2)
    high = first >> 4 | second >> 4 << 2 | third >> 4 << 4 | fourth >> 4 << 6
    blocks = np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), _narrow(codes), end], axis=1)
    blocks[np.abs(top) < LEAST_MAGNITUDE] = 0
    return blocks


def _ternary(x: Floats) -> tuple[NDArray[np.uint8], Bytes]:
    """Quants [blocks, 256] from 0 to 2, and the stored bytes of the scales."""
    d = np.abs(x).max(axis=1)
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    inverse[np.isinf(inverse)] = 0  # in ggml, numbers beyond the range of integers become zeros
    product = x * inverse[:, None]
    # Rounds half away from zero: with the predecessor of 0.5, numbers just below a half are still rounded down.
    rounded = product + np.copysign(np.nextafter(np.float32(0.5), np.float32(0)), product)
    return _narrow(rounded.astype(np.int32) + 1), _f16(d)


def _tq2_0(x: Floats, w: Floats | None) -> Bytes:
    levels, end = _ternary(x)
    return np.concatenate([_two_bits(levels), end], axis=1)


def _trits(levels: NDArray[np.uint8]) -> Bytes:
    """Levels [blocks, up to 5, n] as n bytes: fractions of 256, whose digits in base 3 are the levels."""
    weights = 3 ** np.arange(4, 4 - levels.shape[1], -1)
    q = (levels.astype(np.int32) * weights[:, None]).sum(axis=1)
    return _narrow((q * 256 + 242) // 243)


def _tq1_0(x: Floats, w: Floats | None) -> Bytes:
    levels, end = _ternary(x)
    parts = (
        levels[:, :160].reshape(-1, 5, 32),
        levels[:, 160:240].reshape(-1, 5, 16),
        levels[:, 240:].reshape(-1, 4, 4),
    )
    return np.concatenate([*map(_trits, parts), end], axis=1)


QUANTIZERS: Final[dict[str, Quantizer]] = {
    "Q4_0": _symmetric_32(15),
    "Q4_1": _affine_32(15),
    "Q5_0": _symmetric_32(31),
    "Q5_1": _affine_32(31),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _with_six_bit_scales(15, Affine(15, -1.0, 0.1, 20)),
    "Q5_K": _with_six_bit_scales(31, Affine(31, -0.5, 0.1, 15)),
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}
