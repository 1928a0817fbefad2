"""Element types as files store them: their names in safetensors, their sizes, and how numpy sees their bytes.

The table of types that a GGUF tensor can have is another one: ggml/element_types.py. Block types have dtypes of their
own there.
Source of names and sizes: the `Dtype` enum of safetensors, tensor.rs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np


@dataclass(frozen=True, slots=True)
class Dtype:
    """How the elements of a row are stored: blocks of `block` elements in `block_nbytes` bytes each.

    Attributes:
        name: The name in safetensors, or GGML's name of a block type.
        view: The numpy dtype of the bytes: the numbers themselves, or their bit patterns if numpy has no such type
            (BF16, F8_*, all block types).
        block: Elements that are stored together: 1, except for types of less than a byte and GGML's block types.
        block_nbytes: Bytes of one block.
    """

    name: str
    view: np.dtype[Any]
    block: int
    block_nbytes: int

    @property
    def n_bits(self) -> int:
        """Bits of one element."""
        return 8 * self.block_nbytes // self.block

    def row_nbytes(self, n_columns: int) -> int:
        """Bytes of a row of `n_columns` elements.

        Raises:
            ValueError: The row does not divide into whole blocks.
        """
        if n_columns % self.block:
            raise ValueError(f"a row of {n_columns} elements does not divide into {self.name} blocks of {self.block}")
        return n_columns // self.block * self.block_nbytes

    def __str__(self) -> str:
        return self.name


def _element(name: str, view: str) -> Dtype:
    return Dtype(name, np.dtype(view), 1, np.dtype(view).itemsize)


F64: Final = _element("F64", "<f8")
F32: Final = _element("F32", "<f4")
F16: Final = _element("F16", "<f2")
BF16: Final = _element("BF16", "<u2")
F8_E4M3: Final = _element("F8_E4M3", "u1")
F8_E5M2: Final = _element("F8_E5M2", "u1")
F8_E8M0: Final = _element("F8_E8M0", "u1")  # a power of two: the block scales of MX formats
F8_E4M3FNUZ: Final = _element("F8_E4M3FNUZ", "u1")
F8_E5M2FNUZ: Final = _element("F8_E5M2FNUZ", "u1")
F6_E2M3: Final = Dtype("F6_E2M3", np.dtype("u1"), 4, 3)
F6_E3M2: Final = Dtype("F6_E3M2", np.dtype("u1"), 4, 3)
F4: Final = Dtype("F4", np.dtype("u1"), 2, 1)  # E2M1, two in a byte
C64: Final = _element("C64", "<c8")
I64: Final = _element("I64", "<i8")
I32: Final = _element("I32", "<i4")
I16: Final = _element("I16", "<i2")
I8: Final = _element("I8", "i1")
U64: Final = _element("U64", "<u8")
U32: Final = _element("U32", "<u4")
U16: Final = _element("U16", "<u2")
U8: Final = _element("U8", "u1")
BOOL: Final = _element("BOOL", "?")

DTYPES: Final[Mapping[str, Dtype]] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (F64, F32, F16, BF16, F8_E4M3, F8_E5M2, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ, F6_E2M3, F6_E3M2, F4,
                      C64, I64, I32, I16, I8, U64, U32, U16, U8, BOOL)
    }
)  # fmt: skip

# Float types whose values all exist in F32, so that widening them is exact.
FLOATS: Final = (F32, F16, BF16)
