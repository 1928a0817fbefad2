"""What a run may write over: never a file that it reads, whatever file that is; other files where they are its own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.api import run as run_module
from streamconv.cli import main
from streamconv.errors import DestinationError
from streamconv.options import SplitOptions
from streamconv.output import destination
from streamconv.output.destination import Place, check_room, claim, write_text
from streamconv.output.sink import Sink
from tests import tiny
from tests.raising import raises

# Python tells an audit hook of every file that it opens, by whatever function, in whosever code.
OPENED = """
import json, os, sys
opened = set()
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened.add(os.fsdecode(arguments[0]))
from streamconv.cli import main
sys.addaudithook(note)
code = main(json.loads(sys.argv[1]))
print(json.dumps([code, sorted(opened)]))
"""


def opened_by(arguments: list[str]) -> list[Path]:
    """The files that a run opens."""
    command = [sys.executable, "-c", OPENED, json.dumps([*arguments, "--quiet"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, paths = json.loads(done.stdout)
    assert code == 0, done.stderr
    return [Path(path) for path in paths]


def full_model(directory: Path, **options: Any) -> Path:
    """A checkpoint with every kind of file that is read of one."""
    tiny.llama(directory, n_shards=2, **options)
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("{{ messages[-1].content }}")
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_model(tmp_path_factory.mktemp("places") / "model")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.lfm2(tmp_path_factory.mktemp("places") / "small")


@pytest.mark.parametrize("case", ["model", "merged", "adapter on a file", "adapter on a folder"])
def test_no_file_that_is_read_is_written_over(
    tmp_path: Path, model: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = full_model(tmp_path / "model")
    adapter = tiny.peft_adapter(tmp_path / "adapter", model)
    base = tmp_path / "base.gguf"
    streamconv.convert(model, base)
    words, expected = {
        "model": (["convert", str(model)], {"config.json", "tokenizer.json", "README.md", "rag.jinja"}),
        "merged": (["convert", str(model), "--adapter", str(adapter)], {"adapter_config.json", "config.json"}),
        "adapter on a file": (["lora", str(adapter), "--base", str(base)], {"adapter_config.json", "base.gguf"}),
        "adapter on a folder": (["lora", str(adapter), "--base", str(model)], {"adapter_config.json", "config.json"}),
    }[case]
    out = tmp_path / "out" / "out.gguf"
    out.parent.mkdir()
    read = [path for path in opened_by([*words, "-o", str(out)]) if path.is_file() and tmp_path in path.parents]
    read = [path for path in read if out.parent not in path.parents]
    assert expected < {path.name for path in read}
    (tmp_path / "x.gguf.manifest.json").hardlink_to(read[0])
    (tmp_path / "y.Modelfile").hardlink_to(read[1])
    before = {path: path.read_bytes() for path in read}
    for path in read:
        for places in (["-o", str(path)], ["-o", str(out), "--profile", str(path)]):
            assert main([*words, *places, "--force", "--quiet"]) == 5, path
            assert "is a file of the source" in capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path / "x.gguf"), "--sha256", "--force", "--quiet"]) == 5
    if case != "adapter on a folder":
        assert main([*words, "-o", str(tmp_path / "y.gguf"), "--modelfile", "--force", "--quiet"]) == 5
    assert {path: path.read_bytes() for path in read} == before
    assert not (tmp_path / "x.gguf").exists()
    assert not (tmp_path / "y.gguf").exists()


def test_one_run_does_not_protect_from_the_next(tmp_path: Path, small: Path) -> None:
    """What was read as a base may be made again afterwards."""
    source = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", source)
    streamconv.convert(source, tmp_path / "base.gguf")
    streamconv.convert_adapter(adapter, tmp_path / "base.gguf", tmp_path / "a.gguf")
    streamconv.convert(source, tmp_path / "base.gguf", force=True)
    streamconv.convert_adapter(adapter, tmp_path / "base.gguf", tmp_path / "a.gguf", force=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out.gguf.manifest.json", ["--sha256"]),
        ("out.Modelfile", ["--modelfile"]),
        ("profile.json", ["--profile", "profile.json"]),
    ],
)
def test_a_file_beside_the_output_is_replaced_as_the_output_is(
    tmp_path: Path,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["convert", str(small), "-o", "out.gguf", "--quiet", *options]
    Path(name).write_text("mine")
    assert main(words) == 5
    assert f"{name}: exists already" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}
    assert main([*words, "--force"]) == 0
    assert Path(name).read_text() != "mine"
    assert {path.name for path in tmp_path.iterdir()} == {name, "out.gguf"}


@pytest.mark.parametrize("option", ["--sha256", "--modelfile"])
@pytest.mark.parametrize("way", ["directory", "fifo", "a part that is none"])
def test_where_no_file_can_be_beside_the_output_there_is_no_output(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str], option: str, way: str
) -> None:
    path = tmp_path / {"--sha256": "out.gguf.manifest.json", "--modelfile": "out.Modelfile"}[option]
    match way:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case _:
            path.with_name(f"{path.name}.part").mkdir()
    before = set(tmp_path.iterdir())
    assert main(["convert", str(small), "-o", str(tmp_path / "out.gguf"), option, "--force", "--quiet"]) == 5
    assert capsys.readouterr().err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_a_name_that_leaves_no_room_for_what_lies_beside_it(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / ("n" * 235 + ".gguf"))
    assert main(["convert", str(small), "-o", out, "--sha256", "--quiet"]) == 5
    assert "its name is too long" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["convert", str(small), "-o", out, "--quiet"]) == 0


def test_the_default_name_s_modelfile_is_looked_for_first(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = streamconv.convert(small, dry_run=True).output
    planned.with_suffix(".Modelfile").write_text("mine")
    assert main(["convert", str(small), "--modelfile", "--quiet"]) == 5
    assert "Modelfile: exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [planned.with_suffix(".Modelfile").name]


@pytest.mark.parametrize("other", ["out.gguf", "out.gguf.part", "out.gguf.manifest.json", "link.gguf"])
def test_two_files_of_one_run_have_two_names(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    (tmp_path / "link.gguf").symlink_to("out.gguf")
    words = ["convert", str(small), "-o", str(tmp_path / "out.gguf"), "--sha256", "--force", "--quiet"]
    assert main([*words, "--profile", str(tmp_path / other)]) == 5
    assert "would be written twice" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["link.gguf"]


@pytest.mark.parametrize("folder", ["missing", "a file"])
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_profile_that_could_not_be_written_is_refused_before_the_work(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str], folder: str, options: list[str]
) -> None:
    (tmp_path / "a file").touch()
    words = ["convert", str(small), "-o", str(tmp_path / "out.gguf"), "--quiet", *options]
    assert main([*words, "--profile", str(tmp_path / folder / "profile.json")]) == 5
    assert "profile.json: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_a_profile_in_a_folder_that_may_not_be_written(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # as root, everything may be
    words = ["convert", str(small), "-o", str(tmp_path / "out.gguf"), "--quiet"]
    assert main([*words, "--profile", str(tmp_path / "profile.json")]) == 5
    assert "profile.json: permission denied" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_profile_that_cannot_be_written_says_that_the_output_is_there(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(destination, "write_all", fail)  # of small files; the output's chunks go another way
    out = tmp_path / "out.gguf"
    assert main(["convert", str(small), "-o", str(out), "--profile", str(tmp_path / "profile.json")]) == 5
    told = capsys.readouterr().err
    assert "profile.json: no space left on its filesystem" in told and f"{out} is complete" in told
    assert "--resume" not in told  # there is nothing left to go on with
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_dry_run_tells_what_is_in_the_way_and_leaves_it(tmp_path: Path, small: Path) -> None:
    for name in ("out.gguf", "out.gguf.manifest.json", "out.Modelfile"):
        (tmp_path / name).write_text("mine")
    report = streamconv.convert(small, tmp_path / "out.gguf", dry_run=True, sha256=True, modelfile=True)
    assert [note.code for note in report.warnings if note.code == "exists"] == ["exists"] * 3
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_stopped_among_its_last_files_is_resumed(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, number: int, moment: str
) -> None:
    whole, out = tmp_path / "whole" / "out.gguf", tmp_path / "out" / "out.gguf"
    for path in (whole, out):
        path.parent.mkdir()
    streamconv.convert(small, whole, sha256=True, modelfile=True)
    n_calls = 0

    def stopped(place: Place, text: str, *, replaces: bool) -> None:
        nonlocal n_calls
        n_calls += 1
        if (n_calls, moment) == (number, "before"):
            raise KeyboardInterrupt
        write_text(place, text, replaces=replaces)
        if (n_calls, moment) == (number, "after"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_text", stopped)
        with pytest.raises(KeyboardInterrupt):
            streamconv.convert(small, out, sha256=True, modelfile=True)
    assert out.with_name("out.gguf.part.journal").exists()
    report = streamconv.convert(small, out, sha256=True, modelfile=True, resume=True)
    assert report.resumed
    left, expected = ({path.name: path.read_bytes() for path in one.parent.iterdir()} for one in (out, whole))
    assert left == expected


def test_a_file_that_is_another_s_is_not_taken_for_one_of_a_resumed_run(tmp_path: Path) -> None:
    (place,) = claim([tmp_path / "m.json"], {})
    write_text(place, "first", replaces=False)
    write_text(place, "first", replaces=False)
    with raises(DestinationError, code="exists"):
        write_text(place, "other", replaces=False)
    assert place.path.read_text() == "first"
    write_text(place, "other", replaces=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"m.json": "other"}


def test_a_refused_run_leaves_what_an_earlier_one_kept(tmp_path: Path, small: Path) -> None:
    split = SplitOptions(max_tensors=15)
    paths = [output.path for output in streamconv.convert(small, tmp_path / "z.gguf", split=split).outputs]
    assert len(paths) == 3
    for path in paths[::2]:
        path.unlink()
    with pytest.raises(KeyboardInterrupt), Sink.create(claim([paths[0]], {})[0], 9, identity={"kept": "yes"}):
        raise KeyboardInterrupt
    left = {path: path.read_bytes() for path in tmp_path.glob("*.part*")}
    assert len(left) == 2
    with raises(DestinationError, code="exists"):
        streamconv.convert(small, tmp_path / "z.gguf", split=split)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.part*")} == left


@pytest.mark.parametrize("name", ["out.gguf.part", "out.gguf.manifest.json.part", "out.Modelfile.part", "profile.part"])
@pytest.mark.parametrize("options", [[], ["--force"], ["--restart", "--force"], ["--resume", "--force"]], ids=" ".join)
def test_no_file_of_another_program_is_touched(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str], name: str, options: list[str]
) -> None:
    (tmp_path / name).write_bytes(b"my half-finished download")
    words = ["convert", str(small), "-o", str(tmp_path / "out.gguf"), "--sha256", "--modelfile", "--json"]
    assert main([*words, "--profile", str(tmp_path / "profile"), *options]) == 5
    assert json.loads(capsys.readouterr().out)["error"]["file"] == str(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"my half-finished download"}


def test_a_dry_run_names_what_the_run_would_refuse(tmp_path: Path, small: Path) -> None:
    (tmp_path / "out.gguf.part").write_bytes(b"my half-finished download")
    report = streamconv.convert(small, tmp_path / "out.gguf", dry_run=True)
    assert "part-foreign" in {warning.code for warning in report.warnings}


def test_too_little_room_for_all_parts_together(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = SplitOptions(max_tensors=15)
    sizes = [
        output.nbytes for output in streamconv.convert(small, tmp_path / "z.gguf", split=split, dry_run=True).outputs
    ]
    block = 512  # whatever the filesystem has here: up to 1 MiB, on NFS
    free = (sum(sizes) - 1) // block  # a block too few, and far more than the largest takes
    assert free * block > max(sizes)
    values = [block, block, *list(os.statvfs(tmp_path))[2:]]
    values[3] = values[4] = free
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))
    with pytest.raises(DestinationError, match=rf"needs {sum(sizes):,} bytes, and its filesystem has "):
        streamconv.convert(small, tmp_path / "z.gguf", split=split)
    assert not list(tmp_path.iterdir())


def test_room_that_an_unfinished_run_has_is_not_needed_again(tmp_path: Path) -> None:
    outputs = claim([tmp_path / name for name in ("a", "b", "c")], {})
    outputs[0].part.write_bytes(bytes(range(256)) * 4096)
    os.sync()
    outputs[1].path.write_bytes(bytes(1000))
    outputs[1].journal.touch()
    held = outputs[0].part.stat().st_blocks * 512
    free = os.statvfs(tmp_path)
    with pytest.raises(DestinationError, match=rf"needs {free.f_blocks * free.f_frsize:,} bytes"):
        check_room(outputs, [held, 1000, free.f_blocks * free.f_frsize])


@pytest.mark.parametrize("command", ["convert", "lora"])
def test_a_folder_named_as_the_output_is_none(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    words = ["convert", str(model)]
    if command == "lora":
        words = ["lora", str(tiny.peft_adapter(tmp_path / "adapter", model)), "--base", str(model)]
    assert main([*words, "-o", f"{tmp_path}/new/", "--quiet"]) == 5
    assert f"{tmp_path}/new: is a directory (give a file in it)" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_missing_folder_is_told_of_the_output(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(small), "-o", str(tmp_path / "no" / "x.gguf"), "--quiet"]) == 5
    assert f"{tmp_path}/no/x.gguf: the folder for it does not exist" in capsys.readouterr().err


def test_a_modelfile_seen_through_a_link(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "src")
    streamconv.convert(source, tmp_path / "base.gguf")
    adapter = tiny.peft_adapter(tmp_path / "adapter", source)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    streamconv.convert_adapter(adapter, tmp_path / "base.gguf", tmp_path / "link" / "my.gguf", modelfile=True)
    _, base, own, *_ = (tmp_path / "a" / "b" / "my.Modelfile").read_text().splitlines()
    assert (base, own) == ("FROM ../../base.gguf", "ADAPTER ./my.gguf")
