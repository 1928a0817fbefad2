"""Every block type gives ggml's bytes, on rows and importances of every kind, with every kernel."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from streamconv.ggml import blocks, element_types
from streamconv.ggml import encode as codecs
from streamconv.ggml.blocks import BLOCK_TYPES, REFERENCE, BlockKernel, Fault, Refusal, Root
from tests import block_rows, kernels
from tests.oracles import ggml

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
TYPES = list(BLOCK_TYPES)
NAMES = [type_.name for type_ in TYPES]
KERNELS = ["numpy", *(["plain", "c", "c-baseline"] if kernels.FLAGS else [])]
CASES = [(kind, weights) for kind in block_rows.ROWS for weights in (None, *block_rows.WEIGHTS)]
GUARD = 0xA5


def named(name: str) -> BlockKernel:
    if name == "numpy":
        return REFERENCE
    if name == "plain":
        return blocks.compiled_kernel(kernels.compiled("", "_plain"))
    return blocks.compiled_kernel(kernels.compiled("", "_blocks"), baseline=name == "c-baseline")


def quantized(
    target: GGMLQuantizationType,
    rows: NDArray[np.generic],
    importance: NDArray[np.float32] | None,
    kernel: str,
    source: GGMLQuantizationType = F32,
    offset: int = 0,
) -> tuple[Refusal | None, NDArray[np.uint8]]:
    """The first fault, and the blocks [n_blocks, nbytes], made `offset` bytes into a guarded buffer."""
    block = BLOCK_TYPES[target]
    nbytes = rows.size // block.n_elements * block.nbytes
    buffer = np.full(offset + nbytes + 64, GUARD, dtype=np.uint8)
    slab = np.frombuffer(b"\0" * (4 + offset) + rows.tobytes(), np.uint8)[4 + offset :]
    refusal = blocks.quantize_rows(
        target, source, slab, rows.shape[1], importance, buffer[offset : offset + nbytes], named(kernel)
    )
    assert (buffer[:offset] == GUARD).all() and (buffer[offset + nbytes :] == GUARD).all(), "written beyond the rows"
    return refusal, buffer[offset : offset + nbytes].reshape(-1, block.nbytes)


def rows_and_importance(
    case: tuple[str, str | None], shape: tuple[int, int], seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    kind, weights = case
    return block_rows.rows(kind, shape, seed), weights and block_rows.weights(weights, shape[1], seed)


@pytest.mark.parametrize("target", TYPES, ids=NAMES)
def test_every_kernel_gives_the_bytes_of_ggml(target: GGMLQuantizationType) -> None:
    wrong = []
    for seed, case in enumerate(CASES):
        rows, importance = rows_and_importance(case, (3, 768), seed)
        expected = ggml.quantize(target, rows, importance)
        for kernel in KERNELS:
            _, made = quantized(target, rows, importance, kernel)
            wrong += [(*case, kernel)] if not np.array_equal(made, expected) else []
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.parametrize("target", TYPES, ids=NAMES)
def test_kernels_agree_on_many_blocks(target: GGMLQuantizationType, case: tuple[str, str | None]) -> None:
    """Over all cases a million blocks of 32 (or two million sub-blocks of 16) of each type."""
    for seed in range(4):
        rows, importance = rows_and_importance(case, (64, 1024), 1000 + seed)
        reference, expected = quantized(target, rows, importance, "numpy")
        for kernel in KERNELS[1:]:
            refusal, made = quantized(target, rows, importance, kernel)
            assert refusal == reference
            assert np.array_equal(made, expected), np.flatnonzero((made != expected).any(axis=1))[:5]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", TYPES, ids=NAMES)
def test_sources_are_widened(target: GGMLQuantizationType, kernel: str) -> None:
    rng = np.random.default_rng(7)
    rows = (rng.standard_normal((5, 1280)) * 0.02).astype(np.float32)
    importance = block_rows.weights("gamma", 1280, 8)
    for source in (F32, F16, BF16):
        dtype = element_types.TYPES[source].dtype
        bits = kernels.patterns(dtype, rows)
        wide = kernels.values(dtype, bits)
        refusal, made = quantized(target, bits, importance, kernel, source, offset=3)
        assert refusal is None
        assert np.array_equal(made, ggml.quantize(target, wide, importance))


@pytest.mark.parametrize("target", TYPES, ids=NAMES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_are_independent(kernel: str, target: GGMLQuantizationType) -> None:
    """Any cut into calls gives the same bytes: many rows a piece, many pieces a row, no whole number of either."""
    importance = block_rows.weights("spread", 7168, 3)
    for weights in (None, importance):
        for n_rows, n_columns in ((21, 256), (3, 7168)):
            rows = block_rows.rows("laplace", (n_rows, n_columns), n_columns)
            part = None if weights is None else weights[:n_columns]
            _, whole = quantized(target, rows, part, kernel)
            single = [quantized(target, row[None], part, kernel)[1] for row in rows]
            assert np.array_equal(whole, np.concatenate(single))


@pytest.mark.parametrize("target", TYPES, ids=NAMES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_is_named(kernel: str, target: GGMLQuantizationType) -> None:
    for value in (np.nan, np.inf, -np.inf):
        for place in (0, 777, 5 * 512 - 1):
            rows = block_rows.rows("gaussian", (5, 512), place)
            rows.reshape(-1)[place] = value
            rows.reshape(-1)[place + 1 :] = np.inf
            for importance in (None, np.ones(512, np.float32)):
                assert quantized(target, rows, importance, kernel)[0] == Refusal(Fault.NOT_FINITE, place)


@pytest.mark.parametrize("target", TYPES, ids=NAMES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_scale_beyond_f16_is_named(kernel: str, target: GGMLQuantizationType) -> None:
    block = BLOCK_TYPES[target]
    rows = block_rows.rows("gaussian", (4, 1024), 5)
    place = 3 * block.n_elements + 5
    rows.reshape(-1)[place] = 3e9
    rows.reshape(-1)[place + 2 * block.n_elements] = 3e9
    for importance in (None, np.ones(1024, np.float32)):
        refusal, made = quantized(target, rows, importance, kernel)
        assert refusal == Refusal(Fault.BEYOND_F16, 3 * block.n_elements)
        assert np.array_equal(made, ggml.quantize(target, rows, importance))


def huge_rows(value: float) -> NDArray[np.float32]:
    """Rows of small numbers with one that is huge, or a block of such; and rows of these, of both signs and of one."""
    rng = np.random.default_rng(3)
    small, huge = rng.standard_normal((4, 512)) * 0.02, rng.uniform(-1, 1, (4, 512)) * value
    huge[3] = np.abs(huge[3]) * 0.5 + 0.25 * value
    is_huge = np.arange(512) // np.array([[1], [32], [512], [512]]) == np.array([[7], [3], [0], [0]])
    return np.where(is_huge, huge, small).astype(np.float32)


@pytest.mark.parametrize("target", TYPES, ids=NAMES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_huge_numbers_are_held_or_refused(kernel: str, target: GGMLQuantizationType) -> None:
    """Never zeros, or anything else than about themselves, because a search's sums overflow."""
    held = set()
    for weight in (None, 1e-38, 1e-12, 1.0, 1e8, 1e16, 1e24, 1e31, 1e36, 3e38):
        importance = None if weight is None else np.full(512, weight, np.float32)
        for value in (1, 1e3, 2e4, 6e4, 1e5, 6e5, 2e6, 8e6, 3e7, 2e8, 5e8, 1e10, 1e13, 1e19, 1e26, 1e37, 1e38, 3.4e38):
            rows = huge_rows(value)
            refusal, made = quantized(target, rows, importance, kernel)
            if refusal is not None:
                continue
            numbers = dequantize(made.reshape(4, -1), target).astype(np.float64)
            assert np.linalg.norm(numbers - rows) < 0.9 * np.linalg.norm(rows.astype(np.float64)), (weight, value)
            held.add((weight, value))
    assert {(None, 2e4), (1e-12, 2e4), (1.0, 2e4), (1e16, 2e4)} <= held


def test_sizes_are_checked() -> None:
    rows, out = np.zeros(1024, np.uint8), np.zeros(144, np.uint8)
    q4_k = GGMLQuantizationType.Q4_K
    assert blocks.quantize_rows(q4_k, F32, rows, 256, None, out, REFERENCE) is None
    for bad in (
        (q4_k, F32, rows, 128, None, out),
        (q4_k, F32, rows, 0, None, out),
        (q4_k, F32, rows, 512, None, out),
        (q4_k, F32, rows[:-1], 256, None, out),
        (q4_k, F32, rows, 256, None, out[:-1]),
        (q4_k, F32, rows, 256, np.ones(128, np.float32), out),
        (q4_k, F32, rows, 256, np.ones(256, np.float64), out),
        (q4_k, q4_k, rows, 256, None, out),
        (F32, F32, rows, 256, None, out),
    ):
        with pytest.raises(ValueError):
            blocks.quantize_rows(*bad, REFERENCE)  # type: ignore[arg-type]
        if kernels.FLAGS:
            compiled = kernels.compiled("", "_blocks")
            with pytest.raises(ValueError):
                compiled.quantize(*(int(part) if i < 2 else part for i, part in enumerate(bad[:4])), *bad[4:])


@pytest.mark.parametrize("target", TYPES, ids=NAMES)
def test_the_reference_stays_within_its_bound(target: GGMLQuantizationType) -> None:
    for shape in ((1, 1 << 18), (512, 512)):
        rows = block_rows.rows("laplace", shape, 1)
        importance = block_rows.weights("gamma", shape[1], 1)
        block = BLOCK_TYPES[target]
        out = np.zeros(rows.size // block.n_elements * block.nbytes, dtype=np.uint8)
        slab = rows.reshape(-1).view(np.uint8)
        tracemalloc.start()
        blocks.quantize_rows(target, F32, slab, shape[1], importance, out, REFERENCE)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= blocks.REFERENCE_NBYTES


@pytest.mark.skipif(not kernels.FLAGS, reason="no C compiler")
def test_the_compiled_kernel_needs_little_stack() -> None:
    """Threads of STACK_NBYTES beside what Python itself takes: one that needs more dies."""
    before = threading.stack_size(blocks.STACK_NBYTES + (128 << 10))
    try:
        done = []

        def work() -> None:
            for target in TYPES:
                rows = block_rows.rows("nearly-constant", (2, 1024), 1)
                for kernel in KERNELS[1:]:
                    for importance in (None, block_rows.weights("spread", 1024, 1)):
                        quantized(target, rows, importance, kernel)
            done.append(True)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert done


def test_files_are_compared_with_another_kernel_than_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMCONV_KERNELS", "0")
    assert blocks.plain_kernel() is blocks.best_kernel() is REFERENCE
    monkeypatch.delenv("STREAMCONV_KERNELS")
    monkeypatch.setattr(blocks.importlib, "import_module", lambda name: name)
    monkeypatch.setattr(blocks, "compiled_kernel", lambda module: BlockKernel(module, REFERENCE.quantize))
    assert blocks.best_kernel().name == "streamconv.ggml._blocks"
    assert codecs.independent_kernel().blocks.name == "streamconv.ggml._plain"
    assert codecs.independent_kernel().encode is codecs.REFERENCE.encode


def test_the_table_says_what_gguf_says() -> None:
    for type_, block in BLOCK_TYPES.items():
        assert (block.n_elements, block.nbytes) == GGML_QUANT_SIZES[type_]
    assert [type_.name for type_, block in BLOCK_TYPES.items() if block.root is Root.NONE] == ["Q6_K", "TQ1_0", "TQ2_0"]
