"""Rows, dims, keys and refusals that decoders have in common: what an architecture's file is put together from.

No architecture itself: a file whose name begins with an underscore has no RECIPE. Names are those of transformers'
Llama and what follows it, and of llama.cpp's gguf-py (constants.py, tensor_mapping.py).
"""

from __future__ import annotations

from collections.abc import Callable

from streamconv.architectures._rope import Rope
from streamconv.recipe import BOOL, F32, Caveat, Config, Dim, Drop, Key, Model, Op, Permute, Refusal, Split, Tensor

LAYER, BLOCK = "model.layers.{i}.", "blk.{i}."

Bias = str | bool | None  # a flag of the config; True: always; False: where it is stored; None: the runtime has none

SOFTMAX, SIGMOID = 1, 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_*

# ---------------------------------------------------------------- dims


def dims(head: int | str = "H/A", **more: Dim) -> dict[str, Dim]:
    """The dims of a decoder. head: the size of a head where neither config nor tensors say it."""
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
    """The number of experts and of those used, and their width where it is not F. used: transformers' default."""
    found = {"E": Dim(count), "U": Dim("num_experts_per_tok", used)}
    return found | ({"M": Dim(width)} if width else {})


# ---------------------------------------------------------------- rows


def linear(
    source: str, target: str, shape: str, *ops: Op, bias: Bias = None, only: str = "", f32: bool = False
) -> tuple[Tensor, ...]:
    """A layer's weight, and its bias where there is one."""
    source, target = LAYER + source, BLOCK + target
    rows = [Tensor(f"{source}.weight", f"{target}.weight", shape, ops, only, f32=f32)]
    if bias is not None:
        rows.append(Tensor(f"{source}.bias", f"{target}.bias", shape.split()[0], ops, only, bias))
    return tuple(rows)


def norm(
    source: str, target: str, extent: str = "H", *ops: Op, bias: bool = False, required: bool | str = True
) -> tuple[Tensor, ...]:
    """A layer's norm; with `bias`, a LayerNorm's."""
    parts = ("weight", "bias") if bias else ("weight",)
    return tuple(
        Tensor(f"{LAYER}{source}.{part}", f"{BLOCK}{target}.{part}", extent, ops, required=required) for part in parts
    )


def attention(*, permuted: bool = False, bias: Bias = None, out_bias: Bias = None) -> tuple[Tensor, ...]:
    """Q, K, V and the output. permuted: the runtime wants RoPE's pairs side by side (LLAMA_ROPE_TYPE_NORM)."""
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
    """A gated network; `suffix` of the target is "_shexp" for shared experts."""
    return (
        *linear(f"{prefix}gate_proj", f"ffn_gate{suffix}", f"{width} H", bias=bias, only=only),
        *linear(f"{prefix}down_proj", f"ffn_down{suffix}", f"H {width}", bias=bias, only=only),
        *linear(f"{prefix}up_proj", f"ffn_up{suffix}", f"{width} H", bias=bias, only=only),
    )


def router(source: str, *, bias: Bias = None, only: str = "") -> tuple[Tensor, ...]:
    """What scores the experts; llama.cpp keeps it F32."""
    return linear(source, "ffn_gate_inp", "E H", bias=bias, only=only, f32=True)


def experts(
    prefix: str = "mlp.", width: str = "M", *, names: str = "gate_proj down_proj up_proj", only: str = ""
) -> tuple[Tensor, ...]:
    """A stack of experts: one by one, as transformers saves them; stacked, gate and up fused, as it holds them; or

    stacked one by one, as mlx-lm names them (models/switch_layers.py).
    """
    targets = [f"{BLOCK}ffn_{part}_exps.weight" for part in ("gate", "down", "up")]
    shapes = (f"{width} H", f"H {width}", f"{width} H")
    one_by_one = [
        Tensor(f"{LAYER}{prefix}experts.{{e}}.{name}.weight", target, shape, only=only)
        for name, target, shape in zip(names.split(), targets, shapes, strict=True)
    ]
    return (*one_by_one, *stacked_experts(prefix, width, only=only))


def stacked_experts(prefix: str = "mlp.", width: str = "M", *, only: str = "") -> tuple[Tensor, ...]:
    """A stack of experts as `experts`, in its two forms that are stacked already."""
    source, gate, down, up = LAYER + prefix, *(f"{BLOCK}ffn_{part}_exps.weight" for part in ("gate", "down", "up"))
    return (
        Tensor(source + "experts.gate_up_proj", gate, f"E 2*{width} H", (Split(0, 2),), only),
        Tensor(source + "experts.gate_up_proj", up, f"E 2*{width} H", (Split(1, 2),), only),
        Tensor(source + "experts.down_proj", down, f"E H {width}", only=only),
        Tensor(source + "switch_mlp.gate_proj.weight", gate, f"E {width} H", only=only),
        Tensor(source + "switch_mlp.down_proj.weight", down, f"E H {width}", only=only),
        Tensor(source + "switch_mlp.up_proj.weight", up, f"E {width} H", only=only),
    )


WINDOW_OF_QWEN = 4096  # where the config is silent

EMBEDDING = Tensor("model.embed_tokens.weight", "token_embd.weight", "V H")
OUTPUT_NORM = Tensor("model.norm.weight", "output_norm.weight", "H")
OUTPUT_NORM_BIAS = Tensor("model.norm.bias", "output_norm.bias", "H")
HEAD = Tensor("lm_head.weight", "output.weight", "V H", required=False)
OWN_HEAD = Tensor("lm_head.weight", "output.weight", "V H")  # for runtimes that do not take the embedding instead

DROPS = (
    Drop("model.layers.{i}.self_attn.rotary_emb.inv_freq", "follows from the config"),
    Drop("model.rotary_emb.inv_freq", "follows from the config"),
)

# ---------------------------------------------------------------- keys


def keys(
    rope: Rope, epsilon: float, *, epsilon_keys: tuple[str, ...] = ("rms_norm_eps",), layer_norm: bool = False
) -> tuple[Key, ...]:
    """The keys of any decoder. epsilon: transformers' where the config has none of `epsilon_keys`; layer_norm: it is a

    LayerNorm's.
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
    """Whether there is no causal mask: any decoder of transformers 5 without one is an encoder."""
    return model.config.flag("is_causal") is False


def expert_keys(width: str | None = "M") -> tuple[Key, ...]:
    """The keys of a mixture of experts; `width` None where the runtime takes feed_forward_length for it."""
    found = (Key("{arch}.expert_count", "E"), Key("{arch}.expert_used_count", "U"))
    return (*found, Key("{arch}.expert_feed_forward_length", width)) if width else found


def constant(name: str, value: int) -> Key:
    return Key(f"{{arch}}.{name}", lambda model: value)


def window_keys(
    window: Callable[[Config], int | None], pattern: Callable[[Config, int], list[bool] | None], fixed: int
) -> tuple[Key, ...]:
    """The sliding window, and which layers have it where that is not the runtime's own: all but each `fixed`-th."""

    def own(model: Model) -> list[int] | None:
        slides = pattern(model.config, model.n_layers)
        is_fixed = slides is None or slides == [(i + 1) % fixed != 0 for i in range(model.n_layers)]
        return None if is_fixed else [int(one) for one in slides or ()]

    return (
        Key("{arch}.attention.sliding_window", lambda model: window(model.config)),
        Key("{arch}.attention.sliding_window_pattern", own, BOOL),
    )


def sliding(config: Config, n_layers: int) -> list[bool] | None:
    """Which layers have a sliding window, as `layer_types` says; None where it says nothing."""
    types = config.list_of("layer_types", str)
    if types is None:
        return None
    if len(types) != n_layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise config.wrong("layer_types", f"sliding_attention or full_attention for each of {n_layers} layers")
    return [kind == "sliding_attention" for kind in types]


# ---------------------------------------------------------------- refusals


def activation(*names: str, key: str = "hidden_act", silent: str = "silu") -> Refusal:
    """Any other activation than those that the runtime computes. silent: transformers' where the config says none."""
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
    """Any other value of a flag than `only`. silent: transformers' where the config does not say."""
    shown = "false" if only else "true"

    def applies(model: Model) -> bool:
        stated = model.config.flag(key)
        return (silent if stated is None else stated) is not only

    return Refusal(f"{key} is {shown}, but {why}", applies)


def has_window(model: Model) -> bool:
    """Whether a Qwen says that it uses a sliding window, and that is shorter than the context."""
    config = model.config
    window = WINDOW_OF_QWEN if "sliding_window" not in config.raw else config.integer("sliding_window", minimum=0)
    context = config.integer("max_position_embeddings")
    return bool(config.flag("use_sliding_window") and window) and (context is None or (window or 0) < context)


def slides(model: Model) -> bool:
    """Whether layers of a dense Qwen, by its several keys, have such a window."""
    if not has_window(model):
        return False
    by_type = sliding(model.config, model.n_layers)
    if by_type is not None:
        return any(by_type)
    first = model.config.integer("max_window_layers", minimum=0)
    return first is None or first < model.n_layers


def window_caveat(family: str, silent: int | None) -> Caveat:
    """What llama.cpp does beyond a sliding window that it lacks. silent: transformers' where the config says none."""

    def applies(model: Model) -> bool:
        config = model.config
        window = silent if "sliding_window" not in config.raw else config.integer("sliding_window")
        return window is not None and window < (config.integer("max_position_embeddings") or window + 1)

    return Caveat(
        f"beyond the sliding window llama.cpp computes something else: it has no such window for {family}",
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
# transformers' Qwens with experts have it in each second layer up to max_window_layers, or in all of them.
NO_WINDOW_AT_ALL = Refusal(USES_WINDOW, has_window)


def has_one_sided_window(model: Model) -> bool:
    """Whether texts may be longer than a window that the runtime ends at earlier tokens alone."""
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
