"""Nemotron (Minitron, Nemotron 3 8B, Nemotron 4): LayerNorms stored as the weight minus one, squared ReLU, no gate.

Sources: transformers' NemotronConfig and modeling_nemotron.py; NemotronModel in llama.cpp's conversion/nemotron.py, and
nemotron.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import F32, STRING, Key, Model, PlusOne, Recipe, Tensor

ROPE = Rope(theta=10_000.0, context=4096, partial=0.5, scalings=("linear",))


def normed(source: str, target: str) -> tuple[Tensor, ...]:
    """A LayerNorm of each layer, with its bias."""
    weight, bias = decoder.norm(source, target, bias=True)
    return (Tensor(weight.source, weight.target, "H", (PlusOne(),)), bias)


def unscaled(model: Model) -> str | None:
    """ "none" if RoPE is not scaled, as llama.cpp's converter writes it."""
    return "none" if ROPE.type(model.config) == "default" else None


RECIPE = Recipe(
    arch="nemotron",
    description="Nemotron and Minitron",
    hf_names=("NemotronForCausalLM",),
    bodies=("NemotronModel",),
    model_type="nemotron",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *normed("input_layernorm", "attn_norm"),
        *decoder.attention(bias="attention_bias", out_bias="attention_bias"),
        *normed("post_attention_layernorm", "ffn_norm"),
        *decoder.linear("mlp.down_proj", "ffn_down", "H F", bias="mlp_bias"),
        *decoder.linear("mlp.up_proj", "ffn_up", "F H", bias="mlp_bias"),
        Tensor("model.norm.weight", "output_norm.weight", "H", (PlusOne(),)),
        decoder.OUTPUT_NORM_BIAS,
        decoder.OWN_HEAD,
    ),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-5, epsilon_keys=("norm_eps",), layer_norm=True),
        Key("{arch}.attention.layer_norm_rms_epsilon", lambda m: m.config.positive("norm_eps") or 1e-5, F32),
        Key("{arch}.rope.scaling.type", unscaled, STRING),
    ),
    refusals=decoder.refusals(ROPE, decoder.activation("relu2", silent="relu2"), decoder.FULL_WIDTH),
    flags={"attention_bias": False, "mlp_bias": False},
)
