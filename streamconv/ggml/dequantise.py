"""A node that decodes quantised rows to numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from streamconv.ggml.element_types import TYPES
from streamconv.ggml.encode import REFERENCE, Kernel
from streamconv.lazy.dtype import F32, FLOATS
from streamconv.lazy.node import Bytes, LazyTensor, Piece, Step, TensorSpec, Workspace
from streamconv.lazy.scratch import padded_nbytes

PIECE = 1 << 16  # elements that gguf decodes at a time
# Memory that gguf allocates per element: float32 copies, and quants as bytes and as numbers. Measured: at most 30.
ELEMENT_NBYTES = 32


def decoded(part: Bytes, type_: GGMLQuantizationType) -> NDArray[np.float32]:
    """The numbers in whole blocks of a type, as F32.

    Raises:
        NotImplementedError: gguf cannot decode the type.
    """
    dtype = TYPES[type_].dtype
    if dtype in FLOATS and type_ != GGMLQuantizationType.BF16:
        part = part.view(dtype.view)
    numbers: NDArray[np.float32] = dequantize(part.reshape(1, -1), type_).reshape(-1)
    return numbers


def is_decodable(type_: GGMLQuantizationType) -> bool:
    """Whether gguf can decode the type; it cannot decode integers."""
    try:
        decoded(np.zeros(TYPES[type_].dtype.block_nbytes, dtype=np.uint8), type_)
    except (NotImplementedError, ValueError):
        return False
    return True


class Dequantise(LazyTensor):
    """Rows of a block type as F32, decoded by the gguf package.

    Args:
        parent: The stored rows.
        type_: Their type.
    """

    def __init__(self, parent: LazyTensor, type_: GGMLQuantizationType) -> None:
        self.spec = TensorSpec(parent.spec.shape, F32)
        self.parents = (parent,)
        self._type = type_

    def needs(self, rows: range) -> Iterator[Step]:
        yield (Piece(self.parents[0], rows),)

    def scratch_nbytes(self, n_rows: int, kernel: Kernel = REFERENCE) -> int:
        return padded_nbytes(ELEMENT_NBYTES * min(PIECE, n_rows * self.spec.n_columns))

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        (slab,) = slabs
        dtype = self.parents[0].spec.dtype
        n_blocks = max(1, PIECE // dtype.block)
        numbers = out.view("<f4")
        with np.errstate(all="ignore"):
            for start in range(0, slab.size // dtype.block_nbytes, n_blocks):
                part = slab[start * dtype.block_nbytes : (start + n_blocks) * dtype.block_nbytes]
                found = decoded(part, self._type)
                numbers[start * dtype.block :][: found.size] = found

    def describe(self) -> str:
        return f"numbers of {self._type.name}"
