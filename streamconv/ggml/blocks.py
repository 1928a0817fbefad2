"""Encode rows of F32, F16 or BF16 as blocks of the quantised types, with or without an importance matrix.

The bytes are those of llama-quantize on x86-64 (without FMA), on every machine and with every kernel: the compiled one
(`kernels/`, optional) or the reference in numpy (`block_reference.py`). Blocks never cross rows, so any division into
calls with whole rows gives the same bytes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.ggml.block_reference import QUANTIZERS, Quantizer

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Elements that the reference handles at a time: enough that numpy's calls have little overhead, few enough for a cache.
PIECE: Final = 1 << 16
# Bound on the memory that the reference allocates besides its arguments: a dozen arrays of PIECE elements.
REFERENCE_NBYTES: Final = 4 << 20
# Bound on the stack of the calling thread that the compiled kernel uses.
STACK_NBYTES: Final = 64 << 10

# The least magnitude that F16 rounds to infinity. An element of this times `levels` does not fit any scale; searches
# whose sums overflow often turn its block into zeros.
LEAST_BEYOND_F16: Final = np.float32(65520)
# The largest product of a weight and an element of its block (or 1) with which no sum of a search exceeds F32: there
# are at most 16 sums of 32 products, times the squares of quants up to 63.
MOST_WEIGHT: Final = np.float32(1e32)

_SOURCES: Final = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


class Root(Enum):
    """The elements whose mean of squares is used in `weight = importance * sqrt(factor * mean + x * x)`."""

    NONE = "none"  # the weight is the importance itself, or there is none
    ROW = "row"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class BlockType:
    """One quantised type.

    Attributes:
        type: GGML's type.
        n_elements: The number of elements in a block.
        nbytes: The size of a block.
        scales: The offsets of its F16 numbers in a block: the scale, and the minimum if there is one.
        root: How a weight is computed from an importance.
        root_factor: The factor of the mean of squares.
        levels: The largest number in a block whose scale is 1.
        reference: Makes blocks in numpy.
    """

    type: GGMLQuantizationType
    n_elements: int
    nbytes: int
    scales: tuple[int, ...]
    root: Root
    root_factor: int
    levels: int
    reference: Quantizer


def _block_type(name: str, scales: tuple[int, ...], levels: int, root: Root, root_factor: int = 1) -> BlockType:
    type_ = GGMLQuantizationType[name]
    return BlockType(type_, *GGML_QUANT_SIZES[type_], scales, root, root_factor, levels, QUANTIZERS[name])


BLOCK_TYPES: Final[dict[GGMLQuantizationType, BlockType]] = {
    row.type: row
    for row in (
        _block_type("Q4_0", (0,), 8, Root.ROW),
        _block_type("Q4_1", (0, 2), 16, Root.ROW),
        _block_type("Q5_0", (0,), 16, Root.ROW),
        _block_type("Q5_1", (0, 2), 32, Root.ROW),
        _block_type("Q2_K", (80, 82), 15 * 3, Root.BLOCK),
        _block_type("Q3_K", (108,), 32 * 4, Root.BLOCK, 2),
        _block_type("Q4_K", (0, 2), 63 * 15, Root.BLOCK, 2),
        _block_type("Q5_K", (0, 2), 63 * 31, Root.BLOCK, 2),
        _block_type("Q6_K", (208,), 128 * 32, Root.NONE),
        _block_type("IQ4_NL", (0,), 127, Root.BLOCK, 2),
        _block_type("IQ4_XS", (0,), 32 * 127, Root.BLOCK, 2),
        _block_type("TQ1_0", (52,), 1, Root.NONE),
        _block_type("TQ2_0", (64,), 1, Root.NONE),
    )
}


class Fault(Enum):
    """Why rows cannot be quantised."""

    NOT_FINITE = "not-finite"
    BEYOND_F16 = "scale-beyond-f16"
    OVERWEIGHT = "weighted-beyond-f32"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The first fault in the rows.

    Attributes:
        fault: Its kind. NOT_FINITE leaves `out` incomplete. With the others it has the bytes that ggml would write,
            from infinite scales or sums that overflowed; these are often zeros.
        element: The index of the value that is not finite, or of the first element of the block.
    """

    fault: Fault
    element: int


@dataclass(frozen=True, slots=True)
class BlockKernel:
    """An implementation of block types: compiled or in numpy, with the same bytes.

    Attributes:
        name: `c`, or `numpy`, which takes ten to thirty times as long.
        quantize: (target, source, rows, n_per_row, importance, out) -> the first fault, see `quantize_rows`.
    """

    name: str
    quantize: Callable[[GGMLQuantizationType, GGMLQuantizationType, Bytes, int, Floats | None, Bytes], Refusal | None]


def compiled_kernel(module: ModuleType, *, baseline: bool = False) -> BlockKernel:
    """The kernel of a compiled extension; with `baseline`, without instructions that only newer machines have."""
    faults = tuple(Fault)

    def quantize(
        target: GGMLQuantizationType,
        source: GGMLQuantizationType,
        rows: Bytes,
        n_per_row: int,
        importance: Floats | None,
        out: Bytes,
    ) -> Refusal | None:
        status, element = module.quantize(int(target), int(source), rows, n_per_row, importance, out, baseline)
        return Refusal(faults[status - 1], element) if status else None

    return BlockKernel("c", quantize)


def best_kernel() -> BlockKernel:
    """The compiled kernel, or REFERENCE if it was not built or the environment has STREAMCONV_KERNELS=0."""
    return _compiled("_blocks") or REFERENCE


def plain_kernel() -> BlockKernel:
    """The kernel for verification: plain C that shares no code with the fast kernel, or REFERENCE as above."""
    return _compiled("_plain") or REFERENCE


def _compiled(name: str) -> BlockKernel | None:
    if os.environ.get("STREAMCONV_KERNELS") == "0":
        return None
    try:
        return compiled_kernel(importlib.import_module(f"streamconv.ggml.{name}"))
    except ImportError:  # the extensions are optional: without a compiler they are not built
        return None


def quantize_rows(
    target: GGMLQuantizationType,
    source: GGMLQuantizationType,
    rows: Bytes,
    n_per_row: int,
    importance: Floats | None,
    out: Bytes,
    kernel: BlockKernel,
) -> Refusal | None:
    """Encode rows as blocks.

    Args:
        target: One of BLOCK_TYPES.
        source: F32, F16 or BF16.
        rows: Contiguous little-endian bytes of whole rows; not changed.
        n_per_row: The number of elements in a row, a multiple of the block's.
        importance: [n_per_row] contiguous float32, finite and not negative, the same for each row; None without a
            matrix. Ones are not the same as None, since other searches are used with a matrix.
        out: Receives the blocks: contiguous bytes of exactly their size, which must not overlap `rows`.
        kernel: `best_kernel()`, or REFERENCE to compare with.

    Returns:
        None on success, else the first fault.

    Raises:
        ValueError: The sizes disagree, or a type is not supported.
    """
    _check(target, source, rows, n_per_row, importance, out)
    return kernel.quantize(target, source, rows.reshape(-1), n_per_row, importance, out.reshape(-1))


def _check(
    target: GGMLQuantizationType,
    source: GGMLQuantizationType,
    rows: Bytes,
    n_per_row: int,
    importance: Floats | None,
    out: Bytes,
) -> None:
    if target not in BLOCK_TYPES or source not in _SOURCES:
        raise ValueError(f"rows of {source.name} cannot be encoded as blocks of {target.name}")
    block = BLOCK_TYPES[target]
    n_elements, rest = divmod(rows.nbytes, GGML_QUANT_SIZES[source][1])
    if n_per_row <= 0 or n_per_row % block.n_elements or rest or n_elements % n_per_row:
        raise ValueError(f"{rows.nbytes} bytes are not rows of {n_per_row} elements in blocks of {block.n_elements}")
    if n_elements // block.n_elements * block.nbytes != out.nbytes:
        raise ValueError(f"{n_elements} elements of {target.name} do not take {out.nbytes} bytes")
    if importance is not None and (importance.shape != (n_per_row,) or importance.dtype != np.float32):
        raise ValueError(f"an importance of {importance.shape} {importance.dtype} is not float32 [{n_per_row}]")


def _quantize_with_numpy(
    target: GGMLQuantizationType,
    source: GGMLQuantizationType,
    rows: Bytes,
    n_per_row: int,
    importance: Floats | None,
    out: Bytes,
) -> Refusal | None:
    block = BLOCK_TYPES[target]
    blocks, refusal, means = out.reshape(-1, block.nbytes), None, None
    with np.errstate(all="ignore"):
        if importance is not None and block.root is Root.ROW:
            means = _row_means(source, rows, n_per_row)
        for start, x in _pieces(source, rows):
            finite = np.isfinite(x)
            if not finite.all():
                return Refusal(Fault.NOT_FINITE, start + int(np.argmin(finite)))
            piece, first = x.reshape(-1, block.n_elements), start // block.n_elements
            w = None if importance is None else _weights(block, piece, first, n_per_row, importance, means)
            made = block.reference(piece, w)
            blocks[first : first + len(piece)] = made
            refusal = refusal or _first_misfit(block, piece, w, made, first)
    return refusal


REFERENCE: Final = BlockKernel("numpy", _quantize_with_numpy)  # compiled kernels are compared with it


def _pieces(source: GGMLQuantizationType, rows: Bytes) -> Iterator[tuple[int, Floats]]:
    """(first element, elements as float32) of each piece."""
    width = GGML_QUANT_SIZES[source][1]
    for start in range(0, rows.nbytes // width, PIECE):
        part = rows.reshape(-1)[start * width : (start + PIECE) * width]
        yield start, _widened(source, part)


def _widened(source: GGMLQuantizationType, part: Bytes) -> Floats:
    if source == GGMLQuantizationType.BF16:
        return (part.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if source == GGMLQuantizationType.F16:
        return part.view("<f2").astype(np.float32)
    return part.view("<f4").astype(np.float32, copy=False)


def _row_means(source: GGMLQuantizationType, rows: Bytes, n_per_row: int) -> Floats:
    """The mean of squares of each row, added from its first element to its last."""
    by_row = rows.reshape(-1, n_per_row * GGML_QUANT_SIZES[source][1])
    means = np.empty(len(by_row), dtype=np.float32)
    for i, row in enumerate(by_row):
        total = np.zeros(1, dtype=np.float32)
        for _, x in _pieces(source, row):
            total = np.add.accumulate(np.concatenate([total, x * x]))[-1:]
        means[i] = total[0] / np.float32(n_per_row)
    return means


def _weights(
    block: BlockType, x: Floats, first: int, n_per_row: int, importance: Floats, means: Floats | None
) -> Floats:
    """The weights of the elements of blocks x [n, elements], which start with block `first` of all rows."""
    per_row = n_per_row // block.n_elements
    places = np.arange(first, first + len(x))
    by_block = importance.reshape(per_row, block.n_elements)[places % per_row]
    if block.root is Root.NONE:
        return by_block
    squares = x * x
    if means is not None:
        mean = means[places // per_row]
    else:
        total = np.zeros(len(x), dtype=np.float32)
        for column in np.ascontiguousarray(squares.T):
            total += column
        mean = np.float32(block.root_factor) * total / np.float32(block.n_elements)
    squares += mean[:, None]
    weights: Floats = by_block * np.sqrt(squares, out=squares)
    return weights


def _first_misfit(block: BlockType, x: Floats, w: Floats | None, made: Bytes, first: int) -> Refusal | None:
    """The first block that does not fit the type, of x [n, elements], which start with block `first` of all rows."""
    scales = [np.ascontiguousarray(made[:, at : at + 2]).view("<u2")[:, 0] for at in block.scales]
    largest = np.abs(x).max(axis=1)
    beyond: NDArray[np.bool_] = largest >= LEAST_BEYOND_F16 * np.float32(block.levels)
    beyond |= np.any([bits & 0x7C00 == 0x7C00 for bits in scales], axis=0)
    misfits = beyond.copy()
    if w is not None:
        misfits |= ~(np.fmax(largest, np.float32(1)) * w.max(axis=1) <= MOST_WEIGHT)
    if not misfits.any():
        return None
    place = int(np.argmax(misfits))
    return Refusal(Fault.BEYOND_F16 if beyond[place] else Fault.OVERWEIGHT, (first + place) * block.n_elements)
