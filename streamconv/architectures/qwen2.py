"""Qwen2, dense: Qwen2, Qwen2.5, and models distilled into them.

Sources: transformers' Qwen2Config and modeling_qwen2.py; Qwen2Model in llama.cpp's conversion/qwen.py, and qwen2.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import Recipe

ROPE = Rope(theta=10_000.0, context=32_768)

RECIPE = Recipe(
    arch="qwen2",
    description="Qwen2, Qwen2.5 and distillations into them",
    hf_names=("Qwen2ForCausalLM",),
    bodies=("Qwen2Model",),
    model_type="qwen2",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(bias=True),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.gated(),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-6),
    refusals=decoder.refusals(ROPE, decoder.SILU, decoder.FULL_WIDTH, decoder.NO_WINDOW),
    default_pre="qwen2",
)
