"""LFM2's kin: the text half of LFM2-Audio, and the models that are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

import streamconv
from streamconv.errors import SourceError
from tests import tiny
from tests.oracles import ggufs
from tests.raising import raises
from tests.tiny.variants import configured, renamed, rewritten

SPEECH = ("conformer.layers.0.norm_out.weight", "audio_adapter.model.0.bias", "audio_embedding.to_logits.weight",
          "depthformer.layers.0.operator_norm.weight", "depth_embeddings.7.embedding_norm.weight", "depth_linear.bias",
          "codebook_offsets", "audio_loss_weights")  # fmt: skip


def audio(folder: Path) -> Path:
    """An LFM2 checkpoint as the text half of an LFM2-Audio."""
    import json

    source = renamed(tiny.lfm2(folder), lambda name: name.replace("model.", "lfm.", 1))
    config = json.loads((source / "config.json").read_text())
    beside = {name: tiny.Tensor.of(tiny.noise(name, (24,), 0.1), "F32") for name in SPEECH}
    rewritten(source, tiny.tensors_of(source) | beside)
    tiny.write_json(source / "config.json", {
        "architectures": ["Lfm2AudioForConditionalGeneration"], "codebooks": 8, "lfm": config,
        "encoder": {"d_model": 512}, "depthformer": {"layers": 6},
    })  # fmt: skip
    return source


def test_the_text_half_of_an_audio_model_is_the_text_models(tmp_path: Path) -> None:
    text = tiny.lfm2(tmp_path / "text")
    source = audio(tmp_path / "audio")
    streamconv.convert(text, tmp_path / "text.gguf", outtype="bf16", name="One")
    report = streamconv.convert(source, tmp_path / "audio.gguf", outtype="bf16", name="One", verify=True)
    assert [warning.code for warning in report.warnings] == ["text-half"]
    ours, expected = (ggufs.read(tmp_path / f"{name}.gguf").golden() for name in ("audio", "text"))
    assert ours["tensors"] == expected["tensors"]
    assert ours["kv"] == expected["kv"]


def test_what_is_of_no_half_is_unknown(tmp_path: Path) -> None:
    source = audio(tmp_path / "audio")
    strange = {"speech.out.weight": tiny.Tensor.of(tiny.noise("x", (8, 24), 0.1), "F32")}
    with raises(SourceError, code="tensors-unknown"):
        streamconv.convert(rewritten(source, tiny.tensors_of(source) | strange), tmp_path / "out.gguf")


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
