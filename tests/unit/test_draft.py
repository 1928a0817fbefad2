"""Drafted recipes: they run, bind to what they were drafted from, and mark what names and shapes do not show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamconv import cli
from streamconv.errors import SourceError
from streamconv.recipe.draft import draft
from streamconv.recipe.language import Model, Recipe
from streamconv.recipe.registry import all_recipes, find_recipe
from tests import cases, inmemory, tiny
from tests.inmemory import bound


def executed(text: str) -> Recipe:
    scope: dict[str, Any] = {}
    exec(compile(text, "draft.py", "exec"), scope)
    recipe = scope["RECIPE"]
    assert isinstance(recipe, Recipe)
    return recipe


def drafted(directory: Path) -> tuple[str, Model]:
    """The draft of a checkpoint, and the checkpoint bound to it."""
    text = draft(directory)
    raw, stored = inmemory.loaded(directory)
    return text, bound(raw, stored, executed(text))


def checkpoint(directory: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    tensors = {name: tiny.Tensor.of(tiny.noise(name, shape, 1.0), "F32") for name, shape in shapes.items()}
    tiny.write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", cases.MODELS)
def test_a_draft_binds_to_its_checkpoint_with_the_recipes_targets(tmp_path: Path, name: str) -> None:
    src = cases.MODELS[name](tmp_path / name)
    text, model = drafted(src)
    raw, stored = inmemory.loaded(src)
    known = bound(raw, stored)
    wanted = {one.name: one.tensor.spec for one in known.targets if one.name in text.replace("{i}", "0")}
    for one in model.targets:
        if "TODO" not in one.name and one.name in wanted:
            assert one.tensor.spec == wanted[one.name]
    computed = {"rope_freqs.weight", *(f"blk.{i}.exp_probs_b.bias" for i in range(4))}
    fused = {f"blk.{i}.ffn_{part}_exps.weight" for i in range(4) for part in ("gate", "up", "down")}
    drafted_names = {one.name for one in model.targets}
    missing = {one.name for one in known.targets} - drafted_names
    assert missing <= (computed | fused if "stacked" in name else computed)
    assert model.dims.items() >= {k: v for k, v in known.dims.items() if k in "LVHAKDE"}.items()
    assert f"There is a recipe already: architectures/{known.recipe.arch}.py" in text


def test_heads_are_told_from_the_hidden_size_by_the_tensor(tmp_path: Path) -> None:
    text = draft(tiny.llama(tmp_path, n_heads=4, hidden=64))
    assert '"model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "A*D H"' in text
    assert '"model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "H A*D"' in text
    assert '"model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight", "F H"' in text


def test_what_no_file_tells_is_marked(tmp_path: Path) -> None:
    text = draft(tiny.llama(tmp_path, attention_bias=True))
    for mark in (
        'TODO (Permute("A"),) after the shape, if llama.cpp permutes',
        'TODO (Permute("K"),) after the shape, if llama.cpp permutes',
        "TODO nothing reads attention_bias: True",
        "TODO nothing reads hidden_act: 'silu'",
    ):
        assert mark in text


def test_layers_that_differ_become_an_axis(tmp_path: Path) -> None:
    text, model = drafted(tiny.lfm2moe(tmp_path))
    assert model.kinds == {
        "axis1": ["conv", "self_attn", "conv", "self_attn"],
        "axis2": ["other", "expert_bias", "expert_bias", "expert_bias"],
    }
    assert "TODO better names, and claims=" in text


def test_names_that_gguf_does_not_know_get_a_place_and_a_mark(tmp_path: Path) -> None:
    shapes = {
        "net.wte.table": (11, 6),
        **{f"net.layer.{i}.spin.weight": (6, 35) for i in range(3)},
        "net.layer.2.extra.weight": (13, 6),
    }
    text, model = drafted(checkpoint(tmp_path, shapes, {"model_type": "novel", "d_model": 6, "ranks": 35}))
    assert "# TODO gguf has no architecture of this name" in text
    assert 'hf_names=("TODO",)' in text
    assert {one.name for one in model.targets} == {
        "TODO.net.wte.table",
        *(f"blk.{i}.TODO.net.layer.spin.weight" for i in range(3)),
        "blk.2.TODO.net.layer.extra.weight",
    }
    assert 'Dim("ranks")' in text and 'Dim("d_model")' in text
    assert text.count('Dim("TODO"),  # TODO what config.json calls ') == 3  # 3 layers, 11 tokens, 13 rows
    assert 'Dim("TODO", 1),  # TODO the number of tokens' in text
    assert "# TODO only in layers 2" in text


def test_the_embedding_tells_what_the_config_calls_otherwise(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (11, 6), "model.layers.0.mlp.up_proj.weight": (13, 6)}
    text, model = drafted(checkpoint(tmp_path, shapes, {"n_words": 11, "d_model": 6, "n_layers": 1}))
    assert '"V": Dim("n_words")' in text and '"H": Dim("d_model")' in text
    assert '"F": Dim("TODO"),  # TODO what config.json calls 13' in text
    written = model.keys()
    assert {key.key: key.value for key in written} == {
        "TODO.vocab_size": 11,
        "TODO.block_count": 1,
        "TODO.embedding_length": 6,
        "TODO.feed_forward_length": 13,
    }


def test_two_names_of_one_meaning_are_marked(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (11, 6), "wte.weight": (11, 6)}
    names = ("model.layers.{}.mlp.up_proj.weight", "h.{}.mlp.c_fc.weight")
    shapes |= {name.format(i): (13, 6) for i in range(2) for name in names}
    text, model = drafted(checkpoint(tmp_path, shapes, {"vocab_size": 11, "hidden_size": 6, "num_hidden_layers": 2}))
    targets = [one.name for one in model.targets]
    assert len(targets) == len(set(targets)) == 6
    assert {"token_embd.weight", "TODO.wte.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"} <= set(targets)
    assert "# TODO looks like token_embd.weight as well: of model.embed_tokens.weight or of this?" in text
    assert "# TODO looks like blk.{i}.ffn_up.weight as well: of h.{i}.mlp.c_fc.weight or of this?" in text


@pytest.mark.parametrize("name", ["model.layers.0.blocks.1.sub.2.weight", "x{i}.weight", "model.layers.0.a{b}.weight"])
def test_a_name_that_no_recipe_can_say_is_marked(tmp_path: Path, name: str) -> None:
    src = checkpoint(tmp_path, {"model.embed_tokens.weight": (11, 6), "model.layers.0.mlp.up_proj.weight": (13, 6)}, {})
    raw, stored = inmemory.loaded(src)
    recipe = executed(draft(src))
    odd = checkpoint(tmp_path / "odd", {key: one.shape for key, one in stored.items()} | {name: (5, 3)}, {})
    text = draft(odd)
    assert "# TODO recipes cannot express a name like " in text
    with pytest.raises(SourceError, match="unknown tensors: "):
        bound(*inmemory.loaded(odd), executed(text))
    assert bound(raw, stored, executed(text)).dims == bound(raw, stored, recipe).dims


def test_shapes_that_differ_are_shown(tmp_path: Path) -> None:
    text = draft(checkpoint(tmp_path, {"a.0.w.weight": (5, 3), "a.1.w.weight": (7, 3)}, {}))
    assert "# TODO shapes differ: (5, 3), (7, 3)" in text


def test_a_strangers_config_cannot_write_code(tmp_path: Path) -> None:
    hostile = '"""\nimport os\n"""'
    config = {"architectures": [hostile], "model_type": hostile, hostile: "\n\u2028raise SystemExit\n", "n": 3}
    text, model = drafted(checkpoint(tmp_path, {'a.0."w\u00e9".weight': (5, 3)}, config))
    assert model.recipe.hf_names == (hostile,)
    assert text.isascii() and "\nimport os" not in text and "\nraise" not in text


def test_the_command_prints_the_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tiny.llama(tmp_path / "src")
    assert cli.main(["draft", str(src)]) == 0
    assert capsys.readouterr().out == draft(src)
    assert cli.main(["draft", str(tmp_path / "nowhere")]) == 3


def test_the_command_lists_every_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["architectures"]) == 0
    text = capsys.readouterr().out
    for recipe in all_recipes():
        assert all(name in text for name in (recipe.arch, *recipe.hf_names, recipe.description))
        wrapped = {recipe.config_root: {"model_type": recipe.text_types[-1]}} if recipe.text_types else {}
        assert find_recipe(inmemory.config({"architectures": [recipe.hf_names[0]], **wrapped})) is recipe
