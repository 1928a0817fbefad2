"""Mixtral 8x7B and 8x22B: Mistral's attention, and experts in every layer.

Sources: transformers' MixtralConfig and modeling_mixtral.py; LlamaModel in llama.cpp's conversion/llama.py, and
llama.cpp, which normalises the weights of the chosen experts, as Mixtral does.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import LLAMA3_FACTORS, Rope
from streamconv.recipe import Computed, Recipe

ROPE = Rope(theta=1_000_000.0, context=131_072, scalings=("linear", "yarn", "llama3"))

RECIPE = Recipe(
    arch="llama",
    description="Mixtral",
    hf_names=("MixtralForCausalLM",),
    bodies=("MixtralModel",),
    model_type="mixtral",
    dims=decoder.dims() | decoder.expert_dims("num_local_experts", 2),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(permuted=True),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.router("block_sparse_moe.gate"),
        *decoder.experts("block_sparse_moe.", "F", names="w1 w2 w3"),
        *decoder.stacked_experts("mlp.", "F"),  # transformers 5's names in memory, also used by adapters
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    computed=(Computed(LLAMA3_FACTORS, ROPE.llama3_factors),),
    drops=decoder.DROPS,
    keys=(*decoder.keys(ROPE, epsilon=1e-5), *decoder.expert_keys(None)),
    refusals=decoder.refusals(ROPE, decoder.SILU, decoder.USED_EXPERTS),
    caveats=(decoder.window_caveat("Mixtral", None),),
)
