"""The whole command on hostile files: the documented exit code, one line, nothing left behind, nothing touched."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from streamconv.cli import main
from tests import tiny
from tests.attacks.gguf_files import FATAL, LISTED
from tests.attacks.readme import PATH, render
from tests.attacks.sources import ALL, Attack

ADAPTERS = ("peft", "mlx")
MAX_SECONDS = 5.0  # of processor time, generous: the slowest takes 0.6
BASES: dict[str, Callable[[Path], Path]] = {
    "lfm2": tiny.lfm2,
    "shards": partial(tiny.lfm2, n_shards=2),
    "lfm2moe": tiny.lfm2moe,
    "llama": tiny.llama,
    "spm": partial(tiny.llama, tokenizer="spm-model"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid source of each kind."""
    folder = tmp_path_factory.mktemp("bases")
    for name, make in BASES.items():
        make(folder / name)
    tiny.peft_adapter(folder / "peft", folder / "llama")
    tiny.mlx_adapter(folder / "mlx", folder / "llama")
    return folder


def state(directory: Path) -> dict[str, object]:
    """Everything of a folder that a reader could change by accident: content, times, links."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mtime_ns,
            path.lstat().st_mode,
            path.lstat().st_size,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(directory.rglob("*"))
    }


def command(attack: Attack, src: Path, bases: Path, out: Path) -> list[str]:
    how = ["lora", str(src), "--base", str(bases / "llama")] if attack.base in ADAPTERS else ["convert", str(src)]
    return [*how, "-o", str(out), "--json", "--quiet", *attack.options]


def assert_refused(
    arguments: list[str], expected: str | None, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.process_time()
    code = main(arguments)
    seconds = time.process_time() - started
    printed = capsys.readouterr()
    assert code == exit_code, printed.err
    assert printed.err.startswith("streamconv: ")
    assert printed.err.endswith("\n")
    assert printed.err[:-1].isprintable()  # so it is one line
    assert len(printed.err) < 6000
    error = json.loads(printed.out)["error"]
    assert error["exit_code"] == exit_code
    assert error["kind"] == "source"
    assert expected is None or expected in {
        error["code"],
        *(problem["code"] for problem in error.get("problems", ())[:1]),
    }, printed.err
    assert error["file"]
    assert error["message"]
    assert seconds < MAX_SECONDS


@pytest.mark.parametrize("base", [*BASES, *ADAPTERS])
def test_the_bases_are_valid(base: str, bases: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert main(command(Attack(base, lambda _: None, ""), bases / base, bases, out)) == 0
    assert out.is_file()


@pytest.mark.parametrize("name", ALL)
def test_attack(name: str, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attack = ALL[name]
    src, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(bases / attack.base, src)
    out.mkdir()
    attack.edit(src)
    before = state(src)
    arguments = command(attack, src, bases, out / "model.gguf")
    if attack.code:
        assert_refused(arguments, attack.code, attack.exit_code, capsys)
        assert list(out.iterdir()) == []
    else:
        assert main(arguments) == 0
        assert [path.name for path in out.iterdir()] == ["model.gguf"]
        verify = ["verify", str(out / "model.gguf"), "--source", str(src), "--quiet"]
        assert main([*verify, *(("--base", str(bases / "llama")) if attack.base in ADAPTERS else ())]) == 0
    assert state(src) == before


@pytest.mark.parametrize("name", [*FATAL, *LISTED])
def test_gguf_as_base_and_in_verify(name: str, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, code = (FATAL | LISTED)[name]
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "hostile.gguf"
    path.write_bytes(content)
    before = state(tmp_path / "src")
    assert_refused(["verify", str(path), "--source", str(bases / "llama"), "--json"], code, 3, capsys)
    out = tmp_path / "out.gguf"
    arguments = ["lora", str(bases / "peft"), "--base", str(path), "-o", str(out), "--json", "--quiet"]
    # Of a base only names and shapes are needed: what is refused there may be another problem of the file.
    assert_refused(arguments, code if name in FATAL else None, 3, capsys)
    if name in FATAL:
        assert_refused(["inspect", str(path), "--json"], code, 3, capsys)
    else:
        assert main(["inspect", str(path), "--json"]) == 3  # all is shown, and then it fails
        found = json.loads(capsys.readouterr().out)
        assert LISTED[name][1] in {problem["code"] for problem in found["problems"]}
    assert {entry.name for entry in tmp_path.iterdir()} == {"src"}
    assert state(tmp_path / "src") == before


def test_the_readme_lists_every_idea() -> None:
    assert PATH.read_text(encoding="utf-8") == render(), "run python -m tests.attacks"
