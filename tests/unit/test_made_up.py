"""One file in architectures/ is all that an architecture takes: conversion, verification, adapters, merges, a tower."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import streamconv
import streamconv.architectures
from streamconv.api.inspect_file import inspect
from streamconv.errors import DestinationError, Interrupted, SourceError, UsageError, VerifyError
from streamconv.recipe.registry import all_recipes, own_recipes
from tests import loras, made_up, tiny
from tests.oracles import deltas, ggufs

A = "lora_A.weight"


@pytest.fixture(autouse=True)
def architecture(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one file, where architectures are."""
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "made_up.py").write_text(made_up.MODULE, encoding="utf-8")
    monkeypatch.setattr(streamconv.architectures, "__path__", [*streamconv.architectures.__path__, str(folder)])
    own_recipes.cache_clear()
    yield
    sys.modules.pop("streamconv.architectures.made_up", None)
    own_recipes.cache_clear()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up.build(tmp_path_factory.mktemp("source") / "MadeUp-1B")


def assert_tensors(file: ggufs.Gguf, expected: made_up.Arrays, outtype: str = "f32") -> None:
    assert file.tensors.keys() == expected.keys()
    for name, values in expected.items():
        tensor = file.tensors[name]
        single = values.astype(np.float32)
        assert tensor.shape == values.shape, name
        if tensor.type == "F32":
            np.testing.assert_array_equal(tensor.float64(), single, err_msg=name)
        else:
            assert tensor.type == outtype.upper()
            assert tensor.raw.tobytes() == tiny.Tensor.of(single, tensor.type).data, name


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
def test_it_converts_into_two_files(tmp_path: Path, source: Path, outtype: str) -> None:
    if outtype != "f32":
        source = made_up.build(tmp_path / "source", routed_scale=2.0)
        made = {name: w * 2.0 / made_up.SCALE if "down_exps" in name else w
                for name, w in made_up.targets(made_up.stored(source)).items()}  # fmt: skip
    else:
        made = made_up.targets(made_up.stored(source))
    report = streamconv.convert(source, tmp_path / "out.gguf", outtype=outtype, verify=True)
    assert [(one.path, one.role) for one in report.outputs] == [
        (tmp_path / "out.gguf", "model"), (tmp_path / "mmproj-out.gguf", "mmproj")
    ]  # fmt: skip
    assert report.verified
    model, tower = (ggufs.read(one.path) for one in report.outputs)
    assert_tensors(model, made, outtype)
    assert_tensors(tower, made_up.tower(made_up.stored(source)), outtype)
    assert {tensor.type for name, tensor in model.tensors.items() if "norm" in name or "gate_inp" in name} == {"F32"}
    assert report.n_tensors == len(model.tensors) + len(tower.tensors)
    assert report.nbytes == sum(one.path.stat().st_size for one in report.outputs)


def test_its_keys_are_those_of_each_file(tmp_path: Path, source: Path) -> None:
    streamconv.convert(source, tmp_path / "out.gguf", outtype="f32")
    model, tower = ggufs.read(tmp_path / "out.gguf"), ggufs.read(tmp_path / "mmproj-out.gguf")
    own = {key.removeprefix("made-up."): entry for key, entry in model.keys.items() if key.startswith("made-up.")}
    assert {key: entry.value for key, entry in own.items() if key != "attention.scales"} == {
        "vocab_size": 416, "block_count": 3, "embedding_length": 64, "feed_forward_length": [28, 40, 40],
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 12,
        "rope.dimension_count": 6, "expert_count": 6,
    }  # fmt: skip
    assert own["attention.scales"].type == ("ARRAY", "FLOAT32")
    np.testing.assert_array_equal(own["attention.scales"].value, np.float32([1, 1 / 2, 1 / 3]))
    assert model["general.type"] == "model"
    assert {key: entry.value for key, entry in tower.keys.items() if not key.startswith("general.")} == {
        "clip.has_vision_encoder": True, "made-up-tower.block_count": 5, "made-up-tower.embedding_length": 36,
        "made-up-tower.projection_dim": 64, "made-up-tower.image_token": 7,
    }  # fmt: skip
    assert (tower["general.type"], tower["general.architecture"]) == ("mmproj", "made-up-tower")


def test_names_follow_the_convention(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = streamconv.convert(source, outtype="f32", dry_run=True)
    first, second = (one.path.name for one in report.outputs)
    assert second == f"mmproj-{first}" or second.startswith("mmproj-MadeUp")
    assert report.plan is not None and len(report.plan) == report.n_tensors


def test_either_file_is_verified_against_the_source(tmp_path: Path, source: Path) -> None:
    streamconv.convert(source, tmp_path / "out.gguf", outtype="f32")
    for name, role in (("out.gguf", "model"), ("mmproj-out.gguf", "mmproj")):
        report = streamconv.verify(tmp_path / name, source)
        assert (report.verified, [one.role for one in report.outputs]) == (True, [role])
        data = bytearray((tmp_path / name).read_bytes())
        data[-40] ^= 64
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VerifyError):
            streamconv.verify(tmp_path / name, source)


def test_a_text_half_alone_is_one_file(tmp_path: Path) -> None:
    source = made_up.build(tmp_path / "source", without="model.vision.")
    report = streamconv.convert(source, tmp_path / "out.gguf", outtype="f32")
    assert [one.path.name for one in report.outputs] == ["out.gguf"]
    assert not (tmp_path / "mmproj-out.gguf").exists()


def test_half_a_tower_is_incomplete(tmp_path: Path) -> None:
    source = made_up.build(tmp_path / "source", without="model.vision.blocks.3.")
    with pytest.raises(SourceError, match=r"made-up-tower.*vision\.blocks\.3\.norm\.weight"):
        streamconv.convert(source, tmp_path / "out.gguf", outtype="f32")
    assert not list(tmp_path.glob("*.gguf*"))


# ---------------------------------------------------------------- sealed together


def test_both_files_are_there_or_none(tmp_path: Path, source: Path) -> None:
    (tmp_path / "mmproj-out.gguf").write_bytes(b"somebody else's")
    with pytest.raises(DestinationError):
        streamconv.convert(source, tmp_path / "out.gguf", outtype="f32")
    assert {path.name for path in tmp_path.iterdir()} == {"mmproj-out.gguf"}
    streamconv.convert(source, tmp_path / "out.gguf", outtype="f32", force=True)
    assert ggufs.read(tmp_path / "mmproj-out.gguf")["general.type"] == "mmproj"


def test_a_stopped_run_leaves_no_file_and_goes_on(tmp_path: Path, source: Path) -> None:
    streamconv.convert(source, tmp_path / "whole.gguf", outtype="f32")
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        streamconv.convert(source, tmp_path / "out.gguf", outtype="f32", cancel=lambda: next(asked, True))
    assert not (tmp_path / "out.gguf").exists() and not (tmp_path / "mmproj-out.gguf").exists()
    streamconv.convert(source, tmp_path / "out.gguf", outtype="f32")
    for name in ("", "mmproj-"):
        assert (tmp_path / f"{name}out.gguf").read_bytes() == (tmp_path / f"{name}whole.gguf").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_a_fault_in_the_second_file_keeps_the_first_from_its_name(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(job: object, *args: object, **keywords: object) -> None:
        if getattr(job, "role", "") == "mmproj":
            raise VerifyError("differs", code="tensor-differs")

    monkeypatch.setattr("streamconv.api.run.compare", wrong)
    with pytest.raises(VerifyError):
        streamconv.convert(source, tmp_path / "out.gguf", outtype="f32", verify=True)
    assert not list(tmp_path.glob("*.gguf"))


def test_splits_are_of_the_model_alone(tmp_path: Path, source: Path) -> None:
    split = streamconv.SplitOptions(max_tensors=12)
    report = streamconv.convert(source, tmp_path / "out.gguf", outtype="f32", split=split)
    roles = [one.role for one in report.outputs]
    assert roles == ["model"] * (len(roles) - 1) + ["mmproj"] and len(roles) > 3
    second = streamconv.SplitOptions(max_tensors=12, only_part=2)
    (tmp_path / "one").mkdir()
    report = streamconv.convert(source, tmp_path / "one" / "out.gguf", outtype="f32", split=second)
    assert [one.role for one in report.outputs] == ["model"]


# ---------------------------------------------------------------- adapters

QKV, OUT = "model.text.layers.1.attn.qkv", "model.text.layers.2.attn.out"
DENSE, GATE_UP, DOWN = (
    f"model.text.layers.{name}" for name in ("0.mlp.gate_up", "1.experts.4.gate_up", "2.experts.1.down")
)
MIXER = "model.text.mixers.6.mix"  # beyond the layers of the model's own stack
MODULES = (QKV, OUT, DENSE, MIXER, GATE_UP, DOWN)


def adapter(folder: Path, modules: tuple[str, ...] = MODULES) -> Path:
    tensors: dict[str, tiny.Tensor] = {}
    for module in modules:
        tensors |= loras.factors(module, *made_up.SHAPES[f"{module}.weight"])
    return loras.write(folder, tensors)


def trained(folder: Path, scale: float = 1.5) -> made_up.Arrays:
    """The change of each stored weight."""
    return {f"{module}.weight": change for module, change in deltas.trained(folder, lambda module: scale).items()}


def changes(source: Path, folder: Path) -> made_up.Arrays:
    """By numpy, what changes in the model's file: of whole tensors, those that change at all."""
    before = made_up.stored(source)
    after = before | {name: before[name] + change for name, change in trained(folder).items()}
    pairs = zip(made_up.targets(before).items(), made_up.targets(after).values(), strict=True)
    return {name: new - old for (name, old), new in pairs if (new != old).any()}


@pytest.mark.parametrize("base", ["folder", "gguf"])
def test_an_adapter_goes_where_its_weights_go(tmp_path: Path, source: Path, base: str) -> None:
    modules = MODULES if base == "folder" else MODULES[:-1]  # a GGUF does not say how experts were scaled
    folder = adapter(tmp_path / "adapter", modules)
    if base == "gguf":
        streamconv.convert(source, tmp_path / "base.gguf", outtype="f32")
    of = source if base == "folder" else tmp_path / "base.gguf"
    streamconv.convert_adapter(folder, of, tmp_path / "lora.gguf", verify=True)
    file = ggufs.read(tmp_path / "lora.gguf")
    expected = changes(source, folder)
    assert {name.rpartition(".lora_")[0] for name in file.tensors} == expected.keys()
    assert {name for name in expected if "attn_" in name and "output" not in name} == {
        "blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_v.weight"
    }  # fmt: skip
    for name, change in expected.items():
        a, b = file.float64(f"{name}.lora_a"), file.float64(f"{name}.lora_b")
        ours = file["adapter.lora.alpha"] / a.shape[-2] * (b @ a)
        np.testing.assert_allclose(ours, change, rtol=0, atol=1e-6 * np.abs(change).max(), err_msg=name)


def test_a_gguf_does_not_tell_how_its_experts_were_scaled(tmp_path: Path, source: Path) -> None:
    streamconv.convert(source, tmp_path / "base.gguf", outtype="f32")
    with pytest.raises(SourceError, match="does not record how its experts were scaled"):
        streamconv.convert_adapter(adapter(tmp_path / "a", (DOWN,)), tmp_path / "base.gguf", tmp_path / "lora.gguf")


def test_an_adapter_is_merged(tmp_path: Path, source: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    streamconv.convert(source, tmp_path / "out.gguf", outtype="f32", adapters=[folder], verify=True)
    stored = made_up.stored(source)
    merged = made_up.targets(stored | {name: stored[name] + change for name, change in trained(folder).items()})
    file = ggufs.read(tmp_path / "out.gguf")
    assert file.tensors.keys() == merged.keys()
    changed = changes(source, folder)
    plain = made_up.targets(stored)
    for name, values in merged.items():
        if name in changed:
            np.testing.assert_allclose(file.float64(name), values, rtol=0, atol=1e-6 * np.abs(values).max())
        else:
            np.testing.assert_array_equal(file.float64(name), plain[name].astype(np.float32), err_msg=name)
    assert_tensors(ggufs.read(tmp_path / "mmproj-out.gguf"), made_up.tower(stored))
    streamconv.verify(tmp_path / "out.gguf", source, adapters=[folder])


def test_an_adapter_of_the_tower_is_merged_into_its_file(tmp_path: Path, source: Path) -> None:
    module = "model.vision.blocks.1.up"
    folder = adapter(tmp_path / "adapter", (QKV,))
    tensors = tiny.tensors_of(folder) | loras.factors(module, made_up.P, 2 * made_up.P)
    loras.write(folder, tensors)
    streamconv.convert(source, tmp_path / "out.gguf", outtype="f32", adapters=[folder], verify=True)
    stored = made_up.stored(source)
    merged = stored | {name: stored[name] + change for name, change in trained(folder).items()}
    plain, expected = made_up.tower(stored), made_up.tower(merged)
    file = ggufs.read(tmp_path / "mmproj-out.gguf")
    assert file.tensors.keys() == expected.keys()
    for name, values in expected.items():
        if (values == plain[name]).all():
            np.testing.assert_array_equal(file.float64(name), values.astype(np.float32), err_msg=name)
        else:
            assert name == "v.blk.1.ffn_up.weight"
            np.testing.assert_allclose(file.float64(name), values, rtol=0, atol=1e-6 * np.abs(values).max())
    changed = ggufs.read(tmp_path / "out.gguf").float64("blk.1.attn_v.weight")
    np.testing.assert_allclose(changed, made_up.targets(merged)["blk.1.attn_v.weight"], rtol=0, atol=1e-6)
    streamconv.verify(tmp_path / "mmproj-out.gguf", source, adapters=[folder])
    with pytest.raises(VerifyError):
        streamconv.verify(tmp_path / "mmproj-out.gguf", source)


def test_what_of_an_adapter_no_gguf_adapter_can_carry_is_named(tmp_path: Path, source: Path) -> None:
    folder = loras.write(tmp_path / "a", loras.factors("model.vision.blocks.1.up", made_up.P, 2 * made_up.P))
    with pytest.raises(SourceError, match=r"model\.vision\.blocks\.1\.up") as caught:
        streamconv.convert_adapter(folder, source, tmp_path / "lora.gguf")
    assert [problem["code"] for problem in caught.value.problems] == ["other-output"]
    assert "--adapter" in str(caught.value.hint)
    strange = loras.write(tmp_path / "b", loras.factors("model.vision.blocks.9.up", made_up.P, 2 * made_up.P))
    with pytest.raises(SourceError, match=r"vision\.blocks\.9\.up"):
        streamconv.convert(source, tmp_path / "out.gguf", adapters=[strange])
    assert not list(tmp_path.glob("*.gguf"))


# ---------------------------------------------------------------- what config and types rule out


def test_a_factor_that_a_type_would_round_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(SourceError) as caught:
        streamconv.convert(source, tmp_path / "out.gguf", outtype="bf16")
    assert caught.value.code == "inexact-type"


def test_config_and_tensors_must_agree(tmp_path: Path) -> None:
    source = made_up.build(tmp_path / "source", kv_heads=4)
    with pytest.raises(SourceError, match=r"has shape \[96, 64\], expected \[144, 64\] from heads=4, kv_heads=4"):
        streamconv.convert(source, tmp_path / "out.gguf")


def test_what_the_config_leaves_open_follows(tmp_path: Path, source: Path) -> None:
    open_source = made_up.build(tmp_path / "source", kv_heads=None, head_dim=12, n_layer=None, experts=None)
    streamconv.convert(open_source, tmp_path / "out.gguf", outtype="f32")
    assert_tensors(ggufs.read(tmp_path / "out.gguf"), made_up.targets(made_up.stored(source)))


def test_inspect_and_the_list_know_it(source: Path) -> None:
    assert inspect(source).architecture == "made-up"
    assert "made-up" in [recipe.arch for recipe in all_recipes()]


def test_options_of_adapters_are_not_for_towers(tmp_path: Path, source: Path) -> None:
    streamconv.convert(source, tmp_path / "out.gguf", outtype="f32")
    with pytest.raises(UsageError):
        streamconv.verify(tmp_path / "mmproj-out.gguf", source, base=source)
