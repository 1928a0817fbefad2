"""The traps of real LFM2 configs: which layers attend, how wide the network is, which RoPE base, tied or not."""

from __future__ import annotations

from typing import Any

import pytest

from streamconv.architectures.lfm2 import ffn_width
from streamconv.errors import SourceError
from tests import inmemory, tiny
from tests.inmemory import ABSENT, Stored, bound, config
from tests.raising import raises

Checkpoint = tuple[dict[str, Any], dict[str, Stored]]

N_LAYERS = 4
ATTENDING = [2]  # of tiny.lfm2
TYPES = ["conv", "conv", "full_attention", "conv"]
HEAD_COUNTS = [0, 0, 2, 0]


@pytest.fixture(scope="module")
def lfm2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return inmemory.loaded(tiny.lfm2(tmp_path_factory.mktemp("lfm2"), ff=96))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return inmemory.loaded(tiny.lfm2(tmp_path_factory.mktemp("untied"), tied=False))


def keys(checkpoint: Checkpoint, **overrides: Any) -> dict[str, Any]:
    return inmemory.keys(bound(*checkpoint, **overrides))


@pytest.mark.parametrize(
    "said",
    [
        {"layer_types": TYPES, "full_attn_idxs": ABSENT},  # newer models
        {"layer_types": ABSENT, "full_attn_idxs": ATTENDING},  # LFM2-350M and 1.2B
        {"layer_types": None, "full_attn_idxs": ATTENDING},
        {"layer_types": TYPES, "full_attn_idxs": None},
        {"layer_types": TYPES, "full_attn_idxs": ATTENDING},
        {"layer_types": ABSENT, "full_attn_idxs": ABSENT},  # the tensors show it
    ],
)
def test_layers_that_attend_have_heads(lfm2: Checkpoint, said: dict[str, Any]) -> None:
    assert keys(lfm2, **said)["attention.head_count_kv"] == HEAD_COUNTS


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"layer_types": ["full_attention"] * 4},
            "layer_types in config.json says that layer 0 is 'attention', but its tensors are those of 'conv'",
        ),
        (
            {"layer_types": ABSENT, "full_attn_idxs": [1]},
            "full_attn_idxs in config.json says that layer 1 is 'attention', but its tensors are those of 'conv'",
        ),
        (
            {"layer_types": TYPES, "full_attn_idxs": [0]},
            "full_attn_idxs in config.json says that layer 0 is 'attention'",
        ),
        ({"layer_types": TYPES, "full_attn_idxs": [2, 4]}, "full_attn_idxs is [2, 4], expected layers from 0 to 3"),
        ({"layer_types": ABSENT, "full_attn_idxs": [2, -1]}, "full_attn_idxs is [2, -1], expected layers from 0 to 3"),
        ({"layer_types": TYPES[:3]}, "layer_types in config.json lists 3 layers, but there are 4"),
        ({"layer_types": [*TYPES[:3], "mamba"]}, "says that layer 3 is 'mamba', but its tensors are those of 'conv'"),
    ],
)
def test_a_claim_against_the_tensors_is_an_error(lfm2: Checkpoint, said: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError) as caught:
        bound(*lfm2, **said)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("said", "width"),
    [
        ({"block_ff_dim": 6656, "block_auto_adjust_ff_dim": True}, 4608),  # 350M
        ({"block_ff_dim": 12288, "block_auto_adjust_ff_dim": True, "intermediate_size": 12288}, 8192),  # 1.2B
        ({"block_ff_dim": 10752, "block_auto_adjust_ff_dim": False}, 10752),  # 2.6B
        ({"intermediate_size": 6656, "block_auto_adjust_ff_dim": True}, 4608),
        ({"block_ff_dim": 6656, "intermediate_size": 7, "block_auto_adjust_ff_dim": True}, 4608),
        ({"block_ff_dim": 6000, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.3}, 5376),
        (
            {
                "block_ff_dim": 100,
                "block_auto_adjust_ff_dim": True,
                "block_ffn_dim_multiplier": 1.5,
                "block_multiple_of": 1,
            },
            99,  # of 66, two thirds in whole numbers
        ),
        ({"block_ff_dim": 6656}, None),
        ({"block_ff_dim": 6656, "block_auto_adjust_ff_dim": True, "block_multiple_of": None}, None),
        ({"block_ff_dim": 6656, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": None}, None),
        ({"block_auto_adjust_ff_dim": True}, None),
    ],
)
def test_width_by_the_auto_adjust_rule(said: dict[str, Any], width: int | None) -> None:
    assert ffn_width(config({"block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0}, **said)) == width


@pytest.mark.parametrize(
    "key", ["intermediate_size", "block_auto_adjust_ff_dim", "block_multiple_of", "block_ffn_dim_multiplier"]
)
def test_a_width_that_is_not_wholly_stated_is_that_of_w1(lfm2: Checkpoint, key: str) -> None:
    assert keys(lfm2, **{key: ABSENT})["feed_forward_length"] == 96


def test_a_stated_width_must_be_that_of_w1(lfm2: Checkpoint) -> None:
    with pytest.raises(SourceError, match=r"w1\.weight has shape \[96, 64\], expected \[144, 64\] from block_ff_dim"):
        bound(*lfm2, block_auto_adjust_ff_dim=False)


@pytest.mark.parametrize(
    ("said", "base"),
    [
        ({"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}, 5e6),
        ({"rope_parameters": ABSENT, "rope_theta": 3e4}, 3e4),
        ({"rope_parameters": {"rope_theta": 5e6}, "rope_theta": 3e4}, 5e6),
        ({"rope_parameters": {"rope_theta": 5e6}, "rope_scaling": {"rope_theta": 2e5}}, 2e5),
        ({"rope_parameters": ABSENT, "theta": 3e4}, 1e6),
    ],
)
def test_rope_base(lfm2: Checkpoint, said: dict[str, Any], base: float) -> None:
    assert keys(lfm2, **said)["rope.freq_base"] == base


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"conv_bias": True}, "conv_bias is true"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn' is not supported"),
        (
            {"num_attention_heads": 4, "head_dim": 8},
            "config.json has head_dim=8, the tensors 16",
        ),
    ],
)
def test_what_the_architecture_lacks_is_refused(lfm2: Checkpoint, said: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError) as caught:
        bound(*lfm2, **said)
    assert message in caught.value.message


def test_heads_must_make_the_hidden_size(lfm2: Checkpoint) -> None:
    """transformers runs such a model; llama.cpp takes the head size from the hidden size."""
    raw, stored = lfm2
    attention = "model.layers.2.self_attn."
    other = {
        attention + "q_proj.weight": (4 * 24, 64),
        attention + "k_proj.weight": (2 * 24, 64),
        attention + "v_proj.weight": (2 * 24, 64),
        attention + "out_proj.weight": (64, 4 * 24),
        attention + "q_layernorm.weight": (24,),
        attention + "k_layernorm.weight": (24,),
    }
    with pytest.raises(SourceError, match="4 heads of 24 make up the hidden size 64"):
        bound(raw, stored | inmemory.made(other))


@pytest.mark.parametrize(
    ("said", "warnings"),
    [
        ({"tie_embedding": True, "tie_word_embeddings": False}, []),
        ({"tie_embedding": ABSENT, "tie_word_embeddings": True}, []),
        ({"tie_embedding": ABSENT, "tie_word_embeddings": ABSENT}, []),  # neither means tied
    ],
)
def test_tied(lfm2: Checkpoint, said: dict[str, Any], warnings: list[str]) -> None:
    model = bound(*lfm2, **said)
    assert "output.weight" not in [one.name for one in model.targets]
    assert [warning.code for warning in model.warnings] == warnings


@pytest.mark.parametrize("said", [{"tie_embedding": False}, {"tie_embedding": None, "tie_word_embeddings": False}])
def test_untied_without_a_head_is_incomplete(lfm2: Checkpoint, said: dict[str, Any]) -> None:
    with raises(SourceError, code="head-missing"):
        bound(*lfm2, **said)


@pytest.mark.parametrize(
    ("said", "warnings"),
    [
        ({"tie_word_embeddings": False}, []),
        ({"tie_embedding": True}, ["head-on-tied"]),
        ({"tie_word_embeddings": ABSENT}, []),
    ],
)
def test_a_stored_head_becomes_the_output(untied: Checkpoint, said: dict[str, Any], warnings: list[str]) -> None:
    model = bound(*untied, **said)
    assert "output.weight" in [one.name for one in model.targets]
    assert [warning.code for warning in model.warnings] == warnings


def test_a_whole_config_of_the_first_release(lfm2: Checkpoint) -> None:
    """LFM2-350M's keys, in the tiny model's size: no layer_types, no head_dim, RoPE at the top, names of the blocks."""
    raw = {
        "architectures": ["Lfm2ForCausalLM"],
        "block_auto_adjust_ff_dim": True,
        "block_dim": 64,
        "block_ff_dim": 144,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 16,
        "block_norm_eps": 1e-5,
        "conv_L_cache": 3,
        "conv_bias": False,
        "full_attn_idxs": ATTENDING,
        "hidden_size": 64,
        "max_position_embeddings": 128000,
        "model_type": "lfm2",
        "norm_eps": 1e-5,
        "num_attention_heads": 4,
        "num_heads": 4,
        "num_hidden_layers": N_LAYERS,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "vocab_size": 416,
    }
    assert inmemory.keys(bound(raw, lfm2[1])) == {
        "vocab_size": 416,
        "block_count": 4,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "context_length": 128000,
        "attention.head_count": 4,
        "attention.head_count_kv": HEAD_COUNTS,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e6,
        "shortconv.l_cache": 3,
    }
