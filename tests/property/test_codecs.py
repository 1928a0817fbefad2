"""Any numbers, cut into any slabs, laid at any offset: the bytes are gguf-py's, and what is counted adds up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.ggml import encode as codecs
from streamconv.ggml import reference
from streamconv.ggml.reference import BF16, F16, F32, FLOATS, Q8_0
from streamconv.lazy.dtype import Dtype
from tests import kernels
from tests.kernels import Bits

PIECE = 96  # small, so that a few rows are many pieces
F16_EXPONENTS = (-30, 15)
Q8_0_EXPONENTS = (-149, 22)


@st.composite
def rows(draw: st.DrawFn, source: Dtype, target: Dtype) -> Bits:
    """[n_rows, n_columns] patterns of magnitudes that `target` can hold, each row with a range of its own."""
    n_rows, n_columns = draw(st.integers(1, 7)), draw(st.integers(1, 5)) * 32
    if target != Q8_0:
        n_columns += draw(st.integers(0, 31))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    lowest, highest = Q8_0_EXPONENTS if target == Q8_0 else F16_EXPONENTS if target == F16 else (-149, 127)
    tops = draw(st.lists(st.integers(lowest, highest), min_size=n_rows, max_size=n_rows))
    width = draw(st.integers(0, 40))
    exponents = np.array(tops)[:, None] - rng.integers(0, width + 1, (n_rows, n_columns))
    numbers = np.ldexp(rng.uniform(-1, 1, (n_rows, n_columns)), exponents).astype(np.float32)
    bits = kernels.patterns(source, numbers).copy()
    if target == Q8_0:
        infinite = (bits & FLOATS[source].magnitude) >= FLOATS[source].infinity
        bits[infinite] = 0
        return bits
    n_special = draw(st.integers(0, 4))
    special = rng.integers(FLOATS[source].infinity, FLOATS[source].magnitude + 1, n_special)
    special[: n_special // 2] = FLOATS[source].infinity
    bits.reshape(-1)[rng.integers(0, bits.size, n_special)] = special
    return bits


@pytest.fixture(params=kernels.NAMES, autouse=True, scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "best_kernel", lambda: kernels.named(request.param))
        patch.setattr(reference, "PIECE", PIECE)
        yield


@pytest.mark.parametrize("target", [F32, F16, BF16, Q8_0])
@pytest.mark.parametrize("source", kernels.SOURCES)
@settings(max_examples=40)
@given(data=st.data())
def test_any_cut_gives_the_whole(source: Dtype, target: Dtype, data: st.DataObject) -> None:
    bits = data.draw(rows(source, target))
    whole, out = kernels.encode(source, target, bits, data.draw(st.integers(0, 9)))
    assert np.array_equal(out, kernels.expected(source, target, bits))
    numbers = kernels.values(source, bits)
    assert whole == codecs.Stats(int(np.isnan(numbers).sum()), int(np.isinf(numbers).sum()))
    cuts = data.draw(st.sets(st.integers(1, len(bits)), max_size=4).map(lambda inner: sorted({0, *inner, len(bits)})))
    parts = [kernels.encode(source, target, bits[a:b], a % 5) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate([part for _, part in parts]), out)
    assert sum((stats for stats, _ in parts), codecs.Stats(0, 0)) == whole
