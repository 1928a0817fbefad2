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

import numpy as np
import pytest

import streamconv
from streamconv import options
from streamconv.batch import jobs_file
from streamconv.batch.jobs_file import JobSpec, read_jobs
from streamconv.cli.parser import build_parser
from streamconv.errors import SourceError, UsageError
from streamconv.ggml.outtypes import WORDS
from streamconv.gguf.names import RENAMES
from streamconv.metadata.vocab.choice import PREFERENCES
from tests import tiny
from tests.raising import raises

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


# Values that no parameter takes, or none of that type: True is an int to isinstance, a text a sequence.
WRONG: dict[str, list[Any]] = {
    "bool": [1, "yes", None],
    "str": [4, b"text", ["text"], None],
    "str | None": [4, b"text", ["text"]],
    "int | None": [True, 2.0, "2"],
    "float | None": [True, "2"],
    "int | str | None": [True, 1.5],
    "str | Path": [4, b"out", None],
    "str | Path | None": [4, b"out"],
    "Source": [4, b"in", ["in"], None],
    "Source | None": [4, b"in", ["in"]],
    "Sequence[str]": [4, "text", [4], None, {"text"}],
    "Sequence[AdapterSpec]": [4, "path", Path("path"), [4], [("path", 0.5, 2)], [("path", "0.5")], [("path", True)]],
    "Sequence[RecipeSource]": [4, "recipe.py", Path("recipe.py"), [4]],
    "SplitOptions | None": [4, {"max_tensors": 2}],
    "Profile | None": ["profile.json"],
    "Callable[[int, int], None] | None": [3, "print"],
    "Callable[[], bool] | None": [False],
}


@pytest.mark.parametrize("function", [*FUNCTIONS.values(), streamconv.inspect, streamconv.quants])
def test_a_wrong_type_is_a_usage_error_that_names_the_parameter(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    right = {one.name: "nothing" for one in parameters if one.default is one.empty}
    for one in parameters:
        for value in (object(), *WRONG[one.annotation]):
            with raises(UsageError, code="argument-type") as caught:
                function(**right | {one.name: value})
            assert caught.value.exit_code == 2
            assert caught.value.message.startswith(f"{one.name} is ")
            assert "\n" not in str(caught.value)


def test_arguments_by_position_are_checked() -> None:
    with raises(UsageError, code="argument-type") as caught:
        streamconv.convert("nothing", 4)  # type: ignore[arg-type]
    assert caught.value.message == "dst is 4, expected str, Path or None"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("adapters", [[], ["a", Path("a"), ("a", 1)], (("a", np.float32(0.5)),)]),
        ("max_memory", ["100MiB", 1 << 28]),
        ("progress", [print, None]),
        ("tensor_type", [["a=q8_0"], ("a=q8_0",)]),
        ("dst", ["x", Path("x"), None]),
    ],
)
def test_every_declared_type_fits(tmp_path: Path, name: str, values: list[Any]) -> None:
    """The first fault is then what the source lacks."""
    for value in values:
        with raises(SourceError, code="source-missing"):
            streamconv.convert(tmp_path / "nothing", **{name: value})


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"max_tensors": True}, "argument-type"),
        ({"max_nbytes": "4G"}, "argument-type"),
        ({"only_part": 1.0}, "argument-type"),
        ({"max_nbytes": 0}, "split-size"),
    ],
)
def test_splits_are_checked_when_they_are_made(given: dict[str, Any], code: str) -> None:
    with raises(UsageError, code=code) as caught:
        options.SplitOptions(**given)
    assert caught.value.message.startswith(f"{next(iter(given))} is ")


# Declares one more option before anything has read the declarations, and prints where it arrives.
ONE_MORE = """
import dataclasses, inspect, json, pathlib, sys
from streamconv import options
from streamconv.options import commands, language

@dataclasses.dataclass(frozen=True)
class More(language.Options):
    colour: str | None = options.option(
        None, "the colour of the file", kind=options.Kind.TEXT, commands=("convert",), metavar="COLOUR"
    )

commands.GROUPS = (*commands.GROUPS, More)

import streamconv
from streamconv.batch import jobs_file
from streamconv.cli.parser import build_parser
from tests.tools import cli_docs

@options.public("convert")
def convert(*, colour: str | None = None):
    return More.of(locals())

try:
    convert(colour=4)
except streamconv.UsageError as error:
    refused = error.message

(job,) = jobs_file.read_jobs(pathlib.Path(sys.argv[1]))
given = vars(build_parser().parse_args(["convert", "m", "--colour", "red"]))
batch_page = (cli_docs.PATH.parent / "batch.md").read_text()
print(json.dumps({
    "signature lacks": [*options.parameters("convert").keys() - inspect.signature(streamconv.convert).parameters],
    "docstring": [line.strip() for line in streamconv.convert.__doc__.splitlines() if "colour" in line],
    "command line": options.arguments("convert", given)["colour"],
    "docs/cli.md": [line for line in cli_docs.render().splitlines() if "--colour" in line],
    "jobs file": options.arguments("convert", job.given())["colour"],
    "docs/batch.md lacks": [key for key in jobs_file.KEYS if f"`{key}`" not in batch_page],
    "library": convert(colour="blue").colour,
    "wrong type": refused,
}))
"""


def test_one_more_option_is_one_entry(tmp_path: Path) -> None:
    """One entry reaches the library, the command line, jobs files and docs, or the tests here name what lacks it."""
    (tmp_path / "m").mkdir()
    (tmp_path / "jobs.jsonl").write_text('{"source": "m", "output": "x.gguf", "colour": "green"}')
    command = [sys.executable, "-c", ONE_MORE, str(tmp_path / "jobs.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=DOCS.parent)
    assert json.loads(done.stdout) == {
        "signature lacks": ["colour"],
        "docstring": ["colour: the colour of the file."],
        "command line": "red",
        "docs/cli.md": ["| `--colour COLOUR` | the colour of the file |"],
        "jobs file": "green",
        "docs/batch.md lacks": ["colour"],
        "library": "blue",
        "wrong type": "colour is 4, expected str or None",
    }


def test_dir_and_help_show_what_is_public() -> None:
    assert {"convert", "convert_adapter", "verify", "inspect", "Report", "StreamconvError"} <= set(dir(streamconv))
    assert set(streamconv.__all__) <= set(dir(streamconv))
    code = "import streamconv; help(streamconv)"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("convert", "convert_adapter", "verify", "inspect"):
        assert f"    {name}(" in text, name
    assert "class Report" in text
    assert "max_memory: limit on resident memory" in text


def test_the_command_starts_without_what_is_heavy() -> None:
    code = "import sys, streamconv.options; print([m for m in ('numpy', 'gguf', 'tqdm', 'psutil') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
