"""ERNIE 4.5 MoE: dense layers first, then layers with routed and shared experts.

Sources: transformers' Ernie4_5_MoeConfig and modeling_ernie4_5_moe.py; Ernie4_5MoeModel in llama.cpp's
conversion/ernie.py, whose width for the shared experts differs from that of their tensors, and ernie4-5-moe.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.architectures import _decoder as decoder
from streamconv.architectures import ernie4_5
from streamconv.architectures._decoder import BLOCK, LAYER
from streamconv.recipe import Claim, Config, Dim, Drop, Key, Model, Recipe, Refusal, Tensor

ROPE = ernie4_5.ROPE
DENSE, MOE = "ffn=dense", "ffn=moe"

# The modules for multi-token prediction, which transformers does not read either.
NEXT = ("mtp_block", "mtp_emb_norm", "mtp_hidden_norm", "mtp_linear_proj")


def kinds(config: Config, n_layers: int) -> Sequence[str] | None:
    """The kind of each layer, "moe" or "dense"; None if the config sets none of the three keys."""
    first, last = (config.integer(f"moe_layer_{end}_index", minimum=-1) for end in ("start", "end"))
    every = config.integer("moe_layer_interval")
    if first is last is every is None:
        return None
    first, every = 1 if first is None else first, every or 1
    last = n_layers - 1 if last in (None, -1) else last
    return ["moe" if (i + 1) % every == 0 and first <= i <= last else "dense" for i in range(n_layers)]


def n_leading_dense(model: Model) -> int:
    return [*model.kinds["ffn"], "moe"].index("moe")


def has_least_sum(model: Model) -> bool:
    """Whether the weights of the chosen experts may sum to less than moe_norm_min, the least divisor in transformers.

    The best k of E probabilities sum to k / E or more.
    """
    used = model.config.integer("moe_k") or 6
    return (model.config.number("moe_norm_min") or 0.0) > used / model.dims["E"]


RECIPE = Recipe(
    arch="ernie4_5-moe",
    description="ERNIE 4.5 with experts",
    hf_names=("Ernie4_5_MoeForCausalLM",),
    bodies=("Ernie4_5_MoeModel",),
    model_type="ernie4_5_moe",
    prefixes=ernie4_5.PREFIXES,
    dims=decoder.dims()
    | {
        "E": Dim("moe_num_experts"),
        "U": Dim("moe_k", 6),
        "M": Dim("moe_intermediate_size"),
        "S": Dim("moe_num_shared_experts", 2, minimum=0),
    },
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(),
        *ernie4_5.FUSED_ATTENTION,
        *decoder.norm("post_attention_layernorm", "ffn_norm"),
        *decoder.gated(only=DENSE),
        *ernie4_5.fused_network(DENSE),
        *decoder.router("mlp.gate", only=MOE),
        Tensor(  # [1, E], as llama.cpp's converter writes it
            LAYER + "mlp.moe_statics.e_score_correction_bias", BLOCK + "exp_probs_b.bias", "1 E", (), MOE, f32=True
        ),
        *decoder.experts(only=MOE),
        *(
            Tensor(f"{LAYER}mlp.shared_experts.{source}.weight", f"{BLOCK}{target}_shexp.weight", shape, (), MOE, False)
            for source, target, shape in (
                ("gate_proj", "ffn_gate", "S*M H"),
                ("down_proj", "ffn_down", "H S*M"),
                ("up_proj", "ffn_up", "S*M H"),
            )
        ),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    drops=(
        *decoder.DROPS,
        *(Drop(f"model.{name}.*", "belongs to a layer for multi-token prediction") for name in NEXT),
    ),
    keys=(
        *decoder.keys(ROPE, epsilon=1e-5),
        *decoder.expert_keys(),
        Key("{arch}.expert_shared_count", "S"),
        Key("{arch}.expert_shared_feed_forward_length", lambda m: m.value("S*M") or None),
        Key("{arch}.leading_dense_block_count", n_leading_dense),
        decoder.constant("interleave_moe_layer_step", 1),
    ),
    axes={"ffn": ("dense", "moe")},
    claims=(Claim("moe_layer_start_index", "ffn", kinds),),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        ernie4_5.NO_BIAS,
        decoder.USED_EXPERTS,
        Refusal("moe_norm_min is {moe_norm_min}, but the runtime has no such limit", has_least_sum),
        Refusal(
            "a dense layer follows one with experts, but the runtime expects all dense layers first",
            lambda m: "dense" in m.kinds["ffn"][n_leading_dense(m) :],
        ),
    ),
    tied_by_default=True,
)
