"""Holding a recipe against a checkpoint: what agrees is bound, and whatever does not is said, all at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from streamconv.errors import SourceError
from streamconv.ggml.mixes import ModelFacts
from streamconv.ggml.policy import OuttypePolicy
from streamconv.lazy.dtype import BF16, F32
from streamconv.lazy.leaves import Resident
from streamconv.lazy.node import TensorSpec
from streamconv.recipe import (
    BOOL,
    Claim,
    Computed,
    Config,
    Dim,
    Drop,
    Key,
    Model,
    PerLayer,
    Permute,
    Recipe,
    Refusal,
    Split,
    Squeeze,
    Tensor,
    words,
)
from tests import inmemory
from tests.inmemory import ABSENT, bound, made, target

FLOAT = words.F32
LAYER, BLOCK = "layers.{i}.", "blk.{i}."

TOY = Recipe(
    arch="toy",
    hf_names=("ToyForCausalLM",),
    model_type="toy",
    dims={
        "L": Dim("n_layers"),
        "H": Dim("hidden"),
        "A": Dim("heads", "H/D"),
        "D": Dim("head_dim", "H/A"),
        "E": Dim("experts"),
        "M": Dim("width"),
        "W": Dim("window", 7),
        "V": Dim("vocabulary", 11),
    },
    tensors=(
        Tensor("embed.weight", "token_embd.weight", "11 H"),
        Tensor(LAYER + "q.weight", BLOCK + "attn_q.weight", "A*D H", (Permute("A"),), only="mixer=attention"),
        Tensor(LAYER + "q.bias", BLOCK + "attn_q.bias", "A*D", required="bias", only="mixer=attention"),
        Tensor(LAYER + "conv.weight", BLOCK + "conv.weight", "H 1 3", (Squeeze(),), only="mixer=conv"),
        Tensor(LAYER + "norm.weight", BLOCK + "norm.weight", "H"),
        Tensor(LAYER + "experts.{e}.up.weight", BLOCK + "up_exps.weight", "M H"),
        Tensor(LAYER + "experts.gate_up", BLOCK + "up_exps.weight", "E 2*M H", (Split(1, 2),)),
        Tensor(LAYER + "offset", BLOCK + "offset.bias", "H", required=False),
        Tensor("lm_head.weight", "output.weight", "11 H", required=False),
    ),
    computed=(
        Computed(BLOCK + "offset.bias", lambda model: np.zeros(model.dims["H"], np.float32)),
        Computed("table.weight", lambda model: None),
    ),
    drops=(Drop(LAYER + "cache", "is not needed"),),
    axes={"mixer": ("attention", "conv")},
    flags={"bias": True},
    claims=(Claim("kinds", "mixer", lambda config, n_layers: config.list_of("kinds", str)),),
    refusals=(Refusal("twisted is true", lambda model: bool(model.config.flag("twisted"))),),
    keys=(
        Key("{arch}.block_count", "L"),
        Key("{arch}.heads", PerLayer("mixer", {"attention": "A", "conv": 0})),
        Key("{arch}.missing", lambda model: None),
    ),
    tied_by_default=True,
)

CONFIG: dict[str, Any] = {
    "n_layers": 2,
    "hidden": 6,
    "heads": 2,
    "head_dim": 4,
    "experts": 3,
    "width": 5,
    "kinds": ["conv", "attention"],
}
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 6),
    "layers.0.conv.weight": (6, 1, 3),
    "layers.1.q.weight": (8, 6),
    **{f"layers.{i}.norm.weight": (6,) for i in range(2)},
    **{f"layers.{i}.experts.{e}.up.weight": (5, 6) for i in range(2) for e in range(3)},
}


def toy(shapes: dict[str, tuple[int, ...]] | None = None, **overrides: Any) -> Model:
    return bound(CONFIG, made(SHAPES | (shapes or {})), TOY, **overrides)


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in SHAPES.items() if name not in names}


def complaint(shapes: dict[str, tuple[int, ...]] | None = None, **overrides: Any) -> str:
    """What bind says of the toy's tensors, or of other `shapes` altogether."""
    with pytest.raises(SourceError) as caught:
        bound(CONFIG, made(SHAPES if shapes is None else shapes), TOY, **overrides)
    assert str(caught.value).startswith("model: cannot be converted as toy: ")
    return caught.value.message


# ---------------------------------------------------------------- what agrees


def test_targets_stand_layer_by_layer_in_the_recipes_order() -> None:
    assert [one.name for one in toy().targets] == [
        "token_embd.weight",
        "blk.0.conv.weight",
        "blk.0.norm.weight",
        "blk.0.up_exps.weight",
        "blk.0.offset.bias",
        "blk.1.attn_q.weight",
        "blk.1.norm.weight",
        "blk.1.up_exps.weight",
        "blk.1.offset.bias",
    ]


def test_sources_are_stacked_squeezed_and_permuted() -> None:
    model, stored = toy(), made(SHAPES)
    experts = np.stack([stored[f"layers.1.experts.{e}.up.weight"].values for e in range(3)])
    np.testing.assert_array_equal(target(model, "blk.1.up_exps.weight"), experts)
    np.testing.assert_array_equal(target(model, "blk.0.conv.weight"), stored["layers.0.conv.weight"].values[:, 0])
    heads = stored["layers.1.q.weight"].values.reshape(2, 2, 2, 6).swapaxes(1, 2).reshape(8, 6)
    np.testing.assert_array_equal(target(model, "blk.1.attn_q.weight"), heads)


def test_an_alternative_source_gives_the_same_target() -> None:
    shapes = without(*(f"layers.1.experts.{e}.up.weight" for e in range(3))) | {"layers.1.experts.gate_up": (3, 10, 6)}
    stored = made(shapes)
    model = bound(CONFIG, stored, TOY)
    np.testing.assert_array_equal(
        target(model, "blk.1.up_exps.weight"), stored["layers.1.experts.gate_up"].values[:, 5:]
    )


def test_a_stored_tensor_comes_before_a_computed_one() -> None:
    model = toy({"layers.1.offset": (6,)})
    assert not target(model, "blk.0.offset.bias").any()
    assert target(model, "blk.1.offset.bias").all()


def test_a_dropped_source_is_no_target_and_no_problem() -> None:
    assert len(toy({"layers.0.cache": (9, 9)}).targets) == len(toy().targets)


def test_open_drops_are_names_that_begin_so() -> None:
    drops = (Drop("tower.*", "another model's"), Drop(LAYER + "*", "predicts more tokens", beyond=True))
    shapes = {"tower.1.w": (3, 3), "tower.x": (2,), "layers.2.q.weight": (8, 6), "layers.3.other.5.w": (1,)}
    recipe = replace(TOY, drops=drops)
    assert len(bound(CONFIG, made(SHAPES | shapes), recipe).targets) == len(toy().targets)
    with pytest.raises(SourceError, match=r"unknown tensors: layers\.3\.other\.5\.w"):
        bound(CONFIG, made(SHAPES | shapes), recipe, n_layers=ABSENT)  # then they are layers of the model
    with pytest.raises(SourceError, match=r"unknown tensors: towers\.x"):
        bound(CONFIG, made(SHAPES | {"towers.x": (2,)}), recipe)


def test_names_begin_as_in_other_checkpoints() -> None:
    recipe = replace(TOY, prefixes={"language_model.": "", "model.language_model.layers.": "layers."})
    for prefix in ("", "language_model."):
        stored = {prefix + name: one for name, one in made(SHAPES).items()}
        model = bound(CONFIG, stored, recipe)
        assert [one.name for one in model.targets] == [one.name for one in toy().targets]
    mixed = {name.replace("layers.", "model.language_model.layers.", 1): shape for name, shape in SHAPES.items()}
    assert len(bound(CONFIG, made(mixed), recipe).targets) == len(toy().targets)
    with pytest.raises(SourceError, match=r"missing tensors: embed\.weight"):
        bound(CONFIG, made({f"x.{name}": shape for name, shape in SHAPES.items()}), recipe)
    both = made(SHAPES | {"language_model.embed.weight": (11, 6)})
    with pytest.raises(SourceError, match=r"embed\.weight and language_model\.embed\.weight are the same tensor"):
        bound(CONFIG, both, recipe)


def test_a_wrapped_models_config_is_a_section() -> None:
    recipe = replace(TOY, config_root="text_config")
    model = bound({"text_config": CONFIG, "hidden": 99, "bias": None}, made(SHAPES), recipe)
    assert model.dims == toy().dims
    assert model.config.parent is not None and model.config.parent.integer("hidden") == 99
    beside = {key: value for key, value in CONFIG.items() if key != "hidden"}
    assert bound({"text_config": beside, "hidden": 6}, made(SHAPES), recipe).dims == toy().dims
    assert bound(CONFIG, made(SHAPES), recipe).dims == toy().dims
    again = bound(model.config.raw, made(SHAPES), recipe)
    assert again.dims == toy().dims
    with pytest.raises(SourceError, match="text_config is 3, expected an object"):
        bound({"text_config": 3}, made(SHAPES), recipe)


def test_a_second_stack_has_its_own_depth_and_kinds() -> None:
    recipe = replace(
        TOY,
        dims={**TOY.dims, "N": Dim("n_vision")},
        stacks={"": "L", "vision": "N"},
        axes={**TOY.axes, "window": ("local", "global")},
        tensors=(
            *TOY.tensors,
            Tensor("v.layers.{i:vision}.w", "v.blk.{i:vision}.w.weight", "H"),
            Tensor("v.layers.{i:vision}.local", "v.blk.{i:vision}.a.weight", "H", only="window=local"),
            Tensor("v.layers.{i:vision}.global", "v.blk.{i:vision}.b.weight", "H H", only="window=global"),
            Tensor("v.merger.0.w", "mm.0.weight", "H H"),
            Tensor("v.merger.2.w", "mm.2.weight", "H H"),
        ),
    )
    shapes: dict[str, tuple[int, ...]] = {f"v.layers.{i}.w": (6,) for i in range(4)}
    shapes |= {f"v.layers.{i}.{'global' if i == 2 else 'local'}": (6, 6) if i == 2 else (6,) for i in range(4)}
    shapes |= {"v.merger.0.w": (6, 6), "v.merger.2.w": (6, 6)}
    model = bound(CONFIG, made(SHAPES | shapes), recipe)
    assert (model.dims["L"], model.dims["N"]) == (2, 4)
    assert model.kinds["window"] == ["local", "local", "global", "local"]
    names = [one.name for one in model.targets]
    assert names[-10:] == [
        "v.blk.0.w.weight", "v.blk.0.a.weight", "v.blk.1.w.weight", "v.blk.1.a.weight", "v.blk.2.w.weight",
        "v.blk.2.b.weight", "v.blk.3.w.weight", "v.blk.3.a.weight", "mm.0.weight", "mm.2.weight",
    ]  # fmt: skip
    with pytest.raises(SourceError, match=r"unexpected tensors \(n_layers=2, experts=3, n_vision=3\)"):
        bound(CONFIG, made(SHAPES | shapes), recipe, n_vision=3)
    with pytest.raises(SourceError, match=r"unknown tensors: v\.merger\.1\.w"):
        bound(CONFIG, made(SHAPES | shapes | {"v.merger.1.w": (6, 6)}), recipe)


def test_a_fused_tensor_is_split_by_sums() -> None:
    recipe = replace(
        TOY,
        dims={**TOY.dims, "K": Dim("kv_heads", "A")},
        flags={},
        tensors=tuple(row for row in TOY.tensors if ".q." not in row.source)
        + tuple(
            Tensor(LAYER + "qkv.weight", BLOCK + f"attn_{x}.weight", "(A+2*K)*D H", (Split(n, "A*D K*D K*D"), *ops),
                   only="mixer=attention")
            for n, (x, ops) in enumerate({"q": (Permute("A"),), "k": (Permute("K"),), "v": ()}.items())
        ),
    )  # fmt: skip
    shapes = without("layers.1.q.weight") | {"layers.1.qkv.weight": (16, 6)}
    stored = made(shapes)
    w = stored["layers.1.qkv.weight"].values
    for overrides in ({"kv_heads": 1}, {}):  # stated, or solved of the shape
        model = bound(CONFIG, stored, recipe, **overrides)
        assert model.dims["K"] == 1
        np.testing.assert_array_equal(target(model, "blk.1.attn_v.weight"), w[12:])
        np.testing.assert_array_equal(
            target(model, "blk.1.attn_k.weight"), w[8:12].reshape(1, 2, 2, 6).swapaxes(1, 2).reshape(4, 6)
        )
    with pytest.raises(
        SourceError, match=r"has shape \[16, 6\], expected \[24, 6\] from heads=2, kv_heads=2, head_dim=4"
    ):
        bound(CONFIG, stored, recipe, kv_heads=2)


def test_a_row_may_say_that_it_stays_f32() -> None:
    rows = tuple(replace(row, f32=row.source == "embed.weight") for row in TOY.tensors)
    model = bound(CONFIG, made(SHAPES), replace(TOY, tensors=rows))
    chosen = OuttypePolicy("f16").choose([model.role(one) for one in model.targets], ModelFacts())
    types = {one.name: type_.name for one, type_ in zip(model.targets, chosen, strict=True)}
    assert (types["token_embd.weight"], types["blk.0.up_exps.weight"]) == ("F32", "F16")


def test_defaults_of_keys_are_those_of_every_architecture_and_its_own() -> None:
    keys = (
        Key("{arch}.attention.head_count", "A"),
        Key("{arch}.embedding_length", "H"),
        Key("{arch}.rope.freq_base", lambda m: 7.0, FLOAT, default=500.0),
        Key("{arch}.attention.causal", None, BOOL, default=True),
        Key("{arch}.window", "W", default=(0, 1)),
        Key("{arch}.half", "H/2", default=lambda m: m.dims["H"] * 2),
    )
    model = bound(CONFIG, made(SHAPES), replace(TOY, keys=keys))
    assert inmemory.keys(model) == {
        "attention.head_count": 2, "embedding_length": 6, "rope.freq_base": 7.0, "window": 7, "half": 3
    }  # fmt: skip
    defaults = model.defaults()
    assert {name: defaults[f"toy.{name}"] for name in ("rope.freq_base", "attention.causal", "window", "half")} == {
        "rope.freq_base": (500.0,), "attention.causal": (True,), "window": (0, 1), "half": (12,)
    }  # fmt: skip
    assert defaults["toy.attention.head_count_kv"] == (2,)
    assert defaults["toy.attention.key_length"] == (3,)
    assert defaults["toy.expert_count"] == (0,)
    assert defaults["toy.vocab_size"] == (11,)


def test_experts_of_two_types_meet_in_float32() -> None:
    class Half(inmemory.Stored):
        def lazy(self) -> Resident:
            tensor = Resident(self.values)
            tensor.spec = TensorSpec(tensor.spec.shape, BF16)
            return tensor

    stored = made(SHAPES)
    stored["layers.0.experts.1.up.weight"] = Half(stored["layers.0.experts.1.up.weight"].values)
    (stack,) = (one.tensor for one in bound(CONFIG, stored, TOY).targets if one.name == "blk.0.up_exps.weight")
    assert {parent.spec.dtype for parent in stack.parents} == {F32}


def test_keys_follow_the_kinds() -> None:
    assert inmemory.keys(toy()) == {"block_count": 2, "heads": [0, 2]}


@pytest.mark.parametrize("key", ["n_layers", "hidden", "heads", "head_dim", "experts", "width", "kinds"])
@pytest.mark.parametrize("value", [ABSENT, None])
def test_what_the_config_does_not_say_follows_from_the_tensors(key: str, value: object) -> None:
    model = toy(**{key: value})
    assert model.dims == {"L": 2, "H": 6, "A": 2, "D": 4, "E": 3, "M": 5, "W": 7, "V": 11}
    assert model.kinds == {"mixer": ["conv", "attention"]}


# ---------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layers", 1, "unexpected tensors (n_layers=1, experts=3): layers.1.q.weight, "),
        ("n_layers", 3, "layer 2 with no tensors of attention or conv"),
        ("hidden", 9, "embed.weight has shape [11, 6], expected [11, 9] from hidden=9"),
        ("heads", 4, "layers.1.q.weight has shape [8, 6], expected [16, 6] from heads=4, head_dim=4, hidden=6"),
        ("experts", 2, "(n_layers=2, experts=2): layers.0.experts.2.up.weight (and 1 more)"),
        ("experts", 4, "missing tensors: layers.0.experts.3.up.weight (and 1 more)"),
        ("experts", 1 << 30, "missing tensors: layers.0.experts.3.up.weight (and 1 more)"),
        ("width", 6, "expected [6, 6] from width=6, hidden=6 (and 5 more like this)"),
        (
            "kinds",
            ["conv", "conv"],
            "kinds in config.json says that layer 1 is 'conv', but its tensors are those of 'attention'",
        ),
        ("kinds", ["conv"], "kinds in config.json lists 1 layers, but there are 2"),
        ("kinds", ["conv", "mamba"], "says that layer 1 is 'mamba'"),
        ("bias", True, "missing tensors: layers.1.q.bias"),
        ("twisted", True, "twisted is true"),
    ],
)
def test_an_explicit_value_that_disagrees_is_named(key: str, value: object, message: str) -> None:
    assert message in complaint(**{key: value})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (without("embed.weight"), "missing tensors: embed.weight"),
        (without("layers.0.experts.1.up.weight"), "missing tensors: layers.0.experts.1.up.weight"),
        (without("layers.0.experts.0.up.weight"), "missing tensors: layers.0.experts.0.up.weight"),
        (without("layers.1.q.weight"), "layer 1 with no tensors of attention or conv"),
        (SHAPES | {"layers.0.q.weight": (8, 6)}, "layer 0 with tensors of attention and conv"),
        (SHAPES | {"embed.wieght": (11, 6)}, "unknown tensors: embed.wieght"),
        (SHAPES | {"layers.01.norm.weight": (6,)}, "unknown tensors: layers.01.norm.weight"),
        (SHAPES | {"layers.0.experts.gate_up": (3, 10, 6)}, "blk.0.up_exps.weight has 2 sources"),
        (SHAPES | {"layers.0.conv.weight": (6, 3)}, "layers.0.conv.weight has shape [6, 3], expected [6, 1, 3]"),
        (SHAPES | {"layers.1.q.weight": ()}, "layers.1.q.weight has shape [], expected [8, 6]"),
        (SHAPES | {"layers.1.norm.weight": (0,)}, "layers.1.norm.weight has shape [0], expected [6]"),
        ({}, "missing tensors: embed.weight"),
    ],
)
def test_a_tensor_out_of_place_is_named(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    assert message in complaint(shapes)


def test_all_disagreements_are_listed_at_once() -> None:
    shapes = without("embed.weight", "layers.1.experts.2.up.weight") | {"stray": (1,), "layers.1.norm.weight": (5,)}
    said = complaint(shapes, kinds=["attention", "attention"], twisted=True, tie_word_embeddings=False)
    for part in (
        "twisted is true",
        "unknown tensors: stray",
        "layers.1.norm.weight has shape [5]",
        "says that layer 0",
        "missing tensors: embed.weight, layers.1.experts.2.up.weight",
        "there is no lm_head.weight",
    ):
        assert part in said


def test_many_alike_are_counted_and_not_listed() -> None:
    said = complaint(SHAPES | {f"stray.{n}.x": (1,) for n in range(900)})
    assert "unknown tensors: stray.0.x (and 899 more)" in said
    assert len(said) < 300


def test_a_flag_that_denies_a_stored_tensor_is_a_disagreement() -> None:
    shapes = SHAPES | {"layers.1.q.bias": (8,)}
    assert "bias is false, but the checkpoint has layers.1.q.bias" in complaint(shapes, bias=False)
    assert "blk.1.attn_q.bias" in [one.name for one in toy(shapes, bias=True).targets]
    assert "blk.1.attn_q.bias" in [one.name for one in toy(shapes).targets]


def test_a_dim_that_nothing_tells_is_named() -> None:
    assert "heads is not in config.json and does not follow" in complaint(
        without("layers.1.q.weight"), heads=ABSENT, head_dim=ABSENT
    )


def test_a_default_quotient_must_come_out_whole() -> None:
    shapes = without("layers.1.q.weight")
    assert "head_dim is not in config.json and does not follow" in complaint(shapes, heads=4, head_dim=ABSENT)
    assert "head_dim" not in complaint(shapes, heads=3, head_dim=ABSENT)


def test_an_empty_tensor_settles_no_dim() -> None:
    shapes = {"layers.0.norm.weight": (0,)} | SHAPES | {"layers.0.norm.weight": (0,)}
    assert "layers.0.norm.weight has shape [0], expected [6]" in complaint(shapes, hidden=ABSENT)


def test_a_rule_must_come_to_a_size() -> None:
    none = replace(TOY, dims={**TOY.dims, "A": Dim(lambda config: 0, rule="heads by a rule")})
    with pytest.raises(SourceError, match=r"^model/config\.json: heads by a rule is 0 "):
        bound(CONFIG, made(SHAPES), none, head_dim=ABSENT)


def test_heads_of_an_odd_size_cannot_be_paired() -> None:
    shapes = SHAPES | {"layers.1.q.weight": (6, 6)}
    assert "cannot be split into heads of two halves" in complaint(shapes, head_dim=3)


def test_more_layers_than_any_model_has_are_not_counted_through() -> None:
    with pytest.raises(SourceError, match="1073741824 is not a valid number of layers"):
        toy(n_layers=1 << 30)


def test_a_model_without_layers_is_none() -> None:
    with pytest.raises(SourceError, match="0 is not a valid number of layers"):
        bound(CONFIG, made({"embed.weight": (11, 6)}), TOY, n_layers=ABSENT)


@pytest.mark.parametrize(
    ("tied", "head", "warnings"),
    [(True, False, []), (True, True, ["head-on-tied"]), (False, True, []), (None, True, []), (None, False, [])],
)
def test_a_stored_head_is_written_whatever_the_config_says(tied: bool | None, head: bool, warnings: list[str]) -> None:
    model = toy({"lm_head.weight": (11, 6)} if head else {}, tie_word_embeddings=tied)
    assert ("output.weight" in [one.name for one in model.targets]) == head
    assert [warning.code for warning in model.warnings] == warnings


def test_a_recipe_that_is_untied_by_default_warns_where_the_head_is_missing() -> None:
    model = bound(CONFIG, made(SHAPES), replace(TOY, tied_by_default=False))
    assert [warning.code for warning in model.warnings] == ["head-missing"]


def test_refusals_alone_do_not_blame_the_files() -> None:
    with pytest.raises(SourceError) as caught:
        toy(twisted=True)
    assert caught.value.code == "model-unrunnable"


def test_a_rule_over_the_config_is_named_by_its_label() -> None:
    def twice(config: Config) -> int | None:
        return 2 * (config.integer("half") or 0) or None

    recipe = replace(TOY, dims={**TOY.dims, "M": Dim(twice, rule="twice the half")})
    assert bound(CONFIG, made(SHAPES), recipe).dims["M"] == 5
    with pytest.raises(SourceError, match=r"from twice the half=4, hidden=6"):
        bound(CONFIG, made(SHAPES), recipe, half=2)
