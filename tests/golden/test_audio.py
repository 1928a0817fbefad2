"""The files of audio models beside llama.cpp's: text half, encoder and detokenizer, their tensors and keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import streamconv
from tests import audio_cases, cases, tiny
from tests.oracles import ggufs, runtime

NAMES = [*audio_cases.MODELS]
ALL = [(name, outtype) for name in NAMES for outtype in cases.OUTTYPES]

# From llama.cpp's folded batch norms: torch's square root is off by a bit, and of a source in F16 it folds in F16.
NORM_DISTANCE = {"lfm2_5-audio": 2.0**-21, "lfm2-audio": 2.0**-9}
KL = {"lfm2_5-audio": 1e-11, "lfm2-audio": 1e-5}  # of what the runtime predicts, from what it does with llama.cpp's


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sources")

    def source(name: str) -> Path:
        return root / name if (root / name).exists() else audio_cases.MODELS[name](root / name)

    return source


def converted(source: Path, folder: Path, outtype: str) -> dict[str, ggufs.Gguf]:
    """The files of a model, by role."""
    report = streamconv.convert(source, folder / "out.gguf", outtype=outtype)
    return {one.role: ggufs.read(one.path) for one in report.outputs}


@pytest.mark.parametrize("name", NAMES)
def test_the_models_are_those_of_the_references(sources: Callable[[str], Path], name: str) -> None:
    assert tiny.digest(sources(name)) == audio_cases.record()[name]["digest"]


@pytest.mark.parametrize(("name", "outtype"), ALL)
def test_tensors_and_keys_are_llama_cpps(
    sources: Callable[[str], Path], tmp_path: Path, name: str, outtype: str
) -> None:
    files = converted(sources(name), tmp_path, outtype)
    assert [*files] == [role for role in audio_cases.ROLES if role in audio_cases.record()[name]]
    for role, ours in files.items():
        golden = audio_cases.golden(name, role, outtype)
        faults = [
            fault
            for fault in ggufs.tensor_faults(ours, golden)
            if ".conv_norm." not in fault.split(":")[0] or "only in" in fault
        ]
        assert (role, faults) == (role, [])
        assert (role, ggufs.key_faults(ours, golden)) == (role, [])
        assert golden["kv"].keys() - ours.keys.keys() == set()
        assert {key for key in ours.keys if key.startswith("clip.")} <= golden["kv"].keys()
        assert ggufs.layout_faults(ours.path) == []


@pytest.mark.parametrize("name", NAMES)
def test_batch_norms_are_folded_in_f32(sources: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    mmproj = converted(sources(name), tmp_path, "bf16")["mmproj"]
    stored = tiny.tensors_of(sources(name))
    for i in range(audio_cases.N_LAYERS):
        weight, bias, mean, variance = (
            stored[f"conformer.layers.{i}.conv.batch_norm.{part}"].float32()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + np.float32(1e-5))
        assert scale.dtype == np.float32
        np.testing.assert_array_equal(mmproj.float64(f"a.blk.{i}.conv_norm.weight"), scale)
        np.testing.assert_array_equal(mmproj.float64(f"a.blk.{i}.conv_norm.bias"), bias - mean * scale)
        their_scale, their_shift = audio_cases.norms(name)[i]
        assert (abs(scale - their_scale) <= NORM_DISTANCE[name] * abs(scale)).all()
        terms = abs(bias) + abs(mean * scale)
        assert (abs(bias - mean * scale - their_shift) <= NORM_DISTANCE[name] * terms).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_runtime_hears_what_it_does_with_llama_cpps(
    sources: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    streamconv.convert(sources(name), tmp_path / "out.gguf", outtype="f32")
    files = (tmp_path / "out.gguf", tmp_path / "mmproj-out.gguf")
    heard = audio_cases.hear(*files, audio_cases.sound())
    assert runtime.kl(audio_cases.heard(name), heard) < KL[name]
    assert runtime.kl(audio_cases.hear(*files, audio_cases.sound(660)), heard) > 1e-6  # it does hear
