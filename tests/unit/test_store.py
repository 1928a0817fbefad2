"""Sources come through stores: what is in none of this machine's folders converts to the same bytes."""

from __future__ import annotations

import ast
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from streamconv import Blob, Identity, SourceError, Store
from streamconv.files.hub import find_source
from streamconv.files.local import LocalStore, has_same_content, local_place
from streamconv.files.store import Buffer, StorePath
from tests import tiny

PACKAGE = Path(streamconv.__file__).parent


class MemoryBlob(Blob):
    """Bytes in memory; their store counts the open ones."""

    def __init__(self, path: StorePath, content: bytes, etag: str) -> None:
        assert isinstance(path.store, MemoryStore)
        self.path, self.nbytes, self.identity = path, len(content), Identity(etag)
        self.content, self.store = content, path.store
        self.is_open = True
        self.store.n_open += 1

    def close(self) -> None:
        self.store.n_open -= self.is_open
        self.is_open = False

    def read_into(self, offset: int, buffer: Buffer) -> None:
        view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
        if offset + len(view) > self.nbytes:
            raise SourceError("ends first", file=self.path)
        assert self.is_open
        view[:] = self.content[offset : offset + len(view)]

    def check_unchanged(self) -> None:
        if Identity(self.store.etag) != self.identity:
            raise SourceError("has another ETag", file=self.path, code="source-changed")


class MemoryStore(Store):
    """The files of a folder, which may then be gone."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.etag, self.n_open = name, "v1", 0
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }

    def names(self, folder: str = "") -> Iterable[str]:
        start = f"{folder}/" if folder else ""
        return {name.removeprefix(start).partition("/")[0] for name in self.files if name.startswith(start)}

    def open(self, name: str) -> MemoryBlob:
        if name not in self.files:
            raise SourceError("there is no such file", file=self.show(name))
        return MemoryBlob(StorePath(self, name), self.files[name], self.etag)


MODELS: dict[str, Any] = {
    "lfm2": tiny.lfm2,
    "lfm2moe": tiny.lfm2moe,
    "llama": tiny.llama,
    "shards": lambda folder: tiny.llama(folder, n_shards=3),
}


def with_everything(folder: Path) -> Path:
    """Beside the model: a card, chat templates in a folder, a generation config."""
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\n---\n# A model\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    return folder


def converted(source: Any, out: Path, **options: Any) -> bytes:
    report = streamconv.convert(source, out, **options)
    assert report.output == out
    return out.read_bytes()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("outtype", ["auto", "q8_0"])
def test_a_model_in_memory(tmp_path: Path, kind: str, outtype: str) -> None:
    folder = with_everything(MODELS[kind](tmp_path / "Some-Model"))
    store = MemoryStore(folder, "Some-Model")
    expected = converted(folder, tmp_path / "local.gguf", outtype=outtype)
    folder.rename(tmp_path / "gone")
    assert converted(store, tmp_path / "memory.gguf", outtype=outtype, verify=True) == expected
    assert b"{{ documents }}" in expected and b"general.license" in expected
    assert streamconv.verify(tmp_path / "local.gguf", store).verified


def test_an_adapter_in_memory(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "my-adapter", base)
    streamconv.convert_adapter(adapter, base, tmp_path / "local.gguf")
    stores = MemoryStore(adapter, "my-adapter"), MemoryStore(base, "base")
    for folder in (adapter, base):
        folder.rename(folder.with_name(f"{folder.name}-gone"))
    streamconv.convert_adapter(*stores, tmp_path / "memory.gguf")
    assert (tmp_path / "memory.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()


def test_an_adapter_for_a_gguf_base_in_memory(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "my-adapter", base)
    gguf = tmp_path / "ggufs" / "base.gguf"
    gguf.parent.mkdir()
    streamconv.convert(base, gguf)
    streamconv.convert_adapter(adapter, gguf, tmp_path / "local.gguf")
    store = MemoryStore(gguf.parent, "ggufs")
    gguf.unlink()
    streamconv.convert_adapter(adapter, StorePath(store, "base.gguf"), tmp_path / "memory.gguf")
    assert (tmp_path / "memory.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
    with pytest.raises(streamconv.UsageError):  # Ollama takes the base from a path
        streamconv.convert_adapter(adapter, StorePath(store, "base.gguf"), tmp_path / "x.gguf", modelfile=True)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merge_in_memory(tmp_path: Path, dora: bool) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "my-adapter", base, dora=dora)
    weight = 1.0 if dora else 0.5
    expected = converted(base, tmp_path / "local.gguf", adapters=[(adapter, weight)], outtype="q8_0")
    stores = MemoryStore(adapter, "my-adapter"), MemoryStore(base, "base")
    for folder in (adapter, base):
        folder.rename(folder.with_name(f"{folder.name}-gone"))
    merged = converted(stores[1], tmp_path / "memory.gguf", adapters=[(stores[0], weight)], outtype="q8_0", verify=True)
    assert merged == expected


# ---------------------------------------------------------------- the other calls


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Callable[[Path], MemoryStore]]:
    """Takes a folder into memory and removes it; in the end, every blob was closed."""
    stores: list[MemoryStore] = []

    def take(folder: Path) -> MemoryStore:
        stores.append(store := MemoryStore(folder, folder.name))
        shutil.rmtree(folder)
        return store

    yield take
    assert not [store.name for store in stores if store.n_open]


Take = Callable[[Path], MemoryStore]


def plain(found: Any) -> Any:
    """An inspection without the place of what was inspected."""
    told = json.loads(json.dumps(found.to_json(), default=str))
    return {key: value for key, value in told.items() if key not in ("path", "source")}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_in_memory_is_inspected_and_listed(tmp_path: Path, in_memory: Take, kind: str) -> None:
    folder = with_everything(MODELS[kind](tmp_path / "Some-Model"))
    listed, inspected = streamconv.quants(folder), plain(streamconv.inspect(folder))
    store = in_memory(folder)
    assert streamconv.quants(store).quants == listed.quants
    assert plain(streamconv.inspect(store)) == inspected


def test_an_adapter_in_memory_is_inspected_and_verified(tmp_path: Path, in_memory: Take) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "my-adapter", base)
    streamconv.convert_adapter(adapter, base, tmp_path / "adapter.gguf")
    merged = tmp_path / "merged.gguf"
    streamconv.convert(base, merged, adapters=[adapter], outtype="bf16")
    inspected, listed = plain(streamconv.inspect(adapter)), streamconv.quants(base, adapters=[adapter])
    base_store, adapter_store = in_memory(base), in_memory(adapter)
    assert plain(streamconv.inspect(adapter_store)) == inspected
    assert streamconv.quants(base_store, adapters=[adapter_store]).quants == listed.quants
    assert streamconv.verify(tmp_path / "adapter.gguf", adapter_store, base=base_store).verified
    assert streamconv.verify(merged, base_store, adapters=[adapter_store]).verified


@pytest.mark.parametrize("n_parts", [1, 3])
def test_a_gguf_in_memory_is_quantised_inspected_and_verified(tmp_path: Path, in_memory: Take, n_parts: int) -> None:
    folder = tmp_path / "ggufs"
    folder.mkdir()
    split = streamconv.SplitOptions(max_tensors=8) if n_parts > 1 else None
    outputs = streamconv.convert(
        tiny.llama(tmp_path / "src", hidden=256), folder / "base.gguf", outtype="bf16", split=split
    ).outputs
    assert (len(outputs) > 1) == (n_parts > 1)
    first = outputs[0].path
    listed = streamconv.quants(first).quants
    matrix = tmp_path / "imatrix"
    matrix.mkdir()
    (matrix / "importance.dat").write_bytes(importance_of(first))
    options: dict[str, Any] = {"outtype": "q4_k_m"}
    streamconv.quantize(first, tmp_path / "local.gguf", imatrix=matrix / "importance.dat", **options)
    inspected = plain(streamconv.inspect(first))
    place = StorePath(in_memory(folder), first.name)
    imatrix = StorePath(in_memory(matrix), "importance.dat")
    streamconv.quantize(place, tmp_path / "memory.gguf", imatrix=imatrix, verify=True, **options)
    assert (tmp_path / "memory.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
    assert streamconv.verify(tmp_path / "local.gguf", place, imatrix=imatrix).verified
    assert plain(streamconv.inspect(place)) == inspected and streamconv.quants(place).quants == listed


def importance_of(gguf: Path) -> bytes:
    """An importance matrix, in the older format, for each matrix of a GGUF."""
    entries = []
    for row in streamconv.inspect(gguf).tensors:
        if len(row.shape) == 2:
            name, values = row.name.encode(), tiny.noise(row.name, (row.shape[-1],), 1.0) ** 2
            entries.append(
                struct.pack("<i", len(name))
                + name
                + struct.pack("<ii", 1, len(values))
                + values.astype("<f4").tobytes()
            )
    return struct.pack("<i", len(entries)) + b"".join(entries)


def test_what_a_store_lacks_is_named(tmp_path: Path) -> None:
    store = MemoryStore(tiny.lfm2(tmp_path / "src"), "Some-Model")
    del store.files["tokenizer.json"]
    with pytest.raises(SourceError) as caught:
        streamconv.convert(store, tmp_path / "out.gguf")
    assert caught.value.file == "Some-Model"
    assert streamconv.inspect(store).problems[0].file.name == "Some-Model"


def test_another_etag_is_another_source(tmp_path: Path) -> None:
    """The chunk that was read of it is not written."""
    store = MemoryStore(tiny.lfm2(tmp_path / "src"), "Some-Model")

    def change(done: int, total: int) -> None:
        store.etag = "v2"

    with pytest.raises(SourceError) as caught:
        streamconv.convert(store, tmp_path / "out.gguf", progress=change)
    assert caught.value.code == "source-changed" and not (tmp_path / "out.gguf").exists()


def test_a_folder_is_a_store(tmp_path: Path) -> None:
    folder = tiny.lfm2(tmp_path / "src")
    store = LocalStore(folder)
    assert set(store.names()) == {path.name for path in folder.iterdir()} and not [*store.names("nowhere")]
    with store.open("config.json") as blob, blob.view(2, 7) as view:
        assert bytes(view) == (folder / "config.json").read_bytes()[2:9] and view.readonly
    assert find_source(str(folder)) == local_place(folder) == StorePath(store)
    assert str(local_place(folder / "config.json")) == str(folder / "config.json")
    assert find_source(store) == StorePath(store)


def test_content_is_compared_to_the_end(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    content = np.random.default_rng(3).integers(0, 256, 200_001, dtype=np.uint8)
    one.write_bytes(content.tobytes())
    other.write_bytes(content.tobytes())
    assert has_same_content(one, other)
    content[-1] ^= 1
    other.write_bytes(content.tobytes())
    assert not has_same_content(one, other)
    other.write_bytes(content[:-1].tobytes())
    assert not has_same_content(one, other)


# ---------------------------------------------------------------- nothing else opens a source

# Modules that open what is not a source: outputs, jobs files, the state of a batch, /proc.
OPENING = {"files.local", "files.hub", "budget", "timing", "checkpoint.library"}  # the last: an anonymous file
OPENING_PACKAGES = {"output", "batch", "cli"}
OPENERS = {"open", "fdopen", "read_text", "read_bytes", "fromfile", "memmap", "loadtxt", "safe_open", "load_file",
           "load_model_card", "load_hf_parameters", "load_generation_config", "mmap", "GGUFReader", "cmp"}  # fmt: skip
CLASSES = {"Checkpoint", "LoraFile", "GGUFFile", "GGUFSet", "ImportanceMatrix"}  # whose `open` takes a place


def opens(tree: ast.AST) -> list[str]:
    """The calls in a module that open a file by a path."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        owner = getattr(getattr(function, "value", None), "id", "")
        if name in OPENERS and owner not in CLASSES:
            found.append(f"line {node.lineno}: {owner}.{name}")
    return found


def test_nothing_else_opens_a_file() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module.partition(".")[0] in OPENING_PACKAGES or module in OPENING | {"files.store"}:
            continue
        if calls := opens(ast.parse(path.read_text(encoding="utf-8"))):
            found[module] = calls
    assert found == {"lazy.scratch": found.get("lazy.scratch")}  # mmap(-1), anonymous memory
    assert len(found["lazy.scratch"]) == 1


def parsers_without_a_ledger(tree: ast.AST) -> list[str]:
    """The calls in a module that parse a source without a ledger to reserve from, or with one that refuses nothing."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "open":
            continue
        if getattr(node.func.value, "id", "") not in CLASSES:
            continue
        given = [*node.args[1:], *(one.value for one in node.keywords if one.arg == "budget")]
        names = {getattr(one, "id", "") for one in given}
        if not given or (
            "unbounded" in {name.id for one in given for name in ast.walk(one) if isinstance(name, ast.Name)}
        ):
            found.append(f"line {node.lineno}: {sorted(names)}")
    return found


def test_whatever_parses_a_source_has_a_ledger() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if calls := parsers_without_a_ledger(ast.parse(path.read_text(encoding="utf-8"))):
            found[path.relative_to(PACKAGE).as_posix()] = len(calls)
    assert found == {"api/run.py": 1}  # the file that was just written, whose header was reserved with its layout


@pytest.mark.parametrize(
    "line", ["GGUFSet.open(p)", "Checkpoint.open(p, budget=unbounded())", "LoraFile.open(source=p)"]
)
def test_a_parser_without_a_ledger_would_be_found(line: str) -> None:
    assert len(parsers_without_a_ledger(ast.parse(line))) == 1
    assert not parsers_without_a_ledger(ast.parse("GGUFSet.open(p, budget)"))


@pytest.mark.parametrize("line", ["open('x')", "path.open()", "os.open(p, 0)", "np.memmap(p)", "p.read_bytes()"])
def test_such_a_call_would_be_found(line: str) -> None:
    assert len(opens(ast.parse(line))) == 1
