"""docs/coming-from.md: the options that it names as ours are there."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from streamconv.cli.parser import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
ROW = re.compile(r"\| (.+?) \| (.+) \|")


def test_every_option_of_ours_exists() -> None:
    (commands,) = (one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
    known = {flag for parser in commands.choices.values() for flag in parser._option_string_actions}
    rows = [match.groups() for line in PAGE.read_text(encoding="utf-8").splitlines() if (match := ROW.fullmatch(line))]
    assert len(rows) > 30
    named = {(theirs, flag) for theirs, ours in rows for flag in re.findall(r"--[a-z][a-z0-9-]*", ours)}
    # "the same" stands for every option of the left column
    named |= {
        (theirs, flag)
        for theirs, ours in rows
        if ours.startswith("the same")
        for flag in re.findall(r"--[a-z][a-z0-9-]*", theirs)
    }
    assert {(theirs, flag) for theirs, flag in named if flag not in known} == set()
