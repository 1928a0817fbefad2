"""gpt-oss with 16-bit experts (fine-tunes): attention sinks, windows in every second layer, interleaved gate and up.

Sources: transformers' GptOssConfig and modeling_gpt_oss.py; GptOssModel in llama.cpp's conversion/gpt_oss.py, and
openai-moe.cpp, which reads the list of layers with a window if the file has one. The runtime rounds YaRN's range, which
these models do not; every GGUF file of them has this difference.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._decoder import BLOCK, LAYER
from streamconv.architectures._rope import Rope
from streamconv.recipe import BOOL, Interleaved, Key, Model, Recipe, Refusal, Tensor, Transpose

ROPE = Rope(theta=150_000.0, context=131_072, rounded=False)

WINDOW, EVERY = 128, 2

# Constants of the runtime's activation (LLM_FFN_SWIGLU_OAI_MOE).
ACTIVATION = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}

EXPERTS = LAYER + "mlp.experts."


def pattern(model: Model) -> list[int] | None:
    """1 for each layer with a window; None if that is every second from the first on, the runtime's default."""
    slides = decoder.sliding(model.config, model.n_layers)
    own = [(i + 1) % EVERY != 0 for i in range(model.n_layers)]
    return None if slides is None or slides == own else [int(one) for one in slides]


def turn(index: int, part: str) -> tuple[Tensor, Tensor]:
    """Gate (0) or up (1) of all experts: every second column of [E, H, 2*F], and of the biases."""
    taken = Interleaved(index, 2, of_columns=True)
    return (
        Tensor(EXPERTS + "gate_up_proj", f"{BLOCK}ffn_{part}_exps.weight", "E H 2*F", (taken, Transpose())),
        Tensor(EXPERTS + "gate_up_proj_bias", f"{BLOCK}ffn_{part}_exps.bias", "E 2*F", (taken,)),
    )


RECIPE = Recipe(
    arch="gpt-oss",
    description="gpt-oss, with experts in 16 bits",
    hf_names=("GptOssForCausalLM",),
    bodies=("GptOssModel",),
    model_type="gpt_oss",
    dims=decoder.dims(head=64) | decoder.expert_dims(("num_local_experts", "num_experts"), 4),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(bias=True, out_bias=True),
        Tensor(LAYER + "self_attn.sinks", BLOCK + "attn_sinks.weight", "A"),
        *decoder.norm("post_attention_layernorm", "post_attention_norm"),
        *decoder.router("mlp.router", bias=True),
        *turn(0, "gate"),
        Tensor(EXPERTS + "down_proj", BLOCK + "ffn_down_exps.weight", "E F H", (Transpose(),)),
        Tensor(EXPERTS + "down_proj_bias", BLOCK + "ffn_down_exps.bias", "E H"),
        *turn(1, "up"),
        decoder.OUTPUT_NORM,
        decoder.OWN_HEAD,
    ),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-5),
        *decoder.expert_keys("F"),
        Key("{arch}.attention.sliding_window", lambda model: model.config.integer("sliding_window") or WINDOW),
        Key("{arch}.attention.sliding_window_pattern", pattern, BOOL),
    ),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILENT_ROPE,
        decoder.SILU,
        decoder.USED_EXPERTS,
        decoder.flag("attention_bias", only=True, silent=True, why="the runtime requires biases"),
        *(
            Refusal(
                f"{key} is {{{key}}}, but the runtime uses {fixed:g}",
                lambda m, key=key, fixed=fixed: m.config.positive(key) not in (None, fixed),  # type: ignore[misc]
            )
            for key, fixed in ACTIVATION.items()
        ),
    ),
    default_pre="gpt-4o",
)
