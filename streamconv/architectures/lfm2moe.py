"""LFM2-MoE (8B-A1B, 24B-A2B): LFM2's layers, most of them with a mixture of experts instead of the dense network.

Experts are stored one by one (as published) or stacked, gate and up fused (as transformers 5 holds them); either way
they become one tensor [E, rows, columns] whose rows are read directly from the file. The rest is in lfm2.py.
Sources: transformers' Lfm2MoeConfig and modeling_lfm2_moe.py; LFM2MoeModel in llama.cpp's conversion/lfm2.py, and
lfm2moe.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamconv.architectures import lfm2
from streamconv.architectures.lfm2 import BLOCK, LAYER
from streamconv.recipe import Alias, Claim, Computed, Config, Dim, Key, Model, Recipe, Refusal, Scale, Split, Tensor

SIGMOID = 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID

DENSE, MOE = "ffn=dense", "ffn=moe"
FFN = LAYER + "feed_forward."


def dense_first(config: Config, n_layers: int) -> Sequence[str] | None:
    n_dense = config.integer("num_dense_layers", minimum=0)
    return None if n_dense is None else ["dense" if i < n_dense else "moe" for i in range(n_layers)]


def n_leading_dense(model: Model) -> int:
    return model.kinds["ffn"].count("dense")


def routed_scale(model: Model) -> float:
    """The factor of the experts' sum. The runtime has no key for it, so w2 is scaled, in which the sum is linear."""
    scale = model.config.number("routed_scaling_factor")
    return 1.0 if scale is None else scale


ROUTED = (Scale(routed_scale),)


def no_bias(model: Model) -> NDArray[np.float32]:
    """Zeros: the runtime requires a bias for the choice of experts, and zeros do not change that choice."""
    return np.zeros(model.dims["E"], dtype=np.float32)


REFUSALS = (
    Refusal(
        "norm_topk_prob is false, but the runtime always normalises the weights of the chosen experts",
        lambda m: m.config.flag("norm_topk_prob") is False,
    ),
    Refusal("the config uses {U} experts of {E}", lambda m: m.dims["U"] > m.dims["E"]),
    Refusal(
        "a dense layer follows one with experts, but the runtime expects all dense layers first",
        lambda m: "dense" in m.kinds["ffn"][n_leading_dense(m) :],
    ),
)


RECIPE = Recipe(
    arch="lfm2moe",
    description="LFM2-MoE and LFM2.5-MoE",
    hf_names=("Lfm2MoeForCausalLM", "LFM2MoeForCausalLM"),
    bodies=("Lfm2MoeModel",),
    model_type="lfm2_moe",
    dims=lfm2.DIMS
    | {
        "F": Dim("intermediate_size"),  # of the dense layers, never adjusted
        "E": Dim("num_experts"),
        "U": Dim("num_experts_per_tok", 4),
        "M": Dim("moe_intermediate_size"),
    },
    tensors=(
        lfm2.EMBEDDING,
        *lfm2.MIXER,
        Tensor(FFN + "w1.weight", BLOCK + "ffn_gate.weight", "F H", only=DENSE),
        Tensor(FFN + "w2.weight", BLOCK + "ffn_down.weight", "H F", only=DENSE),
        Tensor(FFN + "w3.weight", BLOCK + "ffn_up.weight", "F H", only=DENSE),
        Tensor(FFN + "gate.weight", BLOCK + "ffn_gate_inp.weight", "E H", only=MOE, f32=True),
        Tensor(FFN + "expert_bias", BLOCK + "exp_probs_b.bias", "E", only=MOE, required="use_expert_bias"),
        # Experts one by one ...
        Tensor(FFN + "experts.{e}.w1.weight", BLOCK + "ffn_gate_exps.weight", "M H", only=MOE),
        Tensor(FFN + "experts.{e}.w2.weight", BLOCK + "ffn_down_exps.weight", "H M", ROUTED, only=MOE),
        Tensor(FFN + "experts.{e}.w3.weight", BLOCK + "ffn_up_exps.weight", "M H", only=MOE),
        # ... or stacked, gate and up fused ...
        Tensor(FFN + "experts.gate_up_proj", BLOCK + "ffn_gate_exps.weight", "E 2*M H", (Split(0, 2),), only=MOE),
        Tensor(FFN + "experts.gate_up_proj", BLOCK + "ffn_up_exps.weight", "E 2*M H", (Split(1, 2),), only=MOE),
        Tensor(FFN + "experts.down_proj", BLOCK + "ffn_down_exps.weight", "E H M", ROUTED, only=MOE),
        # ... or stacked one by one, as mlx-lm names them (models/switch_layers.py).
        Tensor(FFN + "switch_mlp.gate_proj.weight", BLOCK + "ffn_gate_exps.weight", "E M H", only=MOE),
        Tensor(FFN + "switch_mlp.down_proj.weight", BLOCK + "ffn_down_exps.weight", "E H M", ROUTED, only=MOE),
        Tensor(FFN + "switch_mlp.up_proj.weight", BLOCK + "ffn_up_exps.weight", "E M H", only=MOE),
        *lfm2.OUTPUT,
    ),
    computed=(Computed(BLOCK + "exp_probs_b.bias", no_bias, only=MOE),),
    keys=(
        *lfm2.KEYS,
        Key("{arch}.expert_count", "E"),
        Key("{arch}.expert_used_count", "U"),
        Key("{arch}.expert_feed_forward_length", "M"),
        Key("{arch}.leading_dense_block_count", n_leading_dense),
        Key("{arch}.expert_gating_func", lambda model: SIGMOID),
    ),
    axes={"mixer": lfm2.MIXERS, "ffn": ("dense", "moe")},
    claims=(*lfm2.CLAIMS, Claim("num_dense_layers", "ffn", dense_first)),
    refusals=(*lfm2.REFUSALS, *REFUSALS),
    aliases=(
        *lfm2.ALIASES,
        *(Alias(f"{FFN}experts.{{e}}.{a}.weight", f"{FFN}experts.{{e}}.{b}.weight") for a, b in lfm2.MLX_FFN.items()),
    ),
    flags={"use_expert_bias": True},
    tie_keys=lfm2.TIE_KEYS,
    tied_by_default=True,
    default_pre="lfm2",
)
