"""Qwen3-MoE: Qwen3's attention, and experts in every layer.

Sources: transformers' Qwen3MoeConfig and modeling_qwen3_moe.py; Qwen3MoeModel in llama.cpp's conversion/qwen.py, and
qwen3moe.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures import qwen3
from streamconv.architectures.qwen2moe import ALL_EXPERTS
from streamconv.recipe import Dim, Recipe

RECIPE = Recipe(
    arch="qwen3moe",
    description="Qwen3-MoE",
    hf_names=("Qwen3MoeForCausalLM",),
    bodies=("Qwen3MoeModel",),
    model_type="qwen3_moe",
    dims=decoder.dims()
    | decoder.expert_dims(("num_experts", "num_local_experts"), 8, "moe_intermediate_size")
    | {"F": Dim("intermediate_size", 6144)},
    tensors=(
        decoder.EMBEDDING,
        *qwen3.ATTENTION,
        *decoder.router("mlp.gate"),
        *decoder.experts(),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    drops=decoder.DROPS,
    keys=(*decoder.keys(qwen3.ROPE, epsilon=1e-6), *decoder.expert_keys()),
    refusals=decoder.refusals(
        qwen3.ROPE,
        decoder.SILU,
        decoder.NO_WINDOW_AT_ALL,
        decoder.USED_EXPERTS,
        qwen3.NO_BIAS,
        *ALL_EXPERTS,
        decoder.flag("norm_topk_prob", only=True, silent=False, why="the runtime normalises the experts' weights"),
    ),
    default_pre="qwen2",
)
