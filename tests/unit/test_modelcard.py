"""What a model card becomes, and that no card can stop a conversion or make it take much memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

import streamconv
from streamconv.errors import UsageError
from streamconv.lazy.dtype import BF16
from streamconv.lazy.node import TensorSpec
from streamconv.metadata.modelcard import MAX_CARD_NBYTES, MAX_FRONT_MATTER_NBYTES, General, read_general
from tests import tiny


def general(directory: Path, card: str) -> General:
    (directory / "README.md").write_text(card, encoding="utf-8")
    return read_general(directory, arch="lfm2", name=None, specs=())


def values(found: General) -> dict[str, object]:
    return {key.key: key.value for key in found.keys}


def test_a_card_is_carried_over(tmp_path: Path) -> None:
    found = general(tmp_path, "---\nmodel_name: Made Model\nlicense: mit\n---\n# Made\n" + "text " * 20_000)
    assert not found.warnings
    assert values(found)["general.name"] == "Made Model"
    assert values(found)["general.license"] == "mit"


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [\n---\n",
        '---\nlicense: "\x1b[31m"\n---\n',
        f"---\ntags: [{'a,' * (MAX_FRONT_MATTER_NBYTES // 2)}a]\n---\n",
        f"---\nlicense: mit\n---\n{'a' * MAX_CARD_NBYTES}",
    ],
    ids=["yaml", "escape", "front-matter", "size"],
)
def test_a_card_that_cannot_be_read_is_a_warning_of_one_line(tmp_path: Path, card: str) -> None:
    found = general(tmp_path, card)
    (warning,) = found.warnings
    assert warning.code == "model-card" and warning.message.isprintable()
    assert values(found)["general.name"] == tmp_path.name


@pytest.mark.parametrize(
    ("base", "name", "stem"),
    [
        ("tiny-llama", None, "Tiny-Llama-0.01K-Sea-Shanties"),
        ("LFM2-1.2B", None, "LFM2-0.01K-Sea-Shanties"),
        ("tiny-llama", "Mine", "Mine-0.01K-Sea-Shanties"),
    ],
)
def test_a_merged_model_is_named_by_its_base_and_adapter(
    tmp_path: Path, base: str, name: str | None, stem: str
) -> None:
    folders = [tmp_path / base, tmp_path / "sea-shanties"]
    for folder in folders:
        folder.mkdir()
    specs = [("token_embd.weight", TensorSpec((3, 2), BF16))]
    found = read_general(folders[0], arch="lfm2", name=name, specs=specs, merged=folders[1:])
    assert found.file_name("bf16") == f"{stem}-BF16.gguf"
    assert values(found)["general.name"] == name or str(values(found)["general.name"]).endswith(" + Sea Shanties")


def test_the_largest_front_matter_takes_little_memory(tmp_path: Path) -> None:
    card = f"---\ntags: [{'a,' * (MAX_FRONT_MATTER_NBYTES // 2 - 20)}a]\n---\n"
    tracemalloc.start()
    try:
        found = general(tmp_path, card)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not found.warnings
    assert peak < 32 << 20


def test_half_a_surrogate_pair_in_a_card_becomes_a_question_mark(tmp_path: Path) -> None:
    found = general(tmp_path, '---\nmodel_name: "a\\ud800"\ntags: ["\\udfff"]\n---\n')
    assert values(found)["general.name"] == "a?"


def test_a_folder_whose_name_is_no_utf8_converts(tmp_path: Path) -> None:
    folder = tiny.lfm2(tmp_path / os.fsdecode(b"raw\xff"))
    assert streamconv.convert(folder, tmp_path / "out.gguf").n_tensors


@pytest.mark.parametrize("option", ["name", "pre"])
def test_an_option_that_is_no_utf8_is_wrong_usage(tmp_path: Path, option: str) -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        streamconv.convert(tmp_path, tmp_path / "out.gguf", **{option: "bad\udcff"})  # type: ignore[arg-type]
