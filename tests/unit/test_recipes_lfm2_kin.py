"""LFM2's kin: the models that are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

import streamconv
from streamconv.errors import SourceError
from tests import tiny
from tests.oracles import ggufs
from tests.raising import raises
from tests.tiny.variants import configured


@pytest.mark.parametrize(
    "name",
    ["Lfm2ForSequenceClassification", "Lfm2MoeForSequenceClassification", "Lfm2BidirectionalForMaskedLM",
     "Lfm2BidirectionalForTokenClassification", "Lfm3ForCausalLM", "Lfm3VlForConditionalGeneration", "lfm3"],
)  # fmt: skip
def test_what_no_runtime_runs_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    is_class = name[0] == "L"
    source = configured(
        tiny.lfm2(tmp_path / "src"), architectures=[name] if is_class else None,
        model_type="lfm2" if is_class else name,
    )  # fmt: skip
    with raises(SourceError, code="architecture-unrunnable") as caught:
        streamconv.convert(source, tmp_path / "out.gguf")
    assert caught.value.message.startswith(name) and "llama.cpp" in caught.value.message
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("name", ["Lfm2Model", "Lfm2ForCausalLM"])
def test_the_type_of_a_bidirectional_model_is_enough(tmp_path: Path, name: str) -> None:
    source = configured(tiny.lfm2(tmp_path / "src"), architectures=[name], model_type="lfm2_bidirectional")
    streamconv.convert(source, tmp_path / "out.gguf")
    assert ggufs.read(tmp_path / "out.gguf")["lfm2.attention.causal"] is False
