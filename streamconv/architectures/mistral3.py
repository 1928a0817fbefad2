"""Mistral Small 3.1 and 3.2, Magistral, Devstral, Ministral 3: the text model, by itself or in the multimodal one.

Sources: transformers' Mistral3Config, Ministral3Config and modeling_ministral3.py; Mistral3Model in llama.cpp's
conversion/mistral3.py, mistral3.cpp, and llama-context.cpp for the attention factor.
"""

from __future__ import annotations

import math

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope, yarn_magnitude
from streamconv.recipe import F32, Config, Drop, Key, Model, Recipe, Refusal


class YarnRope(Rope):
    """RoPE for a runtime that divides YaRN's attention factor by the factor that follows from `mscale_all_dim`."""

    def log_multiplier(self, config: Config) -> float | None:
        return self.of(config).number("mscale_all_dim") if self.type(config) == "yarn" else None

    def yarn_attention(self, config: Config) -> float | None:
        """As in Rope, with the runtime's factor for this architecture; None also if that is already the config's."""
        factor = self.factor(config)
        said = super().yarn_attention(config)
        wanted = yarn_magnitude(factor, 1.0) * (1.0 if said is None else said)
        own = yarn_magnitude(factor, 1.0) / yarn_magnitude(factor, self.log_multiplier(config) or 0.0)
        return None if math.isclose(wanted, own) else wanted / own


ROPE = YarnRope(theta=10_000.0, context=262_144, betas=True)


def temperature(model: Model) -> float | None:
    """beta in the scale of queries, 1 + beta * ln(1 + floor(position / original context)); None if 0 or not set."""
    return ROPE.of(model.config).number("llama_4_scaling_beta") or None


RECIPE = Recipe(
    arch="mistral3",
    description="Mistral Small 3.1 and 3.2, Ministral 3 and others with this text model",
    hf_names=("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"),
    bodies=("Ministral3Model",),
    model_type="mistral3",
    config_root="text_config",
    prefixes={
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
    },
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
    drops=(
        *decoder.DROPS,
        *(
            Drop(f"{root}{part}.*", "is not part of the text model")
            for root in ("", "model.")
            for part in ("vision_tower", "multi_modal_projector")
        ),
    ),
    keys=(
        *decoder.keys(ROPE, epsilon=1e-5),
        Key("{arch}.rope.scaling.yarn_log_multiplier", lambda model: ROPE.log_multiplier(model.config), F32),
        Key("{arch}.attention.temperature_scale", temperature, F32),
    ),
    refusals=decoder.refusals(
        ROPE,
        Refusal(
            decoder.SILENT_ROPE.what,
            lambda m: m.config.text("model_type") == "ministral3" and decoder.SILENT_ROPE.applies(m),
        ),
        decoder.SILU,
        Refusal(
            "its text model is {model_type!r}, but this architecture supports mistral and ministral3",
            lambda m: m.config.text("model_type") not in (None, "mistral3", "mistral", "ministral3"),
        ),
        Refusal(
            "llama_4_scaling_beta needs YaRN, whose original context the runtime uses for it",
            lambda m: temperature(m) is not None and ROPE.type(m.config) != "yarn",
        ),
    ),
    caveats=(decoder.window_caveat("Mistral 3", None), decoder.TEXT_HALF),
    default_pre="tekken",
)
