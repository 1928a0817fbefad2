"""A fresh clone has what every target needs, and a missing library stops nothing but the tests that use it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.tools import environment

ROOT = Path(__file__).parents[2]
TARGETS = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
EXTRAS = ("distributed", "huggingface_hub", "matplotlib", "sentencepiece", "tokenizers", "xllamacpp")
WITHOUT = (
    "import sys, pytest\n"
    "sys.modules.update(dict.fromkeys(sys.argv[1].split(',')))\n"  # None there: an import of it fails
    "sys.exit(pytest.main(sys.argv[2:]))"
)


def pytest_without(missing: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process that cannot import `missing`, names with commas between."""
    command = [sys.executable, "-c", WITHOUT, missing, "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def commands_of(target: str) -> list[str]:
    """The commands of a target and of everything that it depends on, as if nothing had been made yet."""
    make = ["make", "--no-print-directory", "--dry-run", "--always-make", target]
    return subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_target_finds_the_same_environment_whatever_ran_before_it() -> None:
    """`make test` once passed only after `make bench-smoke`, which put matplotlib into the same environment."""
    installed: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for target in sorted({*TARGETS} - {"help", "clean"}):
        commands = commands_of(target)
        made = {
            name for line in commands for name in re.findall(r"-m (?:venv|tests\.tools\.environment \w+) (\S+)", line)
        }
        used = {name for line in commands for name in re.findall(r"^(\.venv[\w-]*)/bin/", line)}
        assert used and used <= made, target
        for name in used:
            installed[name].add(tuple(line for line in commands if line.startswith(f"{name}/bin/pip ")))
    assert {name: len(ways) for name, ways in installed.items()} == dict.fromkeys(installed, 1)


def test_ci_begins_with_what_the_readme_says() -> None:
    promised = re.findall(r"^make [a-z-]+", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[:2]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:as_a_new_user|make) [a-z-]+", script, re.MULTILINE)
    assert commands[:2] == [command.replace("make", "as_a_new_user") for command in promised]


def test_missing_libraries_stop_no_collection() -> None:
    done = pytest_without(",".join(EXTRAS), "--collect-only")
    assert done.returncode == 0, f"take it from tests.extras\n{done.stdout}"
    assert "error" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("missing", "test"),
    [
        ("distributed", "tests/unit/test_batch_dask.py::test_a_worker_that_is_killed_loses_nothing"),
        ("xllamacpp", "tests/golden/test_models.py::test_run_time_tokenizes_as_tokenizers_does"),
    ],
)
def test_a_test_whose_library_is_missing_fails(missing: str, test: str) -> None:
    done = pytest_without(missing, test)
    assert done.returncode == 1, done.stdout
    assert "skipped" not in done.stdout and "passed" not in done.stdout


def test_the_minima_are_those_of_the_package_and_of_its_tests() -> None:
    project = {
        "name": "us",
        "dependencies": ["one>=1.2", "two-b>=3"],
        "optional-dependencies": {"test": ["us[more]", "three>=4.5.6"], "more": ["four>=7"], "other": ["five>=8"]},
    }
    assert environment.minima(project) == {"one": "1.2", "two-b": "3", "four": "7", "three": "4.5.6"}


@pytest.mark.parametrize("requirement", ["one", "one>1", "one>=1,<2", "one~=1.0", "one>=1; python_version < '3.13'"])
def test_a_requirement_without_a_plain_minimum_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match="minimum"):
        environment.minima({"name": "us", "dependencies": [requirement], "optional-dependencies": {"test": []}})
