"""EXAONE 4.0: norms after attention and feed-forward network, norms of Q and K, windows in the 32B.

Sources: transformers' Exaone4Config and modeling_exaone4.py; Exaone4Model in llama.cpp's conversion/exaone.py, and
exaone4.cpp, which has windows only in models of 64 layers.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import LLAMA3_FACTORS, Rope
from streamconv.recipe import BOOL, Computed, Key, Model, Recipe, Refusal

ROPE = Rope(theta=10_000.0, context=2048, scalings=("linear", "yarn", "llama3"))

WINDOW = 4096  # Exaone4Config's default; null means no window
LAYERS_WITH_WINDOW = 64
EVERY = 4


def window(model: Model) -> int | None:
    stated = model.config.raw.get("sliding_window", WINDOW)
    return None if stated is None else model.config.integer("sliding_window") or WINDOW


def pattern(model: Model) -> list[int] | None:
    """1 for each layer with a window, by `layer_types` or else by sliding_window_pattern, such as "LLLG" or 4."""
    if window(model) is None:
        return None
    config, layers = model.config, range(model.n_layers)
    if (slides := decoder.sliding(config, model.n_layers)) is not None:
        return [int(one) for one in slides]
    if isinstance(config.raw.get("sliding_window_pattern"), str):
        letters = config.text("sliding_window_pattern") or "G"
        return [int(letters[i % len(letters)] == "L") for i in layers]
    every = config.integer("sliding_window_pattern") or EVERY
    return [int((i + 1) % every != 0) for i in layers]


RECIPE = Recipe(
    arch="exaone4",
    description="EXAONE 4.0",
    hf_names=("Exaone4ForCausalLM",),
    bodies=("Exaone4Model",),
    model_type="exaone4",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.attention(),
        *decoder.norm("self_attn.q_norm", "attn_q_norm", "D"),
        *decoder.norm("self_attn.k_norm", "attn_k_norm", "D"),
        *decoder.norm("post_attention_layernorm", "post_attention_norm"),
        *decoder.gated(),
        *decoder.norm("post_feedforward_layernorm", "post_ffw_norm"),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    computed=(Computed(LLAMA3_FACTORS, ROPE.llama3_factors),),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-5),
        Key("{arch}.attention.sliding_window", window),
        Key("{arch}.attention.sliding_window_pattern", pattern, BOOL),
    ),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        decoder.FULL_WIDTH,
        Refusal(
            f"{{L}} layers with a sliding window, but the runtime has one only in models of {LAYERS_WITH_WINDOW}",
            lambda m: window(m) is not None and m.n_layers != LAYERS_WITH_WINDOW,
        ),
    ),
    default_pre="exaone4",
)
