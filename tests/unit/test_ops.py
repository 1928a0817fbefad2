"""Operations of rows: each does to a weight, and to a change of low rank, what numpy does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.lazy.leaves import Resident
from streamconv.lazy.node import Workspace, description, peak_nbytes, read
from streamconv.lazy.scratch import Scratch
from streamconv.recipe import (
    Columns,
    Config,
    Dim,
    FoldedScale,
    FoldedShift,
    Interleaved,
    MinusExp,
    Model,
    Op,
    Permute,
    PlusOne,
    Recipe,
    Reshape,
    Rows,
    Scale,
    Split,
    Squeeze,
    Tensor,
    Transpose,
)
from streamconv.recipe.operation import CannotAdapt, applied, factors_through, first_fault, loss, total_factor
from tests import inmemory, tiny

Array = NDArray[np.float32]
DIMS = {"L": 1, "V": 50, "A": 4, "K": 2, "D": 6, "H": 10, "G": 3}
F32, F16, BF16, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))

RECIPE = Recipe(
    arch="toy", hf_names=(), model_type="", dims={name: Dim(name.lower()) for name in DIMS}, tensors=(), keys=()
)


def model(has_config: bool = True, **dims: int) -> Model:
    return Model(RECIPE, Config({}, Path("base")), DIMS | dims, has_config=has_config)


def noise(name: str, *shape: int) -> Array:
    return tiny.noise(name, shape, 1.0)


def order(n: int, seed: int) -> Callable[[Model], NDArray[np.int64]]:
    index = np.random.default_rng(seed).permutation(n)
    return lambda model: index


def rope(w: Array, heads: int) -> Array:
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


@dataclass(frozen=True)
class Case:
    ops: tuple[Op, ...]
    shape: tuple[int, ...]
    numpy: Callable[[Array], Array]
    adapts: bool = True  # whether a change of low rank goes through


CASES = {
    "permuted": Case((Permute("A"),), (24, 10), lambda w: rope(w, 4)),
    "permuted by a sum": Case((Permute("A+K"),), (36, 10), lambda w: rope(w, 6)),
    "permuted bias": Case((Permute("A"),), (24,), lambda w: rope(w, 4), adapts=False),
    "rows": Case((Rows(order(10, 1)),), (10, 7), lambda w: w[order(10, 1)(model())]),
    "some rows": Case((Rows(lambda m: np.array([8, 2, 3, 0])),), (10, 7), lambda w: w[[8, 2, 3, 0]]),
    "rows of a stack": Case((Rows(order(5, 2)),), (3, 5, 7), lambda w: w[:, order(5, 2)(model())], adapts=False),
    "elements": Case((Rows(order(10, 3)),), (10,), lambda w: w[order(10, 3)(model())], adapts=False),
    "no index": Case((Rows(lambda m: None), Columns(lambda m: None)), (10, 7), lambda w: w),
    "columns": Case((Columns(order(7, 4)),), (10, 7), lambda w: w[:, order(7, 4)(model())]),
    "fused Q": Case((Split(0, "A*D K*D K*D"),), (48, 10), lambda w: w[:24]),
    "fused K": Case((Split(1, "A*D K*D K*D"), Permute("K")), (48, 10), lambda w: rope(w[24:36], 2)),
    "fused V": Case((Split(2, "A*D K*D K*D"),), (48, 10), lambda w: w[36:]),
    "fused bias": Case((Split(1, "A*D K*D K*D"),), (48,), lambda w: w[24:36], adapts=False),
    "equal blocks": Case((Split(1, 3),), (12, 7), lambda w: w[4:8]),
    "blocks of a stack": Case((Split(1, 2),), (3, 8, 7), lambda w: w[:, 4:], adapts=False),
    "blocks of columns": Case((Split(1, "A H", of_columns=True),), (3, 14), lambda w: w[:, 4:]),
    "interleaved": Case((Interleaved(1, 2),), (12, 7), lambda w: w[1::2]),
    "interleaved of a stack": Case((Interleaved(0, 2),), (3, 8, 7), lambda w: w[:, ::2], adapts=False),
    "interleaved columns": Case((Interleaved(2, 3, of_columns=True),), (4, 9), lambda w: w[:, 2::3]),
    "squeezed": Case((Squeeze(),), (10, 1, 5), lambda w: w[:, 0], adapts=False),
    "squeezed at the end": Case((Squeeze(),), (10, 5, 1), lambda w: w[..., 0], adapts=False),
    "reshaped": Case((Reshape("A D H"),), (24, 10), lambda w: w.reshape(4, 6, 10), adapts=False),
    "reshaped vector": Case((Reshape("H 1"),), (10,), lambda w: w[:, None], adapts=False),
    "transposed": Case((Transpose(),), (10, 7), lambda w: w.T),
    "transposed stack": Case((Transpose(),), (3, 4, 5), lambda w: w.transpose(0, 2, 1), adapts=False),
    "transposed, then split": Case((Transpose(), Split(0, "A K")), (10, 6), lambda w: w.T[:4]),
    "of each head, transposed": Case(
        (Reshape("A D+G H"), Split(0, "D G"), Transpose()),
        (36, 10),
        lambda w: w.reshape(4, 9, 10)[:, :6].transpose(0, 2, 1),
        adapts=False,
    ),
    "plus one": Case((PlusOne(),), (10,), lambda w: w + np.float32(1), adapts=False),
    "plus one of a matrix": Case((PlusOne(),), (10, 7), lambda w: w + np.float32(1)),
    "minus exp": Case((MinusExp(),), (10, 7), lambda w: -np.exp(w.astype(np.float64)).astype(np.float32), adapts=False),
    "scaled": Case((Scale(lambda m: 2.5),), (10, 7), lambda w: w * np.float32(2.5)),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@EACH
def test_a_weight_becomes_what_numpy_makes_of_it(case: Case) -> None:
    w = noise("w", *case.shape)
    tensor = applied(case.ops, Resident(w), model())
    expected = case.numpy(w)
    assert tensor.spec.shape == expected.shape
    np.testing.assert_array_equal(inmemory.values(tensor), expected)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.adapts and len(case.shape) == 2])
def test_a_change_of_low_rank_goes_where_its_weight_goes(case: Case) -> None:
    n_out, n_in = case.shape
    a, b = noise("a", 3, n_in), noise("b", n_out, 3)
    new_a, new_b = factors_through(case.ops, Resident(a), Resident(b), model())
    ours = total_factor(case.ops, model()) * inmemory.values(new_b).astype(np.float64) @ inmemory.values(new_a)
    zero = np.zeros(case.shape, np.float32)
    theirs = case.numpy((b.astype(np.float64) @ a).astype(np.float32)) - case.numpy(zero)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.adapts and len(case.shape) == 2])
def test_what_no_factors_can_carry_is_refused(case: Case) -> None:
    with pytest.raises(CannotAdapt) as caught:
        factors_through(
            case.ops, Resident(noise("a", 3, case.shape[1])), Resident(noise("b", case.shape[0], 3)), model()
        )
    assert caught.value.code == "no-matrix"


@pytest.mark.parametrize(
    ("op", "code"),
    [(Permute("W"), "heads"), (Split(0, "W H"), "dims"), (Scale(lambda m: 1.0), "factor")],
)
def test_what_a_base_lacks_is_named(op: Op, code: str) -> None:
    with pytest.raises(CannotAdapt) as caught:
        factors_through((op,), Resident(noise("a", 3, 8)), Resident(noise("b", 12, 3)), model(has_config=False))
        total_factor((op,), model(has_config=False))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Permute("A"), (20, 10)),
        (Rows(lambda m: np.array([3])), (3, 5)),
        (Columns(lambda m: np.array([5])), (3, 5)),
        (Split(0, 2), (7, 5)),
        (Split(0, "A*D K*D"), (40, 5)),
        (Split(0, 2, of_columns=True), (4, 5)),
        (Interleaved(0, 2), (7, 5)),
        (Reshape("A D H"), (24, 11)),
    ],
)
def test_a_shape_that_does_not_suit_is_a_fault(op: Op, shape: tuple[int, ...]) -> None:
    assert first_fault((op,), shape, model()) is not None


@pytest.mark.parametrize(
    "made",
    [
        lambda: Split(3, "A*D K*D K*D"),
        lambda: Split(-1, "A*D K*D"),
        lambda: Split(2, 2),
        lambda: Split(0, 0),
        lambda: Split(0, ""),
        lambda: Interleaved(2, 2),
        lambda: Interleaved(-1, 2),
        lambda: Interleaved(0, 0),
    ],
)
def test_there_is_no_block_beyond_the_last(made: Callable[[], Op]) -> None:
    with pytest.raises(ValueError, match=r"there is no (block|row)"):
        made()


@EACH
def test_a_shape_that_suits_is_none(case: Case) -> None:
    assert first_fault(case.ops, case.shape, model()) is None


def norm(n: int = 300) -> dict[str, Array]:
    """A batch norm's vectors, by their names; one channel has no variance."""
    made = {part: noise(part, n) for part in ("weight", "bias", "mean", "variance")}
    made["variance"] = np.abs(made["variance"])
    made["variance"][7] = 0
    return made


SCALE = Tensor("weight", "t", "H", (FoldedScale(1e-3),), also=("variance",))
SHIFT = Tensor("bias", "t", "H", (FoldedShift(1e-3),), also=("mean", "weight", "variance"))


def test_a_batch_norm_is_folded_in_f32() -> None:
    """A few rows as all at once, within the scratch that is derived for them."""
    vectors = norm()
    scale = vectors["weight"] / np.sqrt(vectors["variance"] + np.float32(1e-3))
    for row, expected in ((SCALE, scale), (SHIFT, vectors["bias"] - vectors["mean"] * scale)):
        made = model().made(row, [Resident(vectors[name]) for name in row.sources])
        np.testing.assert_array_equal(inmemory.values(made), expected)
        for rows in (range(1), range(7, 8), range(100, 300)):
            out = np.empty(4 * len(rows), np.uint8)
            read(made, rows, out, Workspace(Scratch(peak_nbytes(made, len(rows)))))
            np.testing.assert_array_equal(out.view(np.float32), expected[rows.start : rows.stop])


def test_a_folded_norm_is_a_single_chain() -> None:
    """What is described has every source and the epsilon; only F32 holds the result; no factors go through."""
    stored = {name: Resident(values) for name, values in norm().items()}
    rows = [SCALE, SHIFT, Tensor("weight", "t", "H", (FoldedScale(1e-5),), also=("variance",))]
    found = [description(model().made(row, [stored[name] for name in row.sources])) for row in rows]
    assert len(set(found)) == 3
    for row in rows:
        assert [loss(row.ops, type_, model()) is None for type_ in (F32, F16, BF16, Q8_0)] == [True] + [False] * 3
        assert first_fault(row.ops, (300,), model()) is None
        with pytest.raises(CannotAdapt):
            factors_through(row.ops, Resident(noise("a", 3, 8)), Resident(noise("b", 12, 3)), model())
    with pytest.raises(ValueError, match="not of one shape"):
        model().made(SCALE, [stored["weight"], Resident(noise("v", 299))])


@pytest.mark.parametrize("type_", [F32, F16, BF16, Q8_0])
def test_only_new_numbers_can_be_lost(type_: GGMLQuantizationType) -> None:
    moved = [op for case in CASES.values() for op in case.ops if not isinstance(op, PlusOne | MinusExp | Scale)]
    assert loss(moved, type_, model()) is None
    assert (loss((PlusOne(),), type_, model()) is None) == (type_ == F32)
    assert (loss((MinusExp(),), type_, model()) is None) == (type_ == F32)
    assert (loss((Scale(lambda m: 2.5),), type_, model()) is None) == (type_ in (F32, Q8_0))
    assert loss((Scale(lambda m: 0.5),), type_, model()) is None


def test_a_description_has_all_that_decides_bytes() -> None:
    """And nothing that differs between two runs: rules are shown by what they give."""
    made: list[tuple[tuple[Op, ...], dict[str, int]]] = [
        ((Permute("A"),), {}), ((Permute("A"),), {"A": 2}), ((Split(0, "A 44"),), {}),
        ((Split(1, "K 46"),), {}), ((Split(1, 2),), {}), ((Split(1, 2, True),), {}),
        ((Interleaved(0, 2),), {}), ((Interleaved(1, 2),), {}), ((Scale(lambda m: 2.0),), {}),
        ((Scale(lambda m: 3.0),), {}), ((Rows(order(48, 1)),), {}), ((Rows(order(48, 2)),), {}),
        ((Columns(order(12, 2)),), {}), ((Transpose(),), {}), ((PlusOne(),), {}), ((MinusExp(),), {}),
        ((Reshape("A K D 12"),), {}), ((Reshape("A K D 12"),), {"D": 2, "A": 8, "K": 3}),
        ((PlusOne(), PlusOne()), {}),
    ]  # fmt: skip
    w = Resident(noise("w", 48, 12))
    found = [description(applied(ops, w, model(**dims))) for ops, dims in made]
    assert len(set(found)) == len(made)
    assert not any("0x" in one for one in found)
