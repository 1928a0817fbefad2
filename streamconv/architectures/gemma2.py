"""Gemma 2: norms before and after attention and network, windows in every second layer, logits capped by tanh.

Sources: transformers' Gemma2Config and modeling_gemma2.py; Gemma2Model in llama.cpp's conversion/gemma.py, which leaves
out the base of RoPE, and gemma2.cpp, which scales the queries of the 27B by its hidden size.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures import gemma
from streamconv.architectures._rope import Rope
from streamconv.recipe import F32, Key, Model, PlusOne, Recipe, Refusal, Tensor

ROPE = Rope(theta=10_000.0, context=8192)

WINDOW, EVERY, LAYERS_OF_27B = 4096, 2, 46
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # Gemma2Config


def normed(*ops: PlusOne) -> tuple[Tensor, ...]:
    """The four norms of a layer."""
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    return tuple(row for source, target in names.items() for row in decoder.norm(source, target, "H", *ops))


def query_scale(layers_of_27b: int, silent: int) -> Refusal:
    """Refuses models that scale queries differently from the runtime.

    Args:
        layers_of_27b: The number of layers by which the runtime recognises the 27B, whose scale is different.
        silent: transformers' default for query_pre_attn_scalar.
    """

    def own(model: Model) -> int:
        dims = model.dims
        return dims["H"] // dims["A"] if model.n_layers == layers_of_27b else dims["D"]

    return Refusal(
        "query_pre_attn_scalar is not the head size {D}, with which the runtime scales queries",
        lambda m: (m.config.positive("query_pre_attn_scalar") or silent) != own(m),
    )


NO_WINDOW = Refusal(
    "sliding_window is null, but the runtime always has one in these layers",
    lambda m: m.config.raw.get("sliding_window", WINDOW) is None,
)


RECIPE = Recipe(
    arch="gemma2",
    description="Gemma 2",
    hf_names=("Gemma2ForCausalLM",),
    bodies=("Gemma2Model",),
    model_type="gemma2",
    dims=decoder.dims(256),
    tensors=(
        decoder.EMBEDDING,
        *normed(PlusOne()),
        *decoder.attention(),
        *decoder.gated(),
        gemma.OUTPUT_NORM,
    ),
    aliases=(gemma.SAME_HEAD,),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-6),
        *decoder.window_keys(lambda config: config.integer("sliding_window") or WINDOW, decoder.sliding, EVERY),
        *(
            Key(f"{{arch}}.{key}", lambda model, key=key, cap=cap: model.config.positive(key) or cap, F32)  # type: ignore[misc]
            for key, cap in CAPS.items()
        ),
    ),
    refusals=decoder.refusals(
        ROPE,
        *gemma.GELU,
        gemma.CAUSAL,
        gemma.NO_BIAS,
        gemma.TIED,
        query_scale(LAYERS_OF_27B, 256),
        *(
            Refusal(f"{key} is null, but the runtime always caps", lambda m, key=key: m.config.raw.get(key, 0) is None)  # type: ignore[misc]
            for key in CAPS
        ),
        NO_WINDOW,
    ),
    tied_by_default=True,
)
