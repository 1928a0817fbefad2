"""Where models lie as people have them: Hugging Face's cache, repo ids, single files; nothing is downloaded."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

import streamconv
from streamconv.api.inspect_file import inspect
from streamconv.cli import main
from streamconv.errors import SourceError
from streamconv.files.hub import find_path, model_name
from tests import tiny
from tests.raising import raises

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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def snapshot(hub: Path, tmp_path: Path) -> Path:
    return cache(hub, "some-owner/Tiny-LFM-2B-it", tiny.lfm2(tmp_path / "built", n_shards=2))


@pytest.mark.parametrize("given", ["snapshot", "entry", "repo id"])
def test_a_cache_entry_is_named_after_its_repo(tmp_path: Path, hub: Path, snapshot: Path, given: str) -> None:
    src = {"snapshot": snapshot, "entry": snapshot.parents[1], "repo id": "some-owner/Tiny-LFM-2B-it"}[given]
    assert find_path(src) == snapshot
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
    assert find_path(entry) == entry / "snapshots" / ("f" * 40)
    (entry / "refs" / "main").write_text(REVISION + "\n")
    assert find_path(entry) == snapshot


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
    with pytest.raises(SourceError) as caught:
        streamconv.convert("owner/missing")
    assert caught.value.code == "source-missing"
    assert "pip install huggingface_hub" in str(caught.value.hint)
    assert "hf download owner/missing" in str(caught.value.hint)


@pytest.mark.parametrize("main", [b"\xff\xfe", b"../../../somewhere", b"a\0b", b"x" * 5000, b""])
def test_a_cache_entry_whose_main_is_no_revision(snapshot: Path, main: bytes) -> None:
    entry = snapshot.parents[1]
    (entry / "refs" / "main").write_bytes(main)
    assert find_path(entry) == snapshot


@pytest.mark.parametrize("name", ["models/nope.gguf", "models/nope.safetensors"])
def test_a_mistyped_file_is_no_repo_id(hub: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "models").mkdir()
    assert find_path(name) == Path(name)
    with pytest.raises(SourceError, match="no such") as caught:
        streamconv.convert(name)
    assert "Hugging Face" not in str(caught.value)


WAYS: dict[str, Callable[[Path, Path, Path], object]] = {
    "convert": lambda at, model, adapter: streamconv.convert(at),
    "lora": lambda at, model, adapter: streamconv.convert_adapter(at, model),
    "lora's base": lambda at, model, adapter: streamconv.convert_adapter(adapter, at),
    "merge": lambda at, model, adapter: streamconv.convert(model, adapters=[str(at)]),
    "inspect": lambda at, model, adapter: inspect(at),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_name_that_no_filesystem_takes(tmp_path: Path, way: str) -> None:
    model = tiny.llama(tmp_path / "model")
    adapter = tiny.peft_adapter(tmp_path / "adapter", model)
    with raises(SourceError, code="cannot-read"):
        WAYS[way](tmp_path / ("n" * 300), model, adapter)


def forbid(monkeypatch: pytest.MonkeyPatch, is_closed: Callable[[Path], bool]) -> None:
    """What a folder of somebody else is to all but root: nothing in it can be looked at."""

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **keywords: Any) -> Any:
            if isinstance(path, str | Path) and is_closed(Path(path)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *rest, **keywords)

        return call

    monkeypatch.setattr(os, "stat", watched(os.stat))
    monkeypatch.setattr(os, "open", watched(os.open))


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_that_may_not_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    model = tiny.llama(tmp_path / "model")
    adapter = tiny.peft_adapter(tmp_path / "adapter", model)
    locked = shutil.copytree(adapter if way in ("lora", "merge") else model, tmp_path / "locked")
    forbid(monkeypatch, lambda path: path.parent == locked)
    with raises(SourceError, code="cannot-read"):
        WAYS[way](locked, model, adapter)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer.model"])
def test_a_link_into_a_folder_that_may_not_be_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = tiny.llama(tmp_path / "model")
    forbid(monkeypatch, lambda path: path == model / name)
    with pytest.raises(SourceError, match=f"{name}: cannot be (read|opened): Permission denied"):
        streamconv.convert(model, tmp_path / "x.gguf")


def test_a_path_that_exists_is_no_repo_id(hub: Path, snapshot: Path, tmp_path: Path) -> None:
    here = tiny.llama(tmp_path / "some-owner" / "Tiny-LFM-2B-it")
    assert find_path("some-owner/Tiny-LFM-2B-it").absolute() == here


def test_a_single_file_with_its_config_beside_it(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "Some-Model")
    whole = streamconv.convert(source, tmp_path / "whole.gguf")
    (source / "model.safetensors").rename(source / "weights.safetensors")
    single = streamconv.convert(source / "weights.safetensors", tmp_path / "single.gguf")
    assert single.output.read_bytes() == whole.output.read_bytes()
    (source / "config.json").unlink()
    with raises(SourceError, code="config-missing"):
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


def test_the_base_that_an_adapter_names_is_found_in_the_cache(tmp_path: Path, hub: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base)
    config = json.loads((adapter / "adapter_config.json").read_text())

    def says(name: str | None) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))

    says("owner/base")
    with raises(SourceError, code="source-missing") as caught:
        streamconv.convert_adapter(adapter, dst=tmp_path / "a.gguf")
    assert "hf download owner/base" in str(caught.value.hint)
    cache(hub, "owner/base", base)
    assert streamconv.convert_adapter(adapter, dst=tmp_path / "a.gguf", verify=True).verified
    assert main(["lora", str(adapter), "-o", str(tmp_path / "b.gguf"), "--quiet"]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert streamconv.verify(tmp_path / "a.gguf", adapter).verified
    jobs = tmp_path / "jobs.toml"
    jobs.write_text('[[job]]\ncommand = "lora"\nsource = "adapter"\noutput = "c.gguf"\n')
    assert main(["batch", str(jobs), "--quiet"]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()
    for name in ("/home/somebody/models/base", "C:\\models\\base", None):
        says(name)
        with raises(SourceError, code="base-missing") as caught:
            streamconv.convert_adapter(adapter, dst=tmp_path / "c.gguf")
        assert name is None or name not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("https://huggingface.co/owner/name", "hf download owner/name"),
        ("https://huggingface.co/owner/name/tree/main", "hf download owner/name"),
        ("huggingface.co/owner/name", "hf download owner/name"),
        ("hf://owner/name", "hf download owner/name"),
        ("https://example.org/model.gguf", "download it first"),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_leads_to_a_download(hub: Path, kind: Callable[[str], str | Path], url: str, hint: str) -> None:
    with raises(SourceError, code="source-remote") as caught:
        streamconv.convert(kind(url))  # type: ignore[arg-type]
    assert str(caught.value.hint).startswith(hint)
