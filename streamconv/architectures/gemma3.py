"""Gemma 3: Gemma 2's norms, norms of Q and K, windows with their own RoPE in all but every sixth layer.

The text model, by itself or in the multimodal one.

Sources: transformers' Gemma3TextConfig and modeling_gemma3.py; Gemma3Model in llama.cpp's
conversion/gemma.py, and gemma3.cpp, which scales the queries of the 27B by its hidden size.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures import gemma, gemma2
from streamconv.architectures._rope import Rope
from streamconv.recipe import F32, Config, Dim, Drop, Key, Model, PlusOne, Recipe, Refusal

ROPE = Rope(theta=1_000_000.0, context=131_072, kind="full_attention", scalings=("linear",))
LOCAL_BASE = 10_000.0

WINDOW, EVERY, LAYERS_OF_27B = 4096, 6, 62


def slides(config: Config, n_layers: int) -> list[bool]:
    """Which layers have a window: by `layer_types`, else all but every n-th, by the pattern or 6 by default."""
    every = config.integer("sliding_window_pattern") or config.integer("_sliding_window_pattern") or EVERY
    by_type = decoder.sliding(config, n_layers)
    return [(i + 1) % every != 0 for i in range(n_layers)] if by_type is None else by_type


def has_window(model: Model) -> bool:
    return any(slides(model.config, model.n_layers))


def window(model: Model) -> int | None:
    return (model.config.integer("sliding_window") or WINDOW) if has_window(model) else None


def local(config: Config) -> Config | None:
    """The RoPE settings of the layers with a window; None if the config uses the older keys."""
    section = config.section("rope_parameters")
    return section.section("sliding_attention") if section and not config.section("rope_scaling") else None


def local_base(model: Model) -> float | None:
    if not has_window(model):
        return None
    said = local(model.config)
    return (
        (said.positive("rope_theta") if said else None) or model.config.positive("rope_local_base_freq") or LOCAL_BASE
    )


def pattern(config: Config, n_layers: int) -> list[bool] | None:
    """As `slides`, but None if no layer has a window."""
    found = slides(config, n_layers)
    return found if any(found) else None


_, PATTERN_KEY = decoder.window_keys(lambda config: None, pattern, EVERY)

DIMS = decoder.dims() | {
    "A": Dim("num_attention_heads", 8),
    "K": Dim("num_key_value_heads", 4),
    "D": Dim("head_dim", 256),
}
LAYERS = (
    *gemma2.normed(PlusOne()),
    *decoder.norm("self_attn.q_norm", "attn_q_norm", "D", PlusOne()),
    *decoder.norm("self_attn.k_norm", "attn_k_norm", "D", PlusOne()),
    *decoder.attention(),
    *decoder.gated(),
)
REFUSALS = decoder.refusals(
    ROPE,
    gemma.GELU[1],
    gemma.NO_BIAS,
    Refusal(gemma2.NO_WINDOW.what, lambda m: has_window(m) and gemma2.NO_WINDOW.applies(m)),
    Refusal(
        "RoPE is scaled in the layers with a window, but the runtime scales it only in the others",
        lambda m: (local(m.config) or Config({}, m.config.file)).text("rope_type") not in (None, "default"),
    ),
    Refusal(
        "attn_logit_softcapping is {attn_logit_softcapping}, but the runtime does not cap attention scores",
        lambda m: m.config.positive("attn_logit_softcapping") is not None,
    ),
)

RECIPE = Recipe(
    arch="gemma3",
    description="Gemma 3, the text part",
    hf_names=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_type="gemma3_text",
    config_root="text_config",
    prefixes={
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
    },
    dims=DIMS,
    tensors=(decoder.EMBEDDING, *LAYERS, gemma.OUTPUT_NORM, decoder.HEAD),
    drops=(
        *decoder.DROPS,
        *(
            Drop(f"{root}{part}.*", "is not part of the text model")
            for root in ("", "model.")
            for part in ("vision_tower", "multi_modal_projector")
        ),
    ),
    keys=(
        *decoder.keys(ROPE, epsilon=1e-6),
        Key("{arch}.attention.sliding_window", window),
        PATTERN_KEY,
        Key("{arch}.rope.freq_base_swa", local_base, F32),
        Key("{arch}.final_logit_softcapping", lambda model: model.config.positive("final_logit_softcapping"), F32),
    ),
    refusals=(*REFUSALS, gemma.CAUSAL, gemma2.query_scale(LAYERS_OF_27B, 256)),
    caveats=(decoder.TEXT_HALF,),
    tied_by_default=True,
)
