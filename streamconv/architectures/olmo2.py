"""OLMo 2 and OLMo 3: norms after attention and network instead of before them; OLMo 3 has windows in most layers.

Sources: transformers' Olmo2Config, Olmo3Config and their modeling files; Olmo2Model in llama.cpp's conversion/olmo.py,
and olmo2.cpp, which scales RoPE only in the layers without a window, as OLMo 3 does.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import BOOL, F32, Config, Key, Model, Recipe, Refusal

BASE_OF_OLMO3 = 500_000.0  # Olmo3Config's default


class Olmo(Rope):
    """RoPE with a different default base for OLMo 3."""

    def base(self, config: Config) -> float:
        stated = self.of(config).positive("rope_theta") or config.positive("rope_theta")
        return stated or (BASE_OF_OLMO3 if is_olmo3(config) else self.theta)


ROPE = Olmo(theta=10_000.0, context=2048, kind="full_attention")
SLIDING = Olmo(theta=10_000.0, context=2048, kind="sliding_attention")

WINDOW, EVERY = 4096, 4  # Olmo3Config's defaults: all but every fourth layer


def is_olmo3(config: Config) -> bool:
    names = config.list_of("architectures", str)
    return "Olmo3ForCausalLM" in names if names else config.text("model_type") == "olmo3"


def window(model: Model) -> int | None:
    config = model.config
    if not is_olmo3(config) or config.raw.get("sliding_window", WINDOW) is None:
        return None
    return config.integer("sliding_window") or WINDOW


def pattern(model: Model) -> list[int] | None:
    """1 for each layer with a window."""
    if window(model) is None:
        return None
    slides = decoder.sliding(model.config, model.n_layers)
    return [(i + 1) % EVERY != 0 for i in range(model.n_layers)] if slides is None else [int(one) for one in slides]


def window_base(model: Model) -> float | None:
    """The base of RoPE in the layers with a window; llama.cpp's converter writes it if configs set RoPE by kind."""
    return None if window(model) is None else SLIDING.base(model.config)


RECIPE = Recipe(
    arch="olmo2",
    description="OLMo 2 and OLMo 3",
    hf_names=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    bodies=(
        "Olmo2Model",
        "Olmo3Model",
    ),
    model_type="olmo2",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.attention(),
        *decoder.norm("self_attn.q_norm", "attn_q_norm", "A*D"),
        *decoder.norm("self_attn.k_norm", "attn_k_norm", "K*D"),
        *decoder.norm("post_attention_layernorm", "post_attention_norm"),
        *decoder.gated(),
        *decoder.norm("post_feedforward_layernorm", "post_ffw_norm"),
        decoder.OUTPUT_NORM,
        decoder.OWN_HEAD,
    ),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-5),
        Key("{arch}.attention.sliding_window", window),
        Key("{arch}.attention.sliding_window_pattern", pattern, BOOL),
        Key("{arch}.rope.freq_base_swa", window_base, F32),
    ),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        decoder.FULL_WIDTH,
        decoder.flag("attention_bias", only=False, silent=False, why="the runtime does not support it"),
        Refusal(
            "RoPE has another base in the layers with a window, but the runtime uses one for all layers",
            lambda m: m.config.has_rope_by_kind and SLIDING.base(m.config) != ROPE.base(m.config),
        ),
        Refusal(
            "RoPE is scaled in the layers with a window, but the runtime scales it only in the others",
            lambda m: m.config.has_rope_by_kind and SLIDING.type(m.config) != "default",
        ),
    ),
    default_pre="dbrx",
)
