"""Errors by their codes, so that tests hold on to causes and words are free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from streamconv.errors import StreamconvError

E = TypeVar("E", bound=StreamconvError)


@contextmanager
def raises(kind: type[E], *, code: str) -> Iterator[pytest.ExceptionInfo[E]]:
    """As `pytest.raises`: the error has this code, or sums up a problem that has it."""
    with pytest.raises(kind) as caught:
        yield caught
    assert code in codes_of(caught.value), f"{codes_of(caught.value)}: {caught.value}"


def codes_of(error: StreamconvError) -> set[str]:
    """The code of an error and those of the problems that it sums up."""
    return {error.code, *(str(problem["code"]) for problem in error.problems)}
