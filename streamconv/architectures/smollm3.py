"""SmolLM3: Llama's layers, every fourth one without RoPE.

Sources: transformers' SmolLM3Config and modeling_smollm3.py; SmolLM3Model in llama.cpp's conversion/llama.py, and
smollm3.cpp, which determines the layers without RoPE by their index and has no key for them.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import Model, Recipe, Refusal

ROPE = Rope(theta=2_000_000.0, context=32_768)

INTERVAL = 4  # n_no_rope_layer_step


def other_layers_turn(model: Model) -> bool:
    """Whether the layers with RoPE are not all but every fourth. `no_rope_layers` has 1 for a layer with RoPE."""
    turns = model.config.list_of("no_rope_layers", int)
    if turns is None:
        return model.config.integer("no_rope_layer_interval") not in (None, INTERVAL)
    return [bool(one) for one in turns] != [(i + 1) % INTERVAL != 0 for i in range(model.n_layers)]


def has_window_by_type(model: Model) -> bool:
    """Whether layers have a window by `layer_types`, which transformers applies whatever `use_sliding_window` is."""
    window, context = model.config.integer("sliding_window", 0), model.config.integer("max_position_embeddings")
    slides = any(decoder.sliding(model.config, model.n_layers) or ())
    return slides and bool(window) and (context is None or (window or 0) < context)


NO_BIAS = tuple(
    decoder.flag(key, only=False, silent=False, why="the runtime does not support it")
    for key in ("attention_bias", "mlp_bias")
)

RECIPE = Recipe(
    arch="smollm3",
    description="SmolLM3",
    hf_names=("SmolLM3ForCausalLM",),
    bodies=("SmolLM3Model",),
    model_type="smollm3",
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
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-6),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        decoder.NO_WINDOW,
        Refusal(
            "layer_types has layers with a sliding window, but the runtime has none for this model", has_window_by_type
        ),
        *NO_BIAS,
        Refusal(
            "the layers without RoPE are not every fourth one, and the runtime has no key for that", other_layers_turn
        ),
    ),
    tied_by_default=True,
    default_pre="llama-bpe",
)
