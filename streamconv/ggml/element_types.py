"""The element types of GGUF tensors: one table of all types, and how each can be used.

Source of sizes and numbers: gguf.constants (ggml's ggml.h and ggml-common.h), from which the types without a row of
their own are added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from streamconv.lazy import dtype
from streamconv.lazy.dtype import Dtype


@dataclass(frozen=True, slots=True)
class ElementType:
    """One type.

    Attributes:
        id: Its number in a file.
        dtype: How its rows are stored: block size, bytes, numpy's view of them.
        file_type: `general.file_type` of a model in which all or most matrices have this type; None if such files are
            not made here.
        encoder: How it is made from floats: FLOATS stands for ggml/reference.py and its C counterpart, BLOCKS for
            ggml/blocks.py; None if it can only be read.
        verifier: How the rows are made with which a file is compared, likewise; None if it cannot be verified.
    """

    id: GGMLQuantizationType
    dtype: Dtype
    file_type: LlamaFileType | None = None
    encoder: str | None = None
    verifier: str | None = None

    @property
    def name(self) -> str:
        return self.id.name


def _blocks(id_: GGMLQuantizationType) -> Dtype:
    block, block_nbytes = GGML_QUANT_SIZES[id_]
    return Dtype(id_.name, np.dtype("u1"), block, block_nbytes)


T, F = GGMLQuantizationType, LlamaFileType
FLOATS, BLOCKS = "floats", "blocks"

_ROWS = (
    # type                 stored as            general.file_type     made by    verified by
    ElementType(T.F32,     dtype.F32,           F.ALL_F32,            FLOATS,    FLOATS),
    ElementType(T.F16,     dtype.F16,           F.MOSTLY_F16,         FLOATS,    FLOATS),
    ElementType(T.BF16,    dtype.BF16,          F.MOSTLY_BF16,        FLOATS,    FLOATS),
    ElementType(T.Q8_0,    _blocks(T.Q8_0),     F.MOSTLY_Q8_0,        FLOATS,    FLOATS),
    ElementType(T.Q4_0,    _blocks(T.Q4_0),     F.MOSTLY_Q4_0,        BLOCKS,    BLOCKS),
    ElementType(T.Q4_1,    _blocks(T.Q4_1),     F.MOSTLY_Q4_1,        BLOCKS,    BLOCKS),
    ElementType(T.Q5_0,    _blocks(T.Q5_0),     F.MOSTLY_Q5_0,        BLOCKS,    BLOCKS),
    ElementType(T.Q5_1,    _blocks(T.Q5_1),     F.MOSTLY_Q5_1,        BLOCKS,    BLOCKS),
    ElementType(T.Q2_K,    _blocks(T.Q2_K),     F.MOSTLY_Q2_K,        BLOCKS,    BLOCKS),
    ElementType(T.Q3_K,    _blocks(T.Q3_K),     F.MOSTLY_Q3_K_S,      BLOCKS,    BLOCKS),
    ElementType(T.Q4_K,    _blocks(T.Q4_K),     F.MOSTLY_Q4_K_S,      BLOCKS,    BLOCKS),
    ElementType(T.Q5_K,    _blocks(T.Q5_K),     F.MOSTLY_Q5_K_S,      BLOCKS,    BLOCKS),
    ElementType(T.Q6_K,    _blocks(T.Q6_K),     F.MOSTLY_Q6_K,        BLOCKS,    BLOCKS),
    ElementType(T.IQ4_NL,  _blocks(T.IQ4_NL),   F.MOSTLY_IQ4_NL,      BLOCKS,    BLOCKS),
    ElementType(T.IQ4_XS,  _blocks(T.IQ4_XS),   F.MOSTLY_IQ4_XS,      BLOCKS,    BLOCKS),
    ElementType(T.TQ1_0,   _blocks(T.TQ1_0),    F.MOSTLY_TQ1_0,       BLOCKS,    BLOCKS),
    ElementType(T.TQ2_0,   _blocks(T.TQ2_0),    F.MOSTLY_TQ2_0,       BLOCKS,    BLOCKS),
    ElementType(T.F64,     dtype.F64),
    ElementType(T.I64,     dtype.I64),
    ElementType(T.I32,     dtype.I32),
    ElementType(T.I16,     dtype.I16),
    ElementType(T.I8,      dtype.I8),
)  # fmt: skip
_NAMED = frozenset(row.id for row in _ROWS)

# Every type that gguf knows, so that files with any of them can be read; types without an encoder can only be read.
TYPES: Final[Mapping[GGMLQuantizationType, ElementType]] = MappingProxyType(
    {
        row.id: row
        for row in (*_ROWS, *(ElementType(id_, _blocks(id_)) for id_ in GGML_QUANT_SIZES if id_ not in _NAMED))
    }
)
TYPE_OF: Final[Mapping[Dtype, ElementType]] = MappingProxyType({row.dtype: row for row in TYPES.values()})

VERIFIABLE: Final = frozenset(row.id for row in TYPES.values() if row.verifier)


def row_nbytes(n_columns: int, type_: GGMLQuantizationType) -> int:
    """The size of a row of `n_columns` elements in bytes.

    Raises:
        ValueError: The row does not divide into whole blocks.
    """
    return TYPES[type_].dtype.row_nbytes(n_columns)


def tensor_nbytes(shape: tuple[int, ...], type_: GGMLQuantizationType) -> int:
    """The size of a tensor in bytes; a shape without dimensions counts as one element.

    Raises:
        ValueError: Its rows do not divide into whole blocks.
    """
    n_columns = shape[-1] if shape else 1
    return math.prod(shape[:-1]) * row_nbytes(n_columns, type_)
