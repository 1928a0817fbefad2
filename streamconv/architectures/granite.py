"""Granite 3 and 4, dense: Llama's layers, with four scales.

Sources: transformers' GraniteConfig and modeling_granite.py; GraniteModel in llama.cpp's conversion/granite.py, and
granite.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import LLAMA3_FACTORS, Rope
from streamconv.recipe import F32, Computed, Key, Model, Recipe

ROPE = Rope(theta=10_000.0, context=2048, scalings=("linear", "yarn", "llama3"))

# The names in GGUF and in the config; transformers' default is 1.
SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def scale(name: str, key: str) -> Key:
    def value(model: Model) -> float:
        return model.config.positive(key) or 1.0

    return Key(f"{{arch}}.{name}", value, F32)


ATTENTION = (
    *decoder.norm("input_layernorm", "attn_norm"),
    *decoder.attention(permuted=True, bias="attention_bias", out_bias="attention_bias"),
    *decoder.norm("post_attention_layernorm", "ffn_norm"),
)
KEYS = (*decoder.keys(ROPE, epsilon=1e-6), *(scale(name, key) for name, key in SCALES.items()))
COMPUTED = (Computed(LLAMA3_FACTORS, ROPE.llama3_factors),)

RECIPE = Recipe(
    arch="granite",
    description="Granite, dense",
    hf_names=("GraniteForCausalLM",),
    bodies=("GraniteModel",),
    model_type="granite",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *ATTENTION,
        *decoder.gated(bias="mlp_bias"),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    computed=COMPUTED,
    drops=decoder.DROPS,
    keys=KEYS,
    refusals=decoder.refusals(ROPE, decoder.SILU),
    flags={"attention_bias": False, "mlp_bias": False},
    default_pre="refact",
)
