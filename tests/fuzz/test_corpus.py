"""The corpus through every target, and a few hundred mutants of it: what fuzzing found once stays fixed."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from streamconv.engine.layout import memory_failures
from streamconv.errors import SourceError, StreamconvError
from tests.fuzz.loop import MAX_GROWTH_NBYTES, fuzz, judge, lay_out, read_corpus
from tests.fuzz.targets import TARGETS

CASES = [(target, name) for target in TARGETS for name in read_corpus(target)]
REFUSED = {"journal"}  # that target ends every run with an error, so that nothing is published


@pytest.mark.parametrize(("target", "name"), CASES)
def test_case(target: str, name: str, tmp_path: Path) -> None:
    lay_out(tmp_path / "case", read_corpus(target)[name])
    refused, _, wrong = judge(TARGETS[target][1], tmp_path / "case")
    assert wrong is None
    if name.startswith("valid"):
        assert refused == (target in REFUSED)


@pytest.mark.parametrize("target", TARGETS)
def test_mutants(target: str, tmp_path: Path) -> None:
    tally = fuzz(target, random.Random(target), tmp_path, executions=60)
    assert tally.n_executions == 60
    assert [finding.what for finding in tally.findings.values()] == []


class Silent(StreamconvError):
    """An error that would look like an internal error to people: no exit code of its own."""


class TwoLines(SourceError):
    def __str__(self) -> str:
        return "one\ntwo"


@pytest.mark.parametrize(
    "error", [KeyError("x"), Silent("x", code="x"), TwoLines("x", code="x"), RecursionError(), MemoryError()], ids=repr
)
def test_the_oracle_sees_what_is_no_error_for_people(error: Exception, tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise error

    assert judge(fail, tmp_path)[2] is not None
    assert judge(memory_failures()(fail), tmp_path)[2] is not None
    assert judge(lambda _: None, tmp_path)[::2] == (False, None)


def test_the_oracle_sees_memory(tmp_path: Path) -> None:
    def take(_: Path) -> None:
        bytearray(b"x") * (MAX_GROWTH_NBYTES + (1 << 20))

    for _ in range(2 if sys.platform == "linux" else 1):  # the second takes no more than the process has taken before
        assert "memory" in (judge(take, tmp_path)[2] or "")
