"""LFM2 and LFM2.5, dense: layers of short convolution or of attention, mixed.

Sources: transformers' Lfm2Config and modeling_lfm2.py; LFM2Model in llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from streamconv.recipe import F32, Config, Dim, Key, Model, PerLayer, Recipe, Tensor

ROPE_THETA = 1_000_000.0  # Lfm2Config's default


def ffn_width(config: Config) -> int | None:
    """block_ff_dim / intermediate_size and the block_auto_adjust_ff_dim rule"""
    width = config.integer("block_ff_dim") or config.integer("intermediate_size")
    adjust = config.flag("block_auto_adjust_ff_dim")
    if width is None or adjust is None:
        return None  # the rule is only explicit where the switch is
    if not adjust:
        return width
    multiplier, multiple = config.number("block_ffn_dim_multiplier"), config.integer("block_multiple_of")
    if multiple is None:
        return None
    # Lfm2MLP.__init__; a null multiplier is no multiplier
    width = int(2 * width / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple * ((width + multiple - 1) // multiple)


def rope_base(config: Config) -> float:
    """`rope_scaling` replaces `rope_parameters`, and either comes before `rope_theta` (Lfm2Config's order)."""
    section = config.section("rope_scaling") or config.section("rope_parameters")
    if section is not None and (base := section.number("rope_theta")) is not None:
        return base
    return config.number("rope_theta") or ROPE_THETA


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


def refuse(config: Config) -> Iterator[str]:
    if config.flag("conv_bias"):
        yield "conv_bias is true, and the GGUF architecture has no place for it"
    section = config.section("rope_scaling") or config.section("rope_parameters")
    kind = section and (section.text("rope_type") or section.text("type"))
    if kind not in (None, "default"):
        yield f"RoPE scaling {kind!r} has no place in the GGUF architecture"


def rms_epsilon(model: Model) -> float:
    return model.config.number("norm_eps") or model.config.number("block_norm_eps") or 1e-5


DIMS = {
    "L": Dim("num_hidden_layers"),
    "V": Dim("vocab_size"),
    "H": Dim("hidden_size"),
    "F": Dim(ffn_width),
    "A": Dim("num_attention_heads", lambda d: d["H"] // d["D"] if "D" in d else None),
    "K": Dim("num_key_value_heads", lambda d: d.get("A")),
    "D": Dim("head_dim", lambda d: d["H"] // d["A"] if "A" in d else None),
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
    Key("{arch}.attention.layer_norm_rms_epsilon", rms_epsilon, F32),
    Key("{arch}.rope.freq_base", lambda model: rope_base(model.config), F32),
    Key("{arch}.shortconv.l_cache", "C"),
)

RECIPE = Recipe(
    arch="lfm2",
    description="LFM2 and LFM2.5, dense",
    hf_names=("Lfm2ForCausalLM",),
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
