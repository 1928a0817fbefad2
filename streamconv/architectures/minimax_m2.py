"""MiniMax-M2: experts chosen by sigmoids in every layer, norms of Q and K over all heads, RoPE on a part of each head.

Sources: transformers' MiniMaxM2Config and modeling_minimax_m2.py; MiniMaxM2Model in llama.cpp's conversion/minimax.py,
and minimax-m2.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._decoder import BLOCK, LAYER, SIGMOID
from streamconv.architectures._rope import Rope
from streamconv.recipe import Model, Recipe, Refusal, Tensor


class Rotary(Rope):
    """RoPE on `rotary_dim` elements of each head, as published configs have it."""

    def rotated(self, model: Model) -> int:
        return model.config.integer("rotary_dim") or super().rotated(model)


ROPE = Rotary(theta=5_000_000.0, context=196_608, partial=1.0)

RECIPE = Recipe(
    arch="minimax-m2",
    description="MiniMax-M2",
    hf_names=("MiniMaxM2ForCausalLM",),
    bodies=("MiniMaxM2Model",),
    model_type="minimax_m2",
    dims=decoder.dims(head=128) | decoder.expert_dims(("num_local_experts", "num_experts"), 8),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(),
        *decoder.norm("self_attn.q_norm", "attn_q_norm", "A*D"),
        *decoder.norm("self_attn.k_norm", "attn_k_norm", "K*D"),
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.router("block_sparse_moe.gate"),
        Tensor(LAYER + "block_sparse_moe.e_score_correction_bias", BLOCK + "exp_probs_b.bias", "E"),
        *decoder.experts("block_sparse_moe.", "F", names="w1 w2 w3"),
        *decoder.stacked_experts("mlp.", "F"),  # transformers 5's names in memory, also used by adapters
        decoder.OUTPUT_NORM,
        decoder.OWN_HEAD,
    ),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-6),
        *decoder.expert_keys("F"),
        decoder.constant("expert_gating_func", SIGMOID),
    ),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        decoder.USED_EXPERTS,
        decoder.flag("use_qk_norm", only=True, silent=True, why="the runtime requires norms of Q and K"),
        Refusal(
            "scoring_func is {scoring_func!r}, but the runtime chooses experts by sigmoids",
            lambda m: (m.config.text("scoring_func") or "sigmoid") != "sigmoid",
        ),
    ),
    default_pre="minimax-m2",
)
