"""OLMoE: experts in every layer, norms of Q and K over all heads.

Sources: transformers' OlmoeConfig and modeling_olmoe.py; OlmoeModel in llama.cpp's conversion/olmo.py, and olmoe.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import Recipe, Refusal

ROPE = Rope(theta=10_000.0, context=4096)

RECIPE = Recipe(
    arch="olmoe",
    description="OLMoE",
    hf_names=("OlmoeForCausalLM",),
    bodies=("OlmoeModel",),
    model_type="olmoe",
    dims=decoder.dims() | decoder.expert_dims("num_experts", 8),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(),
        *decoder.norm("self_attn.q_norm", "attn_q_norm", "A*D"),
        *decoder.norm("self_attn.k_norm", "attn_k_norm", "K*D"),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.router("mlp.gate"),
        *decoder.experts(width="F"),
        decoder.OUTPUT_NORM,
        decoder.OWN_HEAD,
    ),
    drops=decoder.DROPS,
    keys=(*decoder.keys(ROPE, epsilon=1e-5), *decoder.expert_keys(None)),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        decoder.FULL_WIDTH,
        decoder.USED_EXPERTS,
        decoder.flag("attention_bias", only=False, silent=False, why="the runtime does not support it"),
        decoder.flag(
            "norm_topk_prob", only=False, silent=False, why="the runtime does not normalise the experts' weights"
        ),
        Refusal(
            "{A} heads and {K} key-value heads, but the runtime needs equal numbers",
            lambda m: m.dims["A"] != m.dims["K"],
        ),
        Refusal(
            "clip_qkv is {clip_qkv}, but the runtime does not clip",
            lambda m: m.config.positive("clip_qkv") is not None,
        ),
    ),
    default_pre="olmo",
)
