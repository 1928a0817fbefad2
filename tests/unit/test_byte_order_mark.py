"""A byte-order mark at the beginning of a JSON file, as editors on Windows write it, changes nothing."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

import streamconv
from tests import tiny


def mark(folder: Path) -> int:
    files = list(folder.glob("*.json"))
    for path in files:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    return len(files)


@pytest.mark.parametrize("model", ["llama", "lfm2"])
def test_a_marked_checkpoint_gives_the_same_file(tmp_path: Path, model: str) -> None:
    builder = {"llama": tiny.llama, "lfm2": tiny.lfm2}[model]
    folder = builder(tmp_path / "model", n_shards=2)
    generation = folder / "generation_config.json"
    generation.write_text(generation.read_text().replace("{", '{"temperature": 0.25, "top_k": 7,', 1))
    plain = streamconv.convert(folder, tmp_path / "plain.gguf")
    assert mark(folder) == 6
    marked = streamconv.convert(folder, tmp_path / "marked.gguf", verify=True)
    assert marked.output.read_bytes() == plain.output.read_bytes()
    assert [warning.code for warning in marked.warnings] == [warning.code for warning in plain.warnings]


def test_a_marked_adapter_gives_the_same_file(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base)
    plain = streamconv.convert_adapter(adapter, base, tmp_path / "plain.gguf")
    assert mark(adapter) == 1
    marked = streamconv.convert_adapter(adapter, base, tmp_path / "marked.gguf")
    assert marked.output.read_bytes() == plain.output.read_bytes()
