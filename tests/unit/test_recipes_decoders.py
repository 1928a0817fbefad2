"""Decoders by their configs: what the runtime cannot do is refused by name, what is left out is as in transformers."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamconv.errors import SourceError
from tests import inmemory
from tests.families import build
from tests.families.table import FAMILIES
from tests.inmemory import ABSENT
from tests.raising import raises

YARN = {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0, "original_max_position_embeddings": 160}


@cache
def family(name: str) -> tuple[dict[str, Any], dict[str, inmemory.Stored]]:
    """The config of a family, and tensors of its shapes, all alike: nothing here looks at their values."""
    raw = inmemory.json.loads((build.DATA / name / "config.json").read_text(encoding="utf-8"))
    shapes = {tensor: tuple(shape) for tensor, (_, *shape) in build.spec(name)["tensors"].items()}
    return raw, {t: inmemory.Stored(np.broadcast_to(np.float32(0), shape)) for t, shape in shapes.items()}


def bound(name: str, **changes: Any) -> inmemory.Model:
    raw, stored = family(name)
    return inmemory.bound(copy.deepcopy(raw), stored, **changes)


def rope(name: str, **changes: Any) -> dict[str, Any]:
    """The family's RoPE with some of its words changed."""
    return family(name)[0]["rope_parameters"] | changes


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1, "layer_types": ABSENT},
        "use_sliding_window",
    ),
    (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": ABSENT,
            "max_window_layers": 1,
            "layer_types": ABSENT,
            "max_position_embeddings": 8192,
        },
        "use_sliding_window",
    ),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
    ("qwen2", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4}}, "llama3"),
    ("qwen2", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "beta_fast"),
    ("qwen2", {"rope_parameters": YARN | {"truncate": False}}, "truncate"),
    ("gpt-oss", {"rope_parameters": ABSENT}, "RoPE is not configured"),
    ("gpt-oss", {"rope_parameters": None, "rope_scaling": None, "rope_theta": 1e5}, "RoPE is not configured"),
    ("ministral3", {"rope_parameters": ABSENT}, "RoPE is not configured"),
    ("iquest-coder", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("iquest-coder", {"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
    ("internlm3", {"hidden_act": "gelu"}, "hidden_act"),
    ("stablelm-epoch", {"use_parallel_residual": True}, "use_parallel_residual is true"),
    ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob is true"),
    ("qwen2moe", {"use_sliding_window": True, "sliding_window": 128, "layer_types": ABSENT}, "use_sliding_window"),
    ("qwen3moe", {"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 5, "sliding_window": 128}, "layer_types"),
    ("qwen2moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("qwen2moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen2moe", {"num_experts_per_tok": 6}, "6 experts of 5"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    ("qwen3moe", {"norm_topk_prob": ABSENT}, "norm_topk_prob is false"),
    ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "RoPE"),
    ("smollm3", {"no_rope_layers": ABSENT, "no_rope_layer_interval": 3}, "RoPE"),
    ("smollm3", {"mlp_bias": True}, "mlp_bias"),
    ("granite", {"hidden_act": "gelu"}, "hidden_act"),
    ("granitemoe", {"num_experts_per_tok": 7}, "7 experts of 5"),
    ("olmo2", {"attention_bias": True}, "attention_bias"),
    (
        "olmo3",
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}},
        "in the layers with a window",
    ),
    (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        "another base",
    ),
    (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "longrope"},
                "sliding_attention": {"rope_type": "default"},
            }
        },
        "RoPE scaling of full_attention",
    ),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("seed-oss", {"attention_out_bias": True}, "attention_out_bias"),
    ("seed-oss", {"mlp_bias": True}, "mlp_bias"),
    ("starcoder2", {"use_bias": False}, "use_bias"),
    ("starcoder2", {"hidden_act": "silu"}, "hidden_act"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual"),
    ("exaone4", {"sliding_window": 128}, "3 layers"),
    ("exaone4", {"sliding_window": ABSENT}, "3 layers"),
    ("hunyuan-dense", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "alpha"),
    ("cohere2", {"attention_bias": True}, "attention_bias"),
    ("cohere2", {"rope_parameters": YARN}, "yarn"),
    ("glm4", {"hidden_act": "gelu"}, "hidden_act"),
    ("glm4moe", {"num_experts_per_tok": 6}, "6 experts of 5"),
    ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
    ("gpt-oss", {"attention_bias": False}, "attention_bias"),
    ("minimax-m2", {"scoring_func": "softmax"}, "scoring_func"),
    ("minimax-m2", {"use_qk_norm": False}, "use_qk_norm"),
    ("mistral", {"hidden_act": "gelu"}, "hidden_act"),
    ("mistral", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4}}, "longrope"),
    ("mixtral", {"num_experts_per_tok": 6}, "6 experts of 5"),
    ("ministral3", {"model_type": "mistral4"}, "mistral4"),
    ("ministral3", {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma", {"attention_bias": True}, "attention_bias"),
    ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
    ("gemma2", {"query_pre_attn_scalar": ABSENT}, "query_pre_attn_scalar"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("gemma2", {"hidden_activation": "relu"}, "hidden_activation"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
    ("gemma3", {"sliding_window": None}, "sliding_window"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (
        "gemma3",
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e4}}},
        "full_attention",
    ),
    (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0},
            }
        },
        "in the layers with a window",
    ),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
    ("phi3-long", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "long_factor"),
    ("ernie4_5", {"use_bias": True}, "use_bias"),
    ("ernie4_5-moe", {"use_bias": True}, "use_bias"),
    ("ernie4_5-moe", {"moe_norm_min": 0.9}, "moe_norm_min"),
    ("ernie4_5-moe", {"moe_k": 6}, "6 experts of 5"),
    ("nemotron", {"hidden_act": "silu"}, "hidden_act"),
    ("nemotron", {"rope_parameters": YARN}, "yarn"),
]


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED, ids=[f"{n}, {w}" for n, _, w in REFUSED])
def test_what_the_run_time_cannot_do_is_refused_by_name(name: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SourceError, match=named) as refused:
        bound(name, **changes)
    assert refused.value.code == "model-unrunnable"


NAMES = sorted({name for name, _, _ in REFUSED})


@pytest.mark.parametrize("name", NAMES)
def test_the_families_themselves_are_not_refused(name: str) -> None:
    bound(name)


# All that say RoPE at the top of the config. A gpt-oss that scales nothing cannot say so in the old spelling.
WITH_ROPE = [
    name
    for name in FAMILIES
    if name != "gpt-oss-pattern" and "rope_theta" in str(family(name)[0].get("rope_parameters"))
    if FAMILIES[name].vectors is None
]


@pytest.mark.parametrize("name", WITH_ROPE)
def test_rope_in_the_spelling_of_transformers_4(name: str) -> None:
    """`rope_theta` and `rope_scaling` beside each other, a scaling's kind under `type`; `torch_dtype`."""
    said = family(name)[0].get("rope_parameters") or {}
    said = said.get("full_attention", said)
    scaling = {
        key: value for key, value in said.items() if key not in ("rope_theta", "rope_type", "partial_rotary_factor")
    }
    old: dict[str, Any] = {"rope_parameters": ABSENT, "rope_theta": said["rope_theta"]}
    old |= {"dtype": ABSENT, "torch_dtype": "bfloat16"}
    old |= {"rope_scaling": scaling | {"type": said["rope_type"]} if scaling else None}
    if "partial_rotary_factor" in said:
        old["partial_rotary_factor"] = said["partial_rotary_factor"]
    assert inmemory.keys(bound(name, **old)) == inmemory.keys(bound(name))


# Sizes that the tensors decide, and flags that are as transformers has them where nothing is said.
SILENT = ("num_key_value_heads", "hidden_act", "attention_bias", "mlp_bias", "attention_dropout", "sliding_window")


@pytest.mark.parametrize("value", [None, ABSENT], ids=["null", "absent"])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_config_leaves_out(name: str, value: Any) -> None:
    raw = family(name)[0]
    # Whose windows transformers takes from a default, and those that null has none of.
    skipped = {"cohere2", "gpt-oss", "olmo3", "gemma2", "gemma3", "phi3-long"}
    keys = [
        key for key in SILENT if key in raw and not (key == "sliding_window" and (name in skipped or value is ABSENT))
    ]
    if name in ("seed-oss", "glm4", "glm4moe"):
        keys = [key for key in keys if key != "attention_bias"]
    assert inmemory.keys(bound(name, **dict.fromkeys(keys, value))) == inmemory.keys(bound(name))


@pytest.mark.parametrize(
    ("name", "default"), [("cohere2", 4096), ("gpt-oss", 128), ("olmo3", 4096), ("gemma2", 4096), ("gemma3", 4096)]
)
def test_windows_that_a_config_leaves_to_transformers(name: str, default: int) -> None:
    assert inmemory.keys(bound(name, sliding_window=ABSENT))["attention.sliding_window"] == default


@pytest.mark.parametrize("name", ["cohere2", "gpt-oss", "gemma2", "gemma3"])
def test_other_layers_with_a_window_are_listed(name: str) -> None:
    n_layers = family(name)[0]["num_hidden_layers"]
    usual = inmemory.keys(bound(name))
    assert "attention.sliding_window_pattern" not in usual
    other = ["full_attention", *["sliding_attention"] * (n_layers - 1)]
    model = bound(name, layer_types=other)
    (listed,) = (entry.value for entry in list(model.keys()) if entry.key.endswith("sliding_window_pattern"))
    assert np.frombuffer(listed.payload, "?").tolist() == [False, *[True] * (n_layers - 1)]


@pytest.mark.parametrize(
    ("name", "said", "code"),
    [("glm4moe", False, "config-contradiction"), ("glm4moe-groups", True, "tensors-missing")],
)
def test_norms_of_queries_that_glms_config_denies(name: str, said: bool, code: str) -> None:
    """transformers takes them by the flag alone."""
    with raises(SourceError, code=code):
        bound(name, use_qk_norm=said)


def test_stablelm_in_its_first_spelling() -> None:
    old = {"rope_parameters": ABSENT, "layer_norm_eps": ABSENT, "rope_theta": 3e4, "rope_pct": 0.75, "norm_eps": 3e-5}
    keys = inmemory.keys(bound("stablelm-epoch", **old))
    assert (keys["rope.dimension_count"], keys["rope.freq_base"]) == (24, 3e4)
    assert keys["attention.layer_norm_epsilon"] == pytest.approx(3e-5)


def test_cohere2_has_no_head_of_its_own() -> None:
    raw, stored = family("cohere2")
    head = {"lm_head.weight": stored["model.embed_tokens.weight"]}
    with pytest.raises(SourceError, match="tie_word_embeddings is false"):
        inmemory.bound(raw, stored | head, tie_word_embeddings=False)


def test_olmo2_has_no_window() -> None:
    assert "attention.sliding_window" not in inmemory.keys(bound("olmo2", sliding_window=128))
    assert "attention.sliding_window" not in inmemory.keys(bound("olmo3", sliding_window=None))


def test_the_base_that_a_config_leaves_to_transformers() -> None:
    bases = {name: inmemory.keys(bound(name, rope_parameters=ABSENT))["rope.freq_base"] for name in ("olmo2", "olmo3")}
    assert bases == {"olmo2": 1e4, "olmo3": 5e5}


def test_olmo3_may_scale_rope_where_there_is_no_window() -> None:
    plain = {"rope_type": "default", "rope_theta": 50_000.0}
    keys = inmemory.keys(bound("olmo3", rope_parameters={"full_attention": YARN, "sliding_attention": plain}))
    assert (keys["rope.scaling.type"], keys["rope.scaling.factor"]) == ("yarn", 4.0)
    old = inmemory.keys(bound("olmo3", rope_parameters=ABSENT, rope_theta=50_000.0, rope_scaling=YARN))
    assert old == keys


def test_a_window_that_starcoder2_loses_is_said() -> None:
    assert [c.code for c in bound("starcoder2", sliding_window=128).warnings] == ["window-ignored"]
    assert bound("starcoder2", sliding_window=640).warnings == []


@pytest.mark.parametrize("name", ["mistral3", "ministral3"])
def test_mistral3s_base_where_rope_has_none(name: str) -> None:
    raw = family(name)[0]
    said = {"rope_parameters": {"rope_type": "default"}}
    changes = {"text_config": raw["text_config"] | said} if "text_config" in raw else said
    assert inmemory.keys(bound(name, **changes))["rope.freq_base"] == 1e4


@pytest.mark.parametrize(("beside", "expected"), [(7, 7), (ABSENT, 4096)])
def test_phi3s_original_context_stands_beside_rope(beside: Any, expected: int) -> None:
    within = rope("phi3-long", original_max_position_embeddings=21)
    keys = inmemory.keys(bound("phi3-long", rope_parameters=within, original_max_position_embeddings=beside))
    assert keys["rope.scaling.original_context_length"] == expected


def test_hunyuans_alpha_is_another_base() -> None:
    said = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10_000.0}
    keys = inmemory.keys(bound("hunyuan-dense", rope_parameters=said))
    assert keys["rope.freq_base"] == pytest.approx(10_000.0 * 1000.0 ** (64 / 62))
    assert keys["rope.scaling.type"] == "none"


def test_minimax_rotates_what_rotary_dim_says() -> None:
    assert (
        inmemory.keys(bound("minimax-m2", rope_parameters=rope("minimax-m2", partial_rotary_factor=1.0)))[
            "rope.dimension_count"
        ]
        == family("minimax-m2")[0]["rotary_dim"]
    )
    assert inmemory.keys(bound("minimax-m2-saved"))["rope.dimension_count"] == 32


def with_next_layer() -> tuple[dict[str, Any], dict[str, inmemory.Stored]]:
    """GLM-4.5 as published: a layer more than num_hidden_layers, which predicts a token further."""
    raw, stored = family("glm4moe")
    last = {name.replace("layers.2.", "layers.3."): one for name, one in stored.items() if ".layers.2." in name}
    shapes = {"eh_proj": (256, 512), "enorm": (256,), "hnorm": (256,), "shared_head.norm": (256,)}
    extra = {
        f"model.layers.3.{n}.weight": inmemory.Stored(np.broadcast_to(np.float32(0), s)) for n, s in shapes.items()
    }
    return raw | {"num_nextn_predict_layers": 1}, stored | last | extra


def test_glms_next_layer_is_written_where_it_is_stored() -> None:
    model = inmemory.bound(*with_next_layer())
    keys = inmemory.keys(model)
    assert (keys["block_count"], keys["nextn_predict_layers"]) == (4, 1)
    names = {target.name for target in model.targets}
    assert {f"blk.3.nextn.{part}.weight" for part in ("eh_proj", "enorm", "hnorm", "shared_head_norm")} <= names
    keys = inmemory.keys(bound("glm4moe", num_nextn_predict_layers=1))
    assert (keys["block_count"], keys["nextn_predict_layers"]) == (3, 0)


def test_glm_with_layers_that_nothing_tells_is_refused() -> None:
    raw, stored = with_next_layer()
    with pytest.raises(SourceError, match="4 layers are stored"):
        inmemory.bound(raw, stored, num_nextn_predict_layers=0)


def test_a_stack_of_experts_in_memory_form_is_the_same_model(tmp_path: Path) -> None:
    """Gate and up fused, as transformers 5 holds them; its names without numbers."""
    raw, stored = family("qwen3moe")
    rest = {name: one for name, one in stored.items() if ".experts." not in name}
    layers, zero = range(raw["num_hidden_layers"]), np.float32(0)
    fused = {
        f"model.layers.{i}.mlp.experts.{name}": inmemory.Stored(np.broadcast_to(zero, shape))
        for i in layers
        for name, shape in (("gate_up_proj", (5, 2048, 256)), ("down_proj", (5, 256, 1024)))
    }
    shapes = {t.name: t.tensor.spec.shape for t in bound("qwen3moe").targets}
    assert {t.name: t.tensor.spec.shape for t in inmemory.bound(raw, rest | fused).targets} == shapes


def test_gemma3_in_the_spelling_of_transformers_4() -> None:
    """RoPE by kind was `rope_theta` with `rope_scaling` for the one, and `rope_local_base_freq` for the other."""
    old = {"rope_parameters": ABSENT, "rope_theta": 2e6, "rope_local_base_freq": 3e4}
    keys = inmemory.keys(bound("gemma3", **old, rope_scaling={"rope_type": "linear", "factor": 8.0}))
    assert (keys["rope.freq_base"], keys["rope.freq_base_swa"]) == (2e6, 3e4)
    assert (keys["rope.scaling.type"], keys["rope.scaling.factor"]) == ("linear", 8.0)


def test_gemma3_by_the_defaults_of_transformers() -> None:
    """The published 4B says no more than four numbers of its text half."""
    said = ("num_hidden_layers", "hidden_size", "intermediate_size", "sliding_window", "query_pre_attn_scalar")
    raw = family("gemma3")[0]
    left_out = [key for key in raw if key not in (*said, "architectures", "model_type", "max_position_embeddings")]
    assert inmemory.keys(bound("gemma3", **dict.fromkeys(left_out, ABSENT))) == inmemory.keys(bound("gemma3"))


def test_gemma3_without_any_window_has_none() -> None:
    keys = inmemory.keys(bound("gemma3", layer_types=ABSENT, sliding_window_pattern=1))
    assert not {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"} & keys.keys()


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_phi3_in_the_spelling_of_older_configs(kind: str) -> None:
    said = rope("phi3-long", rope_type=kind)
    assert inmemory.keys(bound("phi3-long", rope_parameters=said)) == inmemory.keys(bound("phi3-long"))


def test_phi3_takes_the_attention_factor_that_a_config_states() -> None:
    keys = inmemory.keys(bound("phi3-long", rope_parameters=rope("phi3-long", attention_factor=1.25)))
    assert keys["rope.scaling.attn_factor"] == 1.25


def test_the_long_factors_are_warned_of() -> None:
    assert "long-factors" in [warning.code for warning in bound("phi3-long").warnings]
    assert "long-factors" not in [warning.code for warning in bound("phi3").warnings]


@pytest.mark.parametrize("name", ["mistral", "mixtral", "phi3"])
def test_a_window_that_the_run_time_lacks_is_warned_of(name: str) -> None:
    assert "window-ignored" in [warning.code for warning in bound(name, sliding_window=64).warnings]
    assert "window-ignored" not in [warning.code for warning in bound(name, sliding_window=640).warnings]
    assert "window-ignored" not in [warning.code for warning in bound(name).warnings]


def test_ministral3_states_an_attention_factor_that_the_run_time_does_not_come_to() -> None:
    """The runtime divides by that of `mscale_all_dim`, and takes 1 for `mscale`."""
    usual = inmemory.keys(bound("ministral3"))
    assert "rope.scaling.attn_factor" not in usual and usual["rope.scaling.yarn_log_multiplier"] == 1.0
    other = inmemory.keys(bound("ministral3", rope_parameters=rope("ministral3", mscale=2.0)))
    wanted = (1 + 0.2 * np.log(4)) / (1 + 0.1 * np.log(4))
    assert other["rope.scaling.attn_factor"] == pytest.approx(wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_a_wrapper_or_its_section_may_say_that_the_head_is_the_embedding(tied: bool) -> None:
    section = family("mistral3")[0]["text_config"]
    model = bound("mistral3", tie_word_embeddings=not tied, text_config=section | {"tie_word_embeddings": tied})
    assert model.is_tied
    with pytest.raises(SourceError) as refused:
        bound("mistral3", tie_word_embeddings=False, text_config=section | {"tie_word_embeddings": False})
    assert refused.value.code == "checkpoint-mismatch"


@pytest.mark.parametrize("name", ["mistral3", "gemma3-it"])
def test_a_vision_half_that_is_left_out_is_warned_of(name: str) -> None:
    assert "text-half" in [warning.code for warning in bound(name).warnings]


@pytest.mark.parametrize("start", [0, 2])
def test_ernies_first_layer_with_experts_must_be_as_the_config_says(start: int) -> None:
    with pytest.raises(SourceError) as refused:
        bound("ernie4_5-moe", moe_layer_start_index=start)
    assert refused.value.code == "checkpoint-mismatch"


def test_ernies_fused_matrices_are_taken_apart() -> None:
    """As the publisher's own program stores them, under a prefix of its own."""
    raw, stored = family("ernie4_5")
    fused = {name.replace("model.", "ernie."): tensor for name, tensor in stored.items()}
    for i in range(raw["num_hidden_layers"]):
        layer = f"ernie.layers.{i}."
        for part in ("q", "k", "v"):
            del fused[f"{layer}self_attn.{part}_proj.weight"]
        for part in ("gate", "up"):
            del fused[f"{layer}mlp.{part}_proj.weight"]
        n_rows = (raw["num_attention_heads"] + 2 * raw["num_key_value_heads"]) * raw["head_dim"]
        fused[f"{layer}self_attn.qkv_proj.weight"] = zeros(n_rows, raw["hidden_size"])
        fused[f"{layer}mlp.up_gate_proj.weight"] = zeros(2 * raw["intermediate_size"], raw["hidden_size"])
    shapes = {target.name: target.tensor.spec.shape for target in inmemory.bound(copy.deepcopy(raw), fused).targets}
    assert shapes == {target.name: target.tensor.spec.shape for target in bound("ernie4_5").targets}


def zeros(*shape: int) -> inmemory.Stored:
    return inmemory.Stored(np.broadcast_to(np.float32(0), shape))
