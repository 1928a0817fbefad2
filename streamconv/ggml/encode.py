"""How a number is encoded: rows of F32, BF16 or F16 become rows of F32, F16, BF16 or Q8_0.

Owns: the call that everybody makes, the choice of kernel, the count of what is not finite, and the refusal of what a
type cannot hold. Does not own: the arithmetic (reference.py in numpy; `kernels/floats.c`, optional, for speed),
which tensor gets which type (ggml/policy.py), where rows come from (lazy/node.py).
Invariant: the bytes are those of `gguf.quants.quantize` on the float32 values, whatever the kernel, the machine and the
cut into calls. Where gguf leaves room:
- a type that does not change keeps its bytes, those of NaNs too (gguf would make a BF16 NaN quiet);
- a NaN between F16 and F32 keeps its top bits and its kind, as in numpy where it has no F16 instructions;
- a Q8_0 block so small that 1 / scale overflows has quants of 0 (its scale is 0 in F16, so they stand for 0 anyway).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.ggml import reference as kernels
from streamconv.ggml.reference import F16, FLOATS
from streamconv.gguf.format import row_nbytes
from streamconv.lazy.scratch import Scratch, padded_nbytes


@dataclass(frozen=True, slots=True)
class Stats:
    """What `encode` saw in its source: NaNs and infinities. Additive."""

    n_nan: int
    n_inf: int

    def __add__(self, other: Stats) -> Stats:
        return Stats(self.n_nan + other.n_nan, self.n_inf + other.n_inf)


class EncodeError(ValueError):
    """The target type cannot hold these values; `largest` is the largest finite magnitude among them."""

    def __init__(self, reason: str, largest: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.largest = largest


def _compiled() -> ModuleType | None:
    if os.environ.get("STREAMCONV_KERNELS") == "0":
        return None
    try:
        return importlib.import_module("streamconv.ggml._kernels")
    except ImportError:  # the extension is optional: an install without a compiler has none
        return None


_kernels = _compiled()


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Inside, every thread of the process encodes with numpy: what fast paths are checked against."""
    global _kernels
    before, _kernels = _kernels, None
    try:
        yield
    finally:
        _kernels = before


def kernel_name() -> str:
    """`c` where the compiled kernel is there and STREAMCONV_KERNELS is not 0, else `numpy`."""
    return "numpy" if _kernels is None else "c"


def encode_scratch_nbytes(
    source: GGMLQuantizationType, target: GGMLQuantizationType, n_rows: int, n_columns: int
) -> int:
    """The scratch that `encode` takes for `n_rows` rows of `n_columns` elements; bounded, however many they are.

    Alike for both kernels (the compiled one takes none), so that a plan does not hang on which of them serves.
    """
    arrays = kernels.temporaries(source, n_rows * n_columns)
    return sum(padded_nbytes(n_elements * dtype.itemsize) for n_elements, dtype in arrays)


def encode(
    source: GGMLQuantizationType,
    target: GGMLQuantizationType,
    slab: NDArray[np.uint8],
    out: NDArray[np.uint8],
    scratch: Scratch,
    n_columns: int,
) -> Stats:
    """The NaNs and infinities among the rows in `slab`; `out` is filled with the same rows, encoded.

    Both are contiguous bytes of whole rows of `n_columns` elements. `slab` starts at a multiple of its element's size,
    `out` anywhere; where source and target are one type they may be the same memory, else they must not overlap.
    Raises EncodeError where a finite value rounds beyond F16's range (an infinity stays one), or where a Q8_0 block has
    a value that is not finite or a scale beyond F16: `out` is then incomplete. ValueError where the sizes disagree.
    """
    n_rows, rest = divmod(slab.nbytes, n_columns * FLOATS[source].bits.itemsize)
    if rest or n_rows * row_nbytes(n_columns, target) != out.nbytes:
        what = f"{slab.nbytes} bytes of {source.name} in rows of {n_columns}"
        raise ValueError(f"{what} do not make {out.nbytes} bytes of {target.name}")
    slab, out = slab.reshape(-1), out.reshape(-1)
    if _kernels is None:
        n_nan, n_inf, fits = kernels.encode(source, target, slab, out, scratch)
    else:
        n_nan, n_inf, fits = _kernels.encode(source, target, slab, out)
    if not fits:
        raise _refusal(source, target, slab)
    return Stats(n_nan, n_inf)


def product_scratch_nbytes(n_rows: int, n_columns: int) -> int:
    """The scratch that `add_product` takes for `n_rows` rows of `n_columns` elements."""
    return 2 * padded_nbytes(4 * kernels.product_temporaries(n_rows, n_columns))


def add_product(
    left: NDArray[np.float32], right: NDArray[np.float32], scale: np.float32, out: NDArray[np.float32], scratch: Scratch
) -> None:
    """Add scale * left @ right to `out`, all F32 and contiguous: left [n, r], right [r, c], out [n, c].

    The same bits whatever the kernel, the machine and the rows done together.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if _kernels is None:
            kernels.add_product(left, right, scale, out, scratch)
        else:
            _kernels.add_product(left, right, len(right), scale, out)


def largest_finite(source: GGMLQuantizationType, slab: NDArray[np.uint8]) -> float:
    """The largest finite magnitude in `slab` (rows of `source`), 0.0 where there is none: for messages."""
    fmt = FLOATS[source]
    bits = slab.reshape(-1).view(fmt.bits)
    top = 0
    for start in range(0, bits.size, 1024):  # temporaries of a few KiB, since a message needs no speed
        magnitude = bits[start : start + 1024] & fmt.magnitude
        top = max(top, int(np.max(magnitude, where=magnitude < fmt.infinity, initial=0)))
    if source == F16:
        return float(np.uint16(top).view(np.float16))
    return float(np.uint32(top << (32 - 8 * fmt.bits.itemsize)).view(np.float32))


def _refusal(source: GGMLQuantizationType, target: GGMLQuantizationType, slab: NDArray[np.uint8]) -> EncodeError:
    fmt = FLOATS[source]
    largest = largest_finite(source, slab)
    if target == F16:
        return EncodeError(f"{largest:.9g} is beyond F16, whose largest number is 65504", largest)
    if kernels.largest_magnitude(slab.view(fmt.bits)) >= fmt.infinity:
        return EncodeError(f"{target.name} cannot hold a NaN or an infinity", largest)
    return EncodeError(f"{target.name} cannot hold {largest:.9g}: the scale of its block is beyond F16", largest)
