"""What is found, what is refused, and what is noticed while a checkpoint is read."""

from __future__ import annotations

import json
import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from streamconv.budget import Budget
from streamconv.checkpoint import library
from streamconv.checkpoint.folder import INDEX, Checkpoint
from streamconv.checkpoint.safetensors import Shard
from streamconv.errors import BudgetError, SourceError
from streamconv.files.strict_json import objects_nbytes
from tests.raising import raises

RNG = np.random.default_rng(20)


def raw_shard(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], first: int, last: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards with an index: a.weight [3, 5] and b.weight [7, 2]."""
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    arrays = {"a.weight": RNG.standard_normal((3, 5)), "b.weight": RNG.standard_normal((7, 2))}
    for number, (name, array) in enumerate(arrays.items(), start=1):
        save_file({name: array.astype(np.float32)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    weight_map = {name: f"model-0000{n}-of-00002.safetensors" for n, name in enumerate(arrays, start=1)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_an_indexed_checkpoint(checkpoint: Path) -> None:
    with Checkpoint.open(checkpoint) as found:
        assert {name: (t.dtype, t.shape) for name, t in found.tensors.items()} == {
            "a.weight": ("F32", (3, 5)),
            "b.weight": ("F32", (7, 2)),
        }
        assert len(found.shards) == 2


def test_numbered_shards_without_an_index(checkpoint: Path) -> None:
    (checkpoint / INDEX).unlink()
    with Checkpoint.open(checkpoint) as found:
        assert len(found.tensors) == 2


def test_a_single_file_with_its_config_beside_it(checkpoint: Path) -> None:
    for name in ("other.safetensors", "model-00001-of-00001.safetensors"):
        (checkpoint / "model-00002-of-00002.safetensors").rename(checkpoint / name)
        with Checkpoint.open(checkpoint / name) as found:
            assert list(found.tensors) == ["b.weight"]
            assert found.config.raw == {"architectures": ["X"]}
        (checkpoint / name).rename(checkpoint / "model-00002-of-00002.safetensors")


def test_one_shard_of_several_is_no_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(SourceError) as caught:
        Checkpoint.open(checkpoint / "model-00002-of-00002.safetensors")
    assert caught.value.code == "one-shard"


def test_shards_behind_links(checkpoint: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.json")]:
        (linked / path.name).symlink_to(path)
    with Checkpoint.open(linked) as found:
        assert len(found.tensors) == 2


def test_bytes_are_read_where_they_lie(checkpoint: Path) -> None:
    with Checkpoint.open(checkpoint) as found:
        tensor = found.tensors["b.weight"]
        out = np.empty(8, dtype=np.uint8)
        tensor.shard.read_into(tensor.offset + 16, out)
        stored = (checkpoint / "model-00002-of-00002.safetensors").read_bytes()
        assert out.tobytes() == stored[-7 * 2 * 4 :][16:24]


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        index = json.loads((checkpoint / INDEX).read_text())
        change(index["weight_map"])
        (checkpoint / INDEX).write_text(json.dumps(index))

    return edit


def clear(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        path.unlink()


def only_pickles(checkpoint: Path) -> None:
    for path in [*checkpoint.glob("*.safetensors"), checkpoint / INDEX]:
        path.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def cut_first_shard(checkpoint: Path) -> None:
    truncate(checkpoint / "model-00001-of-00002.safetensors")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 7\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (clear, "config-missing"),
        (lambda c: (c / "config.json").unlink(), "config-missing"),
        (lambda c: (c / "config.json").write_text("{"), "json-malformed"),
        (lambda c: (c / "config.json").write_text('{"a": 1, "a": 2}'), "json-malformed"),
        (lambda c: (c / "config.json").write_text('{"a": NaN}'), "json-malformed"),
        (
            lambda c: (c / "config.json").write_bytes(LFS_POINTER),
            "other-file-kind",
        ),
        (lambda c: (c / INDEX).write_text("Entry not found"), "other-file-kind"),
        (lambda c: (c / "config.json").write_bytes(b"\x1f\x8b\x08"), "other-file-kind"),
        (lambda c: (c / "config.json").write_text("[1]"), "json-not-object"),
        (lambda c: (c / "config.json").write_bytes(b'{"a": "\xff"}'), "not-utf8"),
        (lambda c: (c / "config.json").write_text("[" * 200_000), "json-nested"),
        (only_pickles, "pickled"),
        (lambda c: (c / "model-00001-of-00002.safetensors").unlink(), "shard-missing"),
        (cut_first_shard, "shard-truncated"),
        (lambda c: (c / "model-00001-of-00002.safetensors").write_bytes(LFS_POINTER), "not-safetensors"),
        (edit_index(lambda m: m.update({"c.weight": "model-00001-of-00002.safetensors"})), "index-mismatch"),
        (edit_index(lambda m: m.update({"a.weight": "model-00002-of-00002.safetensors"})), "index-mismatch"),
        (edit_index(lambda m: m.update({"a.weight": "../model.safetensors"})), "index"),
        (edit_index(lambda m: m.update({"a.weight": "/etc/passwd"})), "index"),
        (edit_index(lambda m: m.clear()), "index"),
    ],
)
def test_damaged_checkpoints_are_refused(checkpoint: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(checkpoint)
    with raises(SourceError, code=message) as caught:
        Checkpoint.open(checkpoint)
    assert caught.value.file and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        (b"\x80\x02}q\0", "this is a PyTorch pickle", "name the folder, {}"),
        (b"{}", "this is JSON text", "name the folder, {}"),
        (b"what?", "is not a checkpoint directory or a .safetensors file$", "name the folder, {}"),
        (raw_shard({}), "this is a safetensors file", "give it a name that ends in .safetensors"),
    ],
)
def test_a_file_that_is_no_checkpoint(checkpoint: Path, content: bytes, what: str, hint: str) -> None:
    path = checkpoint / "weights"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        Checkpoint.open(path)
    assert re.search(what, caught.value.message) and caught.value.hint == hint.format(checkpoint)


def test_a_gguf_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(SourceError, match=r"this is a GGUF file"):
        Checkpoint.open(tmp_path / "model.gguf")


def test_mistrals_own_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"dim": 64}')
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with raises(SourceError, code="mistral-format"):
        Checkpoint.open(tmp_path, budget=Budget(1 << 30))


def test_an_adapter_is_told_which_command_is_for_it(checkpoint: Path) -> None:
    (checkpoint / "config.json").rename(checkpoint / "adapter_config.json")
    with raises(SourceError, code="is-adapter") as caught:
        Checkpoint.open(checkpoint)
    assert "streamconv lora" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "this is an empty file"),
        (bytes(100), "a file that begins with zeros"),  # a download that was given its size and no bytes
        (b"<!DOCTYPE html><html>", "this is an HTML page"),
        (b"PK\x03\x04" + bytes(8), "this is a PyTorch pickle"),
        (b"\x07" + b"\0" * 6, "7 bytes"),
        (struct.pack("<Q", 2**63), "claims a header"),
        (struct.pack("<Q", 100) + b"{}", "claims a header"),
        (raw_shard(b"[]"), "not a valid safetensors"),
        (raw_shard({"a": entry("F32", [2], 0, 4)}, bytes(4)), "not a valid safetensors"),  # shape and bytes disagree
        (raw_shard({"a": entry("F32", [1], 0, 4)}, bytes(8)), "not a valid safetensors"),  # bytes after the last tensor
        (raw_shard({"a": entry("F32", [1], 4, 8)}, bytes(8)), "not a valid safetensors"),  # a hole
        (raw_shard({"a": entry("F31", [1], 0, 4)}, bytes(4)), "not a valid safetensors"),
        (raw_shard({"a": entry("F32", [2**40, 2**40], 0, 4)}, bytes(4)), "not a valid safetensors"),
        (raw_shard({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "not a valid safetensors"),
        (
            raw_shard({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4)),
            "not a valid safetensors",
        ),  # an overlap
        (
            raw_shard(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                      b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
            "duplicate key 'a'",
        ),
        (raw_shard({"a\0b": entry("F32", [1], 0, 4)}, bytes(4)), "unprintable character"),
        (raw_shard({"../a": entry("F32", [1], 0, 4)}, bytes(4)), "unprintable character"),
    ],
)  # fmt: skip
def test_malformed_shards_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        Shard(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00002.safetensors"])
def test_what_is_too_large_for_the_bound_is_not_parsed(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    if path.suffix == ".safetensors":
        n = 100_000
        path.write_bytes(struct.pack("<Q", n) + b"{" * n)  # parsing would say that it is malformed
    else:
        path.write_bytes(b"{" * 100_000)
    with pytest.raises(BudgetError) as caught:
        Checkpoint.open(checkpoint, budget=Budget(2_000_000, 0, 0))
    assert caught.value.file == str(path) and caught.value.code == "memory-bound"


def test_the_memory_of_headers_is_bounded_closely(tmp_path: Path) -> None:
    """What `Shard` says that its table takes is more than it takes, and not twice as much; parsing is bounded, too."""
    names = [f"model.layers.{n // 900}.feed_forward.experts.{n // 3}.w{n % 3 + 1}.weight" for n in range(3000)]
    header = {name: entry("BF16", [128, 64], n * 16384, (n + 1) * 16384) for n, name in enumerate(names)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_shard(header))
    os.truncate(path, path.stat().st_size + len(names) * 16384)
    text = json.dumps(header).encode()
    tracemalloc.start()
    shard = Shard(path, Budget(len(text) + objects_nbytes([text]), 0, 0))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < shard.parsed_nbytes < 2 * kept
    assert peak < len(text) + objects_nbytes([text]) < 3 * peak
    with pytest.raises(BudgetError):
        Shard(path, Budget(len(text) + objects_nbytes([text]) - 1, 0, 0))
    shard.close()


def test_the_tables_of_all_shards_are_counted_together(checkpoint: Path) -> None:
    """With room for either shard's header and table, and not for the second beside the first's, that is refused."""
    _, second = sorted(checkpoint.glob("*.safetensors"))
    with Checkpoint.open(checkpoint) as found:
        tables = [shard.parsed_nbytes for shard in found.shards]
    header = second.read_bytes()[8 : -14 * 4]
    jsons = sum(
        len(text := (checkpoint / name).read_bytes()) + objects_nbytes([text]) for name in ("config.json", INDEX)
    )
    needed = jsons + tables[0] + len(header) + objects_nbytes([header])
    Checkpoint.open(checkpoint, budget=Budget(needed, 0, 0)).__exit__(None, None, None)
    with pytest.raises(BudgetError) as caught:
        Checkpoint.open(checkpoint, budget=Budget(needed - 1, 0, 0))
    assert caught.value.file == str(second)


def test_a_dtype_that_does_not_convert(tmp_path: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.int64)}, tmp_path / "model.safetensors")
    tensor = Shard(tmp_path / "model.safetensors").tensors["a"]
    with pytest.raises(SourceError, match="dtype I64") as caught:
        tensor.lazy()
    assert caught.value.tensor == "a"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    os.utime(path, ns=(1, 1))
    path.write_bytes(content)


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize("change", [truncate, rewrite, replace, Path.unlink])
def test_a_shard_that_changes_is_noticed(checkpoint: Path, change: Callable[[Path], None]) -> None:
    path = checkpoint / "model-00001-of-00002.safetensors"
    shard = Shard(path)
    shard.check_unchanged()
    change(path)
    with raises(SourceError, code="source-changed") as caught:
        shard.check_unchanged()
    assert caught.value.file == str(path)


def test_a_truncated_shard_is_a_short_read_and_no_signal(checkpoint: Path) -> None:
    path = checkpoint / "model-00001-of-00002.safetensors"
    shard = Shard(path)
    tensor = shard.tensors["a.weight"]
    os.truncate(path, tensor.offset + 10)
    with raises(SourceError, code="source-changed"):
        shard.read_into(tensor.offset, np.empty(tensor.nbytes, dtype=np.uint8))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the library is asked on an anonymous file")
def test_the_library_has_a_say(tmp_path: Path) -> None:
    """What the safetensors library refuses is refused, whatever our own rules say of it."""
    text = b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    head = len(text).to_bytes(8, "little") + text
    assert library.objection(head, len(head) + 3) is None
    assert library.objection(head, len(head) + 2)
    assert library.objection(head.replace(b"[3]", b"[4]"), len(head) + 3)


def test_what_the_library_refuses_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "objection", lambda head, nbytes: "InvalidOffset")
    with pytest.raises(SourceError) as caught, Checkpoint.open(checkpoint):
        pass
    assert caught.value.code == "safetensors-library"
