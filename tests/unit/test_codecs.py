"""Every conversion gives gguf-py's bytes, on every value of 16 bits and on the hard ones of 32, with either kernel."""

from __future__ import annotations

import sys
import tracemalloc
from types import ModuleType

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from numpy.typing import NDArray

from streamconv.ggml import encode as codecs
from streamconv.ggml import reference
from streamconv.ggml.reference import BF16, F16, F32, FLOATS, Q8_0
from streamconv.lazy.dtype import Dtype
from streamconv.lazy.scratch import Overdraft, Scratch
from tests import kernels
from tests.kernels import Bits

ELEMENTWISE = (F32, F16, BF16)
BEYOND_F16 = np.float32(65520)  # halfway from F16's largest number to the next power of two: rounds to infinity
BEYOND_BF16 = np.uint32(0x7F7F_8000).view(np.float32)  # the same for BF16
BEYOND_Q8_0 = np.float32(65520 * 127)
CHOICE = codecs.best_kernel  # the library's own, before the fixture `kernel` takes its place


@pytest.fixture(params=kernels.NAMES, autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(codecs, "best_kernel", lambda: kernels.named(request.param))
    return str(request.param)


def every_value(source: Dtype) -> Bits:
    """All patterns of 16 bits; of 32 bits random ones, and the neighbourhood of everywhere that a rule changes."""
    if source != F32:
        return np.arange(1 << 16, dtype=np.uint16)
    rng = np.random.default_rng(41)
    turns = [0, 0x0080_0000, 0x3300_0000, 0x3380_0000, 0x3800_0000, 0x3880_0000, 0x477F_E000, 0x477F_F000]
    turns += [0x477F_E000 - 0x1000, 0x4780_0000, 0x7F80_0000, 0x7F80_2000, 0x7FC0_0000, 0x7FFF_FFFF - 4096]
    near = (np.array(turns, dtype=np.int64)[:, None] + np.arange(-4096, 4096)).clip(0, 0x7FFF_FFFF).astype(np.uint32)
    random = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    halfway = rng.integers(0x3300_0000, 0x4780_0000, 50_000, dtype=np.uint32) & 0xFFFF_E000 | 0x1000
    return np.concatenate([near.ravel(), near.ravel() | 0x8000_0000, random, halfway, halfway + 1, halfway - 1])


def beyond(source: Dtype, target: Dtype, bits: Bits) -> NDArray[np.bool_]:
    """Which finite numbers `target` cannot hold."""
    numbers = kernels.values(source, bits)
    least = {F16: BEYOND_F16, BF16: BEYOND_BF16}.get(target, np.float32(np.inf)) if source != target else np.inf
    return np.isfinite(numbers) & (np.abs(numbers) >= least)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("target", ELEMENTWISE)
@pytest.mark.parametrize("source", kernels.SOURCES)
def test_every_value(source: Dtype, target: Dtype, offset: int) -> None:
    bits = every_value(source)
    bits = bits[~beyond(source, target, bits)]
    stats, out = kernels.encode(source, target, bits[:, None], offset)
    wrong = np.flatnonzero((out != kernels.expected(source, target, bits[:, None])).reshape(bits.size, -1).any(axis=1))
    assert wrong.size == 0, [hex(pattern) for pattern in bits[wrong[:5]]]
    numbers = kernels.values(source, bits)
    assert stats == codecs.Stats(int(np.isnan(numbers).sum()), int(np.isinf(numbers).sum()))
    assert stats.n_nan > 1 and stats.n_inf > 1


@pytest.mark.parametrize("type_", ELEMENTWISE)
def test_a_type_that_does_not_change_may_stay_where_it_is(type_: Dtype) -> None:
    bits = every_value(type_)
    slab = bits.copy().view(np.uint8)
    scratch = Scratch(codecs.encode_scratch_nbytes(type_, type_, bits.size, 1))
    numbers = kernels.values(type_, bits)
    assert codecs.encode(type_, type_, slab, slab, scratch, 1, codecs.best_kernel()) == codecs.Stats(
        int(np.isnan(numbers).sum()), int(np.isinf(numbers).sum())
    )
    assert np.array_equal(slab, bits.view(np.uint8))


def test_stats_add_up() -> None:
    assert codecs.Stats(1, 20) + codecs.Stats(300, 4000) == codecs.Stats(301, 4020)


@pytest.mark.parametrize("source", [F32, BF16])
def test_a_finite_value_beyond_f16_is_refused(source: Dtype) -> None:
    rng = np.random.default_rng(42)
    row = kernels.patterns(source, rng.standard_normal(3000).astype(np.float32))
    border = kernels.patterns(source, np.array([BEYOND_F16], dtype=np.float32))[0]  # as BF16 it is cut to 65280
    first = border + 1 if source == BF16 else border
    for pattern, fits in ((first - 1, True), (first, False), (FLOATS[source].infinity - 1, False)):
        for sign in (0, FLOATS[source].magnitude + 1):
            for place in (0, 1500, 2999):
                bits = row.copy()
                bits[place] = pattern | sign
                bits[7] = FLOATS[source].infinity  # not finite: counted, and neither refused nor the largest
                if fits:
                    assert kernels.encode(source, F16, bits[None])[0] == codecs.Stats(0, 1)
                    continue
                with pytest.raises(codecs.EncodeError, match="does not fit F16") as error:
                    kernels.encode(source, F16, bits[None])
                assert error.value.largest == abs(kernels.values(source, bits[place : place + 1])[0])
                assert f"{error.value.largest:.9g}" in error.value.reason == str(error.value)


def test_a_finite_value_beyond_bf16_is_refused() -> None:
    for pattern in (0x7F7F_7FFF, 0x7F7F_8000, 0x7F7F_FFFF):
        for sign in (0, 0x8000_0000):
            bits = np.full((1, 3000), 0x3F80_0000, dtype=np.uint32)
            bits[0, 1500], bits[0, 7] = pattern | sign, 0x7F80_0000
            if pattern < 0x7F7F_8000:
                assert kernels.encode(F32, BF16, bits)[0] == codecs.Stats(0, 1)
                continue
            with pytest.raises(codecs.EncodeError, match="does not fit BF16") as error:
                kernels.encode(F32, BF16, bits)
            assert error.value.largest == abs(kernels.values(F32, bits[0, 1500:1501])[0])


def blocks(rng: np.random.Generator, n_blocks: int) -> NDArray[np.float32]:
    """Random blocks of 32 whose largest magnitudes run over all that Q8_0 takes, subnormal ones too."""
    amax = np.ldexp(rng.uniform(1, 2, n_blocks), rng.integers(-149, 22, n_blocks))
    shape = rng.uniform(-1, 1, (n_blocks, 32))
    shape[np.arange(n_blocks), rng.integers(0, 32, n_blocks)] = rng.choice([-1, 1], n_blocks)
    return (shape * amax[:, None]).astype(np.float32)


def ties(rng: np.random.Generator, n_blocks: int) -> NDArray[np.float32]:
    """Blocks whose values, divided by their scale, come as near to k + 1/2 as float32 allows, from both sides."""
    amax = rng.uniform(1, 2, n_blocks).astype(np.float32)
    amax[::3] = 127
    inverse = np.float32(1) / (amax / np.float32(127))
    k = rng.integers(0, 127, (n_blocks, 32))
    k[:, ::4] = 0
    near = ((k + 0.5) / inverse[:, None]).astype(np.float32)
    near = (near.view(np.int32) + rng.integers(-1, 2, near.shape, dtype=np.int32)).view(np.float32)
    near *= rng.choice(np.array([-1, 1], dtype=np.float32), near.shape)
    near[:, 5] = amax
    return near


def special_blocks() -> NDArray[np.float32]:
    """Zeros of either sign, the least numbers, and where 1 / scale stops to overflow (scale 2^-128)."""
    least = np.float32(127 * 2**-128)
    amax = np.concatenate([np.nextafter(least, np.float32(sign)).repeat(3) for sign in (0, 1)])
    amax = np.concatenate([amax, [0, -0.0, 2**-149, -(2**-149), 2**-126, least, 127, 1e-6, 6e-8 * 127]])
    values = np.outer(amax, np.linspace(-1, 1, 32)).astype(np.float32)
    return np.concatenate([values, -values])


@pytest.mark.parametrize("source", kernels.SOURCES)
def test_q8_0_blocks(source: Dtype) -> None:
    rng = np.random.default_rng(43)
    numbers = np.concatenate([blocks(rng, 9000), ties(rng, 9000), special_blocks()])
    bits = kernels.patterns(source, numbers[: len(numbers) // 3 * 3])
    infinite = (bits & FLOATS[source].magnitude) >= FLOATS[source].infinity  # rounded to F16's infinity on the way
    bits = np.where(infinite, bits & (FLOATS[source].magnitude + 1) | 0x7BFF, bits).astype(bits.dtype).reshape(-1, 96)
    stats, out = kernels.encode(source, Q8_0, bits)
    assert stats == codecs.Stats(0, 0)
    assert np.array_equal(out, kernels.expected(source, Q8_0, bits))
    assert len(np.unique(out.reshape(-1, 34)[:, 2:])) == 255  # every quant but -128 occurs


@pytest.mark.parametrize("source", [F16, BF16])
def test_q8_0_of_every_value(source: Dtype) -> None:
    bits = every_value(source)
    numbers = kernels.values(source, bits)
    bits = bits[np.isfinite(numbers) & (np.abs(numbers) < BEYOND_Q8_0)]
    np.random.default_rng(44).shuffle(bits)
    bits = bits[: bits.size // 64 * 64]
    for rows in (bits, np.sort(bits)):  # by chance the largest of a block drowns the others; sorted they are alike
        rows = rows.reshape(-1, 64)
        assert np.array_equal(kernels.encode(source, Q8_0, rows)[1], kernels.expected(source, Q8_0, rows))


@pytest.mark.parametrize(
    ("source", "pattern", "reason"),
    [
        (F32, 0x7F80_0000, "NaN or an infinity"),
        (F32, 0xFF80_0001, "NaN or an infinity"),
        (BF16, 0xFF80, "NaN or an infinity"),
        (BF16, 0x7FC0, "NaN or an infinity"),
        (F16, 0x7C00, "NaN or an infinity"),
        (F16, 0xFE01, "NaN or an infinity"),
        (F32, int(BEYOND_Q8_0.view(np.uint32)) - 1, None),
        (F32, int(BEYOND_Q8_0.view(np.uint32)), "8321040: the scale"),
        (F32, int(BEYOND_Q8_0.view(np.uint32)) | 0x8000_0000, "8321040: the scale"),
        (BF16, 0x4AFD, None),
        (BF16, 0x4AFE, "8323072: the scale"),
        (F16, 0xFBFF, None),
    ],
)
def test_what_q8_0_cannot_hold_is_refused(source: Dtype, pattern: int, reason: str | None) -> None:
    bits = kernels.patterns(source, np.random.default_rng(45).standard_normal((50, 64)).astype(np.float32)).copy()
    for row, column in ((0, 0), (20, 33), (49, 63)):
        spoilt = bits.copy()
        spoilt[row, column] = pattern
        if reason is None:
            assert np.array_equal(kernels.encode(source, Q8_0, spoilt)[1], kernels.expected(source, Q8_0, spoilt))
            continue
        with pytest.raises(codecs.EncodeError, match=reason) as error:
            kernels.encode(source, Q8_0, spoilt)
        finite = np.abs(kernels.values(source, spoilt))
        assert error.value.largest == finite[np.isfinite(finite)].max()


@pytest.mark.parametrize("source", kernels.SOURCES)
def test_largest_finite(source: Dtype) -> None:
    bits = every_value(source)
    slab = bits.view(np.uint8)
    numbers = np.abs(kernels.values(source, bits))
    assert codecs.largest_finite(source, slab) == numbers[np.isfinite(numbers)].max()
    nothing = np.full(5000, FLOATS[source].infinity, dtype=bits.dtype)
    assert codecs.largest_finite(source, nothing.view(np.uint8)) == 0.0


@pytest.mark.parametrize("target", [*ELEMENTWISE, Q8_0])
@pytest.mark.parametrize("source", kernels.SOURCES)
def test_many_pieces_are_one(source: Dtype, target: Dtype) -> None:
    rng = np.random.default_rng(46)
    bits = kernels.patterns(
        source, rng.standard_normal((3, reference.PIECE - 96)).astype(np.float32) * np.float32(3e-5)
    )
    if target != Q8_0:
        bits.reshape(-1)[[5, reference.PIECE, bits.size - 1]] = FLOATS[source].infinity + 1
    stats, out = kernels.encode(source, target, bits)
    assert stats == codecs.Stats(0 if target == Q8_0 else 3, 0)
    assert np.array_equal(out, kernels.expected(source, target, bits))


@pytest.mark.parametrize("target", [*ELEMENTWISE, Q8_0])
@pytest.mark.parametrize("source", kernels.SOURCES)
def test_declared_memory_is_what_is_taken(source: Dtype, target: Dtype, kernel: str) -> None:
    n_rows, n_columns = 5, reference.PIECE // 4 + 32
    numbers = np.random.default_rng(47).standard_normal(n_rows * n_columns).astype(np.float32)
    bits = kernels.patterns(source, numbers).copy()
    if target != Q8_0:
        bits[::7] = FLOATS[source].infinity + 1
    slab = bits.view(np.uint8)
    declared = codecs.encode_scratch_nbytes(source, target, n_rows, n_columns)
    scratch = Scratch(declared)
    for offset in (0, 1):
        out = np.empty(offset + n_rows * target.row_nbytes(n_columns), dtype=np.uint8)[offset:]
        codecs.encode(
            source, target, slab, out, scratch, n_columns, codecs.best_kernel()
        )  # once before, for what is made only once
        tracemalloc.start()
        codecs.encode(source, target, slab, out, scratch, n_columns, codecs.best_kernel())
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert traced < 8_000  # objects and no array: a piece has many more elements
    assert declared < 18 * reference.PIECE
    if kernel == "numpy":
        with pytest.raises(Overdraft):
            codecs.encode(source, target, slab, out, Scratch(declared - 64), n_columns, codecs.REFERENCE)


@pytest.mark.parametrize(
    ("target", "n_columns", "n_slab", "n_out"),
    [
        (F16, 64, 4 * 64, 4 * 64 * 2 - 1),
        (F16, 64, 4 * 64 - 1, 4 * 64 * 2),
        (Q8_0, 64, 4 * 64, 8 * 34 + 34),
        (Q8_0, 48, 4 * 48, 6 * 34),
        (F32, 7, 12, 12 * 4),
    ],
)
def test_sizes_that_disagree(target: Dtype, n_columns: int, n_slab: int, n_out: int) -> None:
    slab, out = np.zeros(2 * n_slab, dtype=np.uint8), np.zeros(n_out, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"do not make|does not divide"):
        codecs.encode(BF16, target, slab, out, Scratch(1 << 16), n_columns, codecs.best_kernel())


def test_the_compiled_kernel_guards_its_buffers() -> None:
    if not kernels.FLAGS:
        return
    compiled = kernels.compiled()
    slab, out = np.zeros(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    for source, target, n_slab, n_out in (
        (T.BF16, T.F16, 64, 62),
        (T.BF16, T.F16, 63, 62),
        (T.BF16, T.Q8_0, 32, 17),
        (T.F32, T.F16, 8, 8),
    ):
        with pytest.raises(ValueError, match="do not make"):
            compiled.encode(source, target, slab[:n_slab], out[:n_out])
    with pytest.raises(ValueError, match="no kernel from type 8 to type 0"):
        compiled.encode(T.Q8_0, T.F32, slab, out)
    out.flags.writeable = False
    with pytest.raises((ValueError, BufferError, TypeError), match=r"read-only|read-write"):
        compiled.encode(T.BF16, T.F16, slab, out)
    with pytest.raises((ValueError, BufferError), match="contiguous"):
        compiled.encode(T.BF16, T.F16, slab[::2], slab[1::2])


def test_which_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMCONV_KERNELS", raising=False)
    monkeypatch.setitem(sys.modules, "streamconv.ggml._kernels", None)  # as where no compiler was there
    assert CHOICE() is codecs.REFERENCE
    there = ModuleType("streamconv.ggml._kernels")
    monkeypatch.setitem(sys.modules, "streamconv.ggml._kernels", there)
    assert CHOICE().name == "c"
    monkeypatch.setenv("STREAMCONV_KERNELS", "0")
    assert CHOICE() is codecs.REFERENCE
