"""The command as people and scripts use it: help, pipes, encodings, completion, errors; and its page in docs/."""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from streamconv import cli
from streamconv.cli.output import _is_ascii, next_command
from streamconv.cli.parser import build_parser
from streamconv.recipe.registry import all_recipes
from streamconv.report import Gives, Output, Report
from tests import terminal, tiny
from tests.tools import cli_docs

COMMANDS = ("convert", "lora", "quantize", "verify", "batch", "inspect", "quants", "architectures", "draft")


def run(*words: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "streamconv", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True)


def help_of(*words: str) -> str:
    done = run(*words, "--help", COLUMNS="100")
    assert done.returncode == 0
    return done.stdout.decode()


def parsers() -> Collection[argparse.ArgumentParser]:
    """Each command's."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices.values()


def test_version() -> None:
    assert run("--version").stdout.decode() == f"streamconv {streamconv.__version__}\n"


def test_help_lists_the_commands_and_not_the_one_of_our_own() -> None:
    text = help_of()
    assert all(f"\n    {name}" in text for name in COMMANDS)
    assert "batch-job" not in text
    assert "exit codes:" in text


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"architectures"}))
def test_help_of_a_command_has_an_example(command: str) -> None:
    assert f"example:\n  streamconv {command} " in help_of(command) or "example of JOBS:" in help_of(command)


def test_every_option_is_explained_and_none_is_abbreviated() -> None:
    for parser in parsers():
        assert not parser.allow_abbrev
        assert [action.dest for action in parser._actions if not action.help] == []
        assert {"-v", "--verbose"} <= set(parser._option_string_actions)


def test_the_page_is_what_the_parser_says() -> None:
    assert cli_docs.PATH.read_text(encoding="utf-8") == cli_docs.render(), "run `make docs`"


def test_wrong_usage_is_one_line_and_with_json_an_object() -> None:
    done = run("convert", "x", "--outtype", "q9_0", "--json")
    assert done.returncode == 2
    assert done.stderr.decode().startswith("streamconv: argument --outtype: invalid choice: 'q9_0'")
    assert done.stderr.decode().count("\n") == 1
    assert json.loads(done.stdout)["error"]["kind"] == "usage"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("convert _", "SRC: is empty; the current folder is ."),
        ("lora _ --base .", "ADAPTER: is empty; the current folder is ."),
        ("lora . --base _", "--base: is empty; the current folder is ."),
        ("verify _ --source .", "OUT: is empty; the current folder is ."),
        ("verify m.gguf --source _", "--source: is empty; the current folder is ."),
        ("inspect _", "PATH: is empty; the current folder is ."),
        ("draft _", "SRC: is empty; the current folder is ."),
        ("batch _", "JOBS: is empty; the current folder is ."),
        ("convert . -o _", "-o/--output/--outfile: is empty; name a file"),
        (
            "convert . -o -",
            "-o/--output/--outfile: an output cannot be written to standard output; for a file named -, write ./-",
        ),
        (
            "lora . --base . -o -",
            "-o/--output/--outfile: an output cannot be written to standard output; for a file named -, write ./-",
        ),
        (
            "convert . --profile -",
            "--profile: an output cannot be written to standard output; for a file named -, write ./-",
        ),
    ],
)
def test_a_name_that_is_nothing_or_a_dash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    there = sorted(tiny.llama(tmp_path / "src").iterdir())
    monkeypatch.chdir(tmp_path / "src")
    assert cli.main(["" if word == "_" else word for word in words.split()]) == 2
    assert capsys.readouterr().err == f"streamconv: argument {said} (streamconv {words.split()[0]} --help)\n"
    assert sorted(Path.cwd().iterdir()) == there


def test_the_file_named_dash_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(tiny.llama(tmp_path / "src")), "-o", "./-"]) == 0
    assert (tmp_path / "-").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("word", ["Q8_0", "BF16", "F32", "f16", "Auto", "Q4_K_M"])
def test_an_outtype_may_be_in_capitals(tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    source, expected = str(tiny.llama(tmp_path / "src")), "f16" if word == "Auto" else word.lower()
    assert cli.main(["convert", source, "--outtype", word, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outtype"] == expected


@pytest.mark.parametrize("word", ["iq2_xxs", "IQ3_M", "mxfp4_moe"])
def test_an_outtype_of_llama_cpp_alone_is_told_the_way(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert cli.main(["convert", "x", "--outtype", word]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"streamconv: argument --outtype: {word!r} is not one of auto, f32, f16, bf16, q8_0, ")
    assert printed.endswith(f"(llama.cpp's llama-quantize makes {word.upper()} from a converted file)\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model whose name no ASCII terminal can show."""
    folder = tmp_path_factory.mktemp("modèle-模")
    streamconv.convert(tiny.lfm2(folder / "src"), folder / "größe.gguf", outtype="q8_0", name="Größe 模 🦙")
    return folder / "größe.gguf"


def test_a_closed_pipe_ends_it_without_a_word(model: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "streamconv", "inspect", str(model), "--tensors"]
    with os.fdopen(write_end, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_the_head_of_a_long_output_is_all_that_is_asked_for(model: Path) -> None:
    line = f"{sys.executable} -m streamconv inspect '{model}' --tensors --json | head -c 20"
    done = subprocess.run(["bash", "-c", line], capture_output=True)
    assert (done.stdout, done.stderr) == (b'{"schema": 1, "kind"', b"")


def test_a_full_disk_behind_stdout_is_an_error_of_ours(model: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "streamconv", "inspect", str(model)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert done.stderr == "streamconv: standard output: cannot be written: No space left on device\n"


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_a_stderr_that_takes_nothing_changes_nothing_else(tmp_path: Path, stderr: str) -> None:
    source = tiny.lfm2(tmp_path / "src")
    (tmp_path / "src" / "README.md").write_text("---\nbase_model: [}\n---\n")  # which there will be a warning of
    (tmp_path / "j.toml").write_text('[[job]]\nsource = "src"\noutput = "b.gguf"\n')
    for words, code, n_lines in (
        (["convert", "nope"], 3, 0),
        (["convert", "nope", "--json"], 3, 1),
        (["convert", str(source), "-o", "m.gguf"], 0, 4),
        (["convert", str(source), "-o", "x.gguf", "--json"], 0, 1),
        (["batch", "j.toml"], 0, 2),
        (["batch", "j.toml", "--json"], 0, 1),
    ):
        line = f"exec {sys.executable} -m streamconv {' '.join(words)} {stderr}"
        env = os.environ | {"PYTHONPATH": str(Path(streamconv.__file__).parents[1])}
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True)
        assert (done.returncode, done.stderr) == (code, b""), words
        assert done.stdout.count(b"\n") == n_lines, done.stdout


def test_a_terminal_that_goes_away_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone:
        closed, encoding = False, "utf-8"

        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 2

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def flush(self) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sys, "stderr", Gone())
    assert cli.main(["convert", str(tiny.llama(tmp_path / "src")), "-o", str(tmp_path / "m.gguf")]) == 0
    assert capsys.readouterr().out.startswith("wrote ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("quiet", "is_shown"), [([], True), (["--quiet"], False), (["--progress", "none"], False)])
def test_commands_that_take_long_have_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: list[str], is_shown: bool
) -> None:
    source, out = str(tiny.llama(tmp_path / "src")), str(tmp_path / "m.gguf")
    for words, labels in (
        (["convert", source, "-o", out, "--verify"], ["converting", "verifying"]),
        (["verify", out, "--source", source], ["verifying"]),
    ):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        assert cli.main([*words, *quiet]) == 0
        shown = [label for label, _ in groupby(re.findall(r"\r(\w+): .*?/s\]", terminal.getvalue()))]
        assert shown == (labels if is_shown else []), words


def test_no_file_gets_the_number_of_a_closed_standard_stream() -> None:
    code = "import os; from streamconv.cli import main; main(['architectures']); print(os.open('/', os.O_RDONLY) > 2)"
    line = f'exec {sys.executable} -c "{code}" <&- 2>&-'
    done = subprocess.run(["bash", "-c", line], capture_output=True)
    assert done.stdout.endswith(b"\nTrue\n")


def test_an_unknown_command_leads_to_those_that_people_use() -> None:
    assert b"batch-job" not in run("batch-jbo").stderr
    assert b"streamconv --help" in run("foo").stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_all_characters(model: Path, encoding: str) -> None:
    done = run("inspect", model, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, b"")
    shown = {
        "ascii": "Gr\\xf6\\xdfe \\u6a21 \\U0001f999",
        "latin-1": "Größe \\u6a21 \\U0001f999",
        "utf-8": "Größe 模 🦙",
    }
    assert shown[encoding] in done.stdout.decode(encoding)
    assert run("inspect", model.with_name("nö.gguf"), PYTHONIOENCODING=encoding).returncode == 3


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "src")
    command = [os.fsencode(sys.executable), b"-m", b"streamconv", b"convert", os.fsencode(source), b"-o", b"\xff.gguf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))).exists()


def test_a_bug_of_ours_is_one_line_and_with_v_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("streamconv.recipe.registry.all_recipes", broken)
    assert cli.main(["architectures"]) == 1
    expected = "streamconv: internal error: ZeroDivisionError: a b (please report it with the output of -v)\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(ZeroDivisionError):
        cli.main(["architectures", "-v"])


def test_verbose_says_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.llama(tmp_path / "src")
    said = []
    for options in ([], ["-v"], ["--quiet"]):
        assert cli.main(["convert", str(source), "-o", str(tmp_path / "m.gguf"), "--force", "--sha256", *options]) == 0
        said.append(capsys.readouterr().out.splitlines())
    assert [len(lines) for lines in said] == [6, 10, 0]
    assert all(any("sha256" in line for line in lines) for lines in said[:2])


@pytest.mark.parametrize(
    ("words", "code", "meant", "command"),
    [
        ("convert . --out-type q8_0", "option-unknown", "--outtype", "streamconv convert"),
        ("convert . --verfy", "option-unknown", "--verify", "streamconv convert"),
        ("lora a --bsae b", "option-unknown", "--base", "streamconv lora"),
        ("inspect . --tensor=3", "option-unknown", "--tensors", "streamconv inspect"),
        ("convrt .", "command-unknown", "convert", "streamconv"),
        ("help inspct", "command-unknown", "inspect", "streamconv"),
        ("--verison", "option-unknown", "--version", "streamconv"),
        ("convert . --outtype q4km", "command-line", "q4_k_m", "streamconv convert"),
        ("convert . --io maped", "command-line", "mapped", "streamconv convert"),
    ],
)
def test_what_is_not_known_is_told_with_the_nearest_that_is(
    capsys: pytest.CaptureFixture[str], words: str, code: str, meant: str, command: str
) -> None:
    assert cli.main([*words.split(), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == code
    assert f"{meant}? {command} --help" in error["hint"]


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        ("--outtype q8_0 convert .", "streamconv convert --outtype"),
        ("convert . other", "streamconv convert --help"),
        ("lora a -q", "streamconv lora --help"),
    ],
)
def test_a_word_out_of_place_is_told_where_to_look(
    capsys: pytest.CaptureFixture[str], words: str, way_out: str
) -> None:
    assert cli.main([*words.split()]) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"{way_out})")


def test_paths_below_the_current_folder_are_shown_as_from_there(tmp_path: Path) -> None:
    """In what people read; the JSON of a program has them whole."""
    tiny.llama(tmp_path / "src")
    words = ("convert", "src", "-o", "m.gguf", "--sha256", "--modelfile")
    first, again = run(*words, cwd=tmp_path), run(*words, "--json", cwd=tmp_path)
    assert (first.returncode, again.returncode) == (0, 5)
    said = (first.stdout + first.stderr + again.stderr).decode()
    assert str(tmp_path) not in said
    assert "wrote m.gguf.manifest.json\n" in said and "wrote m.Modelfile\n" in said
    assert "create NAME -f m.Modelfile\n" in said and "streamconv: m.gguf: exists" in said
    assert json.loads(again.stdout)["error"]["file"] == str(tmp_path / "m.gguf")
    elsewhere = tmp_path / "x" / tmp_path.relative_to("/") / "m.gguf"  # with the folder's path in its own
    elsewhere.parent.mkdir(parents=True)
    elsewhere.touch()
    done = run("convert", tmp_path / "src", "-o", elsewhere, cwd=tmp_path)
    assert f"streamconv: {elsewhere.relative_to(tmp_path)}: " in done.stderr.decode()


def test_the_seconds_count_from_the_start_of_the_process(tmp_path: Path) -> None:
    """A second before the interpreter's first line of ours counts."""
    (tmp_path / "late.py").write_text(
        "import sys, time; time.sleep(1); from streamconv.cli import main; sys.exit(main())"
    )
    source = tiny.llama(tmp_path / "src")
    done = subprocess.run(
        [sys.executable, tmp_path / "late.py", "convert", source, "-o", tmp_path / "m.gguf", "--json"],
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["seconds"] > 1


def test_options_after_two_dashes_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.llama(tmp_path / "--odd")
    assert cli.main(["convert", "-o", "x.gguf", "--", "--odd"]) == 0
    assert (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("words", "same"), [("", "--help"), ("help", "--help"), ("help help", "--help"), ("help convert", "convert --help")]
)
def test_help_however_it_is_asked_for(words: str, same: str) -> None:
    done = run(*words.split(), COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == run(*same.split(), COLUMNS="80").stdout


def test_the_help_of_all_commands_fits_80_columns() -> None:
    assert max(map(len, run("--help", COLUMNS="80").stdout.decode().splitlines())) <= 80
    assert run("-V").stdout == run("--version").stdout


@pytest.mark.parametrize(
    ("template", "made"),
    [
        ("{name}-{ftype}.gguf", "src-q8_0.gguf"),
        ("{outtype}/{NAME}-{FTYPE}.gguf", "q8_0/{NAME}-Q8_0.gguf"),
        ("{OUTTYPE}-{x}.gguf", "Q8_0-{x}.gguf"),
    ],
)
def test_llama_cpp_s_options_for_name_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, made: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q8_0").mkdir()
    source = str(tiny.llama(tmp_path / "src"))
    words = ["convert", source, "--outfile", template, "--outtype", "Q8_0", "--model-name", "Called so"]
    assert cli.main(words) == 0
    assert b"Called so" in (tmp_path / made).read_bytes()


def test_the_last_lines_say_what_was_asked_and_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny.llama(tmp_path / "src"), tmp_path / "m 1.gguf"
    assert cli.main(["convert", str(source), "-o", str(out), "--verify", "--sha256", "--modelfile"]) == 0
    said = capsys.readouterr().out
    n_tensors = re.search(r"(\d+) tensors", said)
    assert n_tensors and f"verified: {n_tensors[1]} of {n_tensors[1]} tensors" in said
    assert f"sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}" in said
    written = {path for path in tmp_path.iterdir() if path not in (source, out)}
    assert len(written) == 2 and all(f"wrote {path}\n" in said for path in written)
    assert said.endswith(f"next: ollama create NAME -f '{tmp_path / 'm 1.Modelfile'}'\n")


def test_the_next_command_fits_the_output() -> None:
    def after(*outputs: Output, base: Path | None = None, gives: Gives = "text") -> str | None:
        report = Report("convert", outputs[0].path, "a", "d", "f16", 1, 1, {}, outputs, gives)
        return next_command(report, base)

    model = Output(Path("m.gguf"), 1)
    part_1, part_2 = (Output(Path(f"m-0000{number}-of-00002.gguf"), 1) for number in (1, 2))
    adapter = Output(Path("a b.gguf"), 1, role="adapter")
    assert after(model) == "llama-cli -m m.gguf"
    assert (
        after(model, Output(Path("mmproj-m.gguf"), 1, role="mmproj"))
        == "llama-mtmd-cli -m m.gguf --mmproj mmproj-m.gguf"
    )
    assert after(part_1, part_2) == "llama-cli -m m-00001-of-00002.gguf"
    assert after(part_1) is None and after(part_2) is None
    assert after(model, gives="vectors") == "llama-embedding -m m.gguf -p TEXT"
    assert after(model, gives="token vectors") == "llama-embedding -m m.gguf -p TEXT --pooling none"
    assert after(model, gives="scores") == "llama-server -m m.gguf --reranking"
    assert after(adapter, base=Path("b.gguf")) == "llama-cli -m b.gguf --lora 'a b.gguf'"
    assert after(adapter, base=Path("folder")) == "llama-cli -m BASE.gguf --lora 'a b.gguf'"


@pytest.mark.parametrize(
    ("environment", "encoding", "is_ascii"),
    [
        ({"LANG": "de_DE.UTF-8"}, "utf-8", False),
        ({"LANG": "de_DE.UTF-8"}, "ascii", True),
        ({"LC_ALL": "C", "LANG": "de_DE.UTF-8"}, "utf-8", True),
        ({"LC_CTYPE": "C.UTF-8", "LANG": "C"}, "utf-8", True),  # as Python changes it
        ({"LANG": "C.UTF-8"}, "utf-8", False),
        ({}, "utf-8", True),
    ],
)
def test_the_bar_is_ascii_where_the_locale_is(environment: dict[str, str], encoding: str, is_ascii: bool) -> None:
    assert _is_ascii(environment, encoding) is is_ascii


def test_progress_in_lines_for_a_log(tmp_path: Path) -> None:
    source, out = tiny.llama(tmp_path / "src"), tmp_path / "m.gguf"
    done = run("convert", source, "-o", out, "--verify", "--progress", "plain")
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 0 and b"\r" not in done.stderr
    assert [line.split()[0] for line in lines if ": 100% (" in line] == ["converting:", "verifying:"]
    assert run("convert", source, "-o", out, "--force").stderr == b""


@pytest.mark.parametrize("words", [(), ("--dry-run",), ("--verify", "--progress", "plain")])
def test_quiet_is_quiet(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run("convert", tiny.llama(tmp_path / "src"), "-o", tmp_path / "m.gguf", "--quiet", *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_dry_run_has_its_sums_first_and_tensors_where_asked_for(tmp_path: Path) -> None:
    words = ("convert", tiny.llama(tmp_path / "src"), "-o", "m.gguf", "--dry-run")
    short, long = (run(*words, *more, cwd=tmp_path).stdout.decode().splitlines() for more in ((), ("--tensors",)))
    n_tensors = int(re.findall(r"(\d+) tensors", "\n".join(short))[0])
    assert len(long) - len(short) == n_tensors
    assert long[:2] == short[:2]
    assert [line.split()[0] for line in short[:3]] == ["would", "llama,", "memory"]
    assert max(map(len, short)) <= 80


def test_the_version_and_what_decides_speed() -> None:
    for words in (("--version", "-v"), ("-v", "-V")):
        lines = run(*words).stdout.decode().splitlines()
        assert lines[0] == f"streamconv {streamconv.__version__}"
        assert any(line.startswith("kernels: floats ") for line in lines)
        assert f"numpy {np.__version__}" in lines
    assert "floats numpy" in run("-V", "-v", STREAMCONV_KERNELS="0").stdout.decode()


def test_architectures_for_programs() -> None:
    found = json.loads(run("architectures", "--json").stdout)
    rows = {row["architecture"]: row for row in reversed(found["architectures"])}  # the first of each
    assert found["schema"] == 1
    assert {row.arch for row in all_recipes()} == set(rows)
    assert rows["lfm2"]["group"] == "dense" and rows["lfm2moe"]["group"] == "mixture of experts"
    assert rows["gpt-oss"]["group"] == rows["granitemoe"]["group"] == "mixture of experts"  # stored as stacks only
    assert "Lfm2ForCausalLM" in rows["lfm2"]["names"]


def test_inspect_fails_on_what_no_loader_takes(tmp_path: Path) -> None:
    streamconv.convert(tiny.llama(tmp_path / "src"), whole := tmp_path / "m.gguf")
    assert run("inspect", whole).returncode == 0
    (cut := tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-64])
    for more in ((), ("--json",)):
        done = run("inspect", cut, *more)
        assert done.returncode == 3 and b"truncated" in done.stdout


def test_warnings_of_what_was_hardly_meant(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "src")

    def codes(**options: Any) -> set[str]:
        report = streamconv.convert(source, tmp_path / "m.gguf", dry_run=True, **options)
        return {warning.code for warning in report.warnings}

    assert "split-small" in codes(split=streamconv.SplitOptions(max_nbytes=500))
    assert "split-small" not in codes(split=streamconv.SplitOptions(max_nbytes=2_000_000))
    assert "modelfile-template" in codes(modelfile=True)
    assert "modelfile-template" not in codes()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(command: str) -> None:
    done = run(*command.split(), "--help", COLUMNS="80")
    assert [line for line in done.stdout.decode().splitlines() if len(line) > 80] == []


def test_the_last_lines_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny.llama(tmp_path / "src"), tmp_path / "m.gguf"
    adapter = tiny.peft_adapter(tmp_path / "french", source)
    assert cli.main(["convert", str(source), "--adapter", str(adapter), "-o", str(out), "--quiet"]) == 0
    assert cli.main(["verify", str(out), "--source", str(source), "--adapter", str(adapter)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"verified {out}: 20 of 20 tensors match {source} with {adapter} merged"
    assert second.endswith(" MiB")


def test_an_interrupted_comparison_says_how_far_it_was(tmp_path: Path) -> None:
    source, out = tiny.llama(tmp_path / "src"), tmp_path / "m.gguf"
    streamconv.convert(source, out)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        streamconv.verify(out, source, progress=stop)
    (note,) = caught.value.__notes__
    assert note.endswith(" were compared") and not note.startswith("0 bytes of 0")


def test_a_dry_run_fits_80_columns(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "A-Checkpoint-With-A-Name-That-Is-Rather-Long")
    command = [sys.executable, "-m", "streamconv", "convert", str(source), "--dry-run"]
    code, text = terminal.run(command, tmp_path)
    assert code == 0
    assert [line for line in terminal.rendered(text) if len(line) > 80] == []
