"""Command R7B and others of Cohere 2: parallel attention and feed-forward network, windows and RoPE in most layers.

Sources: transformers' Cohere2Config and modeling_cohere2.py, whose RoPE rotates adjacent pairs, as llama.cpp's does;
Cohere2Model in llama.cpp's conversion/command_r.py, and cohere2.cpp, which reads the list of layers with a window if
the file has one.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import BOOL, F32, STRING, Key, Model, Recipe

ROPE = Rope(theta=10_000.0, context=8192, scalings=())

WINDOW, EVERY, LOGIT_SCALE = 4096, 4, 0.0625


def pattern(model: Model) -> list[int] | None:
    """1 for each layer with a window; None if that is all but every fourth, the runtime's default."""
    slides = decoder.sliding(model.config, model.n_layers)
    if slides is None:
        every = model.config.integer("sliding_window_pattern") or EVERY
        slides = [(i + 1) % every != 0 for i in range(model.n_layers)]
    own = [(i + 1) % EVERY != 0 for i in range(model.n_layers)]
    return None if slides == own else [int(one) for one in slides]


RECIPE = Recipe(
    arch="cohere2",
    description="Cohere 2 (Command R7B, Command A)",
    hf_names=("Cohere2ForCausalLM",),
    bodies=("Cohere2Model",),
    model_type="cohere2",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(),
        *decoder.gated(),
        decoder.OUTPUT_NORM,
    ),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-5, epsilon_keys=("layer_norm_eps",), layer_norm=True),
        Key("{arch}.attention.sliding_window", lambda model: model.config.integer("sliding_window") or WINDOW),
        Key("{arch}.attention.sliding_window_pattern", pattern, BOOL),
        Key("{arch}.logit_scale", lambda model: model.config.positive("logit_scale") or LOGIT_SCALE, F32),
        Key("{arch}.rope.scaling.type", lambda model: "none", STRING),
    ),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        decoder.FULL_WIDTH,
        decoder.flag("attention_bias", only=False, silent=False, why="the runtime does not support it"),
        decoder.flag("tie_word_embeddings", only=True, silent=True, why="the runtime uses the embedding as the head"),
    ),
    tied_by_default=True,
    default_pre="command-r",
)
