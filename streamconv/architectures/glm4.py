"""GLM-4 (0414), dense: norms before and after attention and feed-forward network, RoPE on half of each head.

Sources: transformers' Glm4Config and modeling_glm4.py, whose RoPE rotates adjacent pairs, as llama.cpp's does;
Glm4Model in llama.cpp's conversion/glm.py, and glm4.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import Recipe, SpecialTokens

ROPE = Rope(theta=10_000.0, context=131_072, partial=0.5)

# From Glm4Model.set_vocab, for special tokens that the tokenizer's files do not define.
SPECIAL_TOKENS = SpecialTokens(
    {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>"}
)

RECIPE = Recipe(
    arch="glm4",
    description="GLM-4, dense",
    hf_names=("Glm4ForCausalLM",),
    bodies=("Glm4Model",),
    model_type="glm4",
    dims=decoder.dims(head=128),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(bias="attention_bias"),
        *decoder.norm("post_self_attn_layernorm", "post_attention_norm"),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.linear("mlp.gate_up_proj", "ffn_up", "2*F H"),
        *decoder.linear("mlp.down_proj", "ffn_down", "H F"),
        *decoder.norm("post_mlp_layernorm", "post_ffw_norm"),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=0.00000015625),
    refusals=decoder.refusals(ROPE, decoder.SILU),
    flags={"attention_bias": True},
    default_pre="glm4",
    special_tokens=SPECIAL_TOKENS,
)
