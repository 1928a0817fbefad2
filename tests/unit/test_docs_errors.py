"""docs/errors.md has every code of the source, and the source no error without one."""

from __future__ import annotations

import re

import pytest

from streamconv.errors import SourceError, StreamconvError
from streamconv.report import error_to_json
from tests.tools import error_docs

KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def test_the_page_is_what_the_source_says() -> None:
    assert error_docs.PATH.read_text(encoding="utf-8") == error_docs.render(), "run make docs"


def test_every_error_has_a_literal_code() -> None:
    assert error_docs.without_code() == []


def test_every_helper_that_takes_a_code_is_known() -> None:
    """Else the page lacks the codes of its callers."""
    assert error_docs.unknown_helpers() == []


def test_codes_are_kebab_case() -> None:
    codes = {site.code for site in error_docs.sites()}
    assert len(codes) > 150
    assert [code for code in codes if not KEBAB.fullmatch(code)] == []


def test_a_code_is_required() -> None:
    with pytest.raises(TypeError, match="code"):
        SourceError("words")  # type: ignore[call-arg]


def test_json_has_the_code() -> None:
    said = error_to_json(StreamconvError("words", code="a-cause"))["error"]
    assert (said["kind"], said["code"]) == ("internal", "a-cause")
