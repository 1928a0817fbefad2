"""GLM-4.5, 4.6 and 4.7: experts after some dense layers, and layers for multi-token prediction if they are stored.

Sources: transformers' Glm4MoeConfig and modeling_glm4_moe.py; Glm4MoeModel in llama.cpp's conversion/glm.py, and
glm4-moe.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._decoder import BLOCK, LAYER, SIGMOID
from streamconv.architectures._rope import Rope
from streamconv.recipe import BOOL, F32, Claim, Config, Dim, Key, Model, Recipe, Refusal, SpecialTokens, Tensor

ROPE = Rope(theta=10_000.0, context=131_072, partial=0.5)

DENSE, MOE = "ffn=dense", "ffn=moe"

# Tensors of the layers for multi-token prediction, which follow the model's last layer; transformers omits them.
NEXT = {
    "eh_proj": "H 2*H",
    "enorm": "H",
    "hnorm": "H",
    "embed_tokens": "V H",
    "shared_head.head": "V H",
    "shared_head.norm": "H",
}


def n_next(model: Model) -> int:
    """The number of stored layers for multi-token prediction."""
    return model.dims["L"] - model.dims["N"]


def dense_first(config: Config, n_layers: int) -> Sequence[str] | None:
    n_dense = config.integer("first_k_dense_replace", minimum=0)
    return None if n_dense is None else ["dense" if i < n_dense else "moe" for i in range(n_layers)]


def n_leading_dense(model: Model) -> int:
    return model.kinds["ffn"].count("dense")


def normalised(model: Model) -> bool:
    return model.config.flag("norm_topk_prob") is not False


RECIPE = Recipe(
    arch="glm4moe",
    description="GLM-4.5, 4.6 and 4.7",
    hf_names=("Glm4MoeForCausalLM",),
    bodies=("Glm4MoeModel",),
    model_type="glm4_moe",
    dims=decoder.dims()
    | decoder.expert_dims("n_routed_experts", 8, "moe_intermediate_size")
    | {
        "L": Dim(lambda config: None, rule="the number of layers stored"),
        "N": Dim("num_hidden_layers", "L"),
        "S": Dim("n_shared_experts", 1),
        "F": Dim("intermediate_size", 10_944),
    },
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm"),
        *decoder.attention(bias="attention_bias"),
        *decoder.norm("self_attn.q_norm", "attn_q_norm", "D", required="use_qk_norm"),
        *decoder.norm("self_attn.k_norm", "attn_k_norm", "D", required="use_qk_norm"),
        *decoder.norm("post_attention_layernorm", "post_attention_norm"),
        *decoder.gated(only=DENSE),
        *decoder.router("mlp.gate", only=MOE),
        Tensor(LAYER + "mlp.gate.e_score_correction_bias", BLOCK + "exp_probs_b.bias", "E", only=MOE),
        *decoder.experts(only=MOE),
        *decoder.gated("mlp.shared_experts.", "_shexp", "S*M", only=MOE),
        *(
            Tensor(f"{LAYER}{name}.weight", f"{BLOCK}nextn.{name.replace('.', '_')}.weight", shape, required=False)
            for name, shape in NEXT.items()
        ),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-5),
        *decoder.expert_keys(),
        Key("{arch}.expert_group_count", lambda m: m.config.integer("n_group") or 1),
        Key("{arch}.expert_group_used_count", lambda m: m.config.integer("topk_group") or 1),
        Key("{arch}.expert_shared_count", "S"),
        Key("{arch}.leading_dense_block_count", n_leading_dense),
        decoder.constant("expert_gating_func", SIGMOID),
        Key("{arch}.expert_weights_scale", lambda m: m.config.positive("routed_scaling_factor") or 1.0, F32),
        Key("{arch}.expert_weights_norm", normalised, BOOL),
        Key("{arch}.nextn_predict_layers", n_next),
    ),
    axes={"ffn": ("dense", "moe")},
    claims=(Claim("first_k_dense_replace", "ffn", dense_first),),
    refusals=decoder.refusals(
        ROPE,
        decoder.SILU,
        decoder.USED_EXPERTS,
        Refusal(
            "{L} layers are stored, but num_hidden_layers is {N}",
            lambda m: n_next(m) not in (0, m.config.integer("num_nextn_predict_layers", minimum=0)),
        ),
        Refusal(
            "a dense layer follows one with experts, but the runtime expects all dense layers first",
            lambda m: "dense" in m.kinds["ffn"][n_leading_dense(m) :],
        ),
    ),
    flags={"attention_bias": False, "use_qk_norm": False},
    default_pre="glm4",
    special_tokens=SpecialTokens(
        {"bos": "[gMASK]", "eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}
    ),
)
