"""Seed-OSS: Llama's layers, half-split RoPE, biases of Q, K and V.

Sources: transformers' SeedOssConfig and modeling_seed_oss.py; SeedOssModel in llama.cpp's conversion/olmo.py, and
seed-oss.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import Recipe

ROPE = Rope(theta=10_000.0, context=524_288)

NO_BIAS = tuple(
    decoder.flag(key, only=False, silent=False, why="the runtime does not support it")
    for key in ("attention_out_bias", "mlp_bias")
)

RECIPE = Recipe(
    arch="seed_oss",
    description="Seed-OSS",
    hf_names=("SeedOssForCausalLM",),
    bodies=("SeedOssModel",),
    model_type="seed_oss",
    dims=decoder.dims(head=128),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(bias="attention_bias"),
        *decoder.norm("post_attention_layernorm", "post_attention_norm"),
        *decoder.gated(),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-6),
    refusals=decoder.refusals(ROPE, decoder.SILU, *NO_BIAS),
    flags={"attention_bias": True},
    default_pre="seed-coder",
)
