"""docs/faults.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


def test_every_test_that_the_table_names_exists() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/\w+\.py|\.\.\.)::\w+)`", text)
    assert len(named) > 25
    path = ""
    for entry in named:
        where, _, test = entry.partition("::")
        path = path if where == "..." else where
        assert f"def {test}(" in (TESTS / path).read_text(encoding="utf-8"), entry
    for path in re.findall(r"`((?:unit|fault|fuzz|property|attacks)/[\w./]*)`", text):
        assert (TESTS / path).exists(), path
    for path in re.findall(r"\]\((\.\./[\w./]+)\)", text):
        assert (ROOT / "docs" / path).exists(), path
