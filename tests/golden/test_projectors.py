"""The projector files of vision models beside llama.cpp's: tensors, keys, and what the runtime sees through them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import streamconv
from tests import cases, families, tiny
from tests.families.table import FAMILIES
from tests.oracles import ggufs, runtime

NAMES = [name for name, family in FAMILIES.items() if family.has_projector]
KL = 2e-6  # from transformers, whose GELU in the projector is the exact one


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sources")

    def source(name: str) -> Path:
        return root / name if (root / name).exists() else families.checkpoint(name, root / name)

    return source


def projector(source: Path, folder: Path, outtype: str) -> Path:
    report = streamconv.convert(source, folder / "out.gguf", outtype=outtype)
    assert [one.role for one in report.outputs] == ["model", "mmproj"]
    return folder / "mmproj-out.gguf"


@pytest.mark.parametrize("outtype", cases.OUTTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_llama_cpps(sources: Callable[[str], Path], tmp_path: Path, name: str, outtype: str) -> None:
    ours = ggufs.read(projector(sources(name), tmp_path, outtype))
    assert ggufs.tensor_faults(ours, families.projector(name, outtype)) == []
    assert ggufs.layout_faults(ours.path) == []


@pytest.mark.parametrize("outtype", cases.OUTTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_keys_are_llama_cpps(sources: Callable[[str], Path], tmp_path: Path, name: str, outtype: str) -> None:
    ours, golden = ggufs.read(projector(sources(name), tmp_path, outtype)), families.projector(name, outtype)
    for key in FAMILIES[name].wrong_keys:
        del golden["kv"][key]
        assert key in ours.keys
    mine = ours.golden()["kv"]
    assert {key: mine.get(key) for key in golden["kv"]} == golden["kv"]
    assert {key for key in mine if key.startswith("clip.")} <= golden["kv"].keys() | FAMILIES[name].wrong_keys.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_runtime_sees_what_it_does_with_llama_cpps(
    sources: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    mmproj = projector(sources(name), tmp_path, "f32")
    seen = families.see(tmp_path / "out.gguf", mmproj)
    theirs = families.image_logprobs(name)
    assert runtime.kl(theirs, seen) < 1e-12
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3  # it does see
    assert families.record(name)["image_kl"] < KL


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_makes_the_same_files(sources: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Liquid's names, those of transformers 5, mlx-vlm's, and those of a model saved by AutoModel."""
    made = projector(sources(name), tmp_path, "bf16").read_bytes()
    text = (tmp_path / "out.gguf").read_bytes()
    spellings: dict[str, Callable[[str], str]] = {
        "transformers": lambda tensor: tensor.replace("vision_tower.vision_model.", "vision_tower."),
        "mlx": lambda tensor: (
            tensor.replace("vision_tower.vision_model.", "vision_tower.")
            .replace("model.language_model.", "language_model.model.")
            .removeprefix("model.")
        ),
        "body": lambda tensor: tensor.removeprefix("model."),
        "wrapped": lambda tensor: f"_orig_mod.{tensor}",
    }
    for spelling, rename in spellings.items():
        folder = tmp_path / spelling / name
        folder.mkdir(parents=True)
        for file in sources(name).iterdir():
            if file.suffix != ".safetensors":
                os.link(file, folder / file.name)
        tensors = {rename(tensor): value for tensor, value in tiny.tensors_of(sources(name)).items()}
        tiny.write_safetensors(folder / "model.safetensors", tensors)
        assert projector(folder, folder, "bf16").read_bytes() == made, spelling
        assert (folder / "out.gguf").read_bytes() == text, spelling
