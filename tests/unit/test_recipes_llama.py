"""Llama: what its configs say in two generations' words, and what the runtime makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamconv.architectures.llama import ROPE
from streamconv.errors import SourceError
from tests import inmemory, tiny
from tests.inmemory import ABSENT, Stored, bound, target

Checkpoint = tuple[dict[str, Any], dict[str, Stored]]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

LOW_AND_HIGH = "low_freq_factor of RoPE must be below high_freq_factor"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return inmemory.loaded(tiny.llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("biased")
    return inmemory.loaded(tiny.llama(root, head_dim=24, n_kv_heads=1, attention_bias=True, mlp_bias=True))


def keys(checkpoint: Checkpoint, **overrides: Any) -> dict[str, Any]:
    return inmemory.keys(bound(*checkpoint, **overrides))


def permuted(values: np.ndarray[Any, Any], n_heads: int) -> np.ndarray[Any, Any]:
    """As LlamaModel.permute in llama.cpp's converter."""
    halves = values.reshape(n_heads, 2, values.shape[0] // n_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


# ---------------------------------------------------------------- tensors


def test_rows_of_q_and_k_are_paired_per_head_and_no_others(biased: Checkpoint) -> None:
    model, stored = bound(*biased), biased[1]
    for kind in ("weight", "bias"):
        for source, name, n_heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 1)):
            values = stored[f"model.layers.1.self_attn.{source}.{kind}"].values
            paired = target(model, f"blk.1.{name}.{kind}")
            np.testing.assert_array_equal(paired, permuted(values, n_heads))
            assert not np.array_equal(paired, values)
        for source, name in (
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.down_proj", "ffn_down"),
            ("mlp.up_proj", "ffn_up"),
        ):
            values = stored[f"model.layers.0.{source}.{kind}"].values
            np.testing.assert_array_equal(target(model, f"blk.0.{name}.{kind}"), values)


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_biases_are_there_just_where_the_config_says(llama: Checkpoint, biased: Checkpoint, flag: str) -> None:
    with pytest.raises(SourceError, match=f"{flag} is false, but the checkpoint has model.layers.0"):
        bound(*biased, **{flag: False})
    with pytest.raises(SourceError, match=r"missing tensors: model\.layers\.0\..*_proj\.bias"):
        bound(*llama, **{flag: True})
    assert len(bound(*biased, **{flag: ABSENT}).targets) == len(bound(*biased).targets)


def test_old_checkpoints_bring_frequencies_that_are_not_needed(llama: Checkpoint) -> None:
    raw, stored = llama
    names = (*(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)), "model.rotary_emb.inv_freq")
    old = inmemory.made(dict.fromkeys(names, (8,)))
    assert len(bound(raw, stored | old).targets) == len(bound(raw, stored).targets)


def test_heads_and_embedding_agree_on_the_vocabulary(llama: Checkpoint) -> None:
    with pytest.raises(SourceError, match=r"embed_tokens\.weight has shape \[404, 64\], expected \[405, 64\]"):
        bound(*llama, vocab_size=405)


# ---------------------------------------------------------------- keys


def test_the_plain_keys(llama: Checkpoint) -> None:
    assert keys(llama) == {
        "vocab_size": 404,
        "block_count": 2,
        "context_length": 640,
        "embedding_length": 64,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
    }


def test_defaults_are_those_of_transformers(llama: Checkpoint) -> None:
    said = keys(llama, rope_parameters=ABSENT, max_position_embeddings=ABSENT, rms_norm_eps=None)
    assert (said["rope.freq_base"], said["context_length"]) == (10000.0, 2048)
    assert said["attention.layer_norm_rms_epsilon"] == 1e-6


def test_head_size_of_its_own(biased: Checkpoint) -> None:
    for said in (keys(biased), keys(biased, head_dim=ABSENT), keys(biased, num_key_value_heads=None)):
        assert said["attention.key_length"] == said["rope.dimension_count"] == 24
        assert said["attention.head_count_kv"] == 1


SCALINGS = [
    ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    ({"type": "linear", "factor": 2}, {"type": "linear", "factor": 2.0}),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160},
        {"type": "yarn", "factor": 4.0, "original_context_length": 160},
    ),
    (
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 160},
        {"type": "yarn", "factor": 4.0, "original_context_length": 160},
    ),
    (
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "beta_slow": 1.0},
        {"type": "yarn", "factor": 2.0, "original_context_length": 640, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0},
    ),
    ({"rope_type": "default"}, {}),
    (LLAMA3, {}),
]


@pytest.mark.parametrize(("said", "written"), SCALINGS)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_scaling(llama: Checkpoint, place: str, said: dict[str, Any], written: dict[str, Any]) -> None:
    """Either generation's place gives the same keys, and the base is found beside the scaling or at the top."""
    top = {"rope_scaling": ABSENT, "rope_parameters": ABSENT, "rope_theta": 5000.0}
    for overrides in (top | {place: said}, top | {place: said | {"rope_theta": 5000.0}, "rope_theta": ABSENT}):
        made = keys(llama, **overrides)
        assert {key: value for key, value in made.items() if key.startswith("rope.scaling.")} == {
            f"rope.scaling.{key}": value for key, value in written.items()
        }
        assert made["rope.freq_base"] == 5000.0


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (1 + 0.1 * math.log(4)) / (1 + 0.05 * math.log(4))),
        ({"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.5),
        ({"mscale": 0.7}, None),  # transformers needs both
    ],
)
def test_yarns_attention_factor_is_what_the_run_time_makes_of_the_key(
    llama: Checkpoint, said: dict[str, Any], wanted: float | None
) -> None:
    made = keys(llama, rope_parameters={"rope_type": "yarn", "factor": 4.0} | said)
    if wanted is None:
        assert "rope.scaling.attn_factor" not in made
    else:
        assert made["rope.scaling.attn_factor"] * (1 + 0.1 * math.log(4)) == pytest.approx(wanted, rel=1e-12)


def test_the_context_before_scaling_stands_at_the_top_first(llama: Checkpoint) -> None:
    said = keys(
        llama,
        original_max_position_embeddings=80,
        rope_parameters={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 160},
    )
    assert said["rope.scaling.original_context_length"] == 80


# ---------------------------------------------------------------- llama3's factors


def test_factors_slow_long_waves_and_blend_between(llama: Checkpoint) -> None:
    """Against the formula in float64: 1 below 8 positions, 8 beyond 32, between them a harmonic blend."""
    model = bound(*llama, rope_parameters=LLAMA3 | {"rope_theta": 100.0})
    factors = target(model, "rope_freqs.weight")
    waves = 2 * math.pi * 100.0 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((32 / waves - 1) / 3, 0, 1)
    np.testing.assert_allclose(factors, 1 / ((1 - smooth) / 8 + smooth), rtol=1e-6)
    assert factors.dtype == np.float32 and len(set(factors.tolist())) > 3


@pytest.mark.parametrize(
    ("size", "factor", "context", "bits"),
    [  # of torch's float32 arithmetic in llama.cpp's converter, for base 500000
        (64, 32.0, 8192, {14: 0x3F800000, 15: 0x3FD35EC2, 16: 0x4052B46F, 17: 0x411AAAEE, 18: 0x42000000}),
        (128, 8.0, 8192, {28: 0x3F800000, 29: 0x3F9A8ED5, 31: 0x4001AF1D, 34: 0x40A83C06, 35: 0x41000000}),
        (128, 8.0, 2048, {25: 0x4020C275}),  # where numpy's float32 power is a bit off
    ],
)
def test_factors_of_published_models_have_llama_cpps_bits(
    llama: Checkpoint, size: int, factor: float, context: int, bits: dict[int, int]
) -> None:
    published = LLAMA3 | {"factor": factor, "original_max_position_embeddings": context, "rope_theta": 500000.0}
    model = bound(*llama, rope_parameters=published)
    model.dims["D"] = size
    factors = ROPE.llama3_factors(model)
    assert factors is not None
    assert {i: int(factors.view(np.uint32)[i]) for i in bits} == bits


def test_only_llama3_has_factors(llama: Checkpoint) -> None:
    assert "rope_freqs.weight" not in [one.name for one in bound(*llama).targets]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rope_scaling": {"type": "longrope"}}, "RoPE scaling 'longrope' is not supported"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, LOW_AND_HIGH),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 5.0}}, LOW_AND_HIGH),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": None}}, LOW_AND_HIGH),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": None, "high_freq_factor": 1.0}}, LOW_AND_HIGH),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast of YaRN is not 32"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 2}}, "beta_slow of YaRN is not 1,"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate of YaRN is false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is not 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but the runtime computes silu"),
    ],
)
def test_what_the_run_time_cannot_express_is_named(llama: Checkpoint, said: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError) as caught:
        bound(*llama, **said)
    assert message in caught.value.message
    assert caught.value.code == "model-unrunnable"


def test_heads_must_share_key_value_heads_evenly(tmp_path: Path) -> None:
    raw, stored = inmemory.loaded(tiny.llama(tmp_path, n_heads=4, n_kv_heads=3))
    with pytest.raises(SourceError, match="4 heads do not share 3 key-value heads evenly"):
        bound(raw, stored)


def test_every_kind_of_layer_has_the_same_rope(llama: Checkpoint) -> None:
    full, sliding = {"rope_theta": 5000.0, "rope_type": "default"}, {"rope_theta": 10.0, "rope_type": "default"}
    assert keys(llama, rope_parameters={"full_attention": full, "other": full})["rope.freq_base"] == 5000
    with pytest.raises(SourceError, match=r"rope_parameters is .*, expected the same RoPE for all kinds of layers"):
        bound(*llama, rope_parameters={"sliding_attention": sliding, "full_attention": full})


# ---------------------------------------------------------------- biases that the config does not mention


def test_biases_that_transformers_would_leave_out_are_a_warning(biased: Checkpoint) -> None:
    assert bound(*biased).warnings == []
    model = bound(*biased, attention_bias=ABSENT)
    (warning,) = model.warnings
    assert warning.code == "flag-missing"
    assert (
        "config.json has no attention_bias, but the checkpoint has model.layers.0.self_attn.q_proj.bias"
        in warning.message
    )
    assert "blk.1.attn_q.bias" in [one.name for one in model.targets]
