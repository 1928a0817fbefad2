"""What recipes refuse because llama.cpp cannot run it: refused before a file is there, and llama.cpp itself agrees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.errors import SourceError
from streamconv.recipe.language import Refusal
from tests import tiny
from tests.oracles import runtime

ODD = {"hidden": 60, "n_heads": 4, "n_kv_heads": 2}
CASES: dict[str, tuple[Callable[..., Path], dict[str, Any], str]] = {
    "lfm2, no attention": (tiny.lfm2, {"attention": ()}, "there is no attention layer"),
    "lfm2, no convolution": (tiny.lfm2, {"attention": range(4)}, "there is no convolution layer"),
    "lfm2, kernels of 1": (tiny.lfm2, {"conv_l": 1}, "conv_L_cache is 1, but the runtime needs 2 or more"),
    "lfm2, uneven heads": (tiny.lfm2, {"n_kv_heads": 3}, "4 heads do not share 3 key-value heads evenly"),
    "lfm2, odd heads": (tiny.lfm2, ODD, "heads of 15 cannot be split into the two halves"),
    "lfm2moe, no attention": (tiny.lfm2moe, {"attention": ()}, "there is no attention layer"),
    "lfm2moe, no convolution": (tiny.lfm2moe, {"attention": range(4)}, "there is no convolution layer"),
    "lfm2moe, kernels of 1": (tiny.lfm2moe, {"conv_l": 1}, "conv_L_cache is 1"),
    "lfm2moe, uneven heads": (tiny.lfm2moe, {"n_kv_heads": 3}, "4 heads do not share 3 key-value heads evenly"),
    "lfm2moe, odd heads": (tiny.lfm2moe, ODD, "heads of 15 cannot be split into the two halves"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_llama_cpp_cannot_run_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, options, message = CASES[name]
    model, dst = build(tmp_path / "model", **options), tmp_path / "model.gguf"
    with pytest.raises(SourceError) as caught:
        streamconv.convert(model, dst, outtype="f32")
    assert message in caught.value.message
    assert "run it with transformers" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("model.gguf*"))
    monkeypatch.setattr(Refusal, "of", lambda refusal, model: None)
    streamconv.convert(model, dst, outtype="f32")
    assert runtime.load(dst).status != "loaded"


@pytest.mark.parametrize("build", [tiny.lfm2, tiny.lfm2moe])
def test_the_least_that_llama_cpp_runs_is_converted(build: Callable[..., Path], tmp_path: Path) -> None:
    model = build(tmp_path / "model", conv_l=2, n_layers=2, attention=(1,), n_kv_heads=1)
    streamconv.convert(model, tmp_path / "model.gguf", outtype="f32")
    assert runtime.load(tmp_path / "model.gguf").status == "loaded"
