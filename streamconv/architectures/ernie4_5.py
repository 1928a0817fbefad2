"""ERNIE 4.5 (dense): RoPE rotates adjacent pairs, both in transformers and in the runtime.

Sources: transformers' Ernie4_5Config and modeling_ernie4_5.py; Ernie4_5Model in llama.cpp's conversion/ernie.py, which
also handles the class name and the fused matrices of the publisher's own code, and ernie4-5.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._decoder import BLOCK, LAYER
from streamconv.architectures._rope import Rope
from streamconv.recipe import Recipe, Split, Tensor

ROPE = Rope(theta=500_000.0, context=131_072)

HEADS = "A*D K*D K*D"
FUSED_ATTENTION = tuple(
    Tensor(LAYER + "self_attn.qkv_proj.weight", f"{BLOCK}attn_{part}.weight", "(A+2*K)*D H", (Split(i, HEADS),))
    for i, part in enumerate("qkv")
)
NO_BIAS = decoder.flag("use_bias", only=False, silent=False, why="the runtime does not support all of the biases")
PREFIXES = {"ernie.": "model."}


def fused_network(only: str = "") -> tuple[Tensor, ...]:
    """Gate and up of a dense layer, stored as one tensor."""
    return tuple(
        Tensor(LAYER + "mlp.up_gate_proj.weight", f"{BLOCK}ffn_{part}.weight", "2*F H", (Split(i, 2),), only)
        for i, part in enumerate(("gate", "up"))
    )


RECIPE = Recipe(
    arch="ernie4_5",
    description="ERNIE 4.5",
    hf_names=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    bodies=("Ernie4_5Model", "Ernie4_5_Model"),
    model_type="ernie4_5",
    prefixes=PREFIXES,
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(),
        *FUSED_ATTENTION,
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.gated(),
        *fused_network(),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-5),
    refusals=decoder.refusals(ROPE, decoder.SILU, NO_BIAS),
    tied_by_default=True,
)
