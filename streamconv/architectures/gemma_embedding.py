"""EmbeddingGemma: Gemma 3's layers without a causal mask, windows that end on both sides, and two dense layers.

Sources: transformers' Gemma3TextConfig and Gemma3TextModel; EmbeddingGemma in llama.cpp's conversion/gemma.py, which
leaves the dense layers out unless it is asked for them, and gemma-embedding.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures import gemma, gemma2, gemma3
from streamconv.recipe import F32, Dim, Key, Model, Recipe, Refusal, Tensor

NO_ADAPTER = "it is a dense layer after the model, to which llama.cpp does not apply adapters"
N_LAYERS = 0  # no model's number: the runtime scales the queries of all sizes the same way


def n_dense(model: Model) -> int:
    return sum(name.endswith(".weight") for name in model.modules.tensors)


def features(name: str, dim: str, needs: int) -> Key:
    """The key for one side of a dense layer, written if there are at least `needs` of these layers."""
    return Key(f"{{arch}}.{name}", lambda model: model.dims[dim] if n_dense(model) >= needs else None)


RECIPE = Recipe(
    arch="gemma-embedding",
    description="EmbeddingGemma",
    hf_names=("Gemma3TextModel",),
    model_type="gemma_embedding",  # in no config: there it is gemma3_text, as for Gemma 3
    dims=gemma3.DIMS
    | {
        "O": Dim(lambda config: None, "H", rule="the width of the first dense layer"),
        "P": Dim(lambda config: None, "H", rule="the width of the second dense layer"),
    },
    tensors=(
        decoder.EMBEDDING,
        *gemma3.LAYERS,
        gemma.OUTPUT_NORM,
        Tensor("dense.0.linear.weight", "dense_2.weight", "O H", required=False, no_adapter=NO_ADAPTER),
        Tensor("dense.1.linear.weight", "dense_3.weight", "P O", required=False, no_adapter=NO_ADAPTER),
    ),
    drops=decoder.DROPS,
    keys=(
        *decoder.keys(gemma3.ROPE, epsilon=1e-6),
        Key("{arch}.attention.sliding_window", gemma3.window),
        gemma3.PATTERN_KEY,
        Key("{arch}.rope.freq_base_swa", gemma3.local_base, F32),
        features("dense_2_feat_in", "H", 1),
        features("dense_2_feat_out", "O", 1),
        features("dense_3_feat_in", "O", 2),
        features("dense_3_feat_out", "P", 2),
    ),
    refusals=(
        *(one for one in gemma3.REFUSALS if one is not decoder.ONE_SIDED),
        gemma2.query_scale(N_LAYERS, 256),
        Refusal(
            "use_bidirectional_attention is not true, but the runtime always attends in both directions; a Gemma 3 "
            "that generates text is Gemma3ForCausalLM in config.json",
            lambda m: m.config.flag("use_bidirectional_attention") is not True,
        ),
        Refusal("no layer has a sliding window, but the runtime needs one", lambda m: not gemma3.has_window(m)),
        Refusal(
            "the dense layer gives vectors of {O}, but the runtime's have the hidden size {H}",
            lambda m: n_dense(m) == 1 and m.dims["O"] != m.dims["H"],
        ),
        Refusal(
            "the dense layers give vectors of {P}, but the runtime's have the hidden size {H}",
            lambda m: n_dense(m) > 1 and m.dims["P"] != m.dims["H"],
        ),
    ),
    head="",
)
