"""LFM2-VL: where its projector goes and of which type, what its configs decide, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from streamconv.cli import main
from streamconv.errors import DestinationError, SourceError, UsageError, VerifyError
from tests import families, loras, tiny
from tests.oracles import deltas, ggufs
from tests.raising import raises
from tests.tiny.variants import configured, renamed, rewritten

TOWER, PROJECTOR = "model.vision_tower.vision_model.", "model.multi_modal_projector."
NORM = ("mm.input_norm.weight", "mm.input_norm.bias")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.checkpoint("lfm2-vl", tmp_path_factory.mktemp("sources") / "LFM2-VL-450M")


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "LFM2-VL-450M"))


def sectioned(folder: Path, section: str, **settings: Any) -> Path:
    """The folder with keys of a section of its config.json replaced; None: left out."""
    config = json.loads((folder / "config.json").read_text())
    values = {key: value for key, value in (config[section] | settings).items() if value is not None}
    return configured(folder, **{section: values})


def without(folder: Path, *names: str) -> Path:
    return renamed(folder, lambda name: "" if any(one in name for one in names) else name)


def convert(source: Path, **options: Any) -> tuple[ggufs.Gguf, set[str]]:
    """The projector file, and the codes of what was warned of."""
    report = streamconv.convert(source, source / "out.gguf", outtype="f32", verify=True, **options)
    return ggufs.read(source / "mmproj-out.gguf"), {warning.code for warning in report.warnings}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if ".gguf" in path.name}


# ---------------------------------------------------------------- names and types


def test_both_are_named_by_the_convention(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = streamconv.convert(made)
    assert [(str(one.path), one.role) for one in report.outputs] == [
        ("LFM2-VL-2.6M-450m-BF16.gguf", "model"), ("mmproj-LFM2-VL-2.6M-450m-BF16.gguf", "mmproj")
    ]  # fmt: skip
    report = streamconv.convert(made, outtype="q4_k_m")
    assert [str(one.path) for one in report.outputs] == [
        "LFM2-VL-2.6M-450m-Q4_K_M.gguf", "mmproj-LFM2-VL-2.6M-450m-F16.gguf"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("outtype", "asked", "type_", "file_type"),
    [("f32", None, "F32", 0), ("bf16", None, "BF16", 32), ("q8_0", None, "Q8_0", 7), ("q4_k_m", None, "F16", 1),
     ("iq4_xs", None, "F16", 1), ("bf16", "q8_0", "Q8_0", 7), ("q4_k_m", "F32", "F32", 0)],
)  # fmt: skip
def test_its_type_is_the_texts_where_it_can_be(
    made: Path, tmp_path: Path, outtype: str, asked: str | None, type_: str, file_type: int
) -> None:
    streamconv.convert(made, tmp_path / "out.gguf", outtype=outtype, mmproj_outtype=asked)
    mmproj = ggufs.read(tmp_path / "mmproj-out.gguf")
    assert mmproj.tensors["v.blk.0.attn_q.weight"].type == type_
    assert mmproj.tensors["v.patch_embd.weight"].type == ("F16" if type_ == "F16" else "F32")
    assert mmproj.tensors["v.position_embd.weight"].type == "F32"
    assert mmproj["general.file_type"] == file_type


def test_it_goes_where_it_is_asked_to(made: Path, tmp_path: Path) -> None:
    (tmp_path / "eyes").mkdir()
    streamconv.convert(made, tmp_path / "out.gguf", mmproj=tmp_path / "eyes" / "{name}-{outtype}.gguf")
    assert files(tmp_path) == {"out.gguf"} and files(tmp_path / "eyes") == {"LFM2-VL-450M-bf16.gguf"}
    with raises(DestinationError, code="same-output"):
        streamconv.convert(made, tmp_path / "one.gguf", mmproj=tmp_path / "one.gguf")
    assert files(tmp_path) == {"out.gguf"}


def test_the_text_model_alone(made: Path, source: Path) -> None:
    streamconv.convert(made, source / "both.gguf", outtype="f32")
    report = streamconv.convert(without(source, f"{TOWER}encoder.layers.1"), source / "out.gguf", no_mmproj=True,
                                outtype="f32")  # fmt: skip
    assert [one.role for one in report.outputs] == ["model"] and not report.warnings
    assert (source / "out.gguf").read_bytes() == (source / "both.gguf").read_bytes()


def test_options_that_ask_for_none_of_it(tmp_path: Path, made: Path) -> None:
    text = tiny.lfm2(tmp_path / "text")
    for words in ({"mmproj": tmp_path / "m.gguf"}, {"mmproj_outtype": "f16"}):
        with raises(UsageError, code="mmproj-none"):
            streamconv.convert(text, tmp_path / "out.gguf", **words)
        with raises(UsageError, code="option-conflict"):
            streamconv.convert(made, tmp_path / "out.gguf", no_mmproj=True, **words)
    streamconv.convert(text, tmp_path / "out.gguf", no_mmproj=True)
    assert files(tmp_path) == {"out.gguf"}


def test_the_command_line_has_the_options(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, mmproj = tmp_path / "out.gguf", tmp_path / "eyes.gguf"
    assert (
        main(["convert", str(made), "-o", str(out), "--mmproj", str(mmproj), "--mmproj-outtype", "F16", "--json"]) == 0
    )
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert [(one["path"], one["role"]) for one in outputs] == [(str(out), "model"), (str(mmproj), "mmproj")]
    assert main(["verify", str(mmproj), "--source", str(made)]) == 0
    assert main(["convert", str(made), "-o", str(tmp_path / "b.gguf"), "--mmproj-outtype", "q4_0"]) == 2


def test_rows_of_the_projector_without_whole_blocks_are_warned_of(made: Path, tmp_path: Path) -> None:
    report = streamconv.convert(made, tmp_path / "out.gguf", outtype="f16", mmproj_outtype="q8_0")
    types = {one.type for one in ggufs.read(tmp_path / "mmproj-out.gguf").tensors.values()}
    assert types == {"F32", "F16", "Q8_0"}
    assert "type-fallback" in {warning.code for warning in report.warnings}


# ---------------------------------------------------------------- verification


def test_what_differs_is_named(made: Path, tmp_path: Path) -> None:
    streamconv.convert(made, tmp_path / "out.gguf", outtype="f16")
    path = tmp_path / "mmproj-out.gguf"
    report = streamconv.verify(path, made)
    assert (report.verified, report.architecture, [one.role for one in report.outputs]) == (True, "clip", ["mmproj"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 64]) + whole[-39:])
    with raises(VerifyError, code="value-differs"):
        streamconv.verify(path, made)
    key = b"clip.vision.projector.scale_factor" + (4).to_bytes(4, "little")
    path.write_bytes(whole.replace(key + (2).to_bytes(4, "little"), key + (3).to_bytes(4, "little")))
    with raises(VerifyError, code="key-differs"):
        streamconv.verify(path, made)


# ---------------------------------------------------------------- the projector


def test_a_norm_that_the_config_denies_is_left_out(source: Path) -> None:
    mmproj, warned = convert(configured(source, projector_use_layernorm=False))
    assert not mmproj.tensors.keys() & set(NORM) and warned == {"tensors-ignored"}


def test_no_norm_and_no_word_of_it_is_incomplete(source: Path) -> None:
    without(source, "layer_norm.")
    for flag in (True, None):
        with raises(SourceError, code="tensors-missing"):
            convert(configured(source, projector_use_layernorm=flag))
    assert files(source) == set()
    mmproj, warned = convert(configured(source, projector_use_layernorm=False))
    assert not mmproj.tensors.keys() & set(NORM) and not warned


def test_the_runtime_gets_biases_where_the_model_has_none(source: Path) -> None:
    without(source, "linear_1.bias", "linear_2.bias")
    with raises(SourceError, code="tensors-missing"):
        convert(source)
    mmproj, _ = convert(configured(source, projector_bias=False))
    for name, n in (("mm.1.bias", 192), ("mm.2.bias", 256)):
        assert mmproj.tensors[name].type == "F32"
        np.testing.assert_array_equal(mmproj.float64(name), np.zeros(n))


def test_a_projector_of_another_text_model_is_refused(source: Path) -> None:
    tensors = dict(tiny.tensors_of(source))
    for part in ("weight", "bias"):
        shape = tensors[f"{PROJECTOR}linear_2.{part}"].shape
        tensors[f"{PROJECTOR}linear_2.{part}"] = tiny.Tensor.of(tiny.noise(part, (224, *shape[1:]), 0.1), "BF16")
    with raises(SourceError, code="unrunnable"):
        convert(rewritten(source, tensors))


# ---------------------------------------------------------------- the tower


def test_patches_have_their_channels_first(made: Path, tmp_path: Path) -> None:
    streamconv.convert(made, tmp_path / "out.gguf", outtype="f32")
    stored = tiny.tensors_of(made)[f"{TOWER}embeddings.patch_embedding.weight"].float32()
    expected = stored.reshape(96, 16, 16, 3).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(ggufs.read(tmp_path / "mmproj-out.gguf").float64("v.patch_embd.weight"), expected)


@pytest.mark.parametrize("patch", [8, [8, 8]])
def test_sizes_come_from_the_config_and_the_tensors(source: Path, patch: object) -> None:
    tensors = dict(tiny.tensors_of(source))
    weight = tiny.noise("patches", (96, 8 * 8 * 3), 0.1)
    tensors[f"{TOWER}embeddings.patch_embedding.weight"] = tiny.Tensor.of(weight, "F32")
    tensors[f"{TOWER}embeddings.position_embedding.weight"] = tiny.Tensor.of(tiny.noise("at", (49, 96), 0.1), "BF16")
    rewritten(source, tensors)
    mmproj, _ = convert(sectioned(source, "vision_config", patch_size=patch, num_patches=None, hidden_size=None))
    np.testing.assert_array_equal(
        mmproj.float64("v.patch_embd.weight"), weight.reshape(96, 8, 8, 3).transpose(0, 3, 1, 2)
    )
    assert (mmproj["clip.vision.patch_size"], mmproj["clip.vision.image_size"]) == (8, 56)


@pytest.mark.parametrize("size", [16.5, [16, 8], 0])
def test_a_patch_that_is_no_square_is_refused(source: Path, size: object) -> None:
    with raises(SourceError, code="config-value"):
        convert(sectioned(source, "vision_config", patch_size=size))


@pytest.mark.parametrize("settings", [{"hidden_act": "relu"}, {"num_attention_heads": 5}])
def test_what_the_runtime_does_not_compute_is_refused(source: Path, settings: dict[str, Any]) -> None:
    with raises(SourceError, code="unrunnable"):
        convert(sectioned(source, "vision_config", **settings))


def test_tensors_of_the_tower_are_accounted_for(made: Path, source: Path) -> None:
    stored = dict(tiny.tensors_of(made))
    one = tiny.Tensor.of(tiny.noise("x", (96,), 0.1), "BF16")
    plain, _ = convert(rewritten(source, stored))
    pooled, _ = convert(rewritten(source, stored | {f"{TOWER}head.layernorm.weight": one}), force=True)
    assert pooled.path.read_bytes() == plain.path.read_bytes()
    for strange in (f"{TOWER}embeddings.class_embedding", f"{PROJECTOR}linear_3.bias"):
        with raises(SourceError, code="tensors-unknown"):
            convert(rewritten(source, stored | {strange: one}), force=True)
    with raises(SourceError, code="tensors-missing"):
        convert(without(rewritten(source, stored), f"{TOWER}encoder.layers.1.mlp"), force=True)


def test_a_text_half_alone_is_warned_of(source: Path) -> None:
    without(source, "vision_tower", "multi_modal_projector")
    report = streamconv.convert(source, source / "out.gguf")
    assert [one.role for one in report.outputs] == ["model"]
    assert {warning.code for warning in report.warnings} == {"mmproj-none"}
    with raises(UsageError, code="mmproj-none"):
        streamconv.convert(source, source / "two.gguf", mmproj_outtype="f16")


@pytest.mark.parametrize(("layer", "n"), [(-1, 3), (-2, 2), (2, 2)])
def test_layers_beyond_the_feature_layer_are_not_counted(source: Path, layer: int, n: int) -> None:
    mmproj, warned = convert(configured(source, vision_feature_layer=layer))
    assert mmproj["clip.vision.block_count"] == n
    assert "v.blk.2.ln1.weight" in mmproj.tensors  # as llama.cpp's converter has it
    assert warned == ({"vision-feature-layer"} if n < 3 else set())


def test_a_feature_layer_that_is_not_there_is_refused(source: Path) -> None:
    for layer in (-4, 0, 4, "last"):
        with raises(SourceError, code="config-value"):
            convert(configured(source, vision_feature_layer=layer))


# ---------------------------------------------------------------- the processor


def test_images_without_a_processor_are_taken_as_the_class_does(source: Path) -> None:
    (source / "preprocessor_config.json").unlink()
    mmproj, warned = convert(source)
    assert (mmproj["clip.vision.image_mean"], mmproj["clip.vision.image_std"]) == ([0.5] * 3, [0.5] * 3)
    assert warned == {"processor-missing"}


def test_images_that_are_not_normalised(source: Path) -> None:
    mmproj, _ = convert(configured(source, "preprocessor_config.json", do_normalize=False))
    assert (mmproj["clip.vision.image_mean"], mmproj["clip.vision.image_std"]) == ([0.0] * 3, [1.0] * 3)


def test_what_no_key_decides_is_warned_of(source: Path) -> None:
    plain = {"max_tiles": 10, "tile_size": 512, "do_rescale": True, "rescale_factor": 0.00392156862745098}
    assert convert(configured(source, "preprocessor_config.json", **plain))[1] == set()
    for changed in ({"tile_size": 384}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}):
        folder = configured(source, "preprocessor_config.json", **plain | changed)
        assert {
            one.code for one in streamconv.convert(folder, source / "out.gguf", dry_run=True, force=True).warnings
        } == {"processor-built-in"}


@pytest.mark.parametrize("std", [[0.5, 0, 0.5], [0.5, 0.5, -0.1]])
def test_channels_are_not_divided_by_zero(source: Path, std: object) -> None:
    with raises(SourceError, code="config-value"):
        convert(configured(source, "preprocessor_config.json", image_std=std))


@pytest.mark.parametrize("mean", [[0.5, 0.5], [0.5, 0.5, "x"], 0.5, [0.5, 0.5, 1e39]])
def test_a_mean_that_is_no_number_for_each_channel_is_refused(source: Path, mean: object) -> None:
    with raises(SourceError, code="config-value"):
        convert(configured(source, "preprocessor_config.json", image_mean=mean))


# ---------------------------------------------------------------- the text model


@pytest.mark.parametrize("model_type", ["lfm2_vl", "lfm2-vl"])
def test_a_config_without_a_class_is_known_by_its_type(made: Path, source: Path, model_type: str) -> None:
    streamconv.convert(made, source / "plain.gguf", outtype="f32")
    mmproj, _ = convert(sectioned(configured(source, architectures=None, model_type=model_type), "text_config",
                                  architectures=None, model_type=None))  # fmt: skip
    assert mmproj.path.read_bytes() == (source / "mmproj-plain.gguf").read_bytes()
    assert (source / "out.gguf").read_bytes() == (source / "plain.gguf").read_bytes()


def test_another_text_model_is_refused_by_name(source: Path) -> None:
    with raises(SourceError, code="architecture-unsupported") as caught:
        convert(sectioned(source, "text_config", model_type="qwen3"))
    assert "qwen3" in caught.value.message


def test_tokens_around_images_that_are_not_there_are_warned_of(source: Path) -> None:
    path = source / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|img_thumbnail|>", "<|thumbnail|>"), encoding="utf-8")
    report = streamconv.convert(source, source / "out.gguf")
    (warning,) = report.warnings
    assert warning.code == "tokens-missing" and "<|img_thumbnail|>" in warning.message


def test_the_way_out_of_a_projector_that_f16_cannot_hold_is_its_own_option(source: Path) -> None:
    tensors = dict(tiny.tensors_of(source))
    name = f"{PROJECTOR}linear_1.weight"
    tensors[name] = tiny.Tensor.of(np.full(tensors[name].shape, 1e6, np.float32), "BF16")
    rewritten(source, tensors)
    with raises(SourceError, code="value-range") as caught:
        streamconv.convert(source, source / "out.gguf", outtype="q4_k_m")
    assert "--mmproj-outtype" in str(caught.value.hint)
    assert not list(source.glob("*.gguf"))
    streamconv.convert(source, source / "out.gguf", outtype="q4_k_m", mmproj_outtype="bf16")


# ---------------------------------------------------------------- adapters

EYES = "model.vision_tower."  # as PEFT names it, on a model of transformers 5
TEXT_Q = "model.language_model.layers.1.self_attn.q_proj"
SEEN = {
    f"{EYES}encoder.layers.0.self_attn.q_proj": ((96, 96), "v.blk.0.attn_q.weight"),
    f"{EYES}encoder.layers.2.mlp.fc2": ((96, 176), "v.blk.2.ffn_down.weight"),
    f"{EYES}embeddings.patch_embedding": ((96, 768), "v.patch_embd.weight"),
    "model.multi_modal_projector.linear_1": ((192, 384), "mm.1.weight"),
}


def adapter(folder: Path, modules: dict[str, tuple[int, int]], **more: tiny.Tensor) -> Path:
    tensors = dict(more)
    for module, shape in modules.items():
        tensors |= loras.factors(module, *shape)
    return loras.write(folder, tensors)


def test_adapters_of_both_halves_are_merged_into_both_files(made: Path, tmp_path: Path) -> None:
    bias = {"base_model.model.model.multi_modal_projector.linear_2.bias": tiny.Tensor.of(np.arange(256.0), "F32")}
    folder = adapter(tmp_path / "a", {TEXT_Q: (256, 256)} | {name: shape for name, (shape, _) in SEEN.items()}, **bias)
    streamconv.convert(made, tmp_path / "plain.gguf", outtype="f32")
    report = streamconv.convert(made, tmp_path / "out.gguf", outtype="f32", adapters=[folder], verify=True)
    assert report.adapters == (str(folder),)
    change = deltas.trained(folder, lambda module: 1.5)
    for name, changed in (("", {TEXT_Q: "blk.1.attn_q.weight"}), ("mmproj-", {m: t for m, (_, t) in SEEN.items()})):
        before, after = ggufs.read(tmp_path / f"{name}plain.gguf"), ggufs.read(tmp_path / f"{name}out.gguf")
        expected = {target: module for module, target in changed.items()}
        for target in before.tensors:
            if target == "mm.2.bias":
                np.testing.assert_array_equal(after.float64(target), np.arange(256.0))
                continue
            ours = after.float64(target) - before.float64(target)
            if target not in expected:
                assert not ours.any(), target
                continue
            delta = change[expected[target]]
            if target == "v.patch_embd.weight":
                delta = delta.reshape(96, 16, 16, 3).transpose(0, 3, 1, 2)
            np.testing.assert_allclose(ours, delta, rtol=0, atol=2e-6 * np.abs(delta).max(), err_msg=target)
    for name in ("out.gguf", "mmproj-out.gguf"):
        assert streamconv.verify(tmp_path / name, made, adapters=[folder]).verified
        with raises(VerifyError, code="value-differs"):
            streamconv.verify(tmp_path / name, made)


def test_an_adapter_of_the_tower_alone_leaves_the_text_as_it_is(made: Path, tmp_path: Path) -> None:
    name, (shape, target) = next(iter(SEEN.items()))
    folder = adapter(tmp_path / "a", {name: shape})
    streamconv.convert(made, tmp_path / "plain.gguf", outtype="f32")
    streamconv.convert(made, tmp_path / "out.gguf", outtype="f32", adapters=[(folder, 0.5)])
    text, plain = ggufs.read(tmp_path / "out.gguf"), ggufs.read(tmp_path / "plain.gguf")
    assert {n: t.sha256 for n, t in text.tensors.items()} == {n: t.sha256 for n, t in plain.tensors.items()}
    mmproj, before = ggufs.read(tmp_path / "mmproj-out.gguf"), ggufs.read(tmp_path / "mmproj-plain.gguf")
    delta = 0.5 * deltas.trained(folder, lambda module: 1.5)[name]
    ours = mmproj.float64(target) - before.float64(target)
    np.testing.assert_allclose(ours, delta, rtol=0, atol=2e-6 * np.abs(delta).max())
    report = streamconv.convert(made, tmp_path / "text.gguf", outtype="f32", adapters=[folder], no_mmproj=True)
    assert {warning.code for warning in report.warnings} == {"adapter-in-part"}


def test_what_is_wrong_with_an_adapter_of_the_tower_is_said(made: Path, tmp_path: Path) -> None:
    name = f"{EYES}encoder.layers.0.self_attn.q_proj"
    for shape, code in (((96, 112), "shape"), ((100, 96), "shape")):
        with raises(SourceError, code=code):
            streamconv.convert(made, tmp_path / "out.gguf", adapters=[adapter(tmp_path / code, {name: shape})])
    table = f"base_model.model.{EYES}embeddings.position_embedding.lora_embedding_"  # PEFT's, of a table
    factors = {f"{table}A": loras.noise("a", (8, 256)), f"{table}B": loras.noise("b", (96, 8))}
    with raises(SourceError, code="shape"):
        streamconv.convert(made, tmp_path / "out.gguf", adapters=[loras.write(tmp_path / "t", factors)])
    assert files(tmp_path) == set()


def test_a_projector_that_an_adapter_says_it_has_must_be_there(made: Path, tmp_path: Path) -> None:
    saved = {"modules_to_save": ["multi_modal_projector"]}
    text = loras.write(tmp_path / "a", loras.factors(TEXT_Q, 256, 256), loras.PEFT | saved)
    with raises(SourceError, code="module-unsaved"):
        streamconv.convert(made, tmp_path / "out.gguf", adapters=[text])
    assert files(tmp_path) == set()


@pytest.mark.parametrize("base", ["folder", "gguf"])
def test_an_adapter_of_the_text_model_becomes_a_gguf(made: Path, tmp_path: Path, base: str) -> None:
    folder = adapter(tmp_path / "a", {TEXT_Q: (256, 256)})
    streamconv.convert(made, tmp_path / "out.gguf", outtype="f32")
    of = made if base == "folder" else tmp_path / "out.gguf"
    streamconv.convert_adapter(folder, of, tmp_path / "lora.gguf", verify=True)
    assert set(ggufs.read(tmp_path / "lora.gguf").tensors) == {
        "blk.1.attn_q.weight.lora_a", "blk.1.attn_q.weight.lora_b"
    }  # fmt: skip
    both = adapter(tmp_path / "b", {TEXT_Q: (256, 256), f"{EYES}encoder.layers.0.mlp.fc1": (176, 96)})
    with raises(SourceError, code="other-output" if base == "folder" else "no-module"):
        streamconv.convert_adapter(both, of, tmp_path / "both.gguf")


# ---------------------------------------------------------------- one job


def test_ollama_gets_the_projector_as_a_second_line(made: Path, tmp_path: Path) -> None:
    (tmp_path / "eyes").mkdir()
    streamconv.convert(made, tmp_path / "out.gguf", mmproj=tmp_path / "eyes" / "m.gguf", modelfile=True)
    lines = (tmp_path / "out.Modelfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("FROM")] == ["FROM ./out.gguf", "FROM ./eyes/m.gguf"]


def test_a_batch_names_the_projector_after_each_output(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(f'[[job]]\nsource = "{made}"\noutput = "{{name}}-{{outtype}}.gguf"\nouttype = ["q8_0", "q4_k_m"]\n')
    for status in ("done", "skipped"):
        assert main(["batch", str(jobs), "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["status"] for line in lines if "status" in line] == [status] * 2
    assert files(tmp_path) == {
        f"{kind}LFM2-VL-450M-{outtype}.gguf" for kind in ("", "mmproj-") for outtype in ("q8_0", "q4_k_m")
    }
    projector = tmp_path / "mmproj-LFM2-VL-450M-q8_0.gguf"
    before = projector.read_bytes()
    projector.unlink()
    assert main(["batch", str(jobs), "--json"]) == 0  # one of two is missing, and the other is as it was written
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["status"] for line in lines if "status" in line} == {"skipped", "done"}
    assert projector.read_bytes() == before
