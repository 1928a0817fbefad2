"""One alpha for all modules, the rest folded into lora_b: exact where it can be, F32 where not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T

from streamconv.ggml.element_types import TYPES
from streamconv.ggml.rows import Encode
from streamconv.lazy.leaves import Resident
from streamconv.lazy.node import LazyTensor, TensorSpec
from streamconv.lazy.views import Transpose
from streamconv.lora.base import Landing, Slot
from streamconv.lora.fold import Folded, choose_alpha, is_power_of_two, slabs
from streamconv.lora.fold import fold as fold_on
from streamconv.lora.resolve import LoraModule
from streamconv.recipe import Config, Dim, Model, Permute, Recipe
from tests import inmemory, tiny

F32, F16, BF16 = T.F32, T.F16, T.BF16


class Stored(Resident):
    """A small tensor in a type of its own."""

    def __init__(self, values: np.ndarray, type_: T = F32) -> None:
        super().__init__(np.zeros(values.shape, np.float32))
        self.spec = TensorSpec(values.shape, TYPES[type_].dtype)
        name = type_.name
        self._bytes = np.frombuffer(tiny.Tensor.of(values, name).data, np.uint8)


def module(
    scale: float, *, r: int = 4, heads: int = 0, type_: T = F32, target: str = "blk.0.x.weight",
    values: np.ndarray | None = None, order: int = 0,
) -> LoraModule:  # fmt: skip
    a = Stored(tiny.noise(f"{target}.a", (r, 6), 1.0), type_)
    b = Stored(tiny.noise(f"{target}.b", (8, r), 1.0) if values is None else values, type_)
    ops = (Permute(str(heads)),) if heads else ()
    return LoraModule(target, Slot((Landing(target, (0, order, -1), ops),), (8, 6)), a, b, scale)


def fold(modules: list[LoraModule]) -> Folded:
    recipe = Recipe(arch="none", hf_names=(), model_type="", dims={"L": Dim("n"), "V": Dim("v")}, tensors=(), keys=())
    return fold_on(modules, Model(recipe, Config({}, Path("base")), {}, has_config=False))


def rows(tensor: LazyTensor) -> np.ndarray:
    return inmemory.values(Encode(tensor, "x", F32))


@pytest.mark.parametrize(
    ("needed", "alpha"),
    [
        ([12.0, 12.0, 12.0], 12.0),
        ([12.0], 12.0),
        ([8.0, 2.0, 8.0], 8.0),  # the most modules are left alone
        ([2.0, 8.0, 2.0], 2.0),
        ([3.0, 3.0, 8.0, 2.0, 4.0], 8.0),  # but exact folds for more of them come first
        ([0.0, 5.0, 0.0], 5.0),  # what is off needs none
        ([0.0, 0.0], 0.0),
        ([-6.0, -6.0], -6.0),
    ],
)
def test_the_chosen_alpha(needed: list[float], alpha: float) -> None:
    assert choose_alpha(needed) == alpha


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.25, True), (-8.0, True), (1.0, True), (0.0, True), (3.0, False), (0.1, False)]
)
def test_powers_of_two(ratio: float, expected: bool) -> None:
    assert is_power_of_two(ratio) is expected


def test_alike_modules_are_written_as_they_are() -> None:
    folded = fold([module(1.5, target="blk.0.x.weight"), module(1.5, target="blk.1.x.weight", type_=F16)])
    assert folded.alpha == 6.0
    assert [type(pair.b).__name__ for pair in folded.pairs] == ["Stored", "Stored"]
    assert [(pair.a_type, pair.b_type) for pair in folded.pairs] == [(F32, F32), (F16, F16)]


@pytest.mark.parametrize("rank", [1, 3, 7, 49, 103])
def test_an_alpha_survives_its_division_by_the_rank(rank: int) -> None:
    assert fold([module(1 / rank, r=rank)]).alpha == 1.0


def test_one_alpha_serves_every_rank() -> None:
    made = [module(2.0, r=4, target="blk.0.x.weight"), module(1.0, r=8, target="blk.1.x.weight")]
    folded = fold(made)
    assert folded.alpha == 8.0
    assert all(type(pair.b).__name__ == "Stored" for pair in folded.pairs)


@pytest.mark.parametrize("scale", [0.5, 1.3, -4.0])
def test_a_module_of_its_own_scale_has_it_in_b(scale: float) -> None:
    odd = module(scale, target="blk.2.x.weight")
    folded = fold([module(2.0), module(2.0, target="blk.1.x.weight"), odd])
    pair = folded.pairs[2]
    ours = folded.alpha / 4 * rows(pair.b).astype(np.float64) @ rows(pair.a)
    theirs = scale * rows(odd.b).astype(np.float64) @ rows(odd.a)
    assert np.linalg.norm(ours - theirs) <= 1e-7 * np.linalg.norm(theirs)


@pytest.mark.parametrize("type_", [F32, F16, BF16])
@pytest.mark.parametrize(("scale", "exact"), [(0.5, True), (-8.0, True), (1.3, False)])
def test_a_power_of_two_keeps_the_type(type_: T, scale: float, exact: bool) -> None:
    plain = [module(1.0, type_=type_, target=f"blk.{i}.x.weight") for i in range(2)]
    pair = fold([*plain, module(scale, type_=type_, target="blk.2.x.weight")]).pairs[2]
    assert pair.b_type == (type_ if exact else F32)
    assert pair.a_type == type_


@pytest.mark.parametrize(
    ("type_", "value", "scale", "keeps"),
    [
        (F16, 65504.0, 2.0, False),  # overflows
        (F16, 32768.0, 0.5, True),
        (F16, 2.0**-24, 0.5, False),  # the least subnormal
        (F16, 2.0**-14 * 1.5, 0.5, True),  # 0.75 * 2**-14 is a subnormal that holds it
        (F16, 2.0**-14 * (1 + 2**-10), 0.5, False),  # this one loses its last bit
        (BF16, 2.0**-126 * (1 + 2**-7), 0.5, False),
        (BF16, 2.0**100, 4.0, True),
        (F32, 2.0**-149, 0.5, True),  # nothing holds it, and it is F32 already
    ],
)
def test_a_power_of_two_that_the_type_cannot_take(type_: T, value: float, scale: float, keeps: bool) -> None:
    values = tiny.noise("b", (8, 4), 1.0)
    values[5, 2] = value
    plain = [module(1.0, target=f"blk.{i}.x.weight") for i in range(2)]
    pair = fold([*plain, module(scale, type_=type_, target="blk.2.x.weight", values=values)]).pairs[2]
    assert pair.b_type == (type_ if keeps else F32)


def test_what_float32_cannot_hold_is_a_problem() -> None:
    values = tiny.noise("b", (8, 4), 1.0)
    values[0, 3] = 3e38
    plain = [module(1.0, target=f"blk.{i}.x.weight") for i in range(2)]
    folded = fold([*plain, module(2.0, target="blk.2.x.weight", values=values)])
    assert [(problem.code, problem.modules) for problem in folded.problems] == [("overflow", ("blk.2.x.weight",))]


@pytest.mark.parametrize("scale", [1e-33, 1e35, -1e-33])
def test_a_scale_beyond_float32_is_a_problem(scale: float) -> None:
    assert [problem.code for problem in fold([module(scale)]).problems] == ["alpha"]


@pytest.mark.parametrize(("most", "odd"), [(1e25, 1e-25), (1e20, 1e-21), (1e-20, 1e21), (1e29, 1e-300), (1e29, -1e-9)])
def test_scales_too_far_apart_are_a_problem(most: float, odd: float) -> None:
    plain = [module(most, target=f"blk.{i}.x.weight") for i in range(2)]
    folded = fold([*plain, module(odd, target="blk.2.x.weight")])
    assert [(problem.code, problem.modules) for problem in folded.problems] == [("alpha", ("blk.2.x.weight",))]


def test_no_modules_have_no_problem() -> None:
    assert fold([]).problems == ()


def test_a_module_that_is_off_has_zeros() -> None:
    folded = fold([module(0.0), module(1.5, target="blk.1.x.weight", type_=BF16), module(0.0, target="blk.2.x.weight")])
    assert folded.alpha == 6.0
    assert not rows(folded.pairs[0].b).any()
    assert rows(folded.pairs[1].b).any()


def test_an_adapter_that_is_off_has_the_alpha_of_scale_one() -> None:
    folded = fold([module(0.0, r=5)])
    assert folded.alpha == 5.0  # 0 would be full strength for llama.cpp
    assert not rows(folded.pairs[0].b).any()
    assert rows(folded.pairs[0].a).any()


def test_heads_are_interleaved_in_b_alone() -> None:
    one = module(1.0, heads=2)
    pair = fold([one]).pairs[0]
    assert (rows(pair.a) == rows(one.a)).all()
    assert (rows(pair.b) == rows(one.b)[[0, 2, 1, 3, 4, 6, 5, 7]]).all()


def test_every_difference_in_making_shows_in_the_origin() -> None:
    plain = module(1.0)
    a = Transpose(Stored(tiny.noise("t", (6, 4), 1.0)))
    transposed = LoraModule("x", plain.slot, a, plain.b, 1.0, (True, False))
    made = [plain, transposed, module(1.0, heads=2), module(1.0, heads=4), module(1.0, target="blk.1.x.weight")]
    assert len({fold([one]).pairs[0].origin for one in made}) == len(made)
    other = fold([module(1.0, target="a"), module(1.0, target="b"), module(3.0)]).pairs[2]
    assert other.origin != fold([plain]).pairs[0].origin


def test_slabs_are_all_rows_in_order() -> None:
    tensor = Transpose(Stored(tiny.noise("wide", (3, 70_000), 1.0), F16))
    parts = [slab.copy() for slab in slabs(tensor)]
    assert len(parts) > 1 or parts[0].shape == (70_000, 3)
    assert (np.concatenate(parts) == rows(tensor)).all()
