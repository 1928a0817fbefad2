"""Llama, and other models of its architecture under the same name (SmolLM2, TinyLlama) or their own (IQuest-Coder).

Sources: transformers' LlamaConfig and modeling_llama.py; LlamaModel in llama.cpp's conversion/llama.py, and llama.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import LLAMA3_FACTORS, Rope
from streamconv.recipe import Computed, Recipe, Refusal

# transformers' defaults; 10000 is also llama.cpp's default if the key is missing.
ROPE = Rope(theta=10_000.0, context=2048, scalings=("linear", "yarn", "llama3"))

RECIPE = Recipe(
    arch="llama",
    description="Llama, SmolLM2, TinyLlama and others of this architecture",
    hf_names=("LlamaForCausalLM", "LLaMAForCausalLM", "IQuestCoderForCausalLM"),
    bodies=("LlamaModel", "IQuestCoderModel"),
    model_type="llama",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(permuted=True, bias="attention_bias", out_bias="attention_bias"),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.gated(bias="mlp_bias"),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    computed=(Computed(LLAMA3_FACTORS, ROPE.llama3_factors),),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-6),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        # Keys of IQuest-Coder's config, which Llama's does not have.
        decoder.NO_WINDOW,
        Refusal(
            "clip_qkv is {clip_qkv}, but the runtime does not clip in this architecture",
            lambda m: m.config.positive("clip_qkv") is not None,
        ),
    ),
    flags={"attention_bias": False, "mlp_bias": False},
)
