"""LFM2-MoE (8B-A1B, 24B-A2B): LFM2's layers, most of them with a mixture of experts instead of the dense network.

Experts are stored one by one (as published) or stacked, gate and up fused (as transformers 5 holds them); either way
they become one tensor [E, rows, columns] whose rows are read where they lie.
Sources: transformers' Lfm2MoeConfig and modeling_lfm2_moe.py; LFM2MoeModel in llama.cpp's conversion/lfm2.py, and
lfm2moe.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from streamconv.recipe import F32, Computed, Config, Dim, Key, Model, Part, PerLayer, Recipe, Tensor

ROPE_THETA, CONTEXT_LENGTH, RMS_EPSILON = 1_000_000.0, 128_000, 1e-5  # Lfm2MoeConfig's defaults
SIGMOID = 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID

LAYER, BLOCK = "model.layers.{i}.", "blk.{i}."
ATTENTION, CONV, DENSE, MOE = "mixer=attention", "mixer=conv", "ffn=dense", "ffn=moe"


def layer_kinds(config: Config, n_layers: int) -> Mapping[str, Sequence[str] | None]:
    """What the config says of each layer, None where it says nothing."""
    names = {"conv": "conv", "full_attention": "attention"}
    types = config.list_of("layer_types", str)
    n_dense = config.integer("num_dense_layers", minimum=0)
    return {
        "mixer": None if types is None else [names.get(kind, kind) for kind in types],
        "ffn": None if n_dense is None else ["dense" if i < n_dense else "moe" for i in range(n_layers)],
    }


def n_leading_dense(model: Model) -> int:
    return model.kinds["ffn"].count("dense")


def routed_scale(model: Model) -> float:
    """What the experts' sum is multiplied by; the run time has no key for it, and the sum is linear in w2."""
    scale = model.config.number("routed_scaling_factor")
    return 1.0 if scale is None else scale


def no_bias(model: Model) -> NDArray[np.float32]:
    """The run time demands a bias of the router's choice; zeros change nothing."""
    return np.zeros(model.dims["E"], dtype=np.float32)


def refuse(model: Model) -> Iterator[str]:
    config, dims = model.config, model.dims
    if config.flag("conv_bias"):
        yield "conv_bias is true, and the GGUF architecture has no place for it"
    if config.rope_type != "default":
        yield f"RoPE scaling {config.rope_type!r} has no place in the GGUF architecture"
    if config.flag("norm_topk_prob") is False:
        yield "norm_topk_prob is false, and the run time always normalises the weights of the chosen experts"
    if dims["A"] * dims["D"] != dims["H"]:
        yield f"{dims['A']} heads of {dims['D']} do not make the hidden size {dims['H']}, as the run time takes it"
    if dims["U"] > dims["E"]:
        yield f"{dims['U']} of {dims['E']} experts cannot be used"
    if "dense" in model.kinds["ffn"][n_leading_dense(model) :]:
        yield "a dense layer follows one with experts, and the run time takes the dense ones first"


RECIPE = Recipe(
    arch="lfm2moe",
    description="LFM2-MoE and LFM2.5-MoE",
    hf_names=("Lfm2MoeForCausalLM",),
    model_type="lfm2_moe",
    dims={
        "L": Dim("num_hidden_layers"),
        "V": Dim("vocab_size"),
        "H": Dim("hidden_size"),
        "F": Dim("intermediate_size"),  # of the dense layers, never adjusted
        "A": Dim("num_attention_heads", "H/D"),
        "K": Dim("num_key_value_heads", "A"),
        "D": Dim("head_dim", "H/A"),
        "C": Dim("conv_L_cache", 3),
        "E": Dim("num_experts"),
        "U": Dim("num_experts_per_tok", 4),
        "M": Dim("moe_intermediate_size"),
    },
    tensors=(
        Tensor("model.embed_tokens.weight", "token_embd.weight", "V H"),
        Tensor(LAYER + "operator_norm.weight", BLOCK + "attn_norm.weight", "H"),
        Tensor(LAYER + "self_attn.q_proj.weight", BLOCK + "attn_q.weight", "A*D H", only=ATTENTION),
        Tensor(LAYER + "self_attn.k_proj.weight", BLOCK + "attn_k.weight", "K*D H", only=ATTENTION),
        Tensor(LAYER + "self_attn.v_proj.weight", BLOCK + "attn_v.weight", "K*D H", only=ATTENTION),
        Tensor(LAYER + "self_attn.out_proj.weight", BLOCK + "attn_output.weight", "H A*D", only=ATTENTION),
        Tensor(LAYER + "self_attn.q_layernorm.weight", BLOCK + "attn_q_norm.weight", "D", only=ATTENTION),
        Tensor(LAYER + "self_attn.k_layernorm.weight", BLOCK + "attn_k_norm.weight", "D", only=ATTENTION),
        Tensor(LAYER + "conv.conv.weight", BLOCK + "shortconv.conv.weight", "H 1 C", only=CONV),
        Tensor(LAYER + "conv.in_proj.weight", BLOCK + "shortconv.in_proj.weight", "3*H H", only=CONV),
        Tensor(LAYER + "conv.out_proj.weight", BLOCK + "shortconv.out_proj.weight", "H H", only=CONV),
        Tensor(LAYER + "ffn_norm.weight", BLOCK + "ffn_norm.weight", "H"),
        Tensor(LAYER + "feed_forward.w1.weight", BLOCK + "ffn_gate.weight", "F H", only=DENSE),
        Tensor(LAYER + "feed_forward.w2.weight", BLOCK + "ffn_down.weight", "H F", only=DENSE),
        Tensor(LAYER + "feed_forward.w3.weight", BLOCK + "ffn_up.weight", "F H", only=DENSE),
        Tensor(LAYER + "feed_forward.gate.weight", BLOCK + "ffn_gate_inp.weight", "E H", only=MOE),
        Tensor(
            LAYER + "feed_forward.expert_bias", BLOCK + "exp_probs_b.bias", "E", only=MOE, required="use_expert_bias"
        ),
        # Experts one by one ...
        Tensor(LAYER + "feed_forward.experts.{e}.w1.weight", BLOCK + "ffn_gate_exps.weight", "M H", only=MOE),
        Tensor(
            LAYER + "feed_forward.experts.{e}.w2.weight",
            BLOCK + "ffn_down_exps.weight",
            "H M",
            only=MOE,
            scale=routed_scale,
        ),
        Tensor(LAYER + "feed_forward.experts.{e}.w3.weight", BLOCK + "ffn_up_exps.weight", "M H", only=MOE),
        # ... or stacked.
        Tensor(
            LAYER + "feed_forward.experts.gate_up_proj",
            BLOCK + "ffn_gate_exps.weight",
            "E 2*M H",
            only=MOE,
            part=Part(0, 2),
        ),
        Tensor(
            LAYER + "feed_forward.experts.gate_up_proj",
            BLOCK + "ffn_up_exps.weight",
            "E 2*M H",
            only=MOE,
            part=Part(1, 2),
        ),
        Tensor(
            LAYER + "feed_forward.experts.down_proj",
            BLOCK + "ffn_down_exps.weight",
            "E H M",
            only=MOE,
            scale=routed_scale,
        ),
        # Logically the output norm; llama.cpp and Ollama look for it under this name.
        Tensor("model.embedding_norm.weight", "token_embd_norm.weight", "H"),
        Tensor("lm_head.weight", "output.weight", "V H", required=False),
    ),
    computed=(Computed(BLOCK + "exp_probs_b.bias", no_bias, only=MOE),),
    keys=(
        Key("{arch}.vocab_size", "V"),
        Key("{arch}.block_count", "L"),
        Key("{arch}.embedding_length", "H"),
        Key("{arch}.feed_forward_length", "F"),
        Key("{arch}.context_length", lambda m: m.config.integer("max_position_embeddings") or CONTEXT_LENGTH),
        Key("{arch}.attention.head_count", "A"),
        Key("{arch}.attention.head_count_kv", PerLayer("mixer", {"attention": "K", "conv": 0})),
        Key("{arch}.attention.key_length", "D"),
        Key("{arch}.attention.value_length", "D"),
        Key("{arch}.attention.layer_norm_rms_epsilon", lambda m: m.config.positive("norm_eps") or RMS_EPSILON, F32),
        Key("{arch}.rope.freq_base", lambda m: m.config.rope_base(ROPE_THETA), F32),
        Key("{arch}.shortconv.l_cache", "C"),
        Key("{arch}.expert_count", "E"),
        Key("{arch}.expert_used_count", "U"),
        Key("{arch}.expert_feed_forward_length", "M"),
        Key("{arch}.leading_dense_block_count", n_leading_dense),
        Key("{arch}.expert_gating_func", lambda model: SIGMOID),
    ),
    axes={"mixer": ("attention", "conv"), "ffn": ("dense", "moe")},
    claims=layer_kinds,
    refuse=refuse,
    tie_keys=("tie_embedding", "tie_word_embeddings"),
    tied_by_default=True,
    default_pre="lfm2",
)
