"""Every node class, on random shapes and cuts: numpy's result, inside the scratch that is derived for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from streamconv.ggml import blocks
from streamconv.ggml.blocks import quantize_rows
from streamconv.ggml.element_types import BLOCKS, TYPES
from streamconv.ggml.encode import REFERENCE, best_kernel
from streamconv.ggml.rows import Encode
from streamconv.lazy import arithmetic, indexing, leaves, views
from streamconv.lazy.arithmetic import (
    AddProduct,
    ColumnFactors,
    ColumnMagnitudes,
    ColumnSquares,
    NegExp,
    Once,
    PlusConstant,
    RowFactors,
    RowMagnitudes,
    Scale,
    TimesRowFactors,
    Widen,
)
from streamconv.lazy.dtype import BF16, F16, F32, F64, I32, U8, Dtype
from streamconv.lazy.indexing import CutColumns, IndexColumns, IndexRows, rows_in_order, slice_columns
from streamconv.lazy.leaves import Generated, Resident, Source, SourceColumns, Zeros
from streamconv.lazy.node import Bytes, LazyTensor, TensorSpec, Workspace, description, peak_nbytes, read, read_lent
from streamconv.lazy.scratch import Scratch
from streamconv.lazy.views import (
    Concatenate,
    PairHalves,
    Reflow,
    Reshape,
    RowBlocks,
    Stack,
    Transpose,
    matrix_of,
    transposed,
)
from tests.property.test_graph import pair_halves, widened

Array = NDArray[np.generic]
Made = tuple[LazyTensor, Array]
Draw = st.DataObject
RTOL = 40 * float(np.finfo(np.float32).eps)


class File:
    """Bytes that are read, or lent where `lends`; counts what was read of them."""

    def __init__(self, data: bytes, lends: bool = False) -> None:
        self.data = np.frombuffer(data, dtype=np.uint8)  # read-only
        self.n_read = self.n_lent = self.n_calls = 0
        self.lends = lends
        self.nbytes, self.is_mapped = len(data), lends

    def map(self, offset: int, nbytes: int) -> None:
        raise AssertionError("a Lender asks for nothing else")

    def check_unchanged(self) -> None:
        pass

    def read_into(self, offset: int, out: Bytes) -> None:
        assert offset >= 24 and offset + out.nbytes <= self.data.nbytes
        out[:] = self.data[offset : offset + out.nbytes]
        self.n_read += out.nbytes
        self.n_calls += 1

    def lend(self, offset: int, nbytes: int) -> AbstractContextManager[Bytes | None]:
        return self._lent(offset, nbytes) if self.lends else nullcontext()

    @contextmanager
    def _lent(self, offset: int, nbytes: int) -> Iterator[Bytes]:
        self.n_lent += nbytes
        yield self.data[offset : offset + nbytes]


class Lender:
    """What a window is to a worker."""

    def lend(self, file: File, offset: int, nbytes: int) -> AbstractContextManager[Bytes | None]:
        return file.lend(offset, nbytes)

    def maps(self, file: File) -> bool:
        return file.lends

    def rows_before_border(self, offset: int, row_nbytes: int, n_rows: int) -> int:
        return n_rows


class Watched(Scratch):
    """A scratch that knows how much of it was taken at most."""

    highest = 0

    def take(self, shape: tuple[int, ...] | int, dtype: DTypeLike = np.uint8) -> Array:
        taken = super().take(shape, dtype)
        self.highest = max(self.highest, self._used)
        return taken


def array_of(shape: tuple[int, ...], dtype: Dtype, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    if dtype in (BF16, F16, F32):
        numbers = rng.standard_normal(shape).astype(np.float32)
        cut = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        return {F32: numbers, F16: numbers.astype(np.float16), BF16: cut}[dtype]
    return rng.integers(0, 256, (*shape, dtype.block_nbytes), dtype=np.uint8).view(dtype.view).reshape(shape)


def stored(data: Draw, shape: tuple[int, ...], dtype: Dtype | None = None) -> Made:
    dtype = dtype or data.draw(st.sampled_from([F32, F16, BF16, F64, I32, U8]))
    return source_of(array_of(shape, dtype, data.draw(st.integers(0, 999))), dtype)


def floats(data: Draw, shape: tuple[int, ...]) -> Made:
    return stored(data, shape, data.draw(st.sampled_from([F32, F16, BF16])))


def source_of(array: Array, dtype: Dtype, lends: bool = False) -> tuple[Source, Array]:
    return Source("made", File(b"x" * 24 + array.tobytes(), lends), 24, TensorSpec(array.shape, dtype)), array


def size(data: Draw, most: int = 7) -> int:
    return data.draw(st.integers(1, most))


def matrix(data: Draw) -> tuple[int, int]:
    return size(data, 12), size(data, 9)


# ---------------------------------------------------------------- one maker for each class


def source(data: Draw) -> Made:
    return stored(data, data.draw(st.sampled_from([(11,), (5, 3), (2, 3, 4)])))


def source_columns(data: Draw) -> Made:
    rows, columns = matrix(data)
    first = data.draw(st.integers(0, columns - 1))
    last = data.draw(st.integers(first + 1, columns))
    tensor, array = stored(data, (rows, columns))
    found = tensor.columns(range(first, last))
    assert isinstance(found, SourceColumns)
    return found, array[:, first:last]


def resident(data: Draw) -> Made:
    array = array_of(matrix(data), F32, 3)
    return Resident(array.astype(np.float32)), array


def zeros(data: Draw) -> Made:
    shape = matrix(data)
    return Zeros(TensorSpec(shape, BF16)), np.zeros(shape, np.uint16)


def generated(data: Draw) -> Made:
    rows, columns = matrix(data)

    def fill(wanted: range, out: Array) -> None:
        out[:] = np.arange(wanted.start * columns, wanted.stop * columns).reshape(-1, columns)

    return Generated(TensorSpec((rows, columns), I32), fill, "counted"), np.arange(
        rows * columns, dtype=np.int32
    ).reshape(rows, columns)


def reshape(data: Draw) -> Made:
    rows, columns = matrix(data)
    tensor, array = stored(data, (rows, 1, columns))
    return Reshape(tensor, (rows, columns)), array.reshape(rows, columns)


def reflow(data: Draw) -> Made:
    a, b, c = (size(data) for _ in range(3))
    tensor, array = stored(data, (a * b, c))
    return Reflow(tensor, (a, b * c)), array.reshape(a, b * c)


def transpose(data: Draw) -> Made:
    shape = (*data.draw(st.sampled_from([(), (1,), (3,), (2, 2)])), size(data, 20), size(data, 20))
    tensor, array = stored(data, shape)
    wrap = data.draw(st.sampled_from(["plain", "reflowed", "twice", "blocks"]))
    if wrap == "twice":  # has no columns of its own
        tensor = Reflow(Reflow(tensor, (1, array.size)), shape)
    if wrap == "reflowed":
        tensor, array = (
            Reflow(tensor, (*shape[:-2], shape[-1], shape[-2])),
            array.reshape(*shape[:-2], shape[-1], shape[-2]),
        )
    elif wrap == "blocks" and len(shape) == 2:
        tensor, array = matrix_of(Stack([tensor, tensor]), 1, shape[0]), array
    return Transpose(tensor), array.swapaxes(-1, -2)


def pairs(data: Draw) -> Made:
    heads, half = size(data, 4), size(data, 5)
    shape = data.draw(st.sampled_from([(2 * heads * half,), (2 * heads * half, 3)]))
    tensor, array = stored(data, shape)
    return PairHalves(tensor, heads), pair_halves(array, heads)


def pairs_of_transpose(data: Draw) -> Made:
    heads, half, columns = size(data, 4), size(data, 5), size(data, 9)
    tensor, array = stored(data, (columns, 2 * heads * half))
    return PairHalves(Transpose(tensor), heads), pair_halves(array.T, heads)


def transpose_of_pairs(data: Draw) -> Made:
    heads, half, columns = size(data, 4), size(data, 5), size(data, 20)
    tensor, array = stored(data, (2 * heads * half, columns))
    return Transpose(PairHalves(tensor, heads)), pair_halves(array, heads).T


def concatenate(data: Draw) -> Made:
    columns, dtype = size(data), data.draw(st.sampled_from([F32, BF16]))
    made = [stored(data, (size(data), columns), dtype) for _ in range(size(data, 4))]
    return Concatenate([tensor for tensor, _ in made]), np.concatenate([array for _, array in made])


def stack(data: Draw) -> Made:
    shape, dtype = matrix(data), data.draw(st.sampled_from([F32, BF16]))
    made = [stored(data, shape, dtype) for _ in range(size(data, 4))]
    return Stack([tensor for tensor, _ in made]), np.stack([array for _, array in made])


def row_blocks(data: Draw) -> Made:
    n, period, columns = size(data, 4), size(data), size(data)
    start = data.draw(st.integers(0, period - 1))
    length = data.draw(st.integers(1, period - start))
    tensor, array = stored(data, (n, period, columns))
    return RowBlocks(tensor, period, start, length), array[:, start : start + length]


def index_rows(data: Draw) -> Made:
    shape = data.draw(st.sampled_from([(9,), (9, 3), (9, 150), (3, 5, 2), (3, 5, 150)]))
    n = shape[0] if len(shape) == 1 else shape[-2]
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    tensor, array = stored(data, shape)
    return IndexRows(tensor, index), np.take(array, index, axis=0 if len(shape) == 1 else -2)


def index_columns(data: Draw) -> Made:
    rows, columns = matrix(data)
    index = data.draw(st.lists(st.integers(0, columns - 1), min_size=1, max_size=12))
    tensor, array = stored(data, (2, rows, columns))
    return IndexColumns(tensor, index), array[..., index]


def cut_columns(data: Draw) -> Made:
    rows, columns = matrix(data)
    first = data.draw(st.integers(0, columns - 1))
    last = data.draw(st.integers(first + 1, columns))
    tensor, array = stored(data, (2, rows, columns))
    return CutColumns(tensor, range(first, last)), array[..., first:last]


def widen(data: Draw) -> Made:
    tensor, array = floats(data, matrix(data))
    return Widen(tensor), widened(array)


def scale(data: Draw) -> Made:
    tensor, array = floats(data, matrix(data))
    return Scale(tensor, 1.7), widened(array) * np.float32(1.7)


def plus_constant(data: Draw) -> Made:
    tensor, array = floats(data, (size(data, 20),))
    return PlusConstant(tensor, 1), widened(array) + np.float32(1)


def neg_exp(data: Draw) -> Made:
    tensor, array = floats(data, matrix(data))
    return NegExp(tensor), (-np.exp(widened(array).astype(np.float64))).astype(np.float32)


def transpose_of_sum(data: Draw) -> Made:
    """Columns of what is computed element by element are computed alone."""
    tensor, array = floats(data, (size(data, 20), size(data, 20)))
    return Transpose(PlusConstant(Scale(tensor, 3), 0.5)), (widened(array) * np.float32(3) + np.float32(0.5)).T


def transpose_of_product(data: Draw) -> Made:
    tensor, total = factors_of(data)
    return Transpose(tensor), total.T


def transpose_of_magnitudes(data: Draw) -> Made:
    tensor, _ = factors_of(data)
    vector, _ = floats(data, (tensor.spec.n_columns,))
    scaled = ColumnMagnitudes(tensor, vector)
    return Transpose(scaled), rows_of(scaled, range(scaled.spec.n_rows)).view("<f4").reshape(scaled.spec.shape).T


def transpose_of_row_magnitudes(data: Draw) -> Made:
    """The bits are those of whole rows, whose norms are computed once."""
    tensor, _ = factors_of(data)
    vector, _ = floats(data, (tensor.spec.n_rows,))
    scaled = RowMagnitudes(tensor, vector)
    return Transpose(scaled), rows_of(scaled, range(scaled.spec.n_rows)).view("<f4").reshape(scaled.spec.shape).T


def factors_of(data: Draw) -> tuple[LazyTensor, NDArray[np.float64]]:
    rows, columns, rank = size(data, 12), size(data, 9), size(data, 5)
    made = [floats(data, shape) for shape in ((rows, columns), (rows, rank), (columns, rank))]
    (w, left, right), (weight, b, a) = zip(
        *((one, widened(array).astype(np.float64)) for one, array in made), strict=True
    )
    return AddProduct(w, left, Transpose(right), 0.3), weight + np.float32(0.3) * (b @ a.T)


def add_product(data: Draw) -> Made:
    return factors_of(data)


def row_magnitudes(data: Draw) -> Made:
    tensor, total = factors_of(data)
    vector, magnitudes = floats(data, (tensor.spec.n_rows,))
    return RowMagnitudes(tensor, vector), total * (widened(magnitudes) / np.linalg.norm(total, axis=1))[:, None]


def row_factors(data: Draw) -> Made:
    tensor, _ = factors_of(data)
    vector, magnitudes = stored(data, (tensor.spec.n_rows,), F32)
    norms = np.sqrt((widened_sum(tensor).astype(np.float64) ** 2).sum(axis=1))
    return RowFactors(tensor, vector), widened(magnitudes) / norms


def times_row_factors(data: Draw) -> Made:
    tensor, array = floats(data, matrix(data))
    vector, factors = stored(data, (tensor.spec.n_rows,), F32)
    return TimesRowFactors(tensor, vector), widened(array) * widened(factors)[:, None]


def column_squares(data: Draw) -> Made:
    tensor, _ = factors_of(data)
    return ColumnSquares(tensor), (widened_sum(tensor).astype(np.float64) ** 2).sum(axis=0, keepdims=True)


def column_factors(data: Draw) -> Made:
    tensor, _ = factors_of(data)
    vector, magnitudes = floats(data, (tensor.spec.n_columns,))
    norms = np.sqrt((widened_sum(tensor).astype(np.float64) ** 2).sum(axis=0))
    return ColumnFactors(ColumnSquares(tensor), vector), (widened(magnitudes) / norms)[None]


def column_magnitudes(data: Draw) -> Made:
    tensor, total = factors_of(data)
    vector, magnitudes = floats(data, (tensor.spec.n_columns,))
    return ColumnMagnitudes(tensor, vector), total * (widened(magnitudes) / np.linalg.norm(total, axis=0))


def once(data: Draw) -> Made:
    tensor, array = floats(data, matrix(data))
    return Once(tensor), array


def widened_sum(tensor: LazyTensor) -> NDArray[np.float32]:
    return rows_of(tensor, range(tensor.spec.n_rows)).view(np.float32).reshape(tensor.spec.n_rows, -1)


def encode(data: Draw) -> Made:
    type_ = data.draw(st.sampled_from([T.F32, T.F16, T.BF16, T.Q8_0]))
    tensor, array = floats(data, (size(data), 32 * size(data, 3)))
    if tensor.spec.dtype.name == type_.name:
        return Encode(tensor, "made", type_), array
    return Encode(tensor, "made", type_), quantize(widened(array), type_)


def encode_with_weights(data: Draw) -> Made:
    """Types that do not weigh errors give the same bytes; the weights of each expert meet its own rows."""
    experts, rows = size(data, 3), size(data, 4)
    tensor, array = floats(data, (experts, rows, 64))
    weights = Resident(array_of((experts, 64), F32, 5).astype(np.float32))
    return Encode(tensor, "made", T.Q8_0, weights), quantize(widened(array), T.Q8_0)


def encode_blocks(data: Draw) -> Made:
    """Block types, with an importance of each column for all rows, or for those of each expert."""
    type_ = data.draw(st.sampled_from([row.id for row in TYPES.values() if row.encoder == BLOCKS]))
    experts, rows, columns = size(data, 2), size(data, 3), TYPES[type_].dtype.block * size(data, 2)
    tensor, array = floats(data, (experts, rows, columns))
    importance = np.abs(array_of((data.draw(st.sampled_from([1, experts])), columns), F32, 5).astype(np.float32))
    weights = Resident(importance) if data.draw(st.booleans()) else None
    made = []
    for e in range(experts):
        expert = np.ascontiguousarray(widened(array[e])).reshape(-1).view(np.uint8)
        out = np.zeros(rows * TYPES[type_].dtype.row_nbytes(columns), np.uint8)
        weight = None if weights is None else importance[e % len(importance)]
        assert quantize_rows(type_, T.F32, expert, columns, weight, out, blocks.REFERENCE) is None
        made.append(out)
    return Encode(tensor, "made", type_, weights), np.concatenate(made)


MAKERS: tuple[Callable[[Draw], Made], ...] = (
    source, source_columns, resident, zeros, generated, reshape, reflow, transpose, pairs, pairs_of_transpose,
    transpose_of_pairs, concatenate, stack, row_blocks, index_rows, index_columns, cut_columns,
    widen, scale, plus_constant, neg_exp, transpose_of_sum, add_product, row_magnitudes, row_factors,
    times_row_factors, column_squares, column_factors, column_magnitudes, once, encode, encode_with_weights,
    encode_blocks, transpose_of_product, transpose_of_magnitudes, transpose_of_row_magnitudes,
)  # fmt: skip
ROUNDED = (
    add_product, row_magnitudes, row_factors, column_squares, column_factors, column_magnitudes, neg_exp,
    transpose_of_product,
)  # fmt: skip
# What they take depends on where the rows lie, or on how many: the bound is that of the worst place.
LOOSE = (
    encode_blocks,
    reflow,
    transpose,
    pairs,
    pairs_of_transpose,
    transpose_of_pairs,
    transpose_of_sum,
    transpose_of_product,
    transpose_of_magnitudes,
    transpose_of_row_magnitudes,
    index_rows,
)


def rows_of(tensor: LazyTensor, rows: range, work: Workspace | None = None) -> Bytes:
    """The rows, made in exactly the scratch that is derived for so many."""
    work = work or Workspace(Scratch(peak_nbytes(tensor, len(rows))), window=Lender())
    out = np.full(len(rows) * tensor.spec.row_nbytes, 0xA5, dtype=np.uint8)
    read(tensor, rows, out, work)
    return out


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors take several steps."""
    monkeypatch.setattr(views, "TRANSPOSE_PIECE_NBYTES", 96)
    monkeypatch.setattr(views, "TRANSPOSE_RUN_NBYTES", 8)
    monkeypatch.setattr(arithmetic, "FLOAT64_PIECE", 21)


def test_every_node_class_has_a_maker() -> None:
    modules = (leaves, views, indexing, arithmetic)
    classes = {
        found
        for module in modules
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, LazyTensor) and found.__module__ == module.__name__ and not inspect.isabstract(found)
    } | {Encode}
    named = {found.__name__ for found in classes}
    assert len(named) >= 25
    made = {maker.__name__.replace("_", "") for maker in MAKERS} | {"pairhalves"}
    assert not {name for name in named if name.lower() not in made}


def test_lent_memory_is_for_the_encoder_alone() -> None:
    """What numpy computes with is read, or copied out by the compiled encoder: never the mapped pages themselves."""
    modules = (leaves, views, indexing, arithmetic)
    found = {one for module in modules for _, one in inspect.getmembers(module, inspect.isclass)} | {Encode}
    nodes = {one for one in found if issubclass(one, LazyTensor) and one is not LazyTensor}
    assert {one for one in nodes if "borrows" in vars(one)} == {Encode, Widen}
    for node in (Encode, Widen):
        calls = inspect.getsource(node.apply)
        assert "codecs.encode(" in calls and "np." not in calls
    assert not REFERENCE.borrows


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_cut_gives_the_whole_within_the_derived_scratch(maker: Callable[[Draw], Made], data: Draw) -> None:
    tensor, expected = maker(data)
    n_rows = tensor.spec.n_rows
    cuts = data.draw(st.sets(st.integers(1, n_rows), max_size=4))
    parts = [rows_of(tensor, range(*pair)) for pair in pairwise(sorted({0, n_rows, *cuts}))]
    found = np.concatenate(parts)
    assert np.array_equal(found, rows_of(tensor, range(n_rows)))
    assert description(tensor)
    if maker not in ROUNDED:
        assert found.tobytes() == np.ascontiguousarray(expected).tobytes()
    else:
        numbers = found.view(tensor.spec.dtype.view).astype(np.float64)
        np.testing.assert_allclose(numbers, expected.reshape(-1).astype(np.float64), rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_scratch_that_is_taken_is_the_derived_one(maker: Callable[[Draw], Made], data: Draw) -> None:
    """Over all places where so many rows can lie, the most that is taken is just what was derived, or nearly."""
    tensor, _ = maker(data)
    n_rows = data.draw(st.integers(1, tensor.spec.n_rows))
    derived = peak_nbytes(tensor, n_rows)
    scratch = Watched(derived)
    work = Workspace(scratch, REFERENCE)
    for start in range(tensor.spec.n_rows - n_rows + 1):
        rows_of(tensor, range(start, start + n_rows), work)
    assert scratch.highest <= derived
    if maker not in LOOSE:
        assert scratch.highest == derived


@pytest.mark.parametrize("maker", [stack, reshape, row_blocks, concatenate, encode], ids=lambda maker: maker.__name__)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_a_source_lends_is_not_read(maker: Callable[[Draw], Made], data: Draw) -> None:
    """The same bytes, from memory of the source's own; views pass on what lies in one run."""
    tensor, _ = maker(data)
    if tensor.spec.dtype not in (F32, F16, BF16):
        return
    encoded = tensor if isinstance(tensor, Encode) else Encode(tensor, "made", T.F32)
    files = {found.file for found in leaves.sources(encoded) if isinstance(found.file, File)}
    expected = rows_of(encoded, range(encoded.spec.n_rows))
    n_read = sum(file.n_read for file in files)
    for file in files:
        file.lends, file.n_read = True, 0
    for row in range(encoded.spec.n_rows):
        made = rows_of(
            encoded, range(row, row + 1), Workspace(Scratch(peak_nbytes(encoded, 1)), best_kernel(), window=Lender())
        )
        assert np.array_equal(made, expected.reshape(encoded.spec.n_rows, -1)[row])
    assert best_kernel().borrows
    assert sum(file.n_lent for file in files) == n_read and not any(file.n_read for file in files)
    work = Workspace(Scratch(0), best_kernel(), window=Lender())
    whole = range(encoded.spec.n_rows)
    if lendable := encoded.lendable(whole, work):
        out = np.empty(lendable * encoded.spec.row_nbytes, dtype=np.uint8)
        assert read_lent(encoded, whole[:lendable], out, work)
        assert out.tobytes() == expected[: out.nbytes].tobytes()
    for file in files:
        file.n_lent = 0
    rows_of(
        encoded,
        range(encoded.spec.n_rows),
        Workspace(Scratch(peak_nbytes(encoded, encoded.spec.n_rows)), REFERENCE, window=Lender()),
    )
    assert not any(file.n_lent for file in files)


def test_a_loan_ends_after_its_step() -> None:
    ends: list[str] = []

    class Lent(File):
        @contextmanager
        def _lent(self, offset: int, nbytes: int) -> Iterator[Bytes]:
            yield self.data[offset : offset + nbytes]
            ends.append("returned")

    array = array_of((4, 8), BF16, 1)
    tensor = Encode(
        Source("made", Lent(b"x" * 24 + array.tobytes(), True), 24, TensorSpec((4, 8), BF16)), "made", T.F32
    )
    assert rows_of(tensor, range(4)).tobytes() == widened(array).tobytes()
    assert ends == ["returned"]


@pytest.mark.parametrize("columns", [4096, 300])
def test_a_transpose_reads_its_source_once_or_twice(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.undo()
    from streamconv.engine.layout import slab_rows

    tensor, array = source_of(array_of((4096, columns), BF16, 1), BF16)
    encoded = Encode(Transpose(tensor), "made", T.BF16)
    step = slab_rows(encoded)
    made = [rows_of(encoded, range(at, min(at + step, columns))) for at in range(0, columns, step)]
    assert np.concatenate(made).tobytes() == array.T.tobytes()
    assert isinstance(tensor.file, File)
    assert array.nbytes <= tensor.file.n_read <= 2 * array.nbytes
    assert tensor.file.n_calls <= 70_000


@pytest.mark.parametrize(
    "made",
    [
        lambda tensor: Transpose(IndexColumns(tensor, np.arange(1, 4096, 2))),
        lambda tensor: rows_in_order(Transpose(tensor), np.arange(1, 4096, 2)),
    ],
)
def test_columns_in_turns_are_read_once(
    monkeypatch: pytest.MonkeyPatch, made: Callable[[LazyTensor], LazyTensor]
) -> None:
    """Gate and up of stacked experts that are stored in turns, and transposed."""
    monkeypatch.undo()
    from streamconv.engine.layout import slab_rows

    tensor, array = source_of(array_of((4096, 4096), BF16, 1), BF16)
    encoded = Encode(made(tensor), "made", T.BF16)
    step = slab_rows(encoded)
    found = [rows_of(encoded, range(at, min(at + step, 2048))) for at in range(0, 2048, step)]
    assert np.concatenate(found).tobytes() == array.T[1::2].tobytes()
    assert isinstance(tensor.file, File)
    assert tensor.file.n_read <= array.nbytes and tensor.file.n_calls <= 70_000


def test_a_transpose_of_a_stored_tensor_under_another_shape_reads_it_once_or_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    from streamconv.engine.layout import slab_rows

    tensor, array = source_of(array_of((1500, 4096), BF16, 1), BF16)
    encoded = Encode(Transpose(Reflow(tensor, (3000, 2048))), "made", T.F32)
    step = slab_rows(encoded)
    parts = [rows_of(encoded, range(at, min(at + step, 2048))) for at in range(0, 2048, step)]
    assert np.concatenate(parts).tobytes() == widened(array.reshape(3000, 2048)).T.tobytes()
    assert isinstance(tensor.file, File)
    assert len(parts) > 4 and tensor.file.n_read <= 2 * array.nbytes


@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.parametrize("rank", [16, 160])
@pytest.mark.parametrize("scaled", ["plain", "by column", "by row"])
def test_a_transpose_of_what_is_merged_reads_its_source_once_or_twice(
    monkeypatch: pytest.MonkeyPatch, scaled: str, rank: int, in_turns: bool
) -> None:
    """As experts that an adapter changes and that are stored transposed; the bits are those of whole rows."""
    monkeypatch.undo()
    from streamconv.engine.layout import slab_rows

    shapes = ((1536, 3000), (1536, rank), (rank, 3000))
    made = [source_of(array_of(shape, BF16, seed), BF16) for seed, shape in enumerate(shapes)]
    (w, left, right), (weight, _, factor) = zip(*made, strict=True)
    tensor: LazyTensor = AddProduct(w, left, right, 0.7)
    if scaled == "by column":
        tensor = ColumnMagnitudes(tensor, source_of(array_of((3000,), F32, 4), F32)[0])
    if scaled == "by row":
        tensor = RowMagnitudes(tensor, source_of(array_of((1536,), F32, 4), F32)[0])
    if in_turns:
        tensor = IndexColumns(tensor, np.arange(1, 3000, 2))
    n_rows, n_columns = tensor.spec.shape
    expected = rows_of(tensor, range(n_rows)).view("<u4").reshape(n_rows, n_columns).T
    encoded = Encode(Transpose(tensor), "made", T.F32)
    step = slab_rows(encoded)
    assert isinstance(w.file, File) and isinstance(right.file, File)
    w.file.n_read = right.file.n_read = 0
    parts = [rows_of(encoded, range(at, min(at + step, n_columns))) for at in range(0, n_columns, step)]
    assert np.concatenate(parts).tobytes() == expected.tobytes()
    assert len(parts) > 4
    assert w.file.n_read <= 2 * weight.nbytes and right.file.n_read <= 2 * weight.nbytes, factor.nbytes


def test_a_transpose_of_a_transpose_is_what_it_was() -> None:
    tensor, _ = source_of(array_of((6, 4), BF16, 1), BF16)
    assert transposed(transposed(tensor)) is tensor


def test_the_factors_of_a_sum_are_read_no_more_than_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from streamconv.engine.layout import slab_rows

    shapes = ((2048, 1024), (2048, 512), (512, 1024))
    made = [source_of(array_of(shape, BF16, seed), BF16) for seed, shape in enumerate(shapes)]
    (w, left, right), (weight, _, a) = zip(*made, strict=True)
    encoded = Encode(AddProduct(w, left, right, 1.0), "made", T.BF16)
    step = slab_rows(encoded)
    for at in range(0, 2048, step):
        rows_of(encoded, range(at, min(at + step, 2048)))
    assert isinstance(right.file, File)
    assert a.nbytes <= right.file.n_read <= weight.nbytes
    assert step * 1024 * 4 <= 2 * right.spec.nbytes


def test_descriptions_tell_tensors_apart() -> None:
    one, other = (source_of(array_of((6, 4), F32, seed), F32)[0] for seed in (1, 2))
    tables = [Resident(array_of((6, 4), F32, seed).astype(np.float32)) for seed in (1, 2)]
    nodes = [
        one, Scale(one, 2.0), Scale(one, 2.0000002), PlusConstant(one, 2.0), PairHalves(one, 1), PairHalves(one, 3),
        Transpose(one), Reshape(one, (2, 3, 4)), Reflow(one, (4, 6)), RowBlocks(one, 3, 0, 1), RowBlocks(one, 3, 1, 1),
        IndexRows(one, [1, 0]), IndexRows(one, [0, 1]), IndexColumns(one, [1, 0]), IndexColumns(one, [0, 1]),
        slice_columns(one, range(2)), slice_columns(one, range(1, 3)), *tables, NegExp(one), Stack([one, one]),
        Concatenate([one, one]), Encode(one, "a", T.F16), Encode(one, "b", T.F16), Encode(one, "a", T.BF16),
        Generated(one.spec, lambda rows, out: None, "a"), Generated(one.spec, lambda rows, out: None, "b"),
        Zeros(one.spec),
    ]  # fmt: skip
    found = [description(node) for node in nodes]
    assert len(set(found)) == len(found)
    assert description(Scale(one, 2.0)) == found[1] == description(Scale(other, 2.0))  # the file's content is not in it


@pytest.mark.parametrize(
    "wrong",
    [
        lambda one: IndexRows(one, [6]),
        lambda one: IndexRows(one, []),
        lambda one: IndexColumns(one, [-1]),
        lambda one: CutColumns(one, range(3, 5)),
        lambda one: Reflow(one, (5, 5)),
        lambda one: Concatenate([one, source_of(array_of((6, 5), F32, 1), F32)[0]]),
        lambda one: Widen(source_of(array_of((6, 5), U8, 1), U8)[0]),
        lambda one: Encode(one, "made", T.F16, Resident(np.ones((5, 4), np.float32))),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Callable[[LazyTensor], LazyTensor]) -> None:
    with pytest.raises(ValueError):
        wrong(source_of(array_of((6, 4), F32, 0), F32)[0])


def test_each_expert_is_weighed_by_its_own_row() -> None:
    tensor, array = source_of(array_of((3, 4, 256), BF16, 1), BF16)
    importance = np.abs(array_of((3, 256), F32, 2).astype(np.float32)) ** 4
    encoded = Encode(tensor, "made", T.Q4_K, Resident(importance))
    made = rows_of(encoded, range(2, 11))
    for e in range(3):
        out = np.zeros(4 * 144, np.uint8)
        rows = np.ascontiguousarray(array[e]).reshape(-1).view(np.uint8)
        assert quantize_rows(T.Q4_K, T.BF16, rows, 256, importance[e], out, blocks.REFERENCE) is None
        first, last = max(4 * e, 2), min(4 * e + 4, 11)
        assert np.array_equal(
            made[(first - 2) * 144 : (last - 2) * 144], out[(first - 4 * e) * 144 :][: (last - first) * 144]
        )


def test_the_norms_of_columns_are_made_once() -> None:
    tensor, array = source_of(array_of((64, 32), F32, 1), F32)
    vector, _ = source_of(array_of((32,), F32, 2), F32)
    scaled = ColumnMagnitudes(tensor, vector)
    for at in range(0, 64, 4):
        rows_of(scaled, range(at, at + 4))
    assert isinstance(tensor.file, File)
    assert tensor.file.n_read == 2 * array.nbytes
