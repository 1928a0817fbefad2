"""StableLM 2 (1.6B, Zephyr) and StableLM 3B: LayerNorms, RoPE on a part of each head.

The first of them are called StableLMEpoch and have `norm_eps` and `rope_pct` instead of `layer_norm_eps` and
`partial_rotary_factor`.

Sources: transformers' StableLmConfig and modeling_stablelm.py; StableLMModel in llama.cpp's conversion/stablelm.py,
which leaves out the base of RoPE, and stablelm.cpp, which reads it.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import BOOL, Key, Recipe

ROPE = Rope(theta=10_000.0, context=4096, partial=0.25)

RECIPE = Recipe(
    arch="stablelm",
    description="StableLM 2 and StableLM 3B",
    hf_names=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    bodies=("StableLmModel", "StableLMEpochModel"),
    model_type="stablelm",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm", bias=True),
        *decoder.attention(bias="use_qkv_bias"),
        *decoder.norm("post_attention_layernorm", "ffn_norm", bias=True),
        *decoder.gated(),
        decoder.OUTPUT_NORM,
        decoder.OUTPUT_NORM_BIAS,
        decoder.OWN_HEAD,
    ),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-5, epsilon_keys=("layer_norm_eps", "norm_eps"), layer_norm=True),
        Key("{arch}.use_parallel_residual", lambda model: False, BOOL),
    ),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        decoder.FULL_WIDTH,
        # Set in StableLM 2 12B, whose norms are stored separately for each head.
        *(
            decoder.flag(key, only=False, silent=False, why="such models are not supported")
            for key in ("qk_layernorm", "use_parallel_residual")
        ),
    ),
    flags={"use_qkv_bias": False},
    default_pre="stablelm2",
)
