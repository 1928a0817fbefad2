"""Llama base models, and what uses their architecture under the same name (SmolLM2, TinyLlama).

Sources: transformers' LlamaConfig, modeling_llama.py and modeling_rope_utils.py; LlamaModel in llama.cpp's
convert_hf_to_gguf.py; llama-model.cpp and llama-context.cpp for what the run time makes of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from streamconv.recipe import F32, STRING, Computed, Config, Dim, Drop, Key, Model, PairHalves, Recipe, Tensor

ROPE_THETA = 10_000.0  # transformers' default, and what llama.cpp takes where the key is missing
# Scalings by their name in a config, as llama.cpp names them; llama3 is a tensor of factors instead of keys.
GGUF_SCALINGS = {"linear": "linear", "yarn": "yarn"}
SUPPORTED_SCALINGS = ("default", "linear", "yarn", "llama3")


def rope(config: Config) -> Config:
    """The section that describes RoPE: `rope_scaling`, where there is one, replaces `rope_parameters`."""
    return config.section("rope_scaling") or config.section("rope_parameters") or Config({}, config.file)


def rope_type(config: Config) -> str:
    return rope(config).text("rope_type") or rope(config).text("type") or "default"


def rope_base(model: Model) -> float:
    return rope(model.config).number("rope_theta") or model.config.number("rope_theta") or ROPE_THETA


def context_length(config: Config) -> int:
    return config.integer("max_position_embeddings") or 2048


def trained_context(config: Config) -> int:
    """The context length before scaling, in the order in which transformers looks for it."""
    name = "original_max_position_embeddings"
    return config.integer(name) or rope(config).integer(name) or context_length(config)


def scaling_type(model: Model) -> str | None:
    return GGUF_SCALINGS.get(rope_type(model.config))


def scaling_factor(model: Model) -> float | None:
    if rope_type(model.config) not in GGUF_SCALINGS:
        return None
    factor = rope(model.config).number("factor")
    return context_length(model.config) / trained_context(model.config) if factor is None else factor


def yarn_number(name: str, default: float) -> Key:
    """A key of YaRN that llama.cpp's converter writes where the config has it; zero means the default."""

    def value(model: Model) -> float | None:
        stated = rope(model.config).number(name) if rope_type(model.config) == "yarn" else None
        return None if stated is None else stated or default

    return Key("{arch}.rope.scaling.yarn_" + name, value, F32)


def yarn_trained_context(model: Model) -> int | None:
    return trained_context(model.config) if rope_type(model.config) == "yarn" else None


def llama3_factors(model: Model) -> NDArray[np.float32] | None:
    """[head size / 2]: by how much each frequency of RoPE is slowed down, in float32 as llama.cpp's converter."""
    if rope_type(model.config) != "llama3":
        return None
    section = rope(model.config)
    factor = np.float32(section.number("factor") or 8.0)
    low, high = section.number("low_freq_factor") or 1.0, section.number("high_freq_factor") or 4.0
    context = trained_context(model.config)
    exponents = np.arange(0, model.dims["D"], 2, dtype=np.float32) / np.float32(model.dims["D"])
    wavelengths = np.float32(2 * math.pi) / (np.float32(1) / np.power(np.float32(rope_base(model)), exponents))
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = np.float32(1) / ((np.float32(1) - smooth) / factor + smooth)
    return np.where(
        wavelengths < np.float32(context / high),
        np.float32(1),
        np.where(wavelengths > np.float32(context / low), factor, blended),
    )


def refuse(config: Config) -> Iterator[str]:
    if rope_type(config) not in SUPPORTED_SCALINGS:
        yield f"RoPE scaling {rope_type(config)!r} has no place in the GGUF architecture"
    if (config.text("hidden_act") or "silu") not in ("silu", "swish"):
        yield f"hidden_act is {config.text('hidden_act')!r}, and the run time computes silu"
    for section in (config, rope(config)):
        if section.number("partial_rotary_factor") not in (None, 1.0):
            yield "partial_rotary_factor: the run time rotates whole heads"


def projection(source: str, target: str, shape: str, heads: str | None = None) -> tuple[Tensor, Tensor]:
    """A linear layer of a block: its weight, and the bias that some models have."""
    source, target = f"model.layers.{{i}}.{source}", f"blk.{{i}}.{target}"
    rows = PairHalves(heads) if heads else None
    return (
        Tensor(f"{source}.weight", f"{target}.weight", shape, rows=rows),
        Tensor(f"{source}.bias", f"{target}.bias", shape.split()[0], rows=rows, required=False),
    )


RECIPE = Recipe(
    arch="llama",
    description="Llama, SmolLM2, TinyLlama and others of this architecture",
    hf_names=("LlamaForCausalLM", "LLaMAForCausalLM"),
    dims={
        "L": Dim("num_hidden_layers"),
        "V": Dim("vocab_size"),
        "H": Dim("hidden_size"),
        "F": Dim("intermediate_size"),
        "A": Dim("num_attention_heads", lambda d: d["H"] // d["D"] if "D" in d else None),
        "K": Dim("num_key_value_heads", lambda d: d.get("A")),
        "D": Dim("head_dim", lambda d: d["H"] // d["A"] if "A" in d else None),
    },
    tensors=(
        Tensor("model.embed_tokens.weight", "token_embd.weight", "V H"),
        Tensor("model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", "H"),
        *projection("self_attn.q_proj", "attn_q", "A*D H", heads="A"),
        *projection("self_attn.k_proj", "attn_k", "K*D H", heads="K"),
        *projection("self_attn.v_proj", "attn_v", "K*D H"),
        *projection("self_attn.o_proj", "attn_output", "H A*D"),
        Tensor("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", "H"),
        *projection("mlp.gate_proj", "ffn_gate", "F H"),
        *projection("mlp.down_proj", "ffn_down", "H F"),
        *projection("mlp.up_proj", "ffn_up", "F H"),
        Tensor("model.norm.weight", "output_norm.weight", "H"),
        Tensor("lm_head.weight", "output.weight", "V H", required=False),
    ),
    computed=(Computed("rope_freqs.weight", llama3_factors),),
    drops=(Drop("model.layers.{i}.self_attn.rotary_emb.inv_freq", "follows from the config"),),
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
        Key("{arch}.attention.layer_norm_rms_epsilon", lambda m: m.config.number("rms_norm_eps") or 1e-6, F32),
        Key("{arch}.rope.dimension_count", "D"),
        Key("{arch}.rope.freq_base", rope_base, F32),
        Key("{arch}.rope.scaling.type", scaling_type, STRING),
        Key("{arch}.rope.scaling.factor", scaling_factor, F32),
        Key("{arch}.rope.scaling.original_context_length", yarn_trained_context),
        yarn_number("beta_fast", 32.0),
        yarn_number("beta_slow", 1.0),
    ),
)
