"""Encode rows of F32, BF16 or F16 as rows of any GGUF type.

Chooses the kernel (reference.py and block_reference.py in numpy, or the optional compiled ones in `kernels/`), counts
non-finite values, and refuses values that a type cannot hold. Which tensor gets which type is decided in policy.py.

F32, F16, BF16 and Q8_0 have the bytes of `gguf.quants.quantize` on the float32 values, with every kernel, on every
machine and for any division into calls. Cases that gguf does not determine:
- a type that does not change keeps its bytes, also those of NaNs (gguf would make a BF16 NaN quiet);
- a NaN converted between F16 and F32 keeps its top bits and its kind, as in numpy without F16 instructions;
- a Q8_0 block so small that 1 / scale overflows has quants of 0 (its scale is 0 in F16, so it decodes to 0 anyway).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from streamconv.files.window import Unread
from streamconv.ggml import blocks, reference
from streamconv.ggml.element_types import BLOCKS, TYPE_OF
from streamconv.ggml.reference import FLOATS
from streamconv.lazy.dtype import BF16, F16, Dtype
from streamconv.lazy.scratch import Scratch, padded_nbytes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


_LARGEST: Final = {F16: "65504", BF16: "3.38953139e+38"}


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of the NaNs and infinities in the source of `encode`; they can be added."""

    n_nan: int
    n_inf: int

    def __add__(self, other: Stats) -> Stats:
        return Stats(self.n_nan + other.n_nan, self.n_inf + other.n_inf)


class EncodeError(ValueError):
    """The target type cannot hold the values.

    Attributes:
        reason: The message.
        largest: The largest finite magnitude among the values.
    """

    def __init__(self, reason: str, largest: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.largest = largest


@dataclass(frozen=True, slots=True)
class Kernel:
    """An implementation of the arithmetic: compiled or in numpy, with the same bytes.

    Each call of the library chooses one and passes it on (`Workspace.kernel`), so that calls do not affect each other.

    Attributes:
        name: `c` or `numpy`.
        encode: (source, target, slab, out, scratch) -> (number of NaNs, number of infinities, whether all values fit).
        add_product: (left, right, scale, out, scratch), see the function of that name.
        blocks: The implementation of block types, see ggml/blocks.py.
        borrows: Whether `encode` can read a slab that is read-only and has any alignment, without a copy.
    """

    name: str
    encode: Callable[[Dtype, Dtype, Bytes, Bytes, Scratch], tuple[int, int, bool]]
    add_product: Callable[[Floats, Floats, np.float32, Floats, Scratch], None]
    blocks: blocks.BlockKernel
    borrows: bool = False


# Compiled kernels are compared with it.
REFERENCE: Final = Kernel("numpy", reference.encode, reference.add_product, blocks.REFERENCE)


@cache
def compiled_kernel(module: ModuleType) -> Kernel:
    """The kernel of a compiled extension, which needs no scratch."""
    return Kernel(
        "c",
        lambda source, target, slab, out, _: module.encode(TYPE_OF[source].id, TYPE_OF[target].id, slab, out),
        lambda left, right, scale, out, _: module.add_product(left, right, len(right), scale, out),
        blocks.best_kernel(),
        borrows=True,
    )


def best_kernel() -> Kernel:
    """The compiled kernel, or REFERENCE if it was not built or the environment has STREAMCONV_KERNELS=0."""
    if os.environ.get("STREAMCONV_KERNELS") == "0":
        return REFERENCE
    try:
        return compiled_kernel(importlib.import_module("streamconv.ggml._kernels"))
    except ImportError:  # the extension is optional: without a compiler it is not built
        return REFERENCE


def independent_kernel() -> Kernel:
    """The kernel for verification, which shares no code with the compiled one: numpy, and plain C for block types."""
    return replace(REFERENCE, blocks=blocks.plain_kernel())


def encode_scratch_nbytes(source: Dtype, target: Dtype, n_rows: int, n_columns: int, kernel: Kernel = REFERENCE) -> int:
    """Bytes of scratch that `encode` needs for `n_rows` rows of `n_columns` elements.

    It does not grow beyond that for `PIECE` elements. The compiled kernels need none.
    """
    if source == target and source not in FLOATS:
        return 0
    if TYPE_OF[target].encoder == BLOCKS:
        return padded_nbytes(blocks.REFERENCE_NBYTES) if kernel.blocks is blocks.REFERENCE else 0
    if kernel.borrows:
        return 0
    arrays = reference.temporaries(source, n_rows * n_columns)
    return sum(padded_nbytes(n_elements * dtype.itemsize) for n_elements, dtype in arrays)


def encode(
    source: Dtype,
    target: Dtype,
    slab: Bytes,
    out: Bytes,
    scratch: Scratch,
    n_columns: int,
    kernel: Kernel,
    weights: Floats | None = None,
) -> Stats:
    """Encode rows.

    Args:
        source: The dtype of the rows: F32, F16 or BF16, or equal to `target`.
        target: The dtype to encode as.
        slab: Contiguous bytes of whole rows. They start at a multiple of the element's size, unless the kernel borrows.
        out: Receives the encoded rows: contiguous bytes of exactly their size. It may be the memory of `slab` if source
            and target are the same, else the two must not overlap.
        scratch: For temporaries, `encode_scratch_nbytes` at most.
        n_columns: The number of elements in a row.
        kernel: The implementation to use.
        weights: The importance of each column, float32 [n_columns]; ignored by types that do not weigh errors.

    Returns:
        The number of NaNs and infinities in `slab`.

    Raises:
        EncodeError: A finite value becomes an infinity in F16 or BF16 (an infinity stays one), or a block has a value
            that is not finite, or a scale beyond F16. `out` is then incomplete.
        Unread: The same, if `slab` is read-only, that is, lent.
        ValueError: The sizes disagree.
    """
    n_rows, rest = divmod(slab.nbytes, source.row_nbytes(n_columns))
    if rest or n_rows * target.row_nbytes(n_columns) != out.nbytes:
        what = f"{slab.nbytes} bytes of {source.name} in rows of {n_columns}"
        raise ValueError(f"{what} do not make {out.nbytes} bytes of {target.name}")
    slab, out = slab.reshape(-1), out.reshape(-1)
    if source == target and source not in FLOATS:
        np.copyto(out, slab)
        return Stats(0, 0)
    if TYPE_OF[target].encoder == BLOCKS:
        _encode_blocks(source, target, slab, out, n_columns, kernel, weights)
        return Stats(0, 0)
    n_nan, n_inf, fits = kernel.encode(source, target, slab, out, scratch)
    if not fits:
        _check_own(slab)
        raise _refusal(source, target, slab)
    return Stats(n_nan, n_inf)


def _encode_blocks(
    source: Dtype, target: Dtype, slab: Bytes, out: Bytes, n_columns: int, kernel: Kernel, weights: Floats | None
) -> None:
    source_id, target_id = TYPE_OF[source].id, TYPE_OF[target].id
    refusal = blocks.quantize_rows(target_id, source_id, slab, n_columns, weights, out, kernel.blocks)
    if refusal is None:
        return
    _check_own(slab)
    if refusal.fault is blocks.Fault.NOT_FINITE:
        raise EncodeError(f"{target.name} cannot hold a NaN or an infinity", largest_finite(source, slab))
    width = source.block_nbytes
    largest = largest_finite(source, slab[refusal.element * width : (refusal.element + target.block) * width])
    why = "the scale of its block does not fit F16"
    if refusal.fault is blocks.Fault.OVERWEIGHT:
        why = "by its importance, its error does not fit F32"
    raise EncodeError(f"{target.name} cannot hold {largest:.9g}: {why}", largest)


def _check_own(slab: Bytes) -> None:
    """Raise Unread if `slab` is lent: the reason for a refusal is searched only in memory that cannot change."""
    if not slab.flags.writeable:
        raise Unread


def product_scratch_nbytes(n_rows: int, n_columns: int, kernel: Kernel = REFERENCE) -> int:
    """Bytes of scratch that `add_product` needs for `n_rows` rows of `n_columns` elements: 0 for a compiled kernel."""
    if kernel.borrows:
        return 0
    return 2 * padded_nbytes(4 * reference.product_temporaries(n_rows, n_columns))


def add_product(left: Floats, right: Floats, scale: np.float32, out: Floats, scratch: Scratch, kernel: Kernel) -> None:
    """Add scale * left @ right to `out`, all F32 and contiguous: left [n, r], right [r, c], out [n, c].

    The bits of the result depend neither on the kernel nor on the machine, nor on which rows are computed together.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        kernel.add_product(left, right, scale, out, scratch)


def largest_finite(source: Dtype, slab: NDArray[np.uint8]) -> float:
    """The largest finite magnitude in `slab` (rows of dtype `source`), for messages; 0.0 if there is none."""
    fmt = FLOATS[source]
    bits = slab.reshape(-1).view(fmt.bits)
    top = 0
    for start in range(0, bits.size, 1024):  # temporaries of a few KiB; speed does not matter for a message
        magnitude = bits[start : start + 1024] & fmt.magnitude
        top = max(top, int(np.max(magnitude, where=magnitude < fmt.infinity, initial=0)))
    if source == F16:
        return float(np.uint16(top).view(np.float16))
    return float(np.uint32(top << (32 - 8 * fmt.bits.itemsize)).view(np.float32))


def _refusal(source: Dtype, target: Dtype, slab: NDArray[np.uint8]) -> EncodeError:
    fmt = FLOATS[source]
    largest = largest_finite(source, slab)
    if target in _LARGEST:
        return EncodeError(
            f"{largest:.9g} does not fit {target.name}, whose largest number is {_LARGEST[target]}", largest
        )
    if reference.largest_magnitude(slab.view(fmt.bits)) >= fmt.infinity:
        return EncodeError(f"{target.name} cannot hold a NaN or an infinity", largest)
    return EncodeError(f"{target.name} cannot hold {largest:.9g}: the scale of its block does not fit F16", largest)
