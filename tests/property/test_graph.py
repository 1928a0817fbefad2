"""What reading rows takes beside the scratch that nodes declare, and what they refuse (results: test_nodes.py)."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from numpy.typing import NDArray

from streamconv.ggml.rows import Encode
from streamconv.lazy import node as graph
from streamconv.lazy.arithmetic import Scale
from streamconv.lazy.dtype import BF16, F16, F32, Dtype
from streamconv.lazy.leaves import Source
from streamconv.lazy.node import LazyTensor, TensorSpec, Workspace
from streamconv.lazy.scratch import Overdraft, Scratch
from streamconv.lazy.views import PairHalves, Reshape, RowBlocks, Stack, Transpose

# What numpy and Python may allocate beside the declared memory while rows are read: views, tuples, small buffers.
OVERHEAD_NBYTES = 64 << 10


class BytesFile:
    """A file in memory, read as a shard is."""

    def __init__(self, data: bytes) -> None:
        self.data = np.frombuffer(data, dtype=np.uint8)

    def check_unchanged(self) -> None:
        pass

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        assert offset >= 0 and offset + out.nbytes <= self.data.nbytes
        out[:] = self.data[offset : offset + out.nbytes]


def stored(shape: tuple[int, ...], dtype: Dtype, seed: int) -> tuple[Source, NDArray[np.generic]]:
    """A source with 24 bytes before it, and its array (BF16 as uint16 patterns)."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    patterns = {
        F32: values,
        F16: values.astype(np.float16),
        BF16: (values.view(np.uint32) >> 16).astype(np.uint16),
    }[dtype]
    return Source("made", BytesFile(b"x" * 24 + patterns.tobytes()), 24, TensorSpec(shape, dtype)), patterns


def widened(patterns: NDArray[np.generic]) -> NDArray[np.float32]:
    if patterns.dtype == np.uint16:
        return (patterns.astype(np.uint32) << 16).view(np.float32)
    return patterns.astype(np.float32)


def pair_halves(array: NDArray[np.generic], n_heads: int) -> NDArray[np.generic]:
    return array.reshape(n_heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize("n_rows", [1, 24, 256])
@pytest.mark.parametrize(
    "chain",
    [
        lambda source: Encode(source, "made", T.Q8_0),
        lambda source: Encode(PairHalves(source, 4), "made", T.F32),
        lambda source: Encode(Scale(PairHalves(source, 8), 3.0), "made", T.F16),
        lambda source: Encode(Transpose(source), "made", T.BF16),
        lambda source: Encode(Stack([source, source]), "made", T.F16),
        lambda source: Encode(source, "made", T.BF16),
    ],
    ids=["q8_0", "pairs-f32", "scaled-pairs-f16", "transpose-bf16", "stack-f16", "identity"],
)
def test_traced_memory_stays_within_what_is_declared(n_rows: int, chain: Callable[[LazyTensor], LazyTensor]) -> None:
    """The scratch is outside the traced heap and as large as declared; whatever else numpy allocates must be small."""
    tensor = chain(stored((512, 1024), BF16, 3)[0])
    work = Workspace(Scratch(graph.peak_nbytes(tensor, n_rows)))
    out = np.zeros(n_rows * tensor.spec.row_nbytes, dtype=np.uint8)
    graph.read(tensor, range(n_rows), out, work)  # once, so that what is cached for good is not counted
    tracemalloc.start()
    graph.read(tensor, range(n_rows), out, work)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert traced <= OVERHEAD_NBYTES


def test_a_lazy_tensor_is_no_array() -> None:
    with pytest.raises(TypeError, match="read"):
        np.asarray(stored((11, 7), BF16, 1)[0])


def test_more_scratch_than_declared_is_refused() -> None:
    tensor = PairHalves(stored((24, 5), F32, 1)[0], 3)
    work = Workspace(Scratch(graph.peak_nbytes(tensor, 8) - 1))
    with pytest.raises(Overdraft):
        graph.read(tensor, range(8), np.zeros(8 * tensor.spec.row_nbytes, dtype=np.uint8), work)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Reshape(stored((4, 6), F32, 0)[0], (6, 4)),
        lambda: PairHalves(stored((10, 3), F32, 0)[0], 4),
        lambda: Stack([stored((4, 3), F32, 0)[0], stored((4, 5), F32, 0)[0]]),
        lambda: RowBlocks(stored((2, 5, 3), F32, 0)[0], 5, 3, 3),
    ],
)
def test_shapes_that_do_not_fit_are_refused(wrong: Callable[[], LazyTensor]) -> None:
    with pytest.raises(ValueError):
        wrong()
