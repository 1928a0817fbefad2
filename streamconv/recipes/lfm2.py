"""LFM2 and LFM2.5, dense: layers of short convolution or of attention, mixed.

Sources: transformers' Lfm2Config and modeling_lfm2.py; LFM2Model in llama.cpp's conversion/lfm2.py, and lfm2.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from streamconv.recipe import F32, Config, Dim, Key, Model, PerLayer, Recipe, Tensor

ROPE_THETA = 1_000_000.0  # Lfm2Config's default


def ffn_width(config: Config) -> int | None:
    """The width of w1 as Lfm2MLP works it out; None where the config leaves a part of that to defaults."""
    width = config.integer("block_ff_dim") or config.integer("intermediate_size")
    adjust = config.flag("block_auto_adjust_ff_dim")
    if width is None or not adjust:
        return width if adjust is False else None
    multiplier, multiple = config.number("block_ffn_dim_multiplier"), config.integer("block_multiple_of")
    if multiplier is None or multiple is None:
        return None
    width = int(multiplier * int(2 * width / 3))
    return multiple * ((width + multiple - 1) // multiple)


def layer_kinds(config: Config, n_layers: int) -> Mapping[str, Sequence[str] | None]:
    """What the config says of each layer: layer_types comes before full_attn_idxs, None where it says nothing."""
    names = {"conv": "conv", "full_attention": "attention"}
    types = config.list_of("layer_types", str)
    if types is not None:
        return {"mixer": [names.get(kind, kind) for kind in types]}
    indices = config.list_of("full_attn_idxs", int)
    if indices is not None:
        return {"mixer": ["attention" if i in indices else "conv" for i in range(n_layers)]}
    return {"mixer": None}


def refuse(model: Model) -> Iterator[str]:
    config, dims = model.config, model.dims
    if config.flag("conv_bias"):
        yield "conv_bias is true, and the GGUF architecture has no place for it"
    if config.rope_type != "default":
        yield f"RoPE scaling {config.rope_type!r} has no place in the GGUF architecture"
    if dims["A"] * dims["D"] != dims["H"]:
        yield f"{dims['A']} heads of {dims['D']} do not make the hidden size {dims['H']}, as the run time takes it"


DIMS = {
    "L": Dim("num_hidden_layers"),
    "V": Dim("vocab_size"),
    "H": Dim("hidden_size"),
    "F": Dim(ffn_width, rule="block_ff_dim with the auto-adjust rule"),
    "A": Dim("num_attention_heads", "H/D"),
    "K": Dim("num_key_value_heads", "A"),
    "D": Dim("head_dim", "H/A"),
    "C": Dim("conv_L_cache", 3),
}

EMBEDDING = Tensor("model.embed_tokens.weight", "token_embd.weight", "V H")

MIXER = (
    Tensor("model.layers.{i}.operator_norm.weight", "blk.{i}.attn_norm.weight", "H"),
    Tensor("model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "A*D H", only="mixer=attention"),
    Tensor("model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "K*D H", only="mixer=attention"),
    Tensor("model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "K*D H", only="mixer=attention"),
    Tensor("model.layers.{i}.self_attn.out_proj.weight", "blk.{i}.attn_output.weight", "H A*D", only="mixer=attention"),
    Tensor("model.layers.{i}.self_attn.q_layernorm.weight", "blk.{i}.attn_q_norm.weight", "D", only="mixer=attention"),
    Tensor("model.layers.{i}.self_attn.k_layernorm.weight", "blk.{i}.attn_k_norm.weight", "D", only="mixer=attention"),
    Tensor("model.layers.{i}.conv.conv.weight", "blk.{i}.shortconv.conv.weight", "H 1 C", only="mixer=conv"),
    Tensor("model.layers.{i}.conv.in_proj.weight", "blk.{i}.shortconv.in_proj.weight", "3*H H", only="mixer=conv"),
    Tensor("model.layers.{i}.conv.out_proj.weight", "blk.{i}.shortconv.out_proj.weight", "H H", only="mixer=conv"),
    Tensor("model.layers.{i}.ffn_norm.weight", "blk.{i}.ffn_norm.weight", "H"),
)

OUTPUT = (
    # Logically the output norm; llama.cpp and Ollama look for it under this name (dialects.py has the older one).
    Tensor("model.embedding_norm.weight", "token_embd_norm.weight", "H"),
    Tensor("lm_head.weight", "output.weight", "V H", required=False),
)

KEYS = (
    Key("{arch}.vocab_size", "V"),
    Key("{arch}.block_count", "L"),
    Key("{arch}.embedding_length", "H"),
    Key("{arch}.feed_forward_length", "F"),
    Key("{arch}.context_length", lambda model: model.config.integer("max_position_embeddings") or 128_000),
    Key("{arch}.attention.head_count", "A"),
    Key("{arch}.attention.head_count_kv", PerLayer("mixer", {"attention": "K", "conv": 0})),
    Key("{arch}.attention.key_length", "D"),
    Key("{arch}.attention.value_length", "D"),
    Key("{arch}.attention.layer_norm_rms_epsilon", lambda model: model.config.positive("norm_eps") or 1e-5, F32),
    Key("{arch}.rope.freq_base", lambda model: model.config.rope_base(ROPE_THETA), F32),
    Key("{arch}.shortconv.l_cache", "C"),
)

RECIPE = Recipe(
    arch="lfm2",
    description="LFM2 and LFM2.5, dense",
    hf_names=("Lfm2ForCausalLM",),
    model_type="lfm2",
    dims=DIMS,
    tensors=(
        EMBEDDING,
        *MIXER,
        Tensor("model.layers.{i}.feed_forward.w1.weight", "blk.{i}.ffn_gate.weight", "F H"),
        Tensor("model.layers.{i}.feed_forward.w2.weight", "blk.{i}.ffn_down.weight", "H F"),
        Tensor("model.layers.{i}.feed_forward.w3.weight", "blk.{i}.ffn_up.weight", "F H"),
        *OUTPUT,
    ),
    keys=KEYS,
    axes={"mixer": ("attention", "conv")},
    claims=layer_kinds,
    refuse=refuse,
    tie_keys=("tie_embedding", "tie_word_embeddings"),
    tied_by_default=True,
    default_pre="lfm2",
)
