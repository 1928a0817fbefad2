"""An option is declared once, in streamconv/options.py: these tests name each place where it is missing."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv import options
from streamconv.batch import jobs_file
from streamconv.batch.jobs_file import JobSpec, read_jobs
from streamconv.cli.parser import build_parser
from streamconv.ggml.outtypes import WORDS
from streamconv.gguf.names import RENAMES
from streamconv.metadata.vocab.choice import PREFERENCES
from tests import tiny

DOCS = Path(__file__).parents[2] / "docs"
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "convert": streamconv.convert,
    "lora": streamconv.convert_adapter,
    "quantize": streamconv.quantize,
    "verify": streamconv.verify,
}
ONLY_ON_THE_COMMAND_LINE = {"help", "output", "json", "quiet", "progress", "tensors", "verbose"}


def parser_of(command: str) -> argparse.ArgumentParser:
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    parser = commands.choices[command]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_function_has_the_parameters_of_its_command(command: str) -> None:
    found = {
        name: parameter
        for name, parameter in inspect.signature(FUNCTIONS[command]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert {name: parameter.default for name, parameter in found.items()} == options.parameters(command)
    annotations = {field.name: field.type for group in options.GROUPS for field in dataclasses.fields(group)}
    assert {name: parameter.annotation for name, parameter in found.items()} == {
        name: annotations[name] for name in found
    }


@pytest.mark.parametrize("command", FUNCTIONS)
def test_no_function_takes_keywords_that_it_does_not_name(command: str) -> None:
    kinds = {parameter.kind for parameter in inspect.signature(FUNCTIONS[command]).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_help_of_a_function_explains_its_options(command: str) -> None:
    text = str(FUNCTIONS[command].__doc__)
    assert "{options}" not in text
    assert [name for name in options.parameters(command) if f"\n        {name}: " not in text] == []
    assert "Returns:" in text and "Raises:" in text


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_command_line_has_every_option_and_no_other(command: str) -> None:
    found = {action.dest: action for action in parser_of(command)._actions if action.option_strings}
    declared = {one.name: one for one in options.taken_by(command) if one.option.flag is not None}
    required = {name for name, action in found.items() if action.required}
    parameters = inspect.signature(FUNCTIONS[command]).parameters.values()
    own = {one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD}
    assert set(found) - ONLY_ON_THE_COMMAND_LINE - required - own == set(declared) - required
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, one in declared.items():
        if name not in required:
            assert one.option.flag in found[name].option_strings
        assert f"`{one.option.flag}" in page, "run make docs"


def test_the_words_are_those_of_the_tables() -> None:
    def one_of(name: str) -> tuple[str, ...]:
        (found,) = (one for one in options.declared() if one.name == name)
        return found.option.choices_for(found.option.commands[0])

    assert one_of("outtype") == WORDS
    assert one_of("dialect") == tuple(RENAMES)
    assert one_of("tokenizer") == PREFERENCES


def test_a_jobs_file_takes_every_option_that_has_a_key(tmp_path: Path) -> None:
    values: dict[options.Kind, Any] = {
        options.Kind.FLAG: True,
        options.Kind.COUNT: 3,
        options.Kind.NUMBER: 0.5,
        options.Kind.SIZE: "77MiB",
    }
    (tmp_path / "m").mkdir()
    for key, one in jobs_file.OPTIONS.items():
        value = values.get(one.option.kind, (*one.option.choices_for(one.option.commands[0]), "text")[0])
        command = one.option.commands[0]
        entry = {"command": command, "source": "m", "output": "out.gguf", key: value}
        entry |= {"base": "b"} if command == "lora" else {}
        (tmp_path / "jobs.jsonl").write_text(json.dumps(entry))
        (job,) = read_jobs(tmp_path / "jobs.jsonl")
        expected = str(tmp_path / value) if key in ("adapter", "imatrix", "recipe") else value
        expected = (expected,) if key == "recipe" else expected
        assert job.given()[key] == expected, key
        assert JobSpec.from_json(json.loads(json.dumps(job.to_json()))) == job
        assert one.name in options.arguments(command, {one.name: value}) or one.of is options.SplitOptions


def test_the_page_of_jobs_files_names_every_key() -> None:
    page = (DOCS / "batch.md").read_text(encoding="utf-8")
    assert [key for key in jobs_file.KEYS if f"`{key}`" not in page] == []


def test_options_of_a_job_reach_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from streamconv.cli import main

    source = tiny.llama(tmp_path / "llama")
    (tmp_path / "jobs.toml").write_text(
        '[defaults]\nsha256 = true\nthreads = 1\nmodelfile = true\n[[job]]\nsource = "llama"\noutput = "x.gguf"\n'
        'general_name = "Named by a job"\n'
    )
    assert main(["batch", str(tmp_path / "jobs.toml"), "--quiet", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["job"]["options"]["sha256"] is True
    assert json.loads(line)["report"]["outputs"][0]["sha256"]
    assert (tmp_path / "Modelfile").exists() or any("odelfile" in path.name for path in tmp_path.iterdir())
    assert b"Named by a job" in (tmp_path / "x.gguf").read_bytes()
    assert source.is_dir()


@pytest.mark.parametrize("name", ["convert", "convert_adapter", "verify"])
def test_a_wrong_keyword_is_pythons_own_error(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'thread'"):
        getattr(streamconv, name)("a", "b", thread=2)


def test_dir_and_help_show_what_is_public() -> None:
    assert {"convert", "convert_adapter", "verify", "inspect", "Report", "StreamconvError"} <= set(dir(streamconv))
    assert set(streamconv.__all__) <= set(dir(streamconv))
    code = "import streamconv; help(streamconv)"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("convert", "convert_adapter", "verify", "inspect"):
        assert f"    {name}(" in text, name
    assert "class Report" in text
    assert "max_memory: ceiling of resident memory" in text


def test_the_command_starts_without_what_is_heavy() -> None:
    code = "import sys, streamconv.options; print([m for m in ('numpy', 'gguf', 'tqdm', 'psutil') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
