"""Qwen1.5-MoE and Qwen2-MoE: routed experts and one shared expert in every layer.

Sources: transformers' Qwen2MoeConfig and modeling_qwen2_moe.py; Qwen2MoeModel in llama.cpp's conversion/qwen.py, and
qwen2moe.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._decoder import BLOCK, LAYER
from streamconv.architectures._rope import Rope
from streamconv.recipe import Dim, Key, Recipe, Refusal, Tensor

ROPE = Rope(theta=10_000.0, context=32_768)

# Configs may also define layers without experts, which the runtime does not support.
ALL_EXPERTS = (
    Refusal(
        "decoder_sparse_step is {decoder_sparse_step}, but the runtime has experts in all layers",
        lambda m: m.config.integer("decoder_sparse_step") not in (None, 1),
    ),
    Refusal(
        "mlp_only_layers is {mlp_only_layers}, but the runtime has experts in all layers",
        lambda m: bool(m.config.list_of("mlp_only_layers", int)),
    ),
)

RECIPE = Recipe(
    arch="qwen2moe",
    description="Qwen1.5-MoE and Qwen2-MoE",
    hf_names=("Qwen2MoeForCausalLM",),
    bodies=("Qwen2MoeModel",),
    model_type="qwen2_moe",
    dims=decoder.dims()
    | decoder.expert_dims(("num_experts", "num_local_experts"), 4, "moe_intermediate_size")
    | {"F": Dim("intermediate_size", "S"), "S": Dim("shared_expert_intermediate_size")},
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(bias="qkv_bias"),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.router("mlp.gate"),
        *decoder.experts(),
        Tensor(LAYER + "mlp.shared_expert_gate.weight", BLOCK + "ffn_gate_inp_shexp.weight", "1 H", f32=True),
        *decoder.gated("mlp.shared_expert.", "_shexp", "S"),
        decoder.OUTPUT_NORM,
        decoder.OWN_HEAD,
    ),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-6),
        *decoder.expert_keys(),
        Key("{arch}.expert_shared_feed_forward_length", "S"),
    ),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        decoder.FULL_WIDTH,
        decoder.NO_WINDOW_AT_ALL,
        decoder.USED_EXPERTS,
        *ALL_EXPERTS,
        decoder.flag(
            "norm_topk_prob", only=False, silent=False, why="the runtime does not normalise the experts' weights"
        ),
    ),
    flags={"qkv_bias": True},
    default_pre="qwen2",
)
