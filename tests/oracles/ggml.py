"""ggml itself as the judge of blocks: `ggml_quantize_chunk` of the llama.cpp that PyPI `xllamacpp` carries.

Its baseline build for x86-64 has no FMA, so that its bytes are those of IEEE single operations.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from tests.extras import xllamacpp


@functools.cache
def _library() -> ctypes.CDLL:
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library


def quantize(
    target: GGMLQuantizationType, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """The blocks that ggml makes of `rows` [n_rows, n_per_row], as [n_blocks, nbytes]."""
    n_elements, nbytes = GGML_QUANT_SIZES[target]
    rows = np.ascontiguousarray(rows)
    out = np.zeros((rows.size // n_elements, nbytes), dtype=np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = _library().ggml_quantize_chunk(int(target), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
    assert written == out.nbytes
    return out
