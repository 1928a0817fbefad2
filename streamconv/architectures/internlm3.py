"""InternLM3: Llama's layers, with different config flags for the biases.

Sources: the publisher's modeling_internlm3.py (InternLM3Attention and InternLM3MLP); InternLM3Model in llama.cpp's
conversion/internlm.py, which writes it with the architecture llama.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import Recipe

ROPE = Rope(theta=10_000.0, context=32_768)

RECIPE = Recipe(
    arch="llama",
    description="InternLM3",
    hf_names=("InternLM3ForCausalLM",),
    bodies=("InternLM3Model",),
    model_type="internlm3",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(permuted=True, bias="qkv_bias", out_bias="bias"),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.gated(bias="bias"),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-6),
    refusals=decoder.refusals(ROPE, decoder.SILU),
    flags={"qkv_bias": False, "bias": False},
)
