"""The reference kernels in numpy: the bytes of F32, F16, BF16 and Q8_0 rows, a piece at a time.

Every float operation is a single IEEE F32 operation whose result is exact or rounded once, so the bytes are the same on
every machine, and `kernels/floats.c` must produce the same. All temporaries come from the Scratch, as declared by
`temporaries`. Bit patterns are little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.ggml.element_types import TYPES
from streamconv.lazy.dtype import BF16, F16, F32, Dtype
from streamconv.lazy.scratch import Scratch

Q8_0: Final = TYPES[GGMLQuantizationType.Q8_0].dtype

# Elements in a piece. The temporaries (13 to 17 bytes an element) exceed a core's own cache, but each numpy call takes
# so long that two threads seldom wait for the interpreter lock: benchmarks/LOG.md.
PIECE: Final = 1 << 18

Bytes = NDArray[np.uint8]
Bits = NDArray[Any]  # the patterns of floats, as unsigned integers


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A float format as bit patterns: a sign bit, then the magnitude.

    Attributes:
        bits: The dtype of the patterns.
        magnitude: The mask of the magnitude.
        infinity: The magnitude of infinity; larger ones are NaNs.
    """

    bits: np.dtype[Any]
    magnitude: int
    infinity: int


FLOATS: Final = {
    F32: FloatFormat(np.dtype("<u4"), 0x7FFF_FFFF, 0x7F80_0000),
    BF16: FloatFormat(np.dtype("<u2"), 0x7FFF, 0x7F80),
    F16: FloatFormat(np.dtype("<u2"), 0x7FFF, 0x7C00),
}

_SIGN: Final = 0x8000_0000
_EXPONENT_ONE: Final = 1 << 23
_REBIAS: Final = (127 - 15) << 23  # from F16's exponent bias to F32's
_F16_NORMAL: Final = 0x3880_0000  # 2^-14 in F32, F16's smallest normal number
_HALF_DOWN: Final = 0x3EFF_FFFF  # the predecessor of 0.5 in F32

# The least F32 magnitudes that do not fit a type: F16 rounds 65520 to infinity, also as the scale of Q8_0, amax / 127;
# for BF16 it is halfway from the largest number to infinity.
_TOO_LARGE: Final = {F16: 0x477F_F000, BF16: 0x7F7F_8000, Q8_0: int(np.float32(65520 * 127).view(np.uint32))}


@dataclass(slots=True)
class _Work:
    """The temporaries of one piece: `magnitude` and `other` as wide as the source, `wide` and `spare` as F32."""

    magnitude: Bits
    other: Bits
    wide: Bits
    spare: Bits
    mask: Bits

    def head(self, n: int) -> _Work:
        return _Work(self.magnitude[:n], self.other[:n], self.wide[:n], self.spare[:n], self.mask[:n])


def temporaries(source: Dtype, n_elements: int) -> tuple[tuple[int, np.dtype[Any]], ...]:
    """(elements, dtype) of each array that `encode` takes from its scratch for `n_elements`: the fields of _Work."""
    n, bits, wide = min(n_elements, PIECE), FLOATS[source].bits, FLOATS[F32].bits
    return tuple((n, dtype) for dtype in (bits, bits, wide, wide, np.dtype(bool)))


def encode(source: Dtype, target: Dtype, slab: Bytes, out: Bytes, scratch: Scratch) -> tuple[int, int, bool]:
    """(NaNs, infinities, whether all values fit), like `Kernel.encode`; the rows are encoded into `out`."""
    fmt = FLOATS[source]
    n_nan = n_inf = 0
    with scratch.frame(), np.errstate(all="ignore"):
        whole = _Work(*(scratch.take(n, dtype) for n, dtype in temporaries(source, slab.nbytes // fmt.bits.itemsize)))
        for bits, part in _pieces(slab.view(fmt.bits), out, target):
            work = whole.head(bits.size)
            top = finite_top = largest_magnitude(bits)
            if top >= fmt.infinity:
                n_piece_nan, n_piece_inf, finite_top = _count(fmt, bits, work)
                n_nan, n_inf = n_nan + n_piece_nan, n_inf + n_piece_inf
            if not _fits(source, target, top if target == Q8_0 else finite_top):
                return n_nan, n_inf, False
            _convert(source, target, bits, top >= fmt.infinity, part, work)
    return n_nan, n_inf, True


def largest_magnitude(bits: Bits) -> int:
    """The largest magnitude, without a temporary: a signed maximum for positive numbers, an unsigned one for others."""
    signed = bits.view(f"<i{bits.itemsize}")
    return max(int(signed.max()), int(bits.max()) & int(np.iinfo(signed.dtype).max))


def _pieces(bits: Bits, out: Bytes, target: Dtype) -> Iterator[tuple[Bits, Bytes]]:
    block, block_nbytes = target.block, target.block_nbytes
    for start in range(0, bits.size, PIECE):
        piece = bits[start : start + PIECE]
        first = start // block * block_nbytes
        yield piece, out[first : first + piece.size // block * block_nbytes]


def _count(fmt: FloatFormat, bits: Bits, work: _Work) -> tuple[int, int, int]:
    """The number of NaNs, the number of infinities, and the largest finite magnitude."""
    magnitude, mask = work.magnitude, work.mask
    np.bitwise_and(bits, fmt.magnitude, out=magnitude)
    n_nan = int(np.count_nonzero(np.greater(magnitude, fmt.infinity, out=mask)))
    n_inf = int(np.count_nonzero(np.equal(magnitude, fmt.infinity, out=mask)))
    np.greater_equal(magnitude, fmt.infinity, out=mask)
    np.copyto(magnitude, 0, where=mask)
    return n_nan, n_inf, int(magnitude.max())


def _fits(source: Dtype, target: Dtype, top: int) -> bool:
    """Whether a magnitude `top` of `source` is in the range of `target`."""
    if source == target or target not in _TOO_LARGE:
        return True
    if source == F16:
        return top < FLOATS[F16].infinity
    return top << (32 - 8 * FLOATS[source].bits.itemsize) < _TOO_LARGE[target]


def _convert(
    source: Dtype,
    target: Dtype,
    bits: Bits,
    has_nonfinite: bool,
    part: Bytes,
    work: _Work,
) -> None:
    if target == Q8_0:
        _q8_0(source, bits, part, work)
        return
    if source == target:
        landing = bits
    else:
        landing = part.view(FLOATS[target].bits)
        if not landing.flags.aligned:  # numpy would allocate buffers of its own
            landing = (work.wide if target == F32 else work.other).view(landing.dtype)[: bits.size]
        _ELEMENTWISE[source, target](bits, has_nonfinite, landing, work)
    if not np.may_share_memory(landing, part):
        np.copyto(part, landing.view(np.uint8))


def _bf16_to_f32(bits: Bits, has_nonfinite: bool, out: Bits, work: _Work) -> None:
    np.copyto(out, bits)
    np.left_shift(out, 16, out=out)


def _f16_to_f32(bits: Bits, has_nonfinite: bool, out: Bits, work: _Work) -> None:
    """Works in magnitude, spare and mask."""
    magnitude, spare, mask, values = work.magnitude, work.spare, work.mask, out.view("<f4")
    np.bitwise_and(bits, 0x7FFF, out=magnitude)
    np.copyto(out, magnitude)
    np.left_shift(out, 13, out=out)
    np.add(out, _REBIAS, out=out)
    # A subnormal does not have the implicit leading 1: with it, it is 2^-14 too large, and subtracting that is exact.
    np.less(magnitude, 0x400, out=mask)
    np.add(out, _EXPONENT_ONE, out=out, where=mask)
    np.subtract(values, np.float32(2**-14), out=values, where=mask)
    if has_nonfinite:
        np.greater_equal(magnitude, FLOATS[F16].infinity, out=mask)
        np.add(out, _REBIAS, out=out, where=mask)
    np.bitwise_and(bits, 0x8000, out=magnitude)
    np.copyto(spare, magnitude)
    np.left_shift(spare, 16, out=spare)
    np.bitwise_or(out, spare, out=out)


def _bf16_to_f16(bits: Bits, has_nonfinite: bool, out: Bits, work: _Work) -> None:
    """Works in magnitude, wide, spare and mask."""
    magnitude, wide, mask = work.magnitude, work.wide, work.mask
    small, values = work.spare.view("<u2")[: bits.size], wide.view("<f4")
    np.bitwise_and(bits, 0x7FFF, out=magnitude)
    # F16's subnormals are multiples of 2^-24, the last place of 0.5: the addition rounds them to nearest even.
    np.copyto(wide, magnitude)
    np.left_shift(wide, 16, out=wide)
    np.add(values, np.float32(0.5), out=values)
    np.copyto(small, wide, casting="unsafe")
    # Normal numbers are exact: the mantissa moves up by three bits, the exponent's bias changes, all modulo 2^16.
    np.left_shift(bits, 3, out=out)
    np.add(out, (-_REBIAS >> 13) & 0xFFFF, out=out)
    np.less(magnitude, _F16_NORMAL >> 16, out=mask)
    np.copyto(out, small, where=mask)
    if has_nonfinite:
        np.greater_equal(magnitude, FLOATS[BF16].infinity, out=mask)
        np.bitwise_or(out, FLOATS[F16].infinity, out=out, where=mask)
    np.bitwise_and(bits, 0x8000, out=magnitude)
    np.bitwise_or(out, magnitude, out=out)


def _f32_to_f16(bits: Bits, has_nonfinite: bool, out: Bits, work: _Work) -> None:
    """Works in magnitude, wide, spare and mask."""
    magnitude, wide, mask = work.magnitude, work.wide, work.mask
    np.bitwise_and(bits, FLOATS[F32].magnitude, out=magnitude)
    # To nearest even: add half of the last place minus one, and one more if the last place is odd.
    np.right_shift(magnitude, 13, out=wide)
    np.bitwise_and(wide, 1, out=wide)
    np.add(wide, magnitude, out=wide)
    np.add(wide, (0xFFF - _REBIAS) & 0xFFFF_FFFF, out=wide)
    np.right_shift(wide, 13, out=wide)
    if has_nonfinite:
        _f32_nonfinite_to_f16(magnitude, wide, work)
    np.less(magnitude, _F16_NORMAL, out=mask)
    values = magnitude.view("<f4")
    np.add(values, np.float32(0.5), out=values)  # as in _bf16_to_f16
    np.copyto(wide, magnitude, where=mask)
    np.right_shift(bits, 16, out=magnitude)
    np.bitwise_and(magnitude, 0x8000, out=magnitude)
    np.bitwise_or(wide, magnitude, out=wide)
    np.copyto(out, wide, casting="unsafe")


def _f32_nonfinite_to_f16(magnitude: Bits, wide: Bits, work: _Work) -> None:
    """Where `magnitude` is not finite, set `wide` to F16's infinity, or to a NaN with the same top bits, at least 1."""
    payload, mask = work.spare, work.mask
    np.greater_equal(magnitude, FLOATS[F32].infinity, out=mask)
    np.right_shift(magnitude, 13, out=payload)
    np.bitwise_and(payload, 0x3FF, out=payload)
    np.add(payload, FLOATS[F16].infinity, out=payload)
    np.copyto(wide, payload, where=mask)
    np.greater(magnitude, FLOATS[F32].infinity, out=mask)
    np.maximum(wide, FLOATS[F16].infinity + 1, out=wide, where=mask)


def _f32_to_bf16(bits: Bits, has_nonfinite: bool, out: Bits, work: _Work) -> None:
    """To nearest even; a NaN keeps its top bits and becomes quiet. Works in spare and mask."""
    spare = work.spare
    np.right_shift(bits, 16, out=spare)
    np.bitwise_and(spare, 1, out=spare)
    np.add(spare, 0x7FFF, out=spare)
    np.add(spare, bits, out=spare)
    if has_nonfinite:
        np.isnan(bits.view("<f4"), out=work.mask)
        np.bitwise_or(bits, 0x0040_0000, out=spare, where=work.mask)
    np.right_shift(spare, 16, out=spare)
    np.copyto(out, spare, casting="unsafe")


def _f16_to_bf16(bits: Bits, has_nonfinite: bool, out: Bits, work: _Work) -> None:
    _f16_to_f32(bits, has_nonfinite, work.wide, work)
    _f32_to_bf16(work.wide, has_nonfinite, out, work)


_ELEMENTWISE: Final = {
    (BF16, F32): _bf16_to_f32,
    (F16, F32): _f16_to_f32,
    (BF16, F16): _bf16_to_f16,
    (F32, F16): _f32_to_f16,
    (F32, BF16): _f32_to_bf16,
    (F16, BF16): _f16_to_bf16,
}


def _q8_0(source: Dtype, bits: Bits, part: Bytes, work: _Work) -> None:
    """Blocks of a scale, amax / 127 as F16, and 32 numbers round(x / scale) as int8, computed as in ggml-quants.c."""
    block, block_nbytes = Q8_0.block, Q8_0.block_nbytes
    n_blocks = bits.size // block
    scale, inverse = _q8_0_scales(source, bits, work)
    values = bits
    if source != F32:
        values = work.wide
        _ELEMENTWISE[source, F32](bits, False, values, work)
    product, half = work.spare.view("<f4"), work.wide
    np.copyto(product.reshape(n_blocks, block), inverse[:, None])  # a product that broadcasts would take a buffer
    np.multiply(values.view("<f4"), product, out=product)
    # Round half away from zero: add 0.5, then the cast truncates. Adding 0.5 itself would round its predecessor up to
    # 1; adding that predecessor instead gives every sum below 2^22 the right integer part.
    np.bitwise_and(product.view("<u4"), _SIGN, out=half)
    np.bitwise_or(half, _HALF_DOWN, out=half)
    np.add(product, half.view("<f4"), out=product)
    blocks = part.reshape(n_blocks, block_nbytes)
    np.copyto(blocks[:, :2], scale.view(np.uint8).reshape(n_blocks, 2))
    np.copyto(blocks[:, 2:].view(np.int8), product.reshape(n_blocks, block), casting="unsafe")


def _q8_0_scales(source: Dtype, bits: Bits, work: _Work) -> tuple[Bits, NDArray[np.float32]]:
    """The scale of each block as F16, and its inverse in F32: 0 if the scale is 0 or the inverse would overflow.

    Both are in work.magnitude or work.other; spare and mask are used as well.
    """
    block = Q8_0.block
    n_blocks = bits.size // block
    largest, spare = work.magnitude, work.other
    np.bitwise_and(bits, FLOATS[source].magnitude, out=largest)
    # By halving the reach, largest[i] becomes the maximum of the 32 elements from i on: three times as fast as
    # max(axis=1).
    n = bits.size
    for reach in (16, 8, 4, 2, 1):
        n -= reach
        np.maximum(largest[:n], largest[reach : n + reach], out=spare[:n])
        largest, spare = spare, largest
    amax = spare[:n_blocks]
    np.copyto(amax, largest[::block])
    scale, inverse = largest.view("<f4")[:n_blocks], largest.view("<f4")[n_blocks : 2 * n_blocks]
    if source == F32:
        np.copyto(scale.view("<u4"), amax)
    else:
        few = _Work(amax, amax, work.wide[:n_blocks], work.spare[:n_blocks], work.mask[:n_blocks])
        _ELEMENTWISE[source, F32](amax, False, scale.view("<u4"), few)
    np.divide(scale, np.float32(127), out=scale)
    has_inverse = np.greater(scale, np.float32(2**-128), out=work.mask[:n_blocks])
    np.copyto(inverse, 0)
    np.divide(np.float32(1), scale, out=inverse, where=has_inverse)
    scale_f16 = largest.view("<f2")[4 * n_blocks : 5 * n_blocks]
    np.copyto(scale_f16, scale, casting="unsafe")
    return scale_f16, inverse


def product_temporaries(n_rows: int, n_columns: int) -> int:
    """The number of elements in each of the two F32 arrays that `add_product` takes from its Scratch."""
    return min(n_rows, max(1, PIECE // n_columns)) * n_columns


def add_product(
    left: NDArray[np.float32], right: NDArray[np.float32], scale: np.float32, out: NDArray[np.float32], scratch: Scratch
) -> None:
    """Add scale * left @ right to `out`; left [n, r], right [r, c], out [n, c].

    Each element's products are summed from the first to the last, and every operation is rounded to F32. A row is
    therefore the same on every machine, whether it is computed by itself or with others; a BLAS guarantees neither.
    """
    n_rows, n_columns = out.shape
    step = max(1, PIECE // n_columns)
    with scratch.frame():
        size = product_temporaries(n_rows, n_columns)
        sums_of_piece, products_of_piece = (scratch.take(size, np.float32) for _ in range(2))
        for start in range(0, n_rows, step):
            factors = left[start : start + step]
            shape = (len(factors), n_columns)
            sums = sums_of_piece[: math.prod(shape)].reshape(shape)
            products = products_of_piece[: math.prod(shape)].reshape(shape)
            np.multiply(factors[:, :1], right[0], out=sums)
            for k in range(1, len(right)):
                np.multiply(factors[:, k : k + 1], right[k], out=products)
                np.add(sums, products, out=sums)
            np.multiply(sums, scale, out=sums)
            np.add(out[start : start + step], sums, out=out[start : start + step])
