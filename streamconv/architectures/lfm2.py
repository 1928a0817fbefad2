"""LFM2 and LFM2.5, dense: layers of short convolution or of attention, mixed.

Sources: transformers' Lfm2Config and modeling_lfm2.py; LFM2Model in llama.cpp's conversion/lfm2.py, and lfm2.cpp.
The limits of the runtime were tested: beyond them it aborts or fails to create a context (tests/unit/test_refusals.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.architectures._rope import DYNAMIC, PLAIN_UP_TO_CONTEXT
from streamconv.recipe import (
    BOOL,
    F32,
    Alias,
    Caveat,
    Claim,
    Config,
    Dim,
    Key,
    Model,
    PerLayer,
    Recipe,
    Refusal,
    Squeeze,
    Tensor,
)

# Lfm2Config's defaults, and Lfm2MoeConfig's.
ROPE_THETA, CONTEXT_LENGTH, RMS_EPSILON = 1_000_000.0, 128_000, 1e-5

LAYER, BLOCK = "model.layers.{i}.", "blk.{i}."
ATTENTION, CONV = "mixer=attention", "mixer=conv"

NO_ADAPTER = "it is a dense layer after the model, to which llama.cpp does not apply adapters"
BIDIRECTIONAL = "Lfm2BidirectionalModel"  # attention and convolutions work in both directions
BIDIRECTIONAL_TYPE = "lfm2_bidirectional"  # its model type in transformers; with Liquid's own code, it is lfm2


def ffn_width(config: Config) -> int | None:
    """The width of w1 as Lfm2MLP computes it; None if the config lacks one of the keys needed for that."""
    width = config.integer("block_ff_dim") or config.integer("intermediate_size")
    adjust = config.flag("block_auto_adjust_ff_dim")
    if width is None or not adjust:
        return width if adjust is False else None
    multiplier, multiple = config.number("block_ffn_dim_multiplier"), config.integer("block_multiple_of")
    if multiplier is None or multiple is None:
        return None
    width = int(multiplier * int(2 * width / 3))
    return multiple * ((width + multiple - 1) // multiple)


def mixers_by_type(config: Config, n_layers: int) -> Sequence[str] | None:
    names = {"full_attention": "attention", "sliding_attention": "attention"}  # the latter: LFM2.5-Audio's detokenizer
    types = config.list_of("layer_types", str)
    return None if types is None else [names.get(kind, kind) for kind in types]


def mixers_by_index(config: Config, n_layers: int) -> Sequence[str] | None:
    attending = config.list_of("full_attn_idxs", int)
    if attending is None:
        return None
    if not set(attending) <= set(range(n_layers)):
        raise config.wrong("full_attn_idxs", f"layers from 0 to {n_layers - 1}")
    return ["attention" if i in attending else "conv" for i in range(n_layers)]


def is_bidirectional(model: Model) -> bool:
    config = model.config.whole
    is_named = BIDIRECTIONAL in (config.list_of("architectures", str) or ())
    return is_named or config.text("model_type") == BIDIRECTIONAL_TYPE


DIMS = {
    "L": Dim("num_hidden_layers"),
    "V": Dim("vocab_size"),
    "H": Dim("hidden_size"),
    "F": Dim(ffn_width, rule="block_ff_dim with the auto-adjust rule"),
    "A": Dim("num_attention_heads", "H/D"),
    "K": Dim("num_key_value_heads", "A"),
    "D": Dim("head_dim", "H/A"),
    "C": Dim("conv_L_cache", 3),
    "O": Dim(lambda config: None, "H", rule="the width of the dense layer"),
}

EMBEDDING = Tensor("model.embed_tokens.weight", "token_embd.weight", "V H")

MIXER = (
    Tensor(LAYER + "operator_norm.weight", BLOCK + "attn_norm.weight", "H"),
    Tensor(LAYER + "self_attn.q_proj.weight", BLOCK + "attn_q.weight", "A*D H", only=ATTENTION),
    Tensor(LAYER + "self_attn.k_proj.weight", BLOCK + "attn_k.weight", "K*D H", only=ATTENTION),
    Tensor(LAYER + "self_attn.v_proj.weight", BLOCK + "attn_v.weight", "K*D H", only=ATTENTION),
    Tensor(LAYER + "self_attn.out_proj.weight", BLOCK + "attn_output.weight", "H A*D", only=ATTENTION),
    Tensor(LAYER + "self_attn.q_layernorm.weight", BLOCK + "attn_q_norm.weight", "D", only=ATTENTION),
    Tensor(LAYER + "self_attn.k_layernorm.weight", BLOCK + "attn_k_norm.weight", "D", only=ATTENTION),
    Tensor(LAYER + "conv.conv.weight", BLOCK + "shortconv.conv.weight", "H 1 C", (Squeeze(),), only=CONV, f32=True),
    Tensor(LAYER + "conv.in_proj.weight", BLOCK + "shortconv.in_proj.weight", "3*H H", only=CONV),
    Tensor(LAYER + "conv.out_proj.weight", BLOCK + "shortconv.out_proj.weight", "H H", only=CONV),
    Tensor(LAYER + "ffn_norm.weight", BLOCK + "ffn_norm.weight", "H"),
)

OUTPUT = (
    # Logically the output norm; llama.cpp and Ollama look for it under this name (dialects.py has the older one).
    Tensor("model.embedding_norm.weight", "token_embd_norm.weight", "H"),
    Tensor("lm_head.weight", "output.weight", "V H", required=False),
    # The dense layer of a retrieval model, after the pooling; O is the width of its vectors.
    Tensor("dense.0.linear.weight", "dense_2.weight", "O H", required=False, no_adapter=NO_ADAPTER),
    Tensor("dense.0.linear.bias", "dense_2.bias", "O", required=False),
)

KEYS = (
    Key("{arch}.vocab_size", "V"),
    Key("{arch}.block_count", "L"),
    Key("{arch}.embedding_length", "H"),
    Key("{arch}.feed_forward_length", "F"),
    Key("{arch}.context_length", lambda model: model.config.integer("max_position_embeddings") or CONTEXT_LENGTH),
    Key("{arch}.attention.head_count", "A"),
    Key("{arch}.attention.head_count_kv", PerLayer("mixer", {"attention": "K", "conv": 0})),
    Key("{arch}.attention.key_length", "D"),
    Key("{arch}.attention.value_length", "D"),
    Key("{arch}.attention.layer_norm_rms_epsilon", lambda model: model.config.positive("norm_eps") or RMS_EPSILON, F32),
    Key("{arch}.rope.freq_base", lambda model: model.config.rope_base(ROPE_THETA), F32),
    Key("{arch}.shortconv.l_cache", "C"),
    Key("{arch}.attention.causal", lambda model: False if is_bidirectional(model) else None, BOOL),
    Key("{arch}.embedding_length_out", lambda model: model.dims["O"] if model.modules.has_dense else None),
)

MIXERS = ("attention", "conv")

CLAIMS = (Claim("layer_types", "mixer", mixers_by_type), Claim("full_attn_idxs", "mixer", mixers_by_index))

REFUSALS = (
    Refusal(
        "RoPE scaling {rope_type!r} is not supported by the GGUF architecture",
        lambda m: m.config.rope_type not in ("default", DYNAMIC),
    ),
    Caveat(PLAIN_UP_TO_CONTEXT, lambda m: m.config.rope_type == DYNAMIC, code="rope-dynamic"),
    Refusal(
        "conv_bias is true, but the GGUF architecture does not support it", lambda m: bool(m.config.flag("conv_bias"))
    ),
    Refusal(
        "the runtime assumes that {A} heads of {D} make up the hidden size {H}",
        lambda m: m.dims["A"] * m.dims["D"] != m.dims["H"],
    ),
    Refusal("{A} heads do not share {K} key-value heads evenly", lambda m: m.dims["A"] % m.dims["K"] != 0),
    Refusal("heads of {D} cannot be split into the two halves that RoPE rotates", lambda m: m.dims["D"] % 2 != 0),
    Refusal("conv_L_cache is {C}, but the runtime needs 2 or more", lambda m: m.dims["C"] < 2),
    Refusal(
        "is_causal is false, but the class is not Lfm2BidirectionalModel: the runtime would make the convolutions "
        "bidirectional, too",
        lambda m: m.config.flag("is_causal") is False and not is_bidirectional(m),
    ),
    Refusal(
        "conv_L_cache is {C}, but the runtime's bidirectional convolutions need an odd number",
        lambda m: m.dims["C"] % 2 == 0 and is_bidirectional(m),
    ),
    Refusal("there is no attention layer, but the runtime needs one", lambda m: set(m.kinds["mixer"]) == {"conv"}),
    Refusal(
        "there is no convolution layer, but the runtime needs one", lambda m: set(m.kinds["mixer"]) == {"attention"}
    ),
)


def mlx_kernel(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape [H, 1, L] of a kernel that mlx-lm stores as [H, L, 1], else None. H > L > 1 makes this unambiguous."""
    is_mlx = len(shape) == 3 and shape[2] == 1 and shape[0] > shape[1] > 1
    return (shape[0], 1, shape[1]) if is_mlx else None


# mlx-lm, models/lfm2_moe.py (sanitize): the kernel's last two extents are exchanged, dense layers have other names.
KERNEL = LAYER + "conv.conv.weight"
MLX_FFN = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
ALIASES = (
    Alias(KERNEL, KERNEL, mlx_kernel),
    *(Alias(f"{LAYER}feed_forward.{a}.weight", f"{LAYER}feed_forward.{b}.weight") for a, b in MLX_FFN.items()),
)

TIE_KEYS = ("tie_embedding", "tie_word_embeddings")

RECIPE = Recipe(
    arch="lfm2",
    description="LFM2 and LFM2.5, dense; their ColBERT and embedding models",
    hf_names=("Lfm2ForCausalLM", "LFM2ForCausalLM", BIDIRECTIONAL),
    bodies=("Lfm2Model", "LFM2Model"),
    model_type="lfm2",
    dims=DIMS,
    tensors=(
        EMBEDDING,
        *MIXER,
        Tensor(LAYER + "feed_forward.w1.weight", BLOCK + "ffn_gate.weight", "F H"),
        Tensor(LAYER + "feed_forward.w2.weight", BLOCK + "ffn_down.weight", "H F"),
        Tensor(LAYER + "feed_forward.w3.weight", BLOCK + "ffn_up.weight", "F H"),
        *OUTPUT,
    ),
    keys=KEYS,
    axes={"mixer": MIXERS},
    claims=CLAIMS,
    refusals=REFUSALS,
    aliases=ALIASES,
    tie_keys=TIE_KEYS,
    tied_by_default=True,
    default_pre="lfm2",
    unrunnable={
        r"L[Ff][Mm]2(Moe|Bidirectional)?For(Sequence|Token)Classification": (
            "has a classification head, which llama.cpp does not support for this architecture"
        ),
        r"L[Ff][Mm]2(Bidirectional)?ForMaskedLM": (
            "is a masked language model, whose head llama.cpp does not support for this architecture"
        ),
        r"L[Ff][Mm]3\w*|lfm3\w*": "is LFM3, a different architecture, which GGUF and llama.cpp do not have",
    },
)
