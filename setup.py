"""Adds the man page and the shells' completion to what pyproject.toml installs; they are made of the command's parser.

The parser needs nothing but the standard library, so that this runs in any build environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MADE = Path("build") / "share"


def shared_files() -> list[tuple[str, list[str]]]:
    """(folder below the prefix, files) of each, as data_files has them."""
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True
    try:
        from streamconv.cli.shells import PLACES, text_for
    finally:
        sys.path.pop(0)
    found = []
    for what, place in PLACES.items():
        path = MADE / place
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text_for(what), encoding="utf-8")
        found.append((str(Path(place).parent), [str(path)]))
    return found


setup(data_files=shared_files())
