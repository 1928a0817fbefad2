"""README is also the page on PyPI, where a link or picture relative to the repository is broken."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_has_no_relative_link() -> None:
    targets = re.findall(r"\]\(([^)]*)\)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=\"([^\"]*)\"", README, re.MULTILINE)
    assert [target for target in map("".join, targets) if not target.startswith("https://")] == []


def test_it_names_every_page_and_no_other() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"`docs/([\w.-]+\.md)`", README)) <= pages
    table = README.partition("## Documentation")[2]
    assert set(re.findall(r"`([\w-]+\.md)`", table)) - {"CHANGELOG.md"} == pages
