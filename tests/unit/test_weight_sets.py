"""More than one set of weights in a folder: which one is read, which folders are refused, and how a user picks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import streamconv
from streamconv.checkpoint.folder import INDEX
from streamconv.errors import SourceError
from tests import tiny
from tests.oracles import ggufs

BUILDERS = {"llama": tiny.llama, "lfm2": tiny.lfm2, "lfm2moe": tiny.lfm2moe}


def read(source: Path, dst: Path) -> tuple[dict[str, str], list[str]]:
    """Digests of the tensors that a source converts to, and the codes of the warnings."""
    report = streamconv.convert(source, dst, outtype="f32", force=True)
    return {name: tensor.sha256 for name, tensor in ggufs.read(dst).tensors.items()}, [w.code for w in report.warnings]


def refused(source: Path, dst: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        streamconv.convert(source, dst, outtype="f32")
    assert not dst.exists()
    assert caught.value.exit_code == 3
    return caught.value


@pytest.fixture(params=BUILDERS)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and another one of the same shapes in one file."""
    build = BUILDERS[request.param]
    return build(tmp_path / "first", seed=5), build(tmp_path / "second", seed=6)


@pytest.fixture
def folder(models: tuple[Path, Path], tmp_path: Path) -> Path:
    """The first model in three shards with their index, which holds the second model in two."""
    first, second = models
    tensors = tiny.tensors_of(first)
    (first / "model.safetensors").unlink()
    tiny.write_shards(first, tensors, 3)
    tiny.write_shards(first, tiny.tensors_of(second), 2, index=False)
    return first


def test_the_index_decides_and_the_other_set_is_a_warning(folder: Path, tmp_path: Path) -> None:
    tensors, codes = read(folder, tmp_path / "out.gguf")
    for path in folder.glob("*-of-00002.safetensors"):
        path.unlink()
    alone, no_codes = read(folder, tmp_path / "alone.gguf")
    assert tensors == alone
    assert (codes, no_codes) == (["weights-left-out"], [])


def test_two_complete_sets_without_an_index_are_refused_by_their_names(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX).unlink()
    error = refused(folder, tmp_path / "out.gguf")
    assert error.code == "weight-sets"
    assert "model-*-of-00002.safetensors" in error.message
    assert "model-*-of-00003.safetensors" in error.message


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "model-00001-of-00002.safetensors"])
def test_a_first_shard_picks_its_set(models: tuple[Path, Path], folder: Path, tmp_path: Path, name: str) -> None:
    expected = read(models[1], tmp_path / "second.gguf")[0] if "00002" in name else read(folder, tmp_path / "f.gguf")[0]
    (folder / INDEX).unlink()
    assert read(folder / name, tmp_path / "out.gguf") == (expected, [])
    report = streamconv.verify(tmp_path / "out.gguf", folder / name)
    assert report.verified


def test_an_index_picks_its_set(models: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    first = read(folder, tmp_path / "first.gguf")[0]
    weight_map = {
        name: path.name for path in folder.glob("*-of-00002.safetensors") for name in tiny.read_safetensors(path)
    }
    other = folder / "other.safetensors.index.json"
    other.write_text(json.dumps({"weight_map": weight_map}))
    assert read(other, tmp_path / "out.gguf") == (read(models[1], tmp_path / "second.gguf")[0], [])
    assert read(folder / INDEX, tmp_path / "out.gguf") == (first, [])


def whole_file(folder: Path) -> None:
    tiny.write_shards(folder, tiny.tensors_of(folder))


def third_set(folder: Path) -> None:
    tiny.write_shards(folder, tiny.tensors_of(folder), 4, index=False)


def another_prefix(folder: Path) -> None:
    for path in folder.glob("*-of-00002.safetensors"):
        path.rename(folder / path.name.replace("model", "merged"))


def another_single_file(folder: Path) -> None:
    tensors = tiny.tensors_of(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    tiny.write_shards(folder, tensors)
    tiny.write_safetensors(folder / "model_fp32.safetensors", tensors)


@pytest.mark.parametrize("change", [whole_file, third_set, another_prefix, another_single_file])
def test_sets_of_any_names_are_refused(folder: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    (folder / INDEX).unlink()
    change(folder)
    assert refused(folder, tmp_path / "out.gguf").code == "weight-sets"


def test_the_one_complete_set_is_read_and_the_other_named(
    models: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    (folder / INDEX).unlink()
    (folder / "model-00003-of-00003.safetensors").unlink()
    expected = read(models[1], tmp_path / "second.gguf")[0]
    assert read(folder, tmp_path / "out.gguf") == (expected, ["weights-left-out"])


def test_a_stale_index_beside_one_complete_set_is_a_warning(
    models: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()
    expected = read(models[1], tmp_path / "second.gguf")[0]
    tensors, codes = read(folder, tmp_path / "out.gguf")
    assert tensors == expected
    assert "weights-index-stale" in codes


def test_an_index_without_its_shards_and_no_other_set_is_an_error(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*-00001-of-*.safetensors"):
        path.unlink()
    assert refused(folder, tmp_path / "out.gguf").code == "shard-missing"


def test_weights_of_something_else_are_no_second_set(models: tuple[Path, Path], tmp_path: Path) -> None:
    first = models[0]
    expected = read(first, tmp_path / "first.gguf")
    tiny.write_safetensors(first / "projector.safetensors", {"linear.weight": tiny.Tensor("F32", (1,), bytes(4))})
    assert read(first, tmp_path / "out.gguf") == expected


def test_names_that_claim_many_shards_cost_nothing(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    for number in range(50):
        (base / f"part{number}-00001-of-99999.safetensors").write_bytes(b"")
    assert read(base, tmp_path / "out.gguf")[1] == []
