"""Finding a config's recipe, reading a config with suspicion, and what every recipe must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamconv.checkpoint.config import Config
from streamconv.errors import SourceError
from streamconv.gguf.format import MAX_NAME_NBYTES
from streamconv.recipe import (
    Alias,
    Claim,
    Columns,
    Computed,
    Dim,
    Drop,
    FoldedScale,
    Interleaved,
    Key,
    Output,
    PerLayer,
    Permute,
    PlusOne,
    Refusal,
    Reshape,
    Rows,
    Scale,
    Split,
    Squeeze,
    Tensor,
    Transpose,
    registry,
)
from streamconv.recipe.language import Model, Recipe
from streamconv.recipe.registry import all_recipes, find_recipe, recipe_of
from tests.raising import raises

FILE = Path("model") / "config.json"
RECIPES = pytest.mark.parametrize("recipe", all_recipes(), ids=lambda recipe: recipe.arch)


def config(**raw: Any) -> Config:
    return Config(raw, FILE)


# ---------------------------------------------------------------- finding one


@pytest.mark.parametrize(
    ("raw", "arch"),
    [
        ({"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2"}, "lfm2"),
        ({"architectures": ["Lfm2MoeForCausalLM"]}, "lfm2moe"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "of some fork"}, "llama"),
        ({"architectures": None, "model_type": "lfm2_moe"}, "lfm2moe"),
        ({"architectures": [], "model_type": "llama"}, "llama"),
        ({"architectures": ["LlamaForCausalLM"], "quantization_config": None}, "llama"),
    ],
)
def test_the_config_names_its_recipe(raw: dict[str, Any], arch: str) -> None:
    assert find_recipe(config(**raw)).arch == arch


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": ["Other"], "model_type": "llama"}, "Other is not supported"),
        ({}, "a model without a name is not supported"),
        ({"architectures": ["FancyForConditionalGeneration"], "text_config": {}}, "convert the text model's own"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a list of str"),
        ({"architectures": [7]}, "architectures is [7], expected a list of str"),
    ],
)
def test_what_is_not_supported_is_said(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError) as caught:
        find_recipe(config(**raw))
    assert message in str(caught.value)
    assert caught.value.file == str(FILE)


def test_the_nearest_names_are_in_the_hint() -> None:
    with pytest.raises(SourceError) as caught:
        find_recipe(config(architectures=["Unknown"]))
    assert caught.value.hint == "streamconv architectures lists the supported ones"
    with pytest.raises(SourceError) as caught:
        find_recipe(config(architectures=["Qwen33ForCausalLM"]))
    assert "Qwen3ForCausalLM" in str(caught.value.hint)
    assert len(str(caught.value)) < 300


def test_a_gguf_architecture_has_its_recipe() -> None:
    assert recipe_of("lfm2moe") in all_recipes()
    assert recipe_of("mamba") is None


def test_of_two_recipes_of_one_architecture_the_files_tensors_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = recipe(tensors=(Tensor(LAYER, "blk.{i}.ffn_up.weight", "H"),), axes={})
    experts = recipe(
        axes={},
        tensors=(Tensor("layers.{i}.x.{e}.w", "blk.{i}.ffn_up_exps.weight", "H"),),
        dims={"L": Dim("l"), "V": Dim("v"), "H": Dim("h"), "E": Dim("e")},
    )
    monkeypatch.setattr(registry, "own_recipes", lambda: (dense, experts))
    assert recipe_of("made-up", ["blk.0.ffn_up.weight"]) is dense
    assert recipe_of("made-up", ["blk.0.ffn_up_exps.weight"]) is experts


# ---------------------------------------------------------------- what every recipe must be


@RECIPES
def test_target_names_fit_into_a_gguf(recipe: Recipe) -> None:
    assert all(len(row.target.format(i=9999)) <= MAX_NAME_NBYTES for row in recipe.tensors)


def recipe(**changed: Any) -> Recipe:
    fields: dict[str, Any] = {
        "arch": "made-up",
        "hf_names": ("MadeUpForCausalLM",),
        "model_type": "made_up",
        "dims": {"L": Dim("layers"), "V": Dim("vocabulary"), "H": Dim("hidden"), "A": Dim("heads")},
        "tensors": (Tensor("embed.weight", "token_embd.weight", "V H"),),
        "keys": (),
        "axes": {"mixer": ("attention", "conv")},
    }
    if "axes" not in changed and "tensors" not in changed:
        fields["tensors"] += MIXED
    return Recipe(**fields | changed)


LAYER, BLOCK = "layers.{i}.w.weight", "blk.{i}.w.weight"
MIXED = tuple(Tensor(f"layers.{{i}}.{kind}.w", BLOCK, "H", only=f"mixer={kind}") for kind in ("attention", "conv"))
TOWER = Tensor("v.{i:vision}.w", "v.{i:vision}.w", "H", only="mixer=conv")


def projector(arch: str) -> Output:
    dims = {"P": Dim("width")}
    return Output(role="mmproj", arch=arch, dims=dims, tensors=(Tensor(f"{arch}.w", "w", "P"),), keys=())


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"dims": {"L": Dim("layers")}}, "no dim V"),
        ({"dims": {"L": Dim("l"), "V": Dim("v"), "H": Dim("h", "V/Q")}}, "the default of dim H: there is no dim Q"),
        ({"tensors": (Tensor("w", "w", "Z Y"),)}, "w: shape 'Z Y': there is no dim Z"),
        ({"tensors": (Tensor("w", "w", "(A+2*) H"),)}, "'(A+2*)' cannot be read"),
        ({"tensors": (Tensor("w", "w", "A**2 H"),)}, "'A**2' cannot be read"),
        ({"tensors": (Tensor("w", "w", "f(A) H"),)}, "'f(A)' cannot be read"),
        ({"tensors": (Tensor(LAYER, BLOCK, "H", only="mixr=conv"),)}, "there is no axis 'mixr'"),
        ({"tensors": (Tensor(LAYER, BLOCK, "H", only="mixer=cnv"),)}, "the kinds of mixer are attention, conv"),
        ({"tensors": (Tensor(LAYER, BLOCK, "H", only="mixer"),)}, "only='mixer'"),
        ({"tensors": (Tensor("w", "w", "H", only="mixer=conv"),)}, "it has no layers"),
        ({"tensors": (Tensor(LAYER, "w", "H"),)}, "its target w counts other layers"),
        ({"tensors": (Tensor("layers.{i:vision}.w", "v.blk.{i:vision}.w", "H"),)}, "there is no stack 'vision'"),
        ({"tensors": (Tensor("layers.{j}.w", "blk.{i}.w", "H"),)}, "has braces that are neither"),
        ({"tensors": (Tensor("layers.{i}.w.{i}.x", "blk.{i}.w", "H"),)}, "has two placeholders of the same kind"),
        ({"tensors": (Tensor("layers.{i}.{e}.w", "blk.{i}.w", "H"),)}, "no dim E"),
        ({"tensors": (Tensor("w", "w", "A H", (Permute("Q"),)),)}, "w: Permute: there is no dim Q"),
        ({"tensors": (Tensor("w", "w", "A H", (Split(0, "A-Q Q"),)),)}, "w: Split: there is no dim Q"),
        ({"tensors": (Tensor("w", "w", "A H", (Reshape("A Q"),)),)}, "w: Reshape: there is no dim Q"),
        ({"computed": (Computed(BLOCK, lambda m: None, only="mixr=conv"),)}, "there is no axis 'mixr'"),
        ({"keys": (Key("{arch}.heads", "Q"),)}, "{arch}.heads: there is no dim Q"),
        ({"keys": (Key("{arch}.heads", PerLayer("mixr", {"attention": "A", "conv": 0})),)}, "of an axis 'mixr'"),
        ({"keys": (Key("{arch}.heads", PerLayer("mixer", {"attention": "A"})),)}, "of an axis 'mixer'"),
        ({"keys": (Key("{arch}.heads", PerLayer("mixer", {"attention": "Q", "conv": 0})),)}, "no dim Q"),
        ({"claims": (Claim("types", "mixr", lambda c, n: None),)}, "types: there is no axis 'mixr'"),
        ({"stacks": {"": "L", "vision": "N"}}, "stack 'vision': there is no dim N"),
        ({"keys": (Key("{arhc}.heads", "A"),)}, "{arhc}.heads: has braces"),
        ({"axes": {"mixer": ("attention", "cnv")}, "tensors": MIXED}, "axis mixer: no tensor occurs only in cnv"),
        (
            {"stacks": {"": "L", "vision": "A"}, "tensors": (*MIXED, TOWER)},
            "axis mixer: its rows belong to several stacks",
        ),
        ({"tensors": (Tensor("w", "w", " "),)}, "w: it has no shape"),
        ({"tensors": (Tensor("w", "w", "True*A H"),)}, "'True*A' cannot be read"),
        (
            {"tensors": (Tensor("scales.{i}", BLOCK, "H"),)},
            "scales.{i}: has a placeholder that is not between two dots",
        ),
        (
            {"tensors": (Tensor("layer{i}.w", BLOCK, "H"),)},
            "layer{i}.w: has a placeholder that is not between two dots",
        ),
        ({"tensors": (Tensor("w", "w", "H"), Tensor("w", "w", "H"))}, "w: 2 rows make w from it"),
        ({"tensors": (Tensor("w", "w", "H", required="attention_bais"),)}, "there is no such flag"),
        ({"tensors": (Tensor("w", "w", "H", or_f16=True),)}, "w: or_f16 is for tensors that stay F32"),
        ({"tensors": (Tensor("w", "w", "H", unless="x"),)}, "w: unless='x', and no row has that source"),
        ({"tensors": (Tensor("w", "blk." + "w" * 60, "H"),)}, "is longer than the 63 bytes of a name in GGUF"),
        ({"role": ""}, "it has no arch, or no role"),
        ({"keys": (Key("{arch}.heads", "A"), Key("{arch}.heads", "H"))}, "{arch}.heads: a key 2 times"),
        ({"keys": (Key("", "A"),)}, "a key without a name"),
        ({"keys": (Key("{arch}.heads", None),)}, "{arch}.heads: is not written, and has no default"),
        ({"keys": (Key("{arch}.heads", 5),)}, "5 is neither an extent nor a rule"),  # type: ignore[arg-type]
        ({"dims": {"L": Dim("l"), "V": Dim("v"), "H": Dim(())}}, "dim H has no key of the config"),
        ({"dims": {"L": Dim("l"), "V": Dim("v"), "H": Dim("h", "H")}}, "the default of dim H is the dim itself"),
        ({"flags": {"bias": True}}, "no row names the flag 'bias'"),
        ({"stacks": {"": "L", "vision": "A"}}, "no row counts the layers of 'vision'"),
        ({"prefixes": {"text.": "mdoel."}}, "prefix 'text.': no row begins with 'mdoel.'"),
        ({"prefixes": {"layers.": "layers."}}, "prefix 'layers.' becomes itself"),
        ({"drops": (Drop("x", "why"), Drop("x", "why"))}, "x: dropped 2 times"),
        ({"drops": (Drop("w", "why"),), "tensors": (Tensor("w", "w", "H"),), "axes": {}}, "w is a row and a drop"),
        ({"aliases": (Alias("w", "w"),), "tensors": (Tensor("w", "w", "H"),), "axes": {}}, "w is a row and an alias"),
        ({"unrunnable": {"(": "why"}}, "unrunnable '('"),
        ({"tensors": (Tensor("w", "w", "A H", (Transpose,)),)}, "is not an operation"),  # type: ignore[arg-type]
        ({"tensors": (Tensor("w", "w", "H", (FoldedScale(),)),)}, "w: FoldedScale takes 2, and has 1 source here"),
        (
            {"tensors": (Tensor("w", "w", "H", (FoldedScale(), FoldedScale()), also=("v",)),)},
            "w: FoldedScale takes 2, and has 1 source here",
        ),
        (
            {"tensors": (Tensor("w", "w", "H", (PlusOne(),), also=("v",)),)},
            "w: PlusOne takes 1, and has 2 sources here",
        ),
        ({"tensors": (Tensor("w", "w", "H", also=("v",)),)}, "w: also= and no operation"),
        ({"tensors": (Tensor("w", "w", "H", (FoldedScale(),), also=("v.{j}.w",)),)}, "v.{j}.w: has braces"),
        ({"tensors": (Tensor("w", "w", "H", (FoldedScale(),), also=("v.{i}.w",)),)}, "v.{i}.w counts other layers"),
        ({"tensors": (Tensor("w", "w", "H", (FoldedScale(),), also=("v.{e}.w",)),)}, "experts are stacked"),
        ({"outputs": (projector("clip"),), "folders": {"mmproj": "codec"}}, "2 outputs are mmproj"),
        ({"aliases": (Alias("v.w", "embd.weight"),)}, "v.w: no row has the name embd.weight"),
        ({"outputs": (projector("clip"), projector("dlip"))}, "2 outputs are mmproj"),
        ({"drops": (Drop("layers.{j}.w", "no"),)}, "layers.{j}.w: has braces"),
        ({"drops": (Drop("tower.*", "no", beyond=True),)}, "tower.*: beyond="),
        ({"drops": (Drop("layers.{i}.w", "no", beyond=True),)}, "layers.{i}.w: beyond="),
    ],
)
def test_a_word_that_means_nothing_is_an_error_when_the_recipe_loads(
    changed: dict[str, Any], fault: str | None
) -> None:
    if fault is None:  # this one means something
        recipe(**changed)
        return
    with pytest.raises(ValueError, match=r"^the recipe of made-up: ") as caught:
        recipe(**changed)
    assert fault in str(caught.value)


def nothing(model: Model) -> None:
    """The rule of an op that moves nothing."""


@pytest.mark.parametrize(
    "made",
    [
        lambda: Split(0, 0),
        lambda: Split(0, 1),
        lambda: Split(0, "A"),
        lambda: Interleaved(0, 1),
        lambda: Rows([1, 0]),  # type: ignore[arg-type]
        lambda: Scale(2.0),  # type: ignore[arg-type]
    ],
)
def test_an_op_that_means_nothing_whatever_the_shape(made: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"the whole|no block|is not a rule"):
        made()


@pytest.mark.parametrize(
    ("source", "shape", "ops", "fault"),
    [
        ("w", "A H", Transpose(), "ops=Transpose() is not a tuple"),
        ("w", "A H", [Transpose()], "is not a tuple"),
        ("w", "A A H", (Permute("A"),), "w: Permute: heads are rows of a matrix"),
        ("w", "A 1 H", (Permute("A"), Squeeze()), "w: Permute: heads are rows of a matrix"),
        ("w", "A 1 H", (Squeeze(), Permute("A"), Transpose(), Columns(nothing)), None),
        ("w", "A", (Permute("A"), Rows(nothing), Split(0, 2), Interleaved(0, 2)), None),
        ("w", "A", (Columns(nothing),), "w: Columns: a vector has no columns"),
        ("w", "A", (Transpose(),), "w: Transpose: a vector has no columns"),
        ("w", "A", (Split(0, 2, of_columns=True),), "w: Split: a vector has no columns"),
        ("w", "A A", (Reshape("A*A"), Interleaved(0, 2, of_columns=True)), "w: Interleaved: a vector has no columns"),
        ("w", "E 2*A", (Split(0, 2),), "w: Split: the rows of E 2*A are experts"),
        ("w.{e}.b", "2*A", (Split(0, 2),), "Split: the rows of E 2*A are experts"),
        ("w.{e}.b", "A", (Permute("A"),), "Permute: the rows of E A are experts"),
        ("w", "E A", (Interleaved(0, 2),), "w: Interleaved: the rows of E A are experts"),
        ("w", "A E", (Transpose(), Split(0, 2)), "w: Split: the rows of E A are experts"),
        ("w.{e}.b", "2*A", (Split(0, 2, of_columns=True),), None),
        ("w.{e}.b", "2*A H", (Split(0, 2), Transpose()), None),
        ("w", "(A+2*H)*V H", (Split(0, "A*V H*V H*V"),), None),
        ("w", "(A+2*H)*V H", (Split(0, "A*V H*V"),), "w: Split: blocks of A*V H*V do not make up (A+2*H)*V"),
        (
            "w",
            "(A+2*H)*V H",
            (
                Transpose(),
                Split(0, "A*V H*V"),
            ),
            None,
        ),
        (
            "w",
            "(A+2*H)*V H",
            (
                Transpose(),
                Split(0, "A*V H*V", True),
            ),
            "w: Split: blocks of A*V H*V do not make up",
        ),
        ("w", "V H", (Split(0, "A*A H*A"),), None),  # as a model's dims may be
        ("w", "A/H H", (Split(0, "A/H-1 1"),), None),
        ("w", "3 H", (Split(0, 2),), "w: Split: 3 does not divide by 2"),
        ("w", "4 H", (Interleaved(0, 3),), "w: Interleaved: 4 does not divide by 3"),
        ("w", "4 H", (Interleaved(0, 4),), None),
        ("w", "A H", (Squeeze(),), "w: Squeeze: no extent of A H is 1"),
        ("w", "A*V H", (Reshape("A V H"),), None),
        ("w", "A*V H", (Reshape("A 2*V H"),), "w: Reshape: A*V H cannot be seen as 'A 2*V H'"),
        ("w", "A*V H", (Reshape("A*V H"),), "w: Reshape: it is A*V H already"),
        ("w", "A*V H", (Reshape(""),), "w: Reshape: A*V H cannot be seen as ''"),
        ("w", "A V H 2", (Transpose(),), None),
        ("w", "A V H 2 2", (), "w: it has 5 extents"),
        ("w", "0 H", (), "w: shape '0 H': 0 is not a size"),
    ],
)
def test_an_op_that_means_nothing_for_a_shape_is_an_error_when_the_recipe_loads(
    source: str, shape: str, ops: Any, fault: str | None
) -> None:
    dims = {"L": Dim("l"), "V": Dim("v"), "H": Dim("h"), "A": Dim("a"), "E": Dim("e")}
    changed: dict[str, Any] = {"axes": {}, "dims": dims, "tensors": (Tensor(source, "w", shape, ops),)}
    if fault is None:
        recipe(**changed)
        return
    with pytest.raises(ValueError, match=r"^the recipe of made-up: ") as caught:
        recipe(**changed)
    assert fault in str(caught.value)


def test_all_faults_of_a_recipe_are_listed() -> None:
    with pytest.raises(ValueError, match=r"no dim Z.*no dim Y.*no axis|no dim Z.*no axis") as caught:
        recipe(tensors=(Tensor("w", "w", "Z"), Tensor(LAYER, BLOCK, "Y", only="mixr=conv")))
    assert "no dim Y" in str(caught.value)


def test_a_refusal_may_name_what_the_config_leaves_out() -> None:
    refusal = Refusal("{A} heads, and hidden_act is {hidden_act!r}", lambda model: True)
    assert refusal.of(Model(recipe(), config(A=3), {"A": 4})) == "4 heads, and hidden_act is None"


def test_no_name_belongs_to_two_recipes() -> None:
    for names in (
        [(name, text) for recipe in all_recipes() for name in recipe.hf_names for text in recipe.text_types or (None,)],
        [(recipe.model_type, text) for recipe in all_recipes() for text in recipe.text_types or (None,)],
    ):
        assert len(names) == len(set(names))


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("key", ["absent", "null"])
def test_absent_and_null_are_none(key: str) -> None:
    read = config(null=None)
    assert [read.integer(key), read.number(key), read.positive(key), read.flag(key), read.text(key)] == [None] * 5
    assert (read.list_of(key, int), read.section(key)) == (None, None)


@pytest.mark.parametrize(
    ("reader", "value"),
    [
        ("integer", 0),
        ("integer", -1),
        ("integer", 4096.0),
        ("integer", True),
        ("integer", "4096"),
        ("integer", 1 << 31),
        ("number", math.inf),
        ("number", 1e39),
        ("number", 10**400),
        ("number", False),
        ("number", "1e-5"),
        ("positive", 0),
        ("positive", -1e-5),
        ("flag", 1),
        ("flag", "true"),
        ("text", 7),
        ("section", [1]),
        ("section", "default"),
    ],
)
def test_nonsense_is_an_error_that_names_the_key(reader: str, value: object) -> None:
    with pytest.raises(SourceError, match=r"^model/config\.json: the_key is .*, expected "):
        getattr(config(the_key=value), reader)("the_key")


@pytest.mark.parametrize("value", [{}, "0", [1, True], [1, 2.0], [None]])
def test_a_list_holds_one_kind(value: object) -> None:
    with raises(SourceError, code="config-value"):
        config(the_key=value).list_of("the_key", int)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(SourceError) as caught:
        config(the_key="x" * 10_000).integer("the_key")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("raw", "base", "kind"),
    [
        ({}, 7.0, "default"),
        ({"rope_theta": 5}, 5.0, "default"),
        ({"rope_theta": 5, "rope_parameters": {"rope_theta": 6.5, "rope_type": "linear"}}, 6.5, "linear"),
        ({"rope_theta": 5, "rope_parameters": {"type": "yarn"}}, 5.0, "yarn"),
        ({"rope_scaling": {"rope_theta": 3.0}, "rope_parameters": {"rope_theta": 6.5}}, 3.0, "default"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_theta": 6.5}, "rope_theta": 5}, 5.0, "linear"),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 6.5}}, 6.5, "default"),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 6.5}}, 6.5, "default"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 8.0, "rope_type": "default"}}}, 8.0, "default"),
        ({"theta": 9.0}, 7.0, "default"),
    ],
)
def test_rope_is_found_where_transformers_looks(raw: dict[str, Any], base: float, kind: str) -> None:
    assert (config(**raw).rope_base(7.0), config(**raw).rope_type) == (base, kind)
