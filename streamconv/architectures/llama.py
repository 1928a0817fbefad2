"""Llama base models, and what uses their architecture under the same name (SmolLM2, TinyLlama).

Sources: transformers' LlamaConfig, modeling_llama.py and modeling_rope_utils.py; LlamaModel in llama.cpp's
convert_hf_to_gguf.py; llama-model.cpp and llama-context.cpp for what the run time makes of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from streamconv.recipe import (
    F32,
    STRING,
    Computed,
    Config,
    Dim,
    Drop,
    Key,
    Model,
    Op,
    Permute,
    Recipe,
    Refusal,
    Scalar,
    Tensor,
)

# transformers' defaults; 10000 is also what llama.cpp takes where the key is missing.
ROPE_THETA, CONTEXT_LENGTH, RMS_EPSILON = 10_000.0, 2048, 1e-6
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def context_length(config: Config) -> int:
    return config.integer("max_position_embeddings") or CONTEXT_LENGTH


def trained_context(config: Config) -> int:
    """The context length before scaling, in the order in which transformers looks for it."""
    name = "original_max_position_embeddings"
    return config.integer(name) or config.rope.integer(name) or context_length(config)


def scaling_factor(config: Config) -> float:
    """By how much linear scaling and YaRN stretch positions; what YaRN does not state is the growth of the context."""
    return config.rope.positive("factor") or context_length(config) / trained_context(config)


def yarn_attention(config: Config) -> float | None:
    """What the run time multiplies its own attention factor, 1 + ln(factor) / 10, by to reach the config's.

    llama.cpp's converter writes `yarn_attn_factor`, which llama-context.cpp reads and then overwrites.
    """
    factor = scaling_factor(config)
    wanted = config.rope.positive("attention_factor")
    scale, scale_all = config.rope.number("mscale"), config.rope.number("mscale_all_dim")
    if wanted is None and scale and scale_all:
        wanted = yarn_magnitude(factor, scale) / yarn_magnitude(factor, scale_all)
    return None if wanted is None else wanted / yarn_magnitude(factor, 1.0)


def yarn_magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 1.0 + 0.1 * scale * math.log(factor)


def for_scaling(*types: str, value: Callable[[Config], float | int | str | None]) -> Callable[[Model], Scalar | None]:
    """A key's value that only models with one of these RoPE scalings have."""
    return lambda model: value(model.config) if model.config.rope_type in types else None


def llama3_range(config: Config) -> tuple[float, float]:
    """low_freq_factor and high_freq_factor; llama.cpp's converter has these defaults, transformers has none."""
    return config.rope.positive("low_freq_factor") or 1.0, config.rope.positive("high_freq_factor") or 4.0


def not_yarns(key: str, fixed: float) -> Callable[[Model], bool]:
    """Whether a model's YaRN has another `key` than the run time."""
    return lambda model: model.config.rope_type == "yarn" and model.config.rope.positive(key) not in (None, fixed)


def llama3_factors(model: Model) -> NDArray[np.float32] | None:
    """[head size / 2]: by how much each frequency of RoPE is slowed down.

    In llama.cpp's order of float32 operations; only the power is rounded from float64, since torch's own differs
    between machines. Equal to llama.cpp's bits for the published models.
    """
    config = model.config
    if config.rope_type != "llama3":
        return None
    f32 = np.float32
    factor = config.rope.positive("factor") or 8.0
    low, high = llama3_range(config)
    context = trained_context(config)
    exponents = np.arange(0, model.dims["D"], 2, dtype=f32) / f32(model.dims["D"])
    with np.errstate(all="ignore"):  # of a hostile config; the factors that models have are far from any limit
        frequencies = 1 / np.power(config.rope_base(ROPE_THETA), exponents.astype(np.float64)).astype(f32)
        wavelengths = 1 / frequencies * f32(2 * math.pi)
        smooth = (1 / wavelengths * f32(context) - f32(low)) / f32(high - low)
        blended = 1 / ((1 - smooth) / f32(factor) + smooth)
    slow = np.where(wavelengths > f32(context / low), f32(factor), blended)
    return np.where(wavelengths < f32(context / high), f32(1), slow)


REFUSALS = (
    Refusal(
        "RoPE scaling {rope_type!r} has no place in the GGUF architecture",
        lambda m: m.config.rope_type not in ("default", "linear", "yarn", "llama3"),
    ),
    Refusal(
        "low_freq_factor of RoPE must be below high_freq_factor",
        lambda m: m.config.rope_type == "llama3" and llama3_range(m.config)[0] >= llama3_range(m.config)[1],
    ),
    # What llama.cpp has keys for, and does not read in a Llama model.
    *(
        Refusal(f"{key} of YaRN is not {fixed:g}, which the run time takes", not_yarns(key, fixed))
        for key, fixed in YARN_BETAS.items()
    ),
    Refusal(
        "truncate of YaRN is false, and the run time rounds its range",
        lambda m: m.config.rope_type == "yarn" and m.config.rope.flag("truncate") is False,
    ),
    Refusal(
        "partial_rotary_factor is not 1, and the run time rotates whole heads",
        lambda m: bool({c.number("partial_rotary_factor") for c in (m.config, m.config.rope)} - {None, 1.0}),
    ),
    Refusal(
        "hidden_act is {hidden_act!r}, and the run time computes silu",
        lambda m: (m.config.text("hidden_act") or "silu") not in ("silu", "swish"),
    ),
    Refusal("{A} heads do not share {K} key-value heads evenly", lambda m: m.dims["A"] % m.dims["K"] != 0),
)


def linear(source: str, target: str, shape: str, *ops: Op, bias: str) -> tuple[Tensor, Tensor]:
    """A layer's weight, and the bias that it has where the config's flag `bias` is true."""
    source, target = f"model.layers.{{i}}.{source}", f"blk.{{i}}.{target}"
    return (
        Tensor(f"{source}.weight", f"{target}.weight", shape, ops),
        Tensor(f"{source}.bias", f"{target}.bias", shape.split()[0], ops, required=bias),
    )


RECIPE = Recipe(
    arch="llama",
    description="Llama, SmolLM2, TinyLlama and others of this architecture",
    hf_names=("LlamaForCausalLM", "LLaMAForCausalLM"),
    bodies=("LlamaModel",),
    model_type="llama",
    dims={
        "L": Dim("num_hidden_layers"),
        "V": Dim("vocab_size"),
        "H": Dim("hidden_size"),
        "F": Dim("intermediate_size"),
        "A": Dim("num_attention_heads", "H/D"),
        "K": Dim("num_key_value_heads", "A"),
        "D": Dim("head_dim", "H/A"),
    },
    tensors=(
        Tensor("model.embed_tokens.weight", "token_embd.weight", "V H"),
        Tensor("model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", "H"),
        *linear("self_attn.q_proj", "attn_q", "A*D H", Permute("A"), bias="attention_bias"),
        *linear("self_attn.k_proj", "attn_k", "K*D H", Permute("K"), bias="attention_bias"),
        *linear("self_attn.v_proj", "attn_v", "K*D H", bias="attention_bias"),
        *linear("self_attn.o_proj", "attn_output", "H A*D", bias="attention_bias"),
        Tensor("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", "H"),
        *linear("mlp.gate_proj", "ffn_gate", "F H", bias="mlp_bias"),
        *linear("mlp.down_proj", "ffn_down", "H F", bias="mlp_bias"),
        *linear("mlp.up_proj", "ffn_up", "F H", bias="mlp_bias"),
        Tensor("model.norm.weight", "output_norm.weight", "H"),
        Tensor("lm_head.weight", "output.weight", "V H", required=False),
    ),
    computed=(Computed("rope_freqs.weight", llama3_factors),),
    drops=(
        Drop("model.layers.{i}.self_attn.rotary_emb.inv_freq", "follows from the config"),
        Drop("model.rotary_emb.inv_freq", "follows from the config"),
    ),
    keys=(
        Key("{arch}.vocab_size", "V"),
        Key("{arch}.block_count", "L"),
        Key("{arch}.context_length", lambda model: context_length(model.config)),
        Key("{arch}.embedding_length", "H"),
        Key("{arch}.feed_forward_length", "F"),
        Key("{arch}.attention.head_count", "A"),
        Key("{arch}.attention.head_count_kv", "K"),
        Key("{arch}.attention.key_length", "D"),
        Key("{arch}.attention.value_length", "D"),
        Key("{arch}.attention.layer_norm_rms_epsilon", lambda m: m.config.positive("rms_norm_eps") or RMS_EPSILON, F32),
        Key("{arch}.rope.dimension_count", "D"),
        Key("{arch}.rope.freq_base", lambda model: model.config.rope_base(ROPE_THETA), F32),
        Key("{arch}.rope.scaling.type", for_scaling("linear", "yarn", value=lambda config: config.rope_type), STRING),
        Key("{arch}.rope.scaling.factor", for_scaling("linear", "yarn", value=scaling_factor), F32),
        Key("{arch}.rope.scaling.original_context_length", for_scaling("yarn", value=trained_context)),
        Key("{arch}.rope.scaling.attn_factor", for_scaling("yarn", value=yarn_attention), F32),
        Key(
            "{arch}.rope.scaling.yarn_beta_fast", for_scaling("yarn", value=lambda c: c.rope.positive("beta_fast")), F32
        ),
        Key(
            "{arch}.rope.scaling.yarn_beta_slow", for_scaling("yarn", value=lambda c: c.rope.positive("beta_slow")), F32
        ),
    ),
    refusals=REFUSALS,
    flags={"attention_bias": False, "mlp_bias": False},
)
