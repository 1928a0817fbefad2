"""Mistral 7B, Nemo, Small (2409, 2501), Codestral and others: Llama's layers, with a window in the earliest models.

Sources: transformers' MistralConfig and modeling_mistral.py; LlamaModel in llama.cpp's conversion/llama.py, and
llama.cpp, which has no sliding window.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import LLAMA3_FACTORS, Rope
from streamconv.recipe import Computed, Recipe

ROPE = Rope(theta=10_000.0, context=131_072, scalings=("linear", "yarn", "llama3"))

WINDOW = 4096  # MistralConfig's default; null means no window

RECIPE = Recipe(
    arch="llama",
    description="Mistral 7B, Nemo, Small 2 and 3 and others of this name",
    hf_names=("MistralForCausalLM",),
    bodies=("MistralModel",),
    model_type="mistral",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(permuted=True),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.gated(),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    computed=(Computed(LLAMA3_FACTORS, ROPE.llama3_factors),),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-6),
    refusals=decoder.refusals(ROPE, decoder.SILU),
    caveats=(decoder.window_caveat("Mistral", WINDOW),),
    default_pre="tekken",
)
