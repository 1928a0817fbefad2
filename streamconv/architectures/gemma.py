"""Gemma and CodeGemma: norms stored as the weight minus one, the embedding used as the head.

Sources: transformers' GemmaConfig and modeling_gemma.py; GemmaModel in llama.cpp's conversion/gemma.py, which leaves
out the base of RoPE, and gemma.cpp.
"""

from __future__ import annotations

from streamconv.architectures import _decoder as decoder
from streamconv.architectures._rope import Rope
from streamconv.recipe import Alias, PlusOne, Recipe, SpecialTokens, Tensor

ROPE = Rope(theta=10_000.0, context=8192)

OUTPUT_NORM = Tensor("model.norm.weight", "output_norm.weight", "H", (PlusOne(),))
SAME_HEAD = Alias("lm_head.weight", "model.embed_tokens.weight")  # some programs store it twice
TIED = decoder.flag("tie_word_embeddings", only=True, silent=True, why="the runtime uses the embedding as the head")

# In older configs "gelu" means the tanh form, and transformers reads it that way.
GELU = tuple(
    decoder.activation("gelu_pytorch_tanh", "gelu", "gelu_new", key=key, silent="gelu")
    for key in ("hidden_act", "hidden_activation")
)
CAUSAL = decoder.flag(
    "use_bidirectional_attention", only=False, silent=False, why="the runtime attends only to earlier tokens"
)
NO_BIAS = decoder.flag("attention_bias", only=False, silent=False, why="such models are not supported")

RECIPE = Recipe(
    arch="gemma",
    description="Gemma and CodeGemma",
    hf_names=("GemmaForCausalLM",),
    bodies=("GemmaModel",),
    model_type="gemma",
    dims=decoder.dims(256),
    tensors=(
        decoder.EMBEDDING,
        *decoder.norm("input_layernorm", "attn_norm", "H", PlusOne()),
        *decoder.attention(),
        *decoder.norm("post_attention_layernorm", "ffn_norm", "H", PlusOne()),
        *decoder.gated(),
        OUTPUT_NORM,
    ),
    aliases=(SAME_HEAD,),
    drops=decoder.DROPS,
    keys=decoder.keys(ROPE, epsilon=1e-6),
    refusals=decoder.refusals(ROPE, *GELU, CAUSAL, NO_BIAS, TIED),
    tied_by_default=True,
    special_tokens=SpecialTokens({"eot": "<end_of_turn>"}),
)
