"""Granite-MoE: Granite's attention, and experts in every layer; GraniteMoeShared adds a shared expert.

Sources: transformers' GraniteMoeConfig, GraniteMoeSharedConfig and their modeling files; GraniteMoeModel in llama.cpp's
conversion/granite.py, and granite-moe.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures import granite
from streamconv.architectures._decoder import BLOCK, LAYER
from streamconv.recipe import Dim, Key, Recipe, Split, Tensor

MOE, SHARED = LAYER + "block_sparse_moe.", LAYER + "shared_mlp."


def shared(source: str, target: str, shape: str, *ops: Split) -> Tensor:
    return Tensor(SHARED + source, BLOCK + target, shape, ops, required=False)


RECIPE = Recipe(
    arch="granitemoe",
    description="Granite-MoE, with a shared expert or without",
    hf_names=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    bodies=(
        "GraniteMoeModel",
        "GraniteMoeSharedModel",
    ),
    model_type="granitemoe",
    dims=decoder.dims()
    | decoder.expert_dims("num_local_experts", 2)
    | {"S": Dim("shared_intermediate_size", 0, minimum=0)},
    tensors=(
        decoder.EMBEDDING,
        *granite.ATTENTION,
        Tensor(MOE + "router.layer.weight", BLOCK + "ffn_gate_inp.weight", "E H", f32=True),
        Tensor(MOE + "input_linear.weight", BLOCK + "ffn_gate_exps.weight", "E 2*F H", (Split(0, 2),)),
        Tensor(MOE + "output_linear.weight", BLOCK + "ffn_down_exps.weight", "E H F"),
        Tensor(MOE + "input_linear.weight", BLOCK + "ffn_up_exps.weight", "E 2*F H", (Split(1, 2),)),
        *decoder.stacked_experts("block_sparse_moe.", "F"),  # transformers 5's names in memory, also used by adapters
        shared("input_linear.weight", "ffn_gate_shexp.weight", "2*S H", Split(0, 2)),
        shared("output_linear.weight", "ffn_down_shexp.weight", "H S"),
        shared("input_linear.weight", "ffn_up_shexp.weight", "2*S H", Split(1, 2)),
        decoder.OUTPUT_NORM,
        decoder.HEAD,
    ),
    computed=granite.COMPUTED,
    drops=decoder.DROPS,
    keys=(
        *granite.KEYS,
        *decoder.expert_keys(None),
        Key("{arch}.expert_shared_feed_forward_length", lambda model: model.dims["S"] or None),
    ),
    refusals=decoder.refusals(granite.ROPE, decoder.SILU, decoder.USED_EXPERTS),
    flags={"attention_bias": False},
    default_pre="refact",
)
