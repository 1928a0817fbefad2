"""Merged rows: the same bits in any partition, on either kernel, inside the memory that their nodes declare."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamconv.ggml import _kernels
from streamconv.ggml import encode as codecs
from streamconv.lazy import node as graph
from streamconv.lazy.arithmetic import AddProduct, ColumnMagnitudes, RowMagnitudes
from streamconv.lazy.dtype import BF16, F16, F32
from streamconv.lazy.leaves import Source
from streamconv.lazy.node import LazyTensor, TensorSpec, Workspace
from streamconv.lazy.scratch import Scratch
from streamconv.lazy.views import PairHalves, Reshape, Stack, Transpose, matrix_of
from tests.property.test_graph import OVERHEAD_NBYTES, stored, widened

N, C, R = 37, 131, 5  # 131 columns: two runs of vectors and a rest
EPSILON = float(np.finfo(np.float32).eps)

Matrix = NDArray[np.float64]
Maker = Callable[[int], tuple[LazyTensor, Matrix]]


def exact(patterns: NDArray[np.generic]) -> Matrix:
    return widened(patterns).astype(np.float64)


def made_sum(seed: int) -> tuple[LazyTensor, Matrix]:
    w, weight = stored((N, C), BF16, seed)
    left, b = stored((N, R), F32, seed + 1)
    right, a = stored((R, C), F32, seed + 2)
    return AddProduct(w, left, right, 0.37), exact(weight) + np.float32(0.37) * (exact(b) @ exact(a))


def made_sum_of_two(seed: int) -> tuple[LazyTensor, Matrix]:
    first, total = made_sum(seed)
    left, b = stored((N, 3), F16, seed + 3)
    right, a = stored((C, 3), BF16, seed + 4)
    return AddProduct(first, left, Transpose(right), -2.0), total - 2 * (exact(b) @ exact(a).T)


def made_turned(seed: int) -> tuple[LazyTensor, Matrix]:
    w, weight = stored((N, C), F32, seed)
    left, b = stored((R, N), BF16, seed + 1)
    right, a = stored((R, C), BF16, seed + 2)
    return AddProduct(w, Transpose(left), right, 1.5), exact(weight) + 1.5 * (exact(b).T @ exact(a))


def made_rows_of_magnitude(seed: int) -> tuple[LazyTensor, Matrix]:
    tensor, total = made_sum(seed)
    vector, magnitudes = stored((N,), F32, seed + 5)
    return RowMagnitudes(tensor, vector), total * (exact(magnitudes) / np.linalg.norm(total, axis=1))[:, None]


def made_columns_of_magnitude(seed: int) -> tuple[LazyTensor, Matrix]:
    tensor, total = made_turned(seed)
    vector, magnitudes = stored((C,), BF16, seed + 5)
    return ColumnMagnitudes(tensor, vector), total * (exact(magnitudes) / np.linalg.norm(total, axis=0))


def made_experts(seed: int) -> tuple[LazyTensor, Matrix]:
    stack, weights = stored((3, N, C), F32, seed)
    left, b = stored((3, N, R), F32, seed + 1)
    right, a = stored((3, R, C), F32, seed + 2)
    merged = [
        AddProduct(matrix_of(stack, e, N), matrix_of(left, e, N), matrix_of(right, e, R), 0.5 + e) for e in range(3)
    ]
    total = [exact(weights)[e] + (0.5 + e) * (exact(b)[e] @ exact(a)[e]) for e in range(3)]
    return Reshape(Stack(merged), (3 * N, C)), np.concatenate(total)


def made_heads(seed: int) -> tuple[LazyTensor, Matrix]:
    w, weight = stored((24, C), BF16, seed)
    left, b = stored((24, R), F32, seed + 1)
    right, a = stored((R, C), F32, seed + 2)
    total = exact(weight) + exact(b) @ exact(a)
    return PairHalves(AddProduct(w, left, right, 1), 3), total.reshape(3, 2, 4, C).swapaxes(1, 2).reshape(24, C)


MAKERS: list[Maker] = [
    made_sum,
    made_sum_of_two,
    made_turned,
    made_rows_of_magnitude,
    made_columns_of_magnitude,
    made_experts,
    made_heads,
]


def read_rows(tensor: LazyTensor, rows: range) -> NDArray[np.uint8]:
    """The rows, made with no more scratch than is declared for them."""
    out = np.empty(len(rows) * tensor.spec.row_nbytes, dtype=np.uint8)
    graph.read(tensor, rows, out, Workspace(Scratch(graph.peak_nbytes(tensor, len(rows)))))
    return out


def whole(tensor: LazyTensor) -> NDArray[np.float32]:
    return read_rows(tensor, range(tensor.spec.n_rows)).view("<f4").reshape(-1, tensor.spec.n_columns)


@pytest.mark.parametrize("make", MAKERS)
def test_values_are_those_of_float64(make: Maker) -> None:
    tensor, total = make(1)
    np.testing.assert_allclose(whole(tensor), total, rtol=20 * EPSILON, atol=20 * EPSILON)


@settings(max_examples=25, deadline=None)
@given(make=st.sampled_from(MAKERS), seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 110), max_size=6))
def test_any_partition_gives_the_bits_of_the_whole(make: Maker, seed: int, cuts: list[int]) -> None:
    tensor, _ = make(seed)
    n_rows = tensor.spec.n_rows
    borders = [0, *sorted({cut for cut in cuts if cut < n_rows}), n_rows]
    parts = [read_rows(tensor, range(*pair)) for pair in pairwise(borders)]
    fresh, _ = make(seed)
    assert np.array_equal(np.concatenate(parts), read_rows(fresh, range(n_rows)))


@pytest.mark.parametrize("make", MAKERS)
def test_numpy_gives_the_bits_of_the_compiled_kernel(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert codecs.best_kernel().name == "c"
    compiled = whole(make(3)[0])
    monkeypatch.setenv("STREAMCONV_KERNELS", "0")
    assert codecs.best_kernel().name == "numpy"
    assert np.array_equal(whole(make(3)[0]).view(np.uint32), compiled.view(np.uint32))


@pytest.mark.parametrize("wide", [AddProduct, RowMagnitudes, ColumnMagnitudes])
def test_traced_memory_stays_within_what_is_declared(wide: type[LazyTensor]) -> None:
    w, left, right = (stored(shape, BF16, 3)[0] for shape in ((64, 32768), (16, 64), (16, 32768)))
    tensor: LazyTensor = AddProduct(w, Transpose(left), right, 1.5)
    if wide is RowMagnitudes:
        tensor = RowMagnitudes(tensor, stored((64,), F32, 4)[0])
    elif wide is ColumnMagnitudes:
        tensor = ColumnMagnitudes(tensor, stored((32768,), F32, 4)[0])
    work = Workspace(Scratch(graph.peak_nbytes(tensor, 16)), codecs.REFERENCE)
    out = np.zeros(16 * tensor.spec.row_nbytes, dtype=np.uint8)
    tracemalloc.start()
    graph.read(tensor, range(16), out, work)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert traced <= OVERHEAD_NBYTES


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 64, 1), (3, 65, 2), (5, 63, 7), (40, 2048, 3)])
def test_products_are_summed_in_order_and_each_rounded(shape: tuple[int, int, int]) -> None:
    n_rows, n_columns, rank = shape
    rng = np.random.default_rng(7)
    left, right, before = (
        rng.standard_normal(size).astype(np.float32)
        for size in ((n_rows, rank), (rank, n_columns), (n_rows, n_columns))
    )
    total = left[:, :1] * right[0]
    for k in range(1, rank):
        total = total + left[:, k : k + 1] * right[k]
    out = before.copy()
    scratch = Scratch(codecs.product_scratch_nbytes(n_rows, n_columns))
    codecs.add_product(left, right, np.float32(0.3), out, scratch, codecs.best_kernel())
    assert np.array_equal(out, before + np.float32(0.3) * total)


def test_columns_read_nothing_but_their_rows() -> None:
    source, array = stored((4, 90), F32, 1)
    reads: list[tuple[int, int]] = []

    class Watched:
        def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
            reads.append((offset, out.nbytes))
            source.file.read_into(offset, out)

    tensor = Transpose(Source("made", Watched(), source.offset, TensorSpec((4, 90), F32)))
    assert np.array_equal(read_rows(tensor, range(70, 73)).view("<f4").reshape(3, 4), array.T[70:73])
    assert reads == [(24 + 4 * (90 * k + 70), 12) for k in range(4)]


def test_factors_that_do_not_fit_are_refused() -> None:
    (w, _), (left, _), (right, _) = (stored(shape, F32, 1) for shape in ((N, C), (N, R), (R + 1, C)))
    with pytest.raises(ValueError, match="is no"):
        AddProduct(w, left, right, 1)
    with pytest.raises(ValueError, match="magnitudes"):
        RowMagnitudes(w, stored((C,), F32, 1)[0])
    with pytest.raises(ValueError, match="magnitudes"):
        ColumnMagnitudes(w, stored((N,), F32, 1)[0])
    with pytest.raises(ValueError, match="do not make"):
        _kernels.add_product(bytes(8), bytes(8), 3, 1.0, bytearray(8))
