"""Rows, dims, keys and refusals that decoders have in common, from which the architectures' files are assembled.

Not an architecture itself: a file whose name begins with an underscore has no RECIPE. Names are those of transformers'
Llama and its successors, and of llama.cpp's gguf-py (constants.py, tensor_mapping.py).
"""

from __future__ import annotations

from collections.abc import Callable

from streamconv.architectures._rope import Rope
from streamconv.recipe import BOOL, F32, Caveat, Config, Dim, Drop, Key, Model, Op, Permute, Refusal, Split, Tensor

LAYER, BLOCK = "model.layers.{i}.", "blk.{i}."

Bias = str | bool | None  # a flag of the config; True: always; False: if it is stored; None: the runtime has none

SOFTMAX, SIGMOID = 1, 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_*

# ---------------------------------------------------------------- dims


def dims(head: int | str = "H/A", **more: Dim) -> dict[str, Dim]:
    """The dims of a decoder.

    Args:
        head: The size of a head if neither the config nor the tensors determine it.
        more: Dims to add or replace.
    """
    return {
        "L": Dim("num_hidden_layers"),
        "V": Dim("vocab_size"),
        "H": Dim("hidden_size"),
        "F": Dim("intermediate_size"),
        "A": Dim("num_attention_heads", "H/D"),
        "K": Dim("num_key_value_heads", "A"),
        "D": Dim("head_dim", head),
    } | more


def expert_dims(count: str | tuple[str, ...], used: int | None = None, width: str | None = None) -> dict[str, Dim]:
    """The dims of a mixture of experts: how many there are, how many are used, and their width.

    Args:
        count: The config's key or keys for the number of experts.
        used: transformers' default for the number of experts used for each token.
        width: The config's key for the width of an expert; None if it is F.
    """
    found = {"E": Dim(count), "U": Dim("num_experts_per_tok", used)}
    return found | ({"M": Dim(width)} if width else {})


# ---------------------------------------------------------------- rows


def linear(
    source: str, target: str, shape: str, *ops: Op, bias: Bias = None, only: str = "", f32: bool = False
) -> tuple[Tensor, ...]:
    """A layer's weight, and its bias unless `bias` is None."""
    source, target = LAYER + source, BLOCK + target
    rows = [Tensor(f"{source}.weight", f"{target}.weight", shape, ops, only, f32=f32)]
    if bias is not None:
        rows.append(Tensor(f"{source}.bias", f"{target}.bias", shape.split()[0], ops, only, bias))
    return tuple(rows)


def norm(
    source: str, target: str, extent: str = "H", *ops: Op, bias: bool = False, required: bool | str = True
) -> tuple[Tensor, ...]:
    """The weight of a layer's norm; with `bias`, the weight and bias of a LayerNorm."""
    parts = ("weight", "bias") if bias else ("weight",)
    return tuple(
        Tensor(f"{LAYER}{source}.{part}", f"{BLOCK}{target}.{part}", extent, ops, required=required) for part in parts
    )


def attention(*, permuted: bool = False, bias: Bias = None, out_bias: Bias = None) -> tuple[Tensor, ...]:
    """Q, K, V and the output projection.

    Args:
        permuted: Whether Q and K are permuted, for a runtime that rotates adjacent pairs (LLAMA_ROPE_TYPE_NORM).
        bias: The bias of Q, K and V.
        out_bias: The bias of the output projection.
    """
    q, k = ((Permute("A"),), (Permute("K"),)) if permuted else ((), ())
    return (
        *linear("self_attn.q_proj", "attn_q", "A*D H", *q, bias=bias),
        *linear("self_attn.k_proj", "attn_k", "K*D H", *k, bias=bias),
        *linear("self_attn.v_proj", "attn_v", "K*D H", bias=bias),
        *linear("self_attn.o_proj", "attn_output", "H A*D", bias=out_bias),
    )


def gated(
    prefix: str = "mlp.", suffix: str = "", width: str = "F", *, bias: Bias = None, only: str = ""
) -> tuple[Tensor, ...]:
    """A gated feed-forward network. The targets of shared experts have the suffix "_shexp"."""
    return (
        *linear(f"{prefix}gate_proj", f"ffn_gate{suffix}", f"{width} H", bias=bias, only=only),
        *linear(f"{prefix}down_proj", f"ffn_down{suffix}", f"H {width}", bias=bias, only=only),
        *linear(f"{prefix}up_proj", f"ffn_up{suffix}", f"{width} H", bias=bias, only=only),
    )


def router(source: str, *, bias: Bias = None, only: str = "") -> tuple[Tensor, ...]:
    """The router, which scores the experts; llama.cpp keeps it in F32."""
    return linear(source, "ffn_gate_inp", "E H", bias=bias, only=only, f32=True)


def experts(
    prefix: str = "mlp.", width: str = "M", *, names: str = "gate_proj down_proj up_proj", only: str = ""
) -> tuple[Tensor, ...]:
    """The experts of a layer, in each of the three forms in which they are stored.

    These are: one tensor for each expert, as transformers saves them; stacked, with gate and up fused, as transformers
    holds them in memory; and stacked, with gate and up separate, as in mlx-lm (models/switch_layers.py).
    """
    targets = [f"{BLOCK}ffn_{part}_exps.weight" for part in ("gate", "down", "up")]
    shapes = (f"{width} H", f"H {width}", f"{width} H")
    one_by_one = [
        Tensor(f"{LAYER}{prefix}experts.{{e}}.{name}.weight", target, shape, only=only)
        for name, target, shape in zip(names.split(), targets, shapes, strict=True)
    ]
    return (*one_by_one, *stacked_experts(prefix, width, only=only))


def stacked_experts(prefix: str = "mlp.", width: str = "M", *, only: str = "") -> tuple[Tensor, ...]:
    """The two forms of `experts` that are already stacked."""
    source, gate, down, up = LAYER + prefix, *(f"{BLOCK}ffn_{part}_exps.weight" for part in ("gate", "down", "up"))
    return (
        Tensor(source + "experts.gate_up_proj", gate, f"E 2*{width} H", (Split(0, 2),), only),
        Tensor(source + "experts.gate_up_proj", up, f"E 2*{width} H", (Split(1, 2),), only),
        Tensor(source + "experts.down_proj", down, f"E H {width}", only=only),
        Tensor(source + "switch_mlp.gate_proj.weight", gate, f"E {width} H", only=only),
        Tensor(source + "switch_mlp.down_proj.weight", down, f"E H {width}", only=only),
        Tensor(source + "switch_mlp.up_proj.weight", up, f"E {width} H", only=only),
    )


WINDOW_OF_QWEN = 4096  # transformers' default

EMBEDDING = Tensor("model.embed_tokens.weight", "token_embd.weight", "V H")
OUTPUT_NORM = Tensor("model.norm.weight", "output_norm.weight", "H")
OUTPUT_NORM_BIAS = Tensor("model.norm.bias", "output_norm.bias", "H")
HEAD = Tensor("lm_head.weight", "output.weight", "V H", required=False)
OWN_HEAD = Tensor("lm_head.weight", "output.weight", "V H")  # if the runtime does not fall back to the embedding

DROPS = (
    Drop("model.layers.{i}.self_attn.rotary_emb.inv_freq", "follows from the config"),
    Drop("model.rotary_emb.inv_freq", "follows from the config"),
)

# ---------------------------------------------------------------- keys


def keys(
    rope: Rope, epsilon: float, *, epsilon_keys: tuple[str, ...] = ("rms_norm_eps",), layer_norm: bool = False
) -> tuple[Key, ...]:
    """The keys of any decoder.

    Args:
        rope: The architecture's RoPE.
        epsilon: transformers' default for the norms' epsilon.
        epsilon_keys: The config's keys for the epsilon; the first one that is set counts.
        layer_norm: Whether the norms are LayerNorms rather than RMSNorms.
    """

    def stated(model: Model) -> float:
        return next((value for key in epsilon_keys if (value := model.config.positive(key))), epsilon)

    name = "layer_norm_epsilon" if layer_norm else "layer_norm_rms_epsilon"
    return (
        Key("{arch}.vocab_size", "V"),
        Key("{arch}.block_count", "L"),
        Key("{arch}.embedding_length", "H"),
        Key("{arch}.feed_forward_length", "F"),
        Key("{arch}.attention.head_count", "A"),
        Key("{arch}.attention.head_count_kv", "K"),
        Key("{arch}.attention.key_length", "D"),
        Key("{arch}.attention.value_length", "D"),
        Key(f"{{arch}}.attention.{name}", stated, F32),
        Key("{arch}.attention.causal", lambda m: False if sees_both_sides(m) else None, BOOL),
        *rope.keys(),
    )


def sees_both_sides(model: Model) -> bool:
    """Whether there is no causal mask: with `is_causal` false, transformers 5 uses any decoder as an encoder."""
    return model.config.flag("is_causal") is False


def expert_keys(width: str | None = "M") -> tuple[Key, ...]:
    """The keys of a mixture of experts. width: their width; None if the runtime uses feed_forward_length for it."""
    found = (Key("{arch}.expert_count", "E"), Key("{arch}.expert_used_count", "U"))
    return (*found, Key("{arch}.expert_feed_forward_length", width)) if width else found


def constant(name: str, value: int) -> Key:
    return Key(f"{{arch}}.{name}", lambda model: value)


def window_keys(
    window: Callable[[Config], int | None], pattern: Callable[[Config, int], list[bool] | None], fixed: int
) -> tuple[Key, ...]:
    """The keys of a sliding window.

    Args:
        window: Returns the size of the window, in tokens.
        pattern: Returns which layers have the window, or None for the runtime's default.
        fixed: The runtime's default: all layers but every `fixed`-th have the window. It is not written to the file.
    """

    def own(model: Model) -> list[int] | None:
        slides = pattern(model.config, model.n_layers)
        is_fixed = slides is None or slides == [(i + 1) % fixed != 0 for i in range(model.n_layers)]
        return None if is_fixed else [int(one) for one in slides or ()]

    return (
        Key("{arch}.attention.sliding_window", lambda model: window(model.config)),
        Key("{arch}.attention.sliding_window_pattern", own, BOOL),
    )


def sliding(config: Config, n_layers: int) -> list[bool] | None:
    """Which layers have a sliding window according to `layer_types`; None if the config has no such list."""
    types = config.list_of("layer_types", str)
    if types is None:
        return None
    if len(types) != n_layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise config.wrong("layer_types", f"sliding_attention or full_attention for each of {n_layers} layers")
    return [kind == "sliding_attention" for kind in types]


# ---------------------------------------------------------------- refusals


def activation(*names: str, key: str = "hidden_act", silent: str = "silu") -> Refusal:
    """Refuses any activation that the runtime does not compute.

    Args:
        names: The names in configs of the activation that the runtime computes.
        key: The config's key.
        silent: transformers' default.
    """
    return Refusal(
        f"{key} is {{{key}!r}}, but the runtime computes {names[0]}",
        lambda m: (m.config.text(key) or silent) not in names,
    )


SILU = activation("silu", "swish")
SHARED_HEADS = Refusal("{A} heads do not share {K} key-value heads evenly", lambda m: m.dims["A"] % m.dims["K"] != 0)
FULL_WIDTH = Refusal(
    "the runtime assumes that {A} heads of {D} make up the hidden size {H}",
    lambda m: m.dims["A"] * m.dims["D"] != m.dims["H"],
)
USED_EXPERTS = Refusal("the config uses {U} experts of {E}", lambda m: m.dims["U"] > m.dims["E"])


def flag(key: str, *, only: bool, silent: bool, why: str) -> Refusal:
    """Refuses any value of a flag other than `only`.

    Args:
        key: The config's key.
        only: The value that is supported.
        silent: transformers' default.
        why: The reason, for the message.
    """
    shown = "false" if only else "true"

    def applies(model: Model) -> bool:
        stated = model.config.flag(key)
        return (silent if stated is None else stated) is not only

    return Refusal(f"{key} is {shown}, but {why}", applies)


def has_window(model: Model) -> bool:
    """Whether the config of a Qwen enables a sliding window that is shorter than the context."""
    config = model.config
    window = WINDOW_OF_QWEN if "sliding_window" not in config.raw else config.integer("sliding_window", minimum=0)
    context = config.integer("max_position_embeddings")
    return bool(config.flag("use_sliding_window") and window) and (context is None or (window or 0) < context)


def slides(model: Model) -> bool:
    """Whether any layer of a dense Qwen has such a window, by `layer_types` or else by `max_window_layers`."""
    if not has_window(model):
        return False
    by_type = sliding(model.config, model.n_layers)
    if by_type is not None:
        return any(by_type)
    first = model.config.integer("max_window_layers", minimum=0)
    return first is None or first < model.n_layers


def window_caveat(family: str, silent: int | None) -> Caveat:
    """Warns that the model has a sliding window, which llama.cpp does not support for this family.

    Args:
        family: The models' name, for the message.
        silent: transformers' default for the size of the window, in tokens; None if there is no window by default.
    """

    def applies(model: Model) -> bool:
        config = model.config
        window = silent if "sliding_window" not in config.raw else config.integer("sliding_window")
        return window is not None and window < (config.integer("max_position_embeddings") or window + 1)

    return Caveat(
        f"llama.cpp processes texts longer than the sliding window differently: it has no such window for {family}",
        applies,
        code="window-ignored",
    )


TEXT_HALF = Caveat(
    "the file contains only the text model: vision tower and projector were left out",
    lambda model: model.config.section("vision_config") is not None,
    code="text-half",
)

SILENT_ROPE = Refusal(
    "RoPE is not configured, and transformers then uses YaRN scaling: set rope_parameters, as the publisher does",
    lambda m: not m.config.section("rope_parameters") and not m.config.section("rope_scaling"),
)

USES_WINDOW = "use_sliding_window is true, but the runtime has no sliding window for this architecture"
NO_WINDOW = Refusal(USES_WINDOW, slides)
# In transformers, Qwens with experts have it in every second layer up to max_window_layers, or in all layers.
NO_WINDOW_AT_ALL = Refusal(USES_WINDOW, has_window)


def has_one_sided_window(model: Model) -> bool:
    """Whether a model without a causal mask has a window that is shorter than the context.

    The runtime limits the window only towards earlier tokens.
    """
    if not sees_both_sides(model):
        return False
    rules = [key.value for key in model.recipe.keys if key.name.endswith(".attention.sliding_window")]
    sizes = [rule(model) for rule in rules if rule is not None and not isinstance(rule, str)]
    context = model.config.integer("max_position_embeddings")
    return any(isinstance(size, int) and 0 < size < (context or size + 1) for size in sizes)


ONE_SIDED = Refusal(
    "is_causal is false, but the runtime's sliding window is not limited on the right", has_one_sided_window
)


def refusals(rope: Rope, *more: Refusal) -> tuple[Refusal, ...]:
    return (*rope.refusals(), SHARED_HEADS, ONE_SIDED, *more)
