"""Where models lie as people have them: Hugging Face's cache, repo ids, single files; nothing is downloaded."""

from __future__ import annotations

import builtins
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from gguf import GGUFReader

import streamconv
from streamconv.errors import SourceError
from streamconv.inspect import inspect
from streamconv.sources import find_source, model_name
from tests import tiny

REVISION = "0123456789abcdef0123456789abcdef01234567"


def cache(root: Path, repo_id: str, built: Path, revision: str = REVISION) -> Path:
    """The files of `built` as huggingface_hub caches them: blobs, and a snapshot of symbolic links to them."""
    entry = root / f"models--{repo_id.replace('/', '--')}"
    snapshot = entry / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir(exist_ok=True)
    (entry / "refs" / "main").write_text(revision)
    (entry / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(built.iterdir())):
        blob = entry / "blobs" / f"{revision[:4]}{number:036x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def name_of(path: Path) -> str:
    return str(GGUFReader(path).fields["general.name"].contents())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that huggingface_hub looks into, and no network at all."""

    def refused(*arguments: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def snapshot(hub: Path, tmp_path: Path) -> Path:
    return cache(hub, "some-owner/Tiny-LFM-2B-it", tiny.lfm2(tmp_path / "built", n_shards=2))


@pytest.mark.parametrize("given", ["snapshot", "entry", "repo id"])
def test_a_cache_entry_is_named_after_its_repo(tmp_path: Path, hub: Path, snapshot: Path, given: str) -> None:
    src = {"snapshot": snapshot, "entry": snapshot.parents[1], "repo id": "some-owner/Tiny-LFM-2B-it"}[given]
    assert find_source(src) == snapshot
    report = streamconv.convert(src)
    plain = streamconv.convert(tmp_path / "built", tmp_path / "plain.gguf")
    assert name_of(report.output) == "Tiny LFM 2B It"
    assert report.output.name.startswith("Tiny")
    assert REVISION not in report.output.read_bytes().decode("latin-1")
    ours, theirs = GGUFReader(report.output), GGUFReader(plain.output)
    assert all((a.data == b.data).all() for a, b in zip(ours.tensors, theirs.tensors, strict=True))
    assert streamconv.verify(report.output, src).verified


def test_the_revision_that_main_names(hub: Path, snapshot: Path, tmp_path: Path) -> None:
    entry = snapshot.parents[1]
    cache(hub, "some-owner/Tiny-LFM-2B-it", tiny.lfm2(tmp_path / "newer", seed=9), revision="f" * 40)
    assert find_source(entry) == entry / "snapshots" / ("f" * 40)
    (entry / "refs" / "main").write_text(REVISION + "\n")
    assert find_source(entry) == snapshot


def test_adapters_and_bases_by_repo_id(tmp_path: Path, hub: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    cache(hub, "owner/base", base)
    cache(hub, "owner/my-lora", tiny.peft_adapter(tmp_path / "adapter", base))
    report = streamconv.convert_adapter("owner/my-lora", "owner/base", tmp_path / "a.gguf")
    plain = streamconv.convert_adapter(tmp_path / "adapter", base, tmp_path / "b.gguf")
    ours, theirs = GGUFReader(report.output), GGUFReader(plain.output)
    assert all((a.data == b.data).all() for a, b in zip(ours.tensors, theirs.tensors, strict=True))
    assert name_of(report.output) == "My Lora"
    assert streamconv.verify(report.output, "owner/my-lora", base="owner/base").verified
    assert inspect("owner/my-lora").kind == "adapter"
    assert inspect("owner/base").kind == "checkpoint"


def test_a_repo_that_is_not_cached_is_not_downloaded(hub: Path) -> None:
    with pytest.raises(SourceError) as caught:
        streamconv.convert("owner/missing")
    with pytest.raises(SourceError, match="not in the local Hugging Face cache"):
        streamconv.convert("owner/no--id")
    assert str(caught.value) == (
        "owner/missing: no such folder, and not in the local Hugging Face cache"
        " (hf download owner/missing; nothing is downloaded here)"
    )


def test_without_the_extra_a_repo_id_says_what_it_needs(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SourceError, match=r'pip install "streamconv\[hub\]"'):
        streamconv.convert("owner/missing")


def test_a_path_that_exists_is_no_repo_id(hub: Path, snapshot: Path, tmp_path: Path) -> None:
    here = tiny.llama(tmp_path / "some-owner" / "Tiny-LFM-2B-it")
    assert find_source("some-owner/Tiny-LFM-2B-it").absolute() == here


def test_a_single_file_with_its_config_beside_it(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "Some-Model")
    whole = streamconv.convert(source, tmp_path / "whole.gguf")
    (source / "model.safetensors").rename(source / "weights.safetensors")
    single = streamconv.convert(source / "weights.safetensors", tmp_path / "single.gguf")
    assert single.output.read_bytes() == whole.output.read_bytes()
    (source / "config.json").unlink()
    with pytest.raises(SourceError, match=r"no config\.json"):
        streamconv.convert(source / "weights.safetensors", tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/LFM2-1.2B", "LFM2-1.2B"),
        ("models/LFM2-1.2B/", "LFM2-1.2B"),
        (f"hub/models--LiquidAI--LFM2-1.2B/snapshots/{REVISION}", "LFM2-1.2B"),
        ("hub/models--LiquidAI--LFM2-1.2B", "LFM2-1.2B"),
        ("hub/models--gpt2/snapshots/abc", "abc"),
    ],
)
def test_the_name_of_a_path(path: str, name: str) -> None:
    assert model_name(Path(path)) == name
