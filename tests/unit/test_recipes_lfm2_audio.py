"""LFM2-Audio: its three files, where they go and of which types, what is left out, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from streamconv.cli import main
from streamconv.errors import DestinationError, SourceError, UsageError, VerifyError
from tests import loras, tiny
from tests.oracles import deltas, ggufs
from tests.raising import raises
from tests.tiny.audio import lfm2_audio, lfm25_detokenizer
from tests.tiny.variants import configured, renamed, rewritten

NORM = "conformer.layers.0.conv.batch_norm."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lfm2_audio(tmp_path_factory.mktemp("sources") / "LFM2.5-Audio-1.5B", n_layers=1)


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "LFM2.5-Audio-1.5B", copy_function=os.link))


def encoding(folder: Path, **settings: Any) -> Path:
    """The folder with keys of the encoder's section replaced."""
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["encoder"]
    return set_config(folder, encoder=section | settings)


def set_config(folder: Path, **settings: Any) -> Path:
    """As `configured`, of a folder whose files may be links to another's."""
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8")
    path.unlink()
    path.write_text(text, encoding="utf-8")
    return configured(folder, **settings)


def stored_as(folder: Path, tensors: dict[str, tiny.Tensor]) -> Path:
    (folder / "model.safetensors").unlink()
    return rewritten(folder, tensors)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if ".gguf" in path.name}


def codes(report: streamconv.Report) -> set[str]:
    return {warning.code for warning in report.warnings}


# ---------------------------------------------------------------- names, types, and what is written


def test_all_files_are_named_by_the_convention(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = streamconv.convert(made, outtype="q4_0")
    assert [(one.role, str(one.path).rpartition("-")[2]) for one in report.outputs] == [
        ("model", "Q4_0.gguf"), ("mmproj", "F16.gguf"), ("detokenizer", "F16.gguf")
    ]  # fmt: skip
    assert [str(one.path).partition("-")[0] for one in report.outputs] == ["LFM2.5", "mmproj", "detokenizer"]
    assert "vocoder-left-out" in codes(report)


def test_types_of_what_lies_beside_the_text(made: Path, tmp_path: Path) -> None:
    streamconv.convert(made, tmp_path / "out.gguf", outtype="bf16", mmproj_outtype="q8_0", verify=True)
    mmproj, detokenizer = (ggufs.read(tmp_path / f"{role}-out.gguf") for role in ("mmproj", "detokenizer"))
    assert mmproj.tensors["a.blk.0.attn_q.weight"].type == "Q8_0"
    assert mmproj.tensors["a.blk.0.conv_pw1.weight"].type == "F32"
    assert detokenizer.tensors["blk.0.ffn_up.weight"].type == "Q8_0"
    assert ggufs.read(tmp_path / "out.gguf").tensors["blk.0.ffn_up.weight"].type == "BF16"


def test_the_text_model_alone(made: Path, source: Path) -> None:
    streamconv.convert(made, source / "all.gguf", outtype="f32")
    report = streamconv.convert(renamed_away(source, "conformer."), source / "out.gguf", outtype="f32", no_mmproj=True)
    assert [one.role for one in report.outputs] == ["model"]
    assert (source / "out.gguf").read_bytes() == (source / "all.gguf").read_bytes()


def renamed_away(folder: Path, beginning: str) -> Path:
    tensors = {name: value for name, value in tiny.tensors_of(folder).items() if not name.startswith(beginning)}
    return stored_as(folder, tensors)


def test_a_text_half_that_was_saved_alone_has_no_projector(source: Path) -> None:
    stored_as(source, {name: value for name, value in tiny.tensors_of(source).items() if name.startswith("lfm.")})
    shutil.rmtree(source / "audio_detokenizer")
    report = streamconv.convert(source, source / "out.gguf")
    assert [one.role for one in report.outputs] == ["model"] and "mmproj-none" in codes(report)
    with raises(UsageError, code="mmproj-none"):
        streamconv.convert(source, source / "again.gguf", mmproj=source / "ears.gguf")
    assert files(source) == {"out.gguf"}


def test_the_text_half_is_that_of_a_text_model(made: Path, source: Path) -> None:
    text = json.loads((made / "config.json").read_text(encoding="utf-8"))["lfm"]
    streamconv.convert(made, source / "all.gguf", outtype="bf16", name="One", no_mmproj=True)
    own = {name: value for name, value in tiny.tensors_of(made).items() if name.startswith("lfm.")}
    stored_as(source, own)
    (source / "config.json").unlink()
    tiny.write_json(source / "config.json", text)
    renamed(source, lambda name: name.replace("lfm.", "model.", 1))
    report = streamconv.convert(source, source / "text.gguf", outtype="bf16", name="One")
    assert (source / "text.gguf").read_bytes() == (source / "all.gguf").read_bytes() and not report.warnings


def test_all_get_their_names_or_none(made: Path, tmp_path: Path) -> None:
    (tmp_path / "detokenizer-out.gguf").write_bytes(b"mine")
    with raises(DestinationError, code="exists"):
        streamconv.convert(made, tmp_path / "out.gguf")
    assert files(tmp_path) == {"detokenizer-out.gguf"}


def test_a_run_that_was_stopped_goes_on(made: Path, tmp_path: Path) -> None:
    streamconv.convert(made, tmp_path / "whole.gguf", name="One")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamconv.convert(made, tmp_path / "out.gguf", name="One", progress=stop, threads=1)
    assert not list(tmp_path.glob("*out.gguf"))
    report = streamconv.convert(made, tmp_path / "out.gguf", name="One", resume=True)
    assert report.resumed
    for role in ("", "mmproj-", "detokenizer-"):
        ours, expected = (tmp_path / f"{role}{name}.gguf" for name in ("out", "whole"))
        assert ours.read_bytes() == expected.read_bytes()


def test_a_source_of_any_file_that_changes_ends_the_run(made: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(made, tmp_path / "source"))

    def touch(done: int, total: int) -> None:
        if done == total:
            os.utime(source / "audio_detokenizer" / "model.safetensors", ns=(1, 1))

    with raises(SourceError, code="source-changed"):
        streamconv.convert(source, tmp_path / "out.gguf", progress=touch, threads=1)
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("role", ["", "mmproj-", "detokenizer-"])
def test_each_file_is_verified_with_the_folder(made: Path, tmp_path: Path, role: str) -> None:
    streamconv.convert(made, tmp_path / "out.gguf", outtype="f16")
    path = tmp_path / f"{role}out.gguf"
    assert main(["verify", str(path), "--source", str(made)]) == 0
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 64]) + whole[-39:])
    with raises(VerifyError, code="value-differs"):
        streamconv.verify(path, made)


def test_the_codec_of_lfm2_audio_is_left_out_by_name(source: Path) -> None:
    """Mimi's weights lie beside the model's, under a name of their own."""
    codec = {"decoder.model.0.conv.conv.weight": tiny.Tensor.of(tiny.noise("codec", (8, 4, 3), 0.1), "F32")}
    tiny.write_safetensors(source / "tokenizer-e351c8d8-checkpoint125.safetensors", codec)
    shutil.rmtree(source / "audio_detokenizer")
    report = streamconv.convert(source, source / "out.gguf")
    assert [one.role for one in report.outputs] == ["model", "mmproj"]
    (warning,) = report.warnings
    assert warning.code == "vocoder-left-out" and "codec" in warning.message


# ---------------------------------------------------------------- the encoder


def test_all_parts_of_a_batch_norm_must_be_there(made: Path, source: Path) -> None:
    stored = tiny.tensors_of(made)
    for part in ("weight", "bias", "running_mean", "running_var"):
        left = {name: value for name, value in stored.items() if name != f"{NORM}{part}"}
        with raises(SourceError, code="tensors-missing") as caught:
            streamconv.convert(stored_as(source, left), source / "out.gguf")
        assert f"{NORM}{part}" in caught.value.message
    without_count = {name: value for name, value in stored.items() if not name.endswith("num_batches_tracked")}
    streamconv.convert(stored_as(source, without_count), source / "out.gguf")


@pytest.mark.parametrize("name", [f"{NORM}running_std", "conformer.layers.0.conv.extra.weight", "audio_adapter.gate"])
def test_every_tensor_has_its_place(source: Path, name: str) -> None:
    strange = {name: tiny.Tensor.of(tiny.noise(name, (512,), 0.1), "F32")}
    with raises(SourceError, code="tensors-unknown"):
        streamconv.convert(stored_as(source, tiny.tensors_of(source) | strange), source / "out.gguf")


def test_a_norm_of_another_length_is_refused(source: Path) -> None:
    short = {f"{NORM}running_var": tiny.Tensor.of(np.ones(511), "F32")}
    with raises(SourceError, code="shape-mismatch"):
        streamconv.convert(stored_as(source, tiny.tensors_of(source) | short), source / "out.gguf")


@pytest.mark.parametrize(
    "settings",
    [{"xscaling": True}, {"subsampling_factor": 4}, {"causal_downsampling": True}, {"reduction": "pooling"},
     {"self_attention_model": "abs_pos"}, {"att_context_size": [128, 128]}, {"conv_norm_type": "layer_norm"},
     {"conv_context_size": "causal"}, {"n_heads": 3}],
)  # fmt: skip
def test_an_encoder_that_the_runtime_is_not_is_refused(source: Path, settings: dict[str, Any]) -> None:
    with raises(SourceError, code="unrunnable"):
        streamconv.convert(encoding(source, **settings), source / "out.gguf")
    assert files(source) == set()


def test_what_an_encoder_leaves_unsaid_is_as_published(made: Path, source: Path) -> None:
    streamconv.convert(made, source / "said.gguf")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    sizes = {key: config["encoder"][key] for key in ("d_model", "n_layers", "n_heads", "feat_in")}
    streamconv.convert(set_config(source, encoder=sizes), source / "out.gguf")
    assert (source / "mmproj-out.gguf").read_bytes() == (source / "mmproj-said.gguf").read_bytes()


def test_sizes_that_are_built_into_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("WIDTH", 64), ("KERNEL", 7)):
        with monkeypatch.context() as patched:
            patched.setattr(f"tests.tiny.audio.{name}", size)
            other = lfm2_audio(tmp_path / name, n_layers=1)
        with raises(SourceError, code="unrunnable"):
            streamconv.convert(other, tmp_path / "out.gguf")


def test_a_projector_of_another_text_model_is_refused(source: Path) -> None:
    tensors = dict(tiny.tensors_of(source))
    shapes = {"audio_adapter.model.3.weight": (72, 160), "audio_adapter.model.3.bias": (72,),
              "audio_embedding.embedding.weight": (280, 72), "audio_embedding.to_logits.weight": (280, 72),
              "audio_embedding.embedding_norm.weight": (72,)}  # fmt: skip
    tensors |= {name: tiny.Tensor.of(tiny.noise(name, shape, 0.1), "BF16") for name, shape in shapes.items()}
    with raises(SourceError, code="unrunnable"):
        streamconv.convert(stored_as(source, tensors), source / "out.gguf")


def test_a_preprocessor_that_hears_otherwise_is_warned_of(source: Path) -> None:
    said = {"sample_rate": 24000, "n_fft": 512}
    report = streamconv.convert(set_config(source, preprocessor=said), source / "out.gguf")
    assert codes(report) == {"vocoder-left-out", "processor-built-in"}


# ---------------------------------------------------------------- the detokenizer


def test_the_detokenizer_by_itself(made: Path, tmp_path: Path) -> None:
    streamconv.convert(made, tmp_path / "out.gguf", outtype="f16")
    report = streamconv.convert(made / "audio_detokenizer", tmp_path / "alone.gguf", outtype="f16", verify=True)
    assert [one.role for one in report.outputs] == ["model"] and not report.warnings
    assert (tmp_path / "alone.gguf").read_bytes() == (tmp_path / "detokenizer-out.gguf").read_bytes()
    alone = ggufs.read(tmp_path / "alone.gguf")
    assert alone["tokenizer.ggml.model"] == "none" and alone["lfm2.attention.sliding_window"] == 30


def test_a_detokenizer_that_cannot_be_converted_ends_the_run(source: Path) -> None:
    shutil.rmtree(source / "audio_detokenizer")
    lfm25_detokenizer(source / "audio_detokenizer", config={"output_size": 71})
    with raises(SourceError, code="shape-mismatch"):
        streamconv.convert(source, source / "out.gguf")
    assert files(source) == set()
    streamconv.convert(source, source / "out.gguf", no_mmproj=True)
    assert files(source) == {"out.gguf"}


# ---------------------------------------------------------------- adapters


def test_adapters_of_both_halves_are_merged_into_their_files(made: Path, tmp_path: Path) -> None:
    modules = {
        "lfm.layers.1.self_attn.q_proj": ((64, 64), "", "blk.1.attn_q.weight"),
        "conformer.layers.0.self_attn.linear_q": ((512, 512), "mmproj-", "a.blk.0.attn_q.weight"),
        "audio_adapter.model.3": ((64, 160), "mmproj-", "mm.a.mlp.3.weight"),
    }
    tensors = {}
    for module, (shape, _, _) in modules.items():
        tensors |= loras.factors(module, *shape)
    folder = loras.write(tmp_path / "a", tensors)
    streamconv.convert(made, tmp_path / "plain.gguf", outtype="f32")
    streamconv.convert(made, tmp_path / "out.gguf", outtype="f32", adapters=[folder], verify=True)
    change = deltas.trained(folder, lambda module: 1.5)
    for role in ("", "mmproj-", "detokenizer-"):
        before, after = (ggufs.read(tmp_path / f"{role}{name}.gguf") for name in ("plain", "out"))
        changed = {target: change[module] for module, (_, of, target) in modules.items() if of == role}
        for target in before.tensors:
            delta = changed.get(target, np.zeros(1))
            found = after.float64(target) - before.float64(target)
            np.testing.assert_allclose(found, delta + 0 * found, rtol=0, atol=2e-6 * np.abs(delta).max())


def test_adapters_on_convolutions_and_norms_are_refused(made: Path, tmp_path: Path) -> None:
    for module, shape in {"conv.pointwise_conv1": (1024, 512), "conv.batch_norm": (512, 512)}.items():
        folder = loras.write(tmp_path / module, loras.factors(f"conformer.layers.0.{module}", *shape))
        with raises(SourceError, code="adapter-unmergeable"):
            streamconv.convert(made, tmp_path / "out.gguf", adapters=[folder])
    assert files(tmp_path) == set()
