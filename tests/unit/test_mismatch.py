"""What is said of a checkpoint or adapter that does not fit: the likely cause first, and one example of each kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.errors import SourceError
from tests import tiny
from tests.tiny import Tensor
from tests.tiny.variants import configured, renamed, rewritten

BUILDERS = {"llama": tiny.llama, "lfm2": tiny.lfm2, "lfm2moe": tiny.lfm2moe}
LONGEST = 700  # characters of a line, the folder's name aside


def refused(call: Callable[[], Any], folder: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        call()
    assert caught.value.exit_code == 3
    assert len(str(caught.value).replace(str(folder), "")) < LONGEST
    return caught.value


def codes(error: SourceError) -> set[str]:
    return {str(problem["code"]) for problem in error.problems}


@pytest.mark.parametrize("name", BUILDERS)
def test_names_that_are_another_programs(tmp_path: Path, name: str) -> None:
    """One example of each kind, how many more of it there are, and the name that it may mean."""
    source = renamed(BUILDERS[name](tmp_path / "model"), lambda one: one.replace("self_attn.q_proj", "self_attn.query"))
    error = refused(lambda: streamconv.convert(source, tmp_path / "out.gguf"), tmp_path)
    assert codes(error) == {"tensors-unknown", "tensors-missing"}
    before, _, after = error.message.partition("unknown tensors: ")
    assert "names" in before
    assert "closest is model.layers.{i}.self_attn.q_proj.weight" in after
    assert after.count("self_attn.query") == 1


@pytest.mark.parametrize("name", BUILDERS)
def test_a_config_of_another_size(tmp_path: Path, name: str) -> None:
    source = configured(BUILDERS[name](tmp_path / "model"), hidden_size=96, num_attention_heads=4)
    error = refused(lambda: streamconv.convert(source, tmp_path / "out.gguf"), tmp_path)
    assert "shape-mismatch" in codes(error)
    assert error.message.index("hidden_size=96, the tensors 64") < error.message.index("has shape")


@pytest.mark.parametrize("name", BUILDERS)
def test_an_incomplete_checkpoint(tmp_path: Path, name: str) -> None:
    source = renamed(BUILDERS[name](tmp_path / "model"), lambda one: "" if "self_attn" in one else one)
    error = refused(lambda: streamconv.convert(source, tmp_path / "out.gguf"), tmp_path)
    assert codes(error) & {"tensors-missing", "layer-tensors"}


@pytest.mark.parametrize("name", BUILDERS)
def test_tensors_of_something_else_beside_the_model(tmp_path: Path, name: str) -> None:
    source = BUILDERS[name](tmp_path / "model")
    more = {f"vision.layers.{i}.{what}.weight": Tensor.of([[1.0]], "F32") for i in range(46) for what in "abcdef"}
    error = refused(
        lambda: streamconv.convert(rewritten(source, dict(tiny.tensors_of(source)) | more), tmp_path / "out.gguf"),
        tmp_path,
    )
    assert codes(error) == {"tensors-unknown"}
    assert "vision.layers.0.a.weight (and 45 more)" in error.message
    assert "and 92 more of 2 other kinds" in error.message


@pytest.mark.parametrize("name", BUILDERS)
def test_an_adapter_of_another_base(tmp_path: Path, name: str) -> None:
    """The cause comes first, then one example and how many more there are."""
    targets = {"llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
    of_it = targets.get(name, ("q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3", "in_proj"))
    other = BUILDERS[name](tmp_path / "other", hidden=96, n_layers=12)
    base = BUILDERS[name](tmp_path / "base", n_layers=12)
    adapter = tiny.peft_adapter(
        tmp_path / "adapter", other, targets=of_it, config={"base_model_name_or_path": "Some/Other-3B"}
    )
    for call in (
        lambda: streamconv.convert(base, tmp_path / "out.gguf", adapters=[adapter]),
        lambda: streamconv.convert_adapter(adapter, base, tmp_path / "out.gguf"),
    ):
        error = refused(call, tmp_path)
        assert codes(error) == {"shape"}
        assert error.message.index("Some/Other-3B") < error.message.index("lora_A [8, ")
        assert error.message.count("lora_A [8, ") == 1
        n_modules = sum(len(problem["modules"]) for problem in error.problems)
        assert f"(and {n_modules - 1} more)" in error.message


def test_it_is_not_said_that_no_adapter_can_where_another_base_is_meant(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    other = tiny.llama(tmp_path / "other", hidden=96)
    wrong = tiny.peft_adapter(tmp_path / "wrong", other, targets=("q_proj",))
    error = refused(lambda: streamconv.convert_adapter(wrong, base, tmp_path / "out.gguf"), tmp_path)
    assert "a GGUF adapter cannot hold" not in error.message
    dora = tiny.peft_adapter(tmp_path / "dora", base, targets=("q_proj",), dora=True)
    error = refused(lambda: streamconv.convert_adapter(dora, base, tmp_path / "out.gguf"), tmp_path)
    assert "a GGUF adapter cannot hold" in error.message
    assert "convert BASE --adapter" in (error.hint or "")
