"""The numbers that quantised rows stand for, as a node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from streamconv.ggml.encode import REFERENCE, Kernel
from streamconv.lazy.dtype import F32
from streamconv.lazy.node import Bytes, LazyTensor, Piece, Step, TensorSpec, Workspace
from streamconv.lazy.scratch import padded_nbytes

PIECE = 1 << 16  # elements that gguf turns into numbers at a time
# What gguf allocates for an element meanwhile: float32 copies, quants as bytes and as numbers. Measured at most 30.
ELEMENT_NBYTES = 32


class Dequantise(LazyTensor):
    """Rows of a block type as F32, by the gguf package.

    Args:
        parent: rows as they are stored.
        type_: their type.
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
                found = dequantize(part.reshape(1, -1), self._type).reshape(-1)
                numbers[start * dtype.block :][: found.size] = found

    def describe(self) -> str:
        return f"numbers of {self._type.name}"
