"""LFM2-MoE: experts in both spellings, layers dense and not, what is folded into them and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from streamconv.errors import SourceError
from streamconv.ggml.mixes import ModelFacts
from streamconv.ggml.policy import OuttypePolicy
from streamconv.ggml.rows import Encode
from streamconv.lazy.leaves import Resident
from streamconv.lazy.node import peak_nbytes
from streamconv.lazy.views import Stack
from streamconv.recipe.language import Model
from tests import inmemory, tiny
from tests.inmemory import ABSENT, Stored, bound, target
from tests.raising import raises

Checkpoint = tuple[dict[str, Any], dict[str, Stored]]
MOE = "model.layers.1.feed_forward."


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return inmemory.loaded(tiny.lfm2moe(tmp_path_factory.mktemp("moe")))


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return inmemory.loaded(tiny.lfm2moe(tmp_path_factory.mktemp("stacked"), stacked=True))


def encoded(model: Model, name: str, outtype: str) -> np.ndarray[Any, Any]:
    """A target's values after encoding, by gguf's own decoder."""
    one = next(one for one in model.targets if one.name == name)
    tensor = one.tensor
    (type_,) = OuttypePolicy(outtype).choose([model.role(one)], ModelFacts())
    return gguf.dequantize(inmemory.raw(Encode(tensor, name, type_)), type_).reshape(tensor.spec.shape)


def keys(checkpoint: Checkpoint, **overrides: Any) -> dict[str, Any]:
    return inmemory.keys(bound(*checkpoint, **overrides))


# ---------------------------------------------------------------- experts


def test_experts_are_stacked_in_order(moe: Checkpoint) -> None:
    model, stored = bound(*moe), moe[1]
    for source, name in (("w1", "ffn_gate_exps"), ("w2", "ffn_down_exps"), ("w3", "ffn_up_exps")):
        experts = np.stack([stored[f"{MOE}experts.{e}.{source}.weight"].values for e in range(6)])
        np.testing.assert_array_equal(target(model, f"blk.1.{name}.weight"), experts)


def test_stacked_experts_give_the_same_targets(moe: Checkpoint, stacked: Checkpoint) -> None:
    ours, theirs = bound(*moe), bound(*stacked)
    assert [one.name for one in ours.targets] == [one.name for one in theirs.targets]
    for name in ("ffn_gate_exps", "ffn_down_exps", "ffn_up_exps"):
        np.testing.assert_array_equal(target(ours, f"blk.2.{name}.weight"), target(theirs, f"blk.2.{name}.weight"))


def test_layers_may_be_stored_in_either_way(moe: Checkpoint, stacked: Checkpoint) -> None:
    first, second = "model.layers.1.feed_forward.experts", "model.layers.2.feed_forward.experts"
    mixed = {name: one for name, one in moe[1].items() if not name.startswith(second)}
    mixed |= {name: one for name, one in stacked[1].items() if name.startswith(second)}
    assert len(bound(moe[0], mixed).targets) == len(bound(*moe).targets)
    both = moe[1] | {name: one for name, one in stacked[1].items() if name.startswith(first)}
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_gate_exps\.weight has 2 sources"):
        bound(moe[0], both)


@pytest.mark.parametrize("lost", [0, 3, 5])
def test_a_lost_expert_is_named(moe: Checkpoint, lost: int) -> None:
    raw, stored = moe
    name = f"{MOE}experts.{lost}.w2.weight"
    with pytest.raises(SourceError) as caught:
        bound(raw, {key: one for key, one in stored.items() if key != name})
    assert f"missing tensors: {name}" in caught.value.message


def test_memory_does_not_grow_with_the_experts() -> None:
    """A stack's scratch is that of one expert's rows, whatever their number."""

    expert = Resident(tiny.noise("expert", (96, 64), 1.0))
    peaks = {peak_nbytes(Encode(Stack([expert] * n), "made", gguf.GGMLQuantizationType.Q8_0), 32) for n in (2, 8, 128)}
    assert len(peaks) == 1


# ---------------------------------------------------------------- the router's bias


def test_the_router_has_a_bias_always(moe: Checkpoint, tmp_path: Path) -> None:
    np.testing.assert_array_equal(target(bound(*moe), "blk.1.exp_probs_b.bias"), moe[1][f"{MOE}expert_bias"].values)
    unbiased = inmemory.loaded(tiny.lfm2moe(tmp_path, expert_bias=False))
    for said in ({}, {"use_expert_bias": ABSENT}):
        zeros = target(bound(*unbiased, **said), "blk.3.exp_probs_b.bias")
        assert zeros.tolist() == [0.0] * 6
    with pytest.raises(
        SourceError, match=r"missing tensors: model\.layers\.1\.feed_forward\.expert_bias \(and 2 more\)"
    ):
        bound(*unbiased, use_expert_bias=True)
    with raises(SourceError, code="config-contradiction"):
        bound(*moe, use_expert_bias=False)


# ---------------------------------------------------------------- dense layers


@pytest.mark.parametrize("n_dense", [0, 1, 3])
def test_dense_layers_come_first(tmp_path: Path, n_dense: int) -> None:
    checkpoint = inmemory.loaded(tiny.lfm2moe(tmp_path, n_dense=n_dense))
    for said in ({}, {"num_dense_layers": ABSENT}):
        assert keys(checkpoint, **said)["leading_dense_block_count"] == n_dense
    names = [one.name for one in bound(*checkpoint).targets]
    assert [f"blk.{i}.ffn_gate.weight" in names for i in range(4)] == [i < n_dense for i in range(4)]
    assert [f"blk.{i}.ffn_gate_exps.weight" in names for i in range(4)] == [i >= n_dense for i in range(4)]


def test_the_config_must_know_which_are_dense(moe: Checkpoint) -> None:
    with pytest.raises(
        SourceError, match=r"num_dense_layers in config\.json says that layer 1 is 'dense', but its tensors are"
    ):
        bound(*moe, num_dense_layers=2)


def test_a_dense_layer_after_experts_has_no_place(moe: Checkpoint) -> None:
    raw, stored = moe
    last = "model.layers.3.feed_forward."
    swapped = {name: one for name, one in stored.items() if not name.startswith(last)}
    swapped |= inmemory.made({last + "w1.weight": (96, 64), last + "w2.weight": (64, 96), last + "w3.weight": (96, 64)})
    with raises(SourceError, code="unrunnable"):
        bound(raw, swapped, num_dense_layers=ABSENT)


def test_the_dense_width_is_never_adjusted(moe: Checkpoint) -> None:
    """LFM2's rule would make 64 of 96; transformers does not apply it here."""
    assert keys(moe, block_auto_adjust_ff_dim=True, block_multiple_of=16)["feed_forward_length"] == 96


# ---------------------------------------------------------------- keys


def test_all_keys(moe: Checkpoint) -> None:
    assert keys(moe) == {
        "vocab_size": 416,
        "block_count": 4,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "context_length": 640,
        "attention.head_count": 4,
        "attention.head_count_kv": [0, 2, 0, 2],
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e6,
        "shortconv.l_cache": 3,
        "expert_count": 6,
        "expert_used_count": 2,
        "expert_feed_forward_length": 160,
        "leading_dense_block_count": 1,
        "expert_gating_func": 2,
    }


@pytest.mark.parametrize("key", ["num_experts", "moe_intermediate_size", "intermediate_size", "layer_types"])
def test_what_the_config_does_not_say_follows_from_the_tensors(moe: Checkpoint, stacked: Checkpoint, key: str) -> None:
    assert keys(moe, **{key: ABSENT}) == keys(stacked, **{key: None}) == keys(moe)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is false"),
        ({"conv_bias": True}, "conv_bias is true"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "RoPE scaling 'linear' is not supported"),
        ({"num_experts_per_tok": 7}, "the config uses 7 experts of 6"),
        ({"num_experts": 5}, "gate.weight has shape [6, 64], expected [5, 64] from num_experts=5, hidden_size=64"),
        (
            {"layer_types": ["conv"] * 4},
            "layer_types in config.json says that layer 1 is 'conv', but its tensors are those of 'attention'",
        ),
        ({"tie_embedding": False}, "untied, but there is no lm_head.weight"),
    ],
)
def test_what_cannot_be_is_named(moe: Checkpoint, said: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError) as caught:
        bound(*moe, **said)
    assert message in caught.value.message


# ---------------------------------------------------------------- the routed scale


@pytest.mark.parametrize("scale", [2.0, 0.25, -4.0])
@pytest.mark.parametrize("outtype", ["bf16", "f32", "q8_0"])
def test_a_power_of_two_is_folded_in_exactly(moe: Checkpoint, scale: float, outtype: str) -> None:
    """Of experts stored in BF16: the exponents move, and nothing is rounded that was not before."""
    plain = encoded(bound(*moe), "blk.1.ffn_down_exps.weight", outtype)
    scaled = encoded(bound(*moe, routed_scaling_factor=scale), "blk.1.ffn_down_exps.weight", outtype)
    np.testing.assert_array_equal(scaled, np.float32(scale) * plain)


def test_f16_rounds_the_product_once(moe: Checkpoint) -> None:
    """Its subnormals are too coarse for BF16's small numbers, scaled or not."""
    scaled = encoded(bound(*moe, routed_scaling_factor=0.25), "blk.1.ffn_down_exps.weight", "f16")
    exact = target(bound(*moe), "blk.1.ffn_down_exps.weight") * np.float32(0.25)
    np.testing.assert_array_equal(scaled, exact.astype(np.float16))


def test_another_factor_is_rounded_once_in_float32(moe: Checkpoint) -> None:
    scaled = target(bound(*moe, routed_scaling_factor=2.3), "blk.1.ffn_down_exps.weight")
    experts = np.stack([moe[1][f"{MOE}experts.{e}.w2.weight"].values for e in range(6)])
    np.testing.assert_array_equal(scaled, experts * np.float32(2.3))


@pytest.mark.parametrize("outtype", ["bf16", "f16"])
def test_16_bits_would_round_every_weight_by_another_factor(moe: Checkpoint, outtype: str) -> None:
    model = bound(*moe, routed_scaling_factor=2.5)
    with pytest.raises(SourceError) as caught:
        encoded(model, "blk.1.ffn_down_exps.weight", outtype)
    assert caught.value.tensor == "blk.1.ffn_down_exps.weight"
    assert caught.value.hint == "--outtype f32 or q8_0"
    encoded(model, "blk.1.ffn_up_exps.weight", outtype)
    for exact in ("f32", "q8_0"):
        encoded(model, "blk.1.ffn_down_exps.weight", exact)


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
@pytest.mark.parametrize("scale", [2.0**-5, -(2.0**-12), 0.05])
def test_a_small_factor_is_beyond_f16s_exponents(moe: Checkpoint, outtype: str, scale: float) -> None:
    """2**-12 in Q8_0 errs by a tenth of the largest weight, whose scales are F16."""
    model = bound(*moe, routed_scaling_factor=scale)
    with raises(SourceError, code="inexact-type") as caught:
        encoded(model, "blk.1.ffn_down_exps.weight", outtype)
    assert caught.value.hint == ("--outtype f32" if scale == 0.05 else "--outtype f32 or bf16")
    plain = encoded(bound(*moe), "blk.1.ffn_down_exps.weight", "f32")
    np.testing.assert_array_equal(encoded(model, "blk.1.ffn_down_exps.weight", "f32"), plain * np.float32(scale))


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_the_least_factor_of_f16_errs_no_more_than_none(moe: Checkpoint, outtype: str) -> None:
    exact = target(bound(*moe), "blk.1.ffn_down_exps.weight")
    plain, scaled = (
        encoded(bound(*moe, routed_scaling_factor=s), "blk.1.ffn_down_exps.weight", outtype) / np.float32(s)
        for s in (1.0, 2.0**-4)
    )
    largest = np.abs(exact).max()
    assert np.abs(scaled - exact).max() <= 1.1 * np.abs(plain - exact).max() + 1e-5 * largest


def test_a_row_that_q8_0_cannot_cut_has_no_such_hint(tmp_path: Path) -> None:
    """It becomes F16, which the other types' hint must not name."""
    narrow = inmemory.loaded(tiny.lfm2moe(tmp_path, moe_ff=100, config={"routed_scaling_factor": 2.5}))
    with pytest.raises(SourceError) as caught:
        encoded(bound(*narrow), "blk.1.ffn_down_exps.weight", "q8_0")
    assert caught.value.hint == "--outtype f32"
