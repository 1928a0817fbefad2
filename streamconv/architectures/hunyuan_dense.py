"""HunYuan, dense (0.5B to 7B): norms of Q and K after RoPE.

Sources: transformers' HunYuanDenseV1Config and modeling_hunyuan_v1_dense.py; HunYuanModel in llama.cpp's
conversion/hunyuan.py, and hunyuan-dense.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import F32, STRING, Config, Key, Recipe, Refusal, SpecialTokens

# The context that llama.cpp's converter writes for models with an alpha; their configs have this or an eighth of it.
ALPHA_CONTEXT = 262_144


class Dynamic(Rope):
    """RoPE whose "dynamic" scaling by `alpha` only changes the base, which is the same for texts of any length."""

    def context_length(self, config: Config) -> int:
        stated = super().context_length(config)
        is_known = self.type(config) == "dynamic" and stated * 8 == ALPHA_CONTEXT
        return ALPHA_CONTEXT if is_known else stated

    def keys(self) -> tuple[Key, ...]:
        scaling = "{arch}.rope.scaling."
        return (
            *super().keys(),
            Key(scaling + "type", self.for_scaling("dynamic", value=lambda config: "none"), STRING),
            Key(scaling + "factor", self.for_scaling("dynamic", value=lambda config: 1.0), F32),
            Key(scaling + "original_context_length", self.for_scaling("dynamic", value=self.context_length)),
        )

    def base(self, config: Config) -> float:
        theta, alpha = super().base(config), self.of(config).positive("alpha")
        if self.type(config) != "dynamic" or alpha is None:
            return theta
        size = config.integer("head_dim") or 1
        return float(theta * alpha ** (size / (size - 2)))


ROPE = Dynamic(theta=10_000.0, context=2048, scalings=("linear", "yarn", "dynamic"))

NO_BIAS = decoder.flag("attention_bias", only=False, silent=False, why="the runtime does not support it")

RECIPE = Recipe(
    arch="hunyuan-dense",
    description="HunYuan, dense",
    hf_names=("HunYuanDenseV1ForCausalLM",),
    bodies=("HunYuanDenseV1Model",),
    model_type="hunyuan_v1_dense",
    dims=decoder.dims(),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(),
        *decoder.norm("self_attn.query_layernorm", "attn_q_norm", "D"),
        *decoder.norm("self_attn.key_layernorm", "attn_k_norm", "D"),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.gated(),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-5),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        NO_BIAS,
        Refusal(
            "RoPE is scaled by the text length ('dynamic' without alpha), which the runtime does not support",
            lambda m: ROPE.type(m.config) == "dynamic" and ROPE.of(m.config).positive("alpha") is None,
        ),
        Refusal(
            "RoPE is scaled by alpha, but config.json has no head_dim from which to compute the base",
            lambda m: ROPE.type(m.config) == "dynamic" and (m.config.integer("head_dim") or 0) < 4,
        ),
    ),
    default_pre="hunyuan-dense",
    special_tokens=SpecialTokens(keys={"eos": "eod_token_id"}),
)
