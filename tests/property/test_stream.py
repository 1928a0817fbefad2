"""Any chunk of an output is the same bytes wherever it is cut, and each non-finite value is counted once."""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
from gguf.constants import GGMLQuantizationType as T
from gguf.constants import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.engine.layout import Layout, PlacedTensor, make_layout
from streamconv.engine.pool import fill_chunk
from streamconv.gguf.format import KeyValue, PackedArray
from streamconv.lazy.dtype import BF16, F16
from streamconv.lazy.leaves import Source
from streamconv.lazy.node import TensorSpec, Workspace
from streamconv.lazy.scratch import Scratch, aligned_buffer
from streamconv.lazy.views import PairHalves
from tests.property.test_graph import BytesFile, pair_halves, stored, widened

NAN, INFINITY = 0x7FC1, 0xFF80

KEYS = [
    KeyValue.string("general.architecture", "made"),
    KeyValue.array("made.sizes", PackedArray.of_numbers(GGUFValueType.UINT32, [3, 70_000, 5])),
    KeyValue.array("made.none", PackedArray.of_strings([])),
    KeyValue.array("made.words", PackedArray.of_strings(["one", "", "three"])),
    KeyValue.u32("made.block_count", 3),
]


def made_layout() -> tuple[Layout, bytes]:
    """Four tensors whose rows do not divide chunks, and the whole file by another way."""
    matrix, matrix_array = stored((37, 96), BF16, 1)
    heads, heads_array = stored((24, 40), BF16, 2)
    kernel, kernel_array = stored((19, 3), F16, 3)
    bad_array = stored((5, 31), BF16, 4)[1].copy()
    bad_array[1, 7], bad_array[3, 30], bad_array[3, 0] = NAN, INFINITY, NAN
    bad = Source("bad", BytesFile(bad_array.tobytes()), 0, TensorSpec((5, 31), BF16))
    layout = make_layout(
        KEYS,
        [
            PlacedTensor("matrix.weight", matrix, ("m",), T.Q8_0),
            PlacedTensor("heads.weight", PairHalves(heads, 3), ("h",), T.F16),
            PlacedTensor("kernel.weight", kernel, ("k",), T.F32),
            PlacedTensor("bad.weight", bad, ("b",), T.F32),
        ],
    )
    from gguf.quants import quantize

    data = [
        quantize(widened(matrix_array), T.Q8_0).tobytes(),
        widened(pair_halves(heads_array, 3)).astype(np.float16).tobytes(),
        kernel_array.astype(np.float32).tobytes(),
        widened(bad_array).tobytes(),
    ]
    whole = b"".join(layout.header.pieces)
    for part in data:
        whole += part + bytes(-len(part) % 32)
    return layout, whole


LAYOUT, WHOLE = made_layout()
SCRATCH_NBYTES = max(step.scratch_nbytes for step in LAYOUT.steps)


def chunk(start: int, nbytes: int, work: Workspace) -> bytes:
    out = aligned_buffer(nbytes)
    out[:] = 0xA5
    fill_chunk(LAYOUT, start, out, work)
    return out.tobytes()


def test_the_layout_is_the_whole_file() -> None:
    assert LAYOUT.nbytes == len(WHOLE)
    assert struct.unpack("<4sI", WHOLE[:8]) == (b"GGUF", 3)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_chunk_anywhere(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(WHOLE) - 1))
    nbytes = data.draw(st.integers(1, len(WHOLE) - start))
    work = Workspace(Scratch(SCRATCH_NBYTES))
    assert chunk(start, nbytes, work) == WHOLE[start : start + nbytes]


@settings(max_examples=60, deadline=None)
@given(cuts=st.sets(st.integers(1, len(WHOLE) - 1), max_size=40))
def test_each_non_finite_value_is_counted_once_for_any_cut(cuts: set[int]) -> None:
    work = Workspace(Scratch(SCRATCH_NBYTES))
    edges = [0, *sorted(cuts), len(WHOLE)]
    parts = [chunk(a, b - a, work) for a, b in pairwise(edges)]
    assert b"".join(parts) == WHOLE
    assert {name: (s.n_nan, s.n_inf) for name, s in work.tally.items()} == {"bad.weight": (2, 1)}
