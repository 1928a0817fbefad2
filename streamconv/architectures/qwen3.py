"""Qwen3, dense: like Qwen2, but with norms of Q and K and without biases.

Sources: transformers' Qwen3Config and modeling_qwen3.py; Qwen3Model in llama.cpp's conversion/qwen.py, and qwen3.cpp.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import STRING, Key, Model, Recipe, Refusal, Rows, Tensor

ROPE = Rope(theta=10_000.0, context=32_768)

NO_BIAS = decoder.flag(
    "attention_bias", only=False, silent=False, why="the runtime does not support that of the output"
)

ATTENTION = (
    *decoder.norm("input_layernorm", "attn_norm"),
    *decoder.attention(),
    *decoder.norm("self_attn.q_norm", "attn_q_norm", "D"),
    *decoder.norm("self_attn.k_norm", "attn_k_norm", "D"),
    *decoder.norm("post_attention_layernorm", "ffn_norm"),
)

# The prompt of a reranker, which the runtime reads from the file; from Qwen3-Reranker's model card.
QUESTION = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def answers(model: Model) -> NDArray[np.int64]:
    """The rows of the head that a reranker needs: those of its two answers, yes and no."""
    return np.array(model.modules.answers, dtype=np.int64)


LAYERS = (*ATTENTION, *decoder.gated())
REFUSALS = decoder.refusals(ROPE, decoder.SILU, decoder.NO_WINDOW, NO_BIAS)
OF_ANSWERS = (Rows(answers),)
NO_ADAPTER = "it is made from rows of the head, to which llama.cpp does not apply adapters"

RERANKER = Recipe(
    arch="qwen3",
    description="Qwen3-Reranker",
    hf_names=("Qwen3ForCausalLM",),
    model_type="qwen3",
    dims=decoder.dims(head=128),
    tensors=(
        decoder.EMBEDDING,
        *LAYERS,
        decoder.OUTPUT_NORM,
        Tensor("lm_head.weight", "cls.output.weight", "V H", OF_ANSWERS, required=False, no_adapter=NO_ADAPTER),
        Tensor(
            decoder.EMBEDDING.source,
            "cls.output.weight",
            "V H",
            OF_ANSWERS,
            no_adapter=NO_ADAPTER,
            unless="lm_head.weight",
        ),
    ),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(ROPE, epsilon=1e-6),
        Key("{arch}.classifier.output_labels", lambda model: ("yes", "no"), STRING),
    ),
    refusals=(
        *REFUSALS,
        Refusal(
            "the answers are tokens beyond the model's vocabulary of {V}",
            lambda m: max(m.modules.answers or (0,)) >= m.dims["V"],
        ),
    ),
    default_pre="qwen2",
    templates={"rerank": QUESTION},
)

RECIPE = Recipe(
    arch="qwen3",
    description="Qwen3, dense; embedding models and rerankers of it",
    hf_names=("Qwen3ForCausalLM",),
    bodies=("Qwen3Model",),
    model_type="qwen3",
    dims=decoder.dims(head=128),
    tensors=(decoder.EMBEDDING, *LAYERS, decoder.OUTPUT_NORM, decoder.HEAD),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-6),
    refusals=REFUSALS,
    default_pre="qwen2",
    reranker=RERANKER,
)
