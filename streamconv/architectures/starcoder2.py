"""StarCoder2: LayerNorms and biases everywhere, a feed-forward network without a gate.

Sources: transformers' Starcoder2Config and modeling_starcoder2.py; StarCoder2Model in llama.cpp's
conversion/starcoder.py, and starcoder2.cpp, which has no sliding window.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import Caveat, Model, Recipe

ROPE = Rope(theta=10_000.0, context=4096)


def is_windowed(model: Model) -> bool:
    window = model.config.integer("sliding_window", minimum=0)
    return window is not None and 0 < window < ROPE.context_length(model.config)


RECIPE = Recipe(
    arch="starcoder2",
    description="StarCoder2",
    hf_names=("Starcoder2ForCausalLM",),
    bodies=("Starcoder2Model",),
    model_type="starcoder2",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm", bias=True),
        *decoder.attention(bias=True, out_bias=True),
        *decoder.norm("post_attention_layernorm", "ffn_norm", bias=True),
        *decoder.linear("mlp.c_proj", "ffn_down", "H F", bias=True),
        *decoder.linear("mlp.c_fc", "ffn_up", "F H", bias=True),
        decoder.OUTPUT_NORM,
        decoder.OUTPUT_NORM_BIAS,
        decoder.HEAD,
    ),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-5, epsilon_keys=("norm_epsilon",), layer_norm=True),
    refusals=decoder.refusals(
        ROPE,
        decoder.FULL_WIDTH,
        decoder.activation("gelu_pytorch_tanh", silent="gelu_pytorch_tanh"),
        decoder.flag("use_bias", only=True, silent=True, why="the runtime requires biases"),
    ),
    caveats=(
        Caveat(
            "llama.cpp processes texts of more than {sliding_window} tokens differently: it has no sliding window for "
            "StarCoder2",
            is_windowed,
            code="window-ignored",
        ),
    ),
    tied_by_default=True,
    default_pre="starcoder",
)
