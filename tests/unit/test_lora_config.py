"""adapter_config.json: the scale of every module, by PEFT's rules and by MLX's, and what rules an adapter out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from streamconv.lora.config import MAX_CHOICES, n_choices
from tests import loras

Q, K, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}}


def codes(raw: dict[str, Any]) -> list[str]:
    return [problem.code for problem in loras.config(raw).problems]


@pytest.mark.parametrize(
    ("settings", "module", "rank", "scale"),
    [
        ({}, Q, 8, 12 / 8),
        ({"r": 6, "lora_alpha": 9, "use_rslora": True}, Q, 6, 9 / math.sqrt(6)),
        ({"lora_alpha": 0.5}, Q, 8, 0.0625),
        ({"lora_alpha": -4}, Q, 8, -0.5),
        ({"lora_alpha": 0}, Q, 8, 0.0),
        ({"alpha_pattern": {"q_proj": 2}}, Q, 8, 0.25),
        ({"alpha_pattern": {"q_proj": 2}}, K, 8, 1.5),
        ({"alpha_pattern": {"q_proj": 0}}, Q, 8, 0.0),
        ({"alpha_pattern": {"proj": 2}}, Q, 8, 1.5),  # a pattern begins where the name or a part of it begins
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2}}, Q, 8, 0.25),
        ({"alpha_pattern": {r"model\.layers\.[0-3]\..*": 2}}, Q, 8, 0.25),
        ({"alpha_pattern": {"self_attn": 2}}, Q, 8, 1.5),  # and it ends where the name ends
        ({"alpha_pattern": {"q_proj": 2, f"{Q}": 4}}, Q, 8, 0.25),  # the first in file order
        ({"alpha_pattern": {f"{Q}": 4, "q_proj": 2}}, Q, 8, 0.5),
        ({"alpha_pattern": {"q_proj": 2}, "use_rslora": True}, Q, 4, 1.0),
    ],
)
def test_peft_scales(settings: dict[str, Any], module: str, rank: int, scale: float) -> None:
    assert loras.config(loras.PEFT | settings).scale(module, rank) == pytest.approx(scale, rel=1e-15, abs=0)


@pytest.mark.parametrize(
    ("patterns", "module", "rank"),
    [({}, Q, 8), ({"q_proj": 6}, Q, 6), ({"q_proj": 6}, K, 8), ({r".*\.o_proj": 2, "o_proj": 3}, OUT, 2)],
)
def test_peft_ranks(patterns: dict[str, int], module: str, rank: int) -> None:
    assert loras.config(loras.PEFT | {"rank_pattern": patterns}).rank(module) == rank


def test_alpha_and_rank_patterns_are_independent() -> None:
    config = loras.config(loras.PEFT | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"k_proj": 16}})
    assert (config.rank(Q), config.scale(Q, 4), config.rank(K), config.scale(K, 8)) == (4, 3.0, 8, 2.0)


def test_absent_keys_have_pefts_defaults() -> None:
    config = loras.config({"peft_type": "LORA"})
    assert (config.rank(Q), config.scale(Q, 8)) == (8, 1.0)
    assert [warning.code for warning in config.warnings] == ["alpha-default"]


@pytest.mark.parametrize(
    ("parameters", "scale"), [({"rank": 8, "scale": 20.0}, 20.0), ({"rank": 8, "scale": 2.0, "alpha": 16}, 2.0)]
)
def test_mlx_scales(parameters: dict[str, Any], scale: float) -> None:
    assert loras.config({"lora_parameters": parameters}).scale(Q, 8) == scale


@pytest.mark.parametrize(
    ("parameters", "kind", "hint"),
    [
        ({"rank": 8, "scale": 10.0, "alpha": 16}, "lora", "--scale 20"),
        ({"rank": 8, "scale": 2.0, "alpha": 16}, None, "--scale 4"),
    ],
)
def test_an_alpha_that_mlx_does_not_use_is_told(parameters: dict[str, Any], kind: str | None, hint: str) -> None:
    (warning,) = loras.config({"fine_tune_type": kind, "lora_parameters": parameters}).warnings
    assert warning.code == "mlx-alpha"
    assert f"scale {parameters['scale']:g} was used" in warning.message
    assert warning.message.endswith(hint)


@pytest.mark.parametrize("alpha", [None, 0, 8])  # 8 is the rank: both rules agree
def test_an_alpha_that_agrees_is_not(alpha: float | None) -> None:
    assert not loras.config({"lora_parameters": {"rank": 8, "scale": 2.0, "alpha": alpha}}).warnings


@pytest.mark.parametrize("raw", [loras.PEFT, MLX, {}, {"lora_parameters": {}}])
def test_a_given_scale_is_every_modules(raw: dict[str, Any]) -> None:
    config = loras.config(raw, scale=0.75)
    assert (config.scale(Q, 8), config.scale(K, 3), config.rank(Q)) == (0.75, 0.75, None)
    assert not config.problems
    assert not config.warnings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"peft_type": "LOHA"}, ["peft-type"]),
        ({"init_lora_weights": "pissa"}, ["init"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["init"]),
        ({"init_lora_weights": "olora"}, ["init"]),
        ({"init_lora_weights": "corda"}, ["init"]),
        ({"init_lora_weights": "loftq"}, ["init"]),
        ({"init_lora_weights": "lora_ga"}, ["init"]),
        ({"init_lora_weights": "of-next-year"}, ["init"]),
        ({"arrow_config": {"top_k": 3}}, ["arrow"]),
        ({"kasa_config": {}}, ["kasa"]),
        ({"invocation_string": "<|go|>"}, ["invocation"]),
        ({"alpha_pattern": {"(": 1}}, ["pattern"]),
        ({"rank_pattern": {"(.*a)*b": 1}}, ["pattern"]),
        ({"rank_pattern": {".*b.*d.*f.*h": 1}}, ["pattern"]),
        ({"alpha_pattern": {".?" * 30 + "!": 3}}, ["pattern"]),
        ({"alpha_pattern": {"(.|.)" * 24: 3}}, ["pattern"]),
        ({"alpha_pattern": {r"(?:.\)|[)]*)+": 3}}, ["pattern"]),
        ({"alpha_pattern": {"(?>a)": 3, "q_proj": 3}}, ["pattern"]),
        ({"alpha_pattern": {"a{99999999999999}": 3}}, ["pattern"]),
        ({"alpha_pattern": {"(" * 240 + ")" * 240: 3, "x" * 501: 3}}, ["pattern"]),
        ({f"{kind}_pattern": {f"{x}.*.*.*": 1 for x in "abc"} for kind in ("rank", "alpha")}, ["pattern"] * 5),
        ({"peft_type": "VERA", "init_lora_weights": "olora", "kasa_config": {}}, ["peft-type", "init", "kasa"]),
    ],
)
def test_what_is_no_plain_lora(settings: dict[str, Any], expected: list[str]) -> None:
    assert codes(loras.PEFT | settings) == expected


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": init} for init in (True, False, "gaussian", "Gaussian", "eva", "mica", None)),
        {"init_lora_weights": "orthogonal"},
        {"num_key_value_heads": 2},  # which Ollama reads
        {"fan_in_fan_out": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"use_qalora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"velora_config": {"num_groups": 8}},
        {"monteclora_config": {"num_samples": 2}},
        {"loftq_config": {}},
        {"corda_config": {}},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
        {"alora_invocation_tokens": [1, 2], "invocation_string": "<|go|>"},
    ],
)
def test_flags_without_effect_on_the_tensors(settings: dict[str, Any]) -> None:
    config = loras.config(loras.PEFT | settings)
    assert not config.problems
    assert not config.warnings


def test_a_key_of_another_peft_is_told() -> None:
    config = loras.config(loras.PEFT | {"use_quaternions": True, "off": None})
    assert [warning.code for warning in config.warnings] == ["unknown-config"]
    assert "use_quaternions" in config.warnings[0].message


def test_activated_lora_has_its_tokens() -> None:
    assert loras.config(loras.PEFT | {"alora_invocation_tokens": [5, 3]}).invocation_tokens == (5, 3)


@pytest.mark.parametrize(
    ("settings", "modules"),
    [
        ({"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}, {Q, OUT}),
        ({"target_modules_bd_b": ["k_proj"], "nblocks": 4}, {K}),
        ({"target_modules_bd_a": ["down_proj"], "nblocks": 2}, set()),
        ({"target_modules_bd_a": ["o_proj"], "nblocks": 1}, set()),
    ],
)
def test_bd_lora_is_of_the_modules_it_names(settings: dict[str, Any], modules: set[str]) -> None:
    config = loras.config(loras.PEFT | {"use_bdlora": settings})
    assert {module for module in (Q, K, OUT) if any(config.module_problems(module))} == modules


@pytest.mark.parametrize(
    ("ranges", "replicated"),
    [(None, False), ([], False), ([[0, 4]], False), ([[0, 2], [2, 4]], False), ([[0, 3], [1, 4]], True),
     ([[0, 3]], True), ([[0, 10**12]], True), ([[-(10**12), 4]], True)],
)  # fmt: skip
def test_layer_replication(ranges: Any, replicated: bool) -> None:
    assert loras.config(loras.PEFT | {"layer_replication": ranges}).replicated_layers(4) is replicated


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (MLX | {"fine_tune_type": "full"}, ["full"]),
        (MLX | {"fine_tune_type": "lokr"}, ["fine-tune-type"]),
        ({"lora_parameters": {"rank": 8, "alpha": 16}}, ["scale"]),
        ({"num_layers": 8}, ["config"]),
        ({}, ["config"]),
    ],
)
def test_what_mlx_configs_rule_out(raw: dict[str, Any], expected: list[str]) -> None:
    assert codes(raw) == expected


@pytest.mark.parametrize(
    ("raw", "is_dora"),
    [
        (loras.PEFT | {"use_dora": True}, True),
        (loras.PEFT, False),
        (MLX | {"fine_tune_type": "dora"}, True),
        ({"use_dora": True, "lora_parameters": {"rank": 8, "scale": 1}}, True),
        (MLX | {"use_dora": True}, False),  # fine_tune_type says more
    ],
)
def test_dora(raw: dict[str, Any], is_dora: bool) -> None:
    assert loras.config(raw).is_dora is is_dora


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 1.5}, "r is 1.5"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "q_proj is None"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj is 0"),
        ({"rank_pattern": {"q_proj": "4"}}, "q_proj is '4'"),
        ({"alora_invocation_tokens": [-1]}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": ["a"]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0]]}, "layer_replication"),
        ({"layer_replication": [["a", "b"]]}, "layer_replication"),
        ({"use_bdlora": True}, "use_bdlora"),
        ({"use_bdlora": {"target_modules_bd_a": [3], "nblocks": 2}}, "target_modules_bd_a"),
    ],
)
def test_nonsense_is_named(settings: dict[str, Any], named: str) -> None:
    (problem,) = loras.config(loras.PEFT | settings).problems
    assert problem.code == "config"
    assert named in problem.message


@pytest.mark.parametrize("parameters", [{"rank": "8"}, {"scale": "1.5"}, {"alpha": [16]}])
def test_nonsense_of_mlx_is_named(parameters: dict[str, Any]) -> None:
    (problem,) = loras.config({"lora_parameters": {"rank": 8, "scale": 2.0} | parameters}).problems
    assert next(iter(parameters)) in problem.message


def test_all_nonsense_is_named() -> None:
    settings = {"r": "8", "lora_alpha": "12", "rank_pattern": {"q_proj": "4"}, "use_dora": 1, "kasa_config": {}}
    config = loras.config(loras.PEFT | settings)
    assert [problem.code for problem in config.problems] == ["config"] * 4 + ["kasa"]
    assert config.rank(Q) is None  # it says none that anything could be held against


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", 1),
        (Q, 1),
        (r"model\.layers\.\d+\.mlp", 8),
        (r".*\.[0-9]+\.x", 64 * 8),
        (r"\\\\d+", 8),  # an escaped backslash, and a letter
        (r"[|(*?]", 1),
        (r"[]*]+", 64),
        ("(a|b)(?:c|d|e)", 6),
        ("(a|(b|c))?", 8),
        ("a|b", 2),
        ("a)|(b", 2),
        ("x{3}y??z*?", 8 * 2 * 8),
        (rf"layers\.(?:{'|'.join(map(str, range(32)))})\.self_attn\.(?:q|k|v|o)_proj", 128),
        (r".*\.layers\.\d+\.(self_attn|mlp)\..*_proj", 64 * 8 * 2 * 64),
        ("(?!lm_head).*", 64),
        ("(a)*", math.inf),
        ("(a){2}", math.inf),
        ("(?P=x)", math.inf),
    ],
)
def test_what_a_pattern_may_cost(pattern: str, expected: float) -> None:
    assert n_choices(pattern) == expected


def test_patterns_that_people_write_are_taken() -> None:
    patterns = [
        *(f"model.layers.{i}.self_attn.{x}_proj" for i in range(80) for x in "qkvo"),
        rf"model\.layers\.(?:{'|'.join(map(str, range(80)))})\.self_attn\.(?:q|k|v|o)_proj",
        r".*\.layers\.\d+\.(self_attn|mlp)\..*_proj",
        r"model\.layers\.[0-3]\..*",
        r"^model\.layers\.(?!0\.)\d+\.mlp\.(gate|up)_proj$",
    ]
    assert sum(map(n_choices, patterns)) < MAX_CHOICES / 2
    assert not loras.config(loras.PEFT | {"rank_pattern": dict.fromkeys(patterns, 8)}).problems
