"""Any partition of a lazy tensor's rows gives the bytes of the whole, inside the memory that its nodes declare."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamconv.lazy import node as graph
from streamconv.lazy.node import (
    Encode,
    LazyTensor,
    PairHalves,
    Reshape,
    Resident,
    RowBlocks,
    Scale,
    Source,
    Stack,
    TensorSpec,
    Transpose,
    Widen,
    Workspace,
)
from streamconv.lazy.scratch import Overdraft, Scratch

F32, F16, BF16, Q8_0 = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
)
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


def stored(shape: tuple[int, ...], type_: GGMLQuantizationType, seed: int) -> tuple[Source, NDArray[np.generic]]:
    """A source with 24 bytes before it, and its array (BF16 as uint16 patterns)."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    patterns = {
        F32: values,
        F16: values.astype(np.float16),
        BF16: (values.view(np.uint32) >> 16).astype(np.uint16),
    }[type_]
    return Source("made", BytesFile(b"x" * 24 + patterns.tobytes()), 24, TensorSpec(shape, type_)), patterns


def widened(patterns: NDArray[np.generic]) -> NDArray[np.float32]:
    if patterns.dtype == np.uint16:
        return (patterns.astype(np.uint32) << 16).view(np.float32)
    return patterns.astype(np.float32)


def pair_halves(array: NDArray[np.generic], n_heads: int) -> NDArray[np.generic]:
    return array.reshape(n_heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def made_source(seed: int) -> tuple[LazyTensor, bytes]:
    tensor, array = stored((11, 7), BF16, seed)
    return tensor, array.tobytes()


def made_squeeze(seed: int) -> tuple[LazyTensor, bytes]:
    tensor, array = stored((13, 1, 3), BF16, seed)
    return Reshape(tensor, (13, 3)), array.tobytes()


def made_transpose(seed: int) -> tuple[LazyTensor, bytes]:
    tensor, array = stored((17, 5), F16, seed)
    return Transpose(tensor), array.T.tobytes()


def made_pairs(seed: int) -> tuple[LazyTensor, bytes]:
    tensor, array = stored((24, 5), F32, seed)  # 3 heads of 2 x 4 rows
    return PairHalves(tensor, 3), pair_halves(array, 3).tobytes()


def made_bias_pairs(seed: int) -> tuple[LazyTensor, bytes]:
    tensor, array = stored((30,), BF16, seed)
    return PairHalves(tensor, 5), pair_halves(array, 5).tobytes()


def made_pairs_of_transpose(seed: int) -> tuple[LazyTensor, bytes]:
    tensor, array = stored((6, 20), BF16, seed)
    return PairHalves(Transpose(tensor), 5), pair_halves(array.T, 5).tobytes()


def made_stack(seed: int) -> tuple[LazyTensor, bytes]:
    pairs = [stored((5, 3), F32, seed + e) for e in range(4)]
    return Stack([tensor for tensor, _ in pairs]), np.stack([array for _, array in pairs]).tobytes()


def made_blocks(seed: int) -> tuple[LazyTensor, bytes]:
    tensor, array = stored((3, 10, 4), F16, seed)
    return RowBlocks(tensor, 10, 5, 5), array[:, 5:].tobytes()


def made_scale(seed: int) -> tuple[LazyTensor, bytes]:
    tensor, array = stored((9, 4), BF16, seed)
    return Scale(Widen(tensor), 1.75), (widened(array) * np.float32(1.75)).tobytes()


def made_resident(seed: int) -> tuple[LazyTensor, bytes]:
    array = np.random.default_rng(seed).standard_normal((8, 3)).astype(np.float32)
    return Resident(array), array.tobytes()


def made_q8_0(seed: int) -> tuple[LazyTensor, bytes]:
    from gguf.quants import quantize

    tensor, array = stored((7, 96), BF16, seed)
    return Encode(tensor, "made", Q8_0), quantize(widened(array), Q8_0).tobytes()


def made_f16(seed: int) -> tuple[LazyTensor, bytes]:
    tensor, array = stored((6, 2, 10), BF16, seed)
    return Encode(tensor, "made", F16), widened(array).astype(np.float16).tobytes()


def made_experts(seed: int) -> tuple[LazyTensor, bytes]:
    pairs = [stored((6, 4), BF16, seed + e) for e in range(3)]
    stack = np.stack([widened(array) for _, array in pairs]) * np.float32(0.5)
    return Encode(Scale(Stack([tensor for tensor, _ in pairs]), 0.5), "made", F32), stack.tobytes()


Maker = Callable[[int], tuple[LazyTensor, bytes]]
MAKERS = [maker for name, maker in sorted(globals().items()) if name.startswith("made_")]


def read_rows(tensor: LazyTensor, rows: range) -> bytes:
    """The rows, in exactly the scratch that is declared for as many; what else is allocated stays small."""
    out = np.full(len(rows) * tensor.spec.row_nbytes, 0xA5, dtype=np.uint8)
    work = Workspace(Scratch(graph.peak_nbytes(tensor, len(rows))))
    graph.read(tensor, rows, out, work)
    return out.tobytes()


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), data=st.data())
def test_any_partition_of_rows_gives_the_whole(maker: Maker, seed: int, data: st.DataObject) -> None:
    tensor, expected = maker(seed)
    n_rows = tensor.spec.n_rows
    cuts = sorted(data.draw(st.sets(st.integers(1, n_rows - 1), max_size=5)))
    parts = [read_rows(tensor, range(a, b)) for a, b in zip([0, *cuts], [*cuts, n_rows], strict=True)]
    assert b"".join(parts) == expected


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_every_single_row(maker: Maker) -> None:
    tensor, expected = maker(7)
    assert b"".join(read_rows(tensor, range(r, r + 1)) for r in range(tensor.spec.n_rows)) == expected


@pytest.mark.parametrize("n_rows", [1, 24, 256])
@pytest.mark.parametrize(
    "chain",
    [
        lambda source: Encode(source, "made", Q8_0),
        lambda source: Encode(PairHalves(source, 4), "made", F32),
        lambda source: Encode(Scale(PairHalves(source, 8), 3.0), "made", F16),
        lambda source: Encode(Transpose(source), "made", BF16),
        lambda source: Encode(Stack([source, source]), "made", F16),
        lambda source: Encode(source, "made", BF16),
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
        np.asarray(made_source(1)[0])


def test_more_scratch_than_declared_is_refused() -> None:
    tensor, _ = made_pairs(1)
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
