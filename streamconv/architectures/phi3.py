"""Phi-3, Phi-3.5, Phi-4 and their minis: fused Q, K and V, fused gate and up, RoPE factors for short and long texts.

Sources: transformers' Phi3Config and modeling_phi3.py, modeling_rope_utils.py (longrope); Phi3MiniModel in llama.cpp's
conversion/phi.py, and phi3.cpp, which has no sliding window and keeps the fused matrices.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import F32, Caveat, Computed, Config, Key, Model, Recipe, Refusal

LONG = "longrope"
ORIGINAL_CONTEXT = 4096  # Phi3Config


class LongRope(Rope):
    """RoPE with a factor for each frequency: short ones up to the original context, long ones beyond it."""

    def type(self, config: Config) -> str:
        """As in Rope, but "su" and "yarn" in older configs also mean this kind, as they do in transformers."""
        said = super().type(config)
        return LONG if said in ("su", "yarn") else said

    def trained_context(self, config: Config) -> int:
        """As in Phi3Config: the key outside of RoPE's settings, or its default, overrides the one inside."""
        return config.integer("original_max_position_embeddings") or ORIGINAL_CONTEXT

    def factors(self, config: Config, name: str) -> list[float] | None:
        values = self.of(config).raw.get(name)
        if self.type(config) != LONG or values is None:
            return None
        is_list = isinstance(values, list) and all(type(one) in (int, float) and 0 < one < 1e30 for one in values)
        if not is_list:
            raise self.of(config).wrong(name, "a list of positive numbers")
        return [float(one) for one in values]

    def attention(self, config: Config) -> float | None:
        """The factor by which queries and keys are multiplied for a longer context; None without such scaling."""
        if self.type(config) != LONG:
            return None
        said, original = self.of(config).positive("attention_factor"), self.trained_context(config)
        factor = self.of(config).positive("factor") or self.context_length(config) / original
        if said is not None:
            return said
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


ROPE = LongRope(theta=10_000.0, context=4096, scalings=(LONG,), partial=1.0)


def table(name: str) -> Computed:
    """The tensor of the factors in the config's `{name}_factor`."""

    def made(model: Model) -> NDArray[np.float32] | None:
        values = ROPE.factors(model.config, f"{name}_factor")
        return None if values is None else np.array(values, dtype=np.float32)

    return Computed(f"rope_factors_{name}.weight", made)


def is_odd(model: Model) -> bool:
    """Whether either list of factors does not have one factor for each rotated frequency."""
    if ROPE.type(model.config) != LONG:
        return False
    sizes = {len(ROPE.factors(model.config, name) or ()) for name in ("long_factor", "short_factor")}
    return sizes != {ROPE.rotated(model) // 2}


RECIPE = Recipe(
    arch="phi3",
    description="Phi-3, Phi-3.5, Phi-4 and their minis",
    hf_names=("Phi3ForCausalLM",),
    bodies=("Phi3Model",),
    model_type="phi3",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.linear("self_attn.qkv_proj", "attn_qkv", "(A+2*K)*D H"),
        *decoder.linear("self_attn.o_proj", "attn_output", "H A*D"),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.linear("mlp.down_proj", "ffn_down", "H F"),
        *decoder.linear("mlp.gate_up_proj", "ffn_up", "2*F H"),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    computed=(table("long"), table("short")),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-5),
        Key("{arch}.rope.scaling.original_context_length", lambda model: ROPE.trained_context(model.config)),
        Key("{arch}.rope.scaling.attn_factor", lambda model: ROPE.attention(model.config), F32),
        # The runtime recognises a Phi-4, which has no window, by the value 0.
        Key("{arch}.attention.sliding_window", lambda model: model.config.integer("sliding_window", 0) or 0),
    ),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        decoder.FULL_WIDTH,
        Refusal("long_factor and short_factor must have one value for each frequency of RoPE", is_odd),
    ),
    caveats=(
        decoder.window_caveat("Phi-3", None),
        Caveat(
            "llama.cpp uses the long factors of RoPE whenever its context is longer than the original one, even for "
            "short texts",
            lambda m: ROPE.type(m.config) == LONG and ROPE.context_length(m.config) > ROPE.trained_context(m.config),
            code="long-factors",
        ),
    ),
    default_pre="gpt-4o",
)
