"""Qwen3, dense: as Qwen2, with norms of Q and K and without biases.

Sources: transformers' Qwen3Config and modeling_qwen3.py; Qwen3Model in llama.cpp's conversion/qwen.py, and qwen3.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import Recipe

ROPE = Rope(theta=10_000.0, context=32_768)

NO_BIAS = decoder.flag(
    "attention_bias", only=False, silent=False, why="the runtime has no place for that of the output"
)

ATTENTION = (
    *decoder.norm("input_layernorm", "attn_norm"),
    *decoder.attention(),
    *decoder.norm("self_attn.q_norm", "attn_q_norm", "D"),
    *decoder.norm("self_attn.k_norm", "attn_k_norm", "D"),
    *decoder.norm("post_attention_layernorm", "ffn_norm"),
)

RECIPE = Recipe(
    arch="qwen3",
    description="Qwen3, dense",
    hf_names=("Qwen3ForCausalLM",),
    bodies=("Qwen3Model",),
    model_type="qwen3",
    dims=decoder.dims(head=128),
    tensors=(decoder.EMBEDDING, *ATTENTION, *decoder.gated(), decoder.OUTPUT_NORM, decoder.HEAD),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-6),
    refusals=decoder.refusals(ROPE, decoder.SILU, decoder.NO_WINDOW, NO_BIAS),
    default_pre="qwen2",
)
