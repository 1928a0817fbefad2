"""Adds the man page and the shells' completion to what is installed; `tool.setuptools.cmdclass` names the class here.

They are made of the command's parser, which needs only the standard library, so that any build environment can do it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from setuptools.command.build_py import build_py

ROOT: Final = Path(__file__).resolve().parents[2]
MADE: Final = Path("build") / "share"  # below ROOT, where a build runs


class BuildPy(build_py):  # type: ignore[misc]
    """setuptools' own command, which also makes the shared files."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.distribution.data_files = shared_files()


def shared_files() -> list[tuple[str, list[str]]]:
    """(folder below the prefix, files) of each file made, in the form that setuptools takes as data_files."""
    sys.path.insert(0, str(ROOT))  # setuptools loads this module by its path, so that the package is not importable
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
