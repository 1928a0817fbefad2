"""Architectures from outside the package: a file that the user names, or a package that the user installed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv import cli
from streamconv.errors import SourceError, StreamconvError
from streamconv.recipe import registry
from tests import loras, tiny
from tests.oracles import ggufs
from tests.raising import raises
from tests.tools import arcee
from tests.unit.test_docs_architecture import recipe_text

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return arcee.build(tmp_path / "Arcee-tiny")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "arcee.py"
    path.write_text(recipe_text(), encoding="utf-8")
    return path


def package(folder: Path, value: str = "streamconv_arcee:RECIPE", text: str | None = None) -> Path:
    """A package of that recipe, to be installed."""
    folder.mkdir()
    (folder / "streamconv_arcee.py").write_text(recipe_text() if text is None else text, encoding="utf-8")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "streamconv-arcee"\nversion = "3.1"\n'
        f'[project.entry-points."{registry.GROUP}"]\narcee = "{value}"\n'
        '[tool.setuptools]\npy-modules = ["streamconv_arcee"]\n'
    )
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Installs packages into a folder that this process has on its path from then on."""
    site = tmp_path / "site"

    def install(one: Path) -> None:
        options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(one)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        registry.installed_recipes.cache_clear()

    yield install
    sys.modules.pop("streamconv_arcee", None)
    registry.installed_recipes.cache_clear()


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_a_file_serves_every_command(
    tmp_path: Path, source: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, adapter, lora = tmp_path / "m.gguf", tmp_path / "adapter", tmp_path / "lora.gguf"
    with raises(SourceError, code="architecture-unsupported"):
        streamconv.convert(source, out)
    assert call("convert", source, "-o", out, "--recipe", file, "--verify", "--quiet") == 0
    assert ggufs.read(out)["general.architecture"] == "arcee"
    assert call("verify", out, "--source", source, "--recipe", file, "--quiet") == 0
    loras.write(adapter, loras.factors(UP, 96, 64))
    assert call("lora", adapter, "--base", source, "-o", lora, "--recipe", file, "--verify", "--quiet") == 0
    assert set(ggufs.read(lora).tensors) == {"blk.1.ffn_up.weight.lora_a", "blk.1.ffn_up.weight.lora_b"}
    assert call("lora", adapter, "--base", out, "-o", tmp_path / "of-gguf.gguf", "--recipe", file, "--quiet") == 0
    assert call("inspect", source, "--recipe", file) == 0
    assert call("quants", source, "--recipe", file) == 0
    capsys.readouterr()
    assert call("architectures", "--recipe", file, "--json") == 0
    (row,) = (one for one in json.loads(capsys.readouterr().out)["architectures"] if one["architecture"] == "arcee")
    assert row["origin"].startswith("arcee.py ")
    with raises(SourceError, code="architecture-unsupported"):  # it was for those calls alone
        streamconv.convert(source, out)


def test_the_library_takes_a_file_or_a_recipe(tmp_path: Path, source: Path, file: Path) -> None:
    first = streamconv.convert(source, tmp_path / "a.gguf", recipes=[file])
    second = streamconv.convert(source, tmp_path / "b.gguf", recipes=[registry.load_recipe(file)])
    assert first.output.read_bytes() == second.output.read_bytes()
    assert streamconv.inspect(source, recipes=[file]).architecture == "arcee"
    assert streamconv.quants(source, recipes=[file]).architecture == "arcee"


def test_a_batch_takes_it_relative_to_its_file(tmp_path: Path, source: Path, file: Path) -> None:
    jobs = tmp_path / "jobs.toml"
    jobs.write_text('[[job]]\nsource = "Arcee-tiny"\nrecipe = "arcee.py"\noutput = "{name}-{outtype}.gguf"\n')
    assert call("batch", jobs, "--quiet") == 0
    streamconv.convert(source, tmp_path / "expected.gguf", recipes=[file])
    assert (tmp_path / "Arcee-tiny-bf16.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    file.write_text(recipe_text() + "\n# changed\n")
    assert call("batch", jobs, "--quiet") != 0  # it is not up to date, and the output is there


def test_a_run_goes_on_with_the_same_file_alone(tmp_path: Path, source: Path, file: Path) -> None:
    out = tmp_path / "m.gguf"
    with raises(StreamconvError, code="cancelled"):
        streamconv.convert(source, out, recipes=[file], cancel=lambda: True)
    file.write_text(recipe_text() + "\n")
    with raises(StreamconvError, code="resume-mismatch") as caught:
        streamconv.convert(source, out, recipes=[file])
    assert "option recipe" in str(caught.value)
    file.write_text(recipe_text())
    streamconv.convert(source, out, recipes=[file])
    assert out.exists() and not list(tmp_path.glob("*.part*"))


def test_a_file_comes_before_what_is_there(tmp_path: Path) -> None:
    """Whoever names a recipe of their own for a known architecture gets it."""
    llama = tiny.llama(tmp_path / "llama")
    own = Path(str(importlib.import_module("streamconv.architectures.llama").__file__)).read_text(encoding="utf-8")
    file = tmp_path / "mine.py"
    file.write_text(f"{own}\nfrom dataclasses import replace\nRECIPE = replace(RECIPE, arch='mine')\n")
    streamconv.convert(llama, tmp_path / "m.gguf", recipes=[file])
    assert ggufs.read(tmp_path / "m.gguf")["general.architecture"] == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("RECIPE = 3\n", "not a Recipe"),
        ("x = 1\n", "no RECIPE"),
        ("x = 1\n\ny = undefined\n", "line 3: NameError"),
        ("def f(:\n", "line 1: SyntaxError"),
        ("from streamconv.recipe import Recipe\nRECIPE = Recipe(arch='a')\n", "line 2: TypeError"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit"),
    ],
)
def test_what_is_no_recipe_is_named(tmp_path: Path, source: Path, text: str, words: str) -> None:
    (tmp_path / "r.py").write_text(text)
    with raises(SourceError, code="recipe-broken") as caught:
        streamconv.convert(source, tmp_path / "m.gguf", recipes=[tmp_path / "r.py"])
    assert words in str(caught.value) and caught.value.file == str(tmp_path / "r.py")
    with raises(SourceError, code="source-missing"):
        streamconv.convert(source, tmp_path / "m.gguf", recipes=[tmp_path / "nowhere.py"])
    assert not list(tmp_path.glob("m.gguf*"))


def test_an_installed_package_serves_every_command(
    tmp_path: Path, source: Path, installed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(package(tmp_path / "package"))
    out = tmp_path / "m.gguf"
    assert call("convert", source, "-o", out, "--verify", "--quiet", "--outtype", "f32") == 0
    assert call("verify", out, "--source", source, "--quiet") == 0
    loras.write(tmp_path / "adapter", loras.factors(UP, 96, 64))
    assert call("lora", tmp_path / "adapter", "--base", out, "-o", tmp_path / "l.gguf", "--quiet") == 0
    assert call("inspect", source) == 0
    capsys.readouterr()
    assert call("architectures") == 0
    assert "(from streamconv-arcee)" in capsys.readouterr().out


def test_a_package_changes_no_architecture_that_is_there(tmp_path: Path, installed: Any) -> None:
    llama = tiny.llama(tmp_path / "llama")
    before = streamconv.convert(llama, tmp_path / "before.gguf").output.read_bytes()
    text = recipe_text().replace('("ArceeForCausalLM",)', '("LlamaForCausalLM",)')
    installed(package(tmp_path / "package", text=text))
    assert streamconv.convert(llama, tmp_path / "after.gguf").output.read_bytes() == before


def test_a_broken_package_is_named_where_it_matters(
    tmp_path: Path, source: Path, installed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(package(tmp_path / "package", text="import nowhere_to_be_found\n"))
    streamconv.convert(tiny.llama(tmp_path / "llama"), tmp_path / "l.gguf")
    with raises(SourceError, code="architecture-unsupported") as caught:
        streamconv.convert(source, tmp_path / "m.gguf")
    assert "streamconv-arcee 3.1's arcee" in str(caught.value) and "nowhere_to_be_found" in str(caught.value)
    assert call("architectures") == 0
    assert "streamconv-arcee 3.1's arcee" in capsys.readouterr().err
