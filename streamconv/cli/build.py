"""Adds the man page and the shell completions to what is installed; `tool.setuptools.cmdclass` names this class.

They are generated from the command's parser, which needs only the standard library, so any build environment will do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from setuptools.command.build_py import build_py

ROOT: Final = Path(__file__).resolve().parents[2]
MADE: Final = Path("build") / "share"  # relative to ROOT, where a build runs


class BuildPy(build_py):  # type: ignore[misc]
    """setuptools' build_py, which also generates the shared files."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.distribution.data_files = shared_files()


def shared_files() -> list[tuple[str, list[str]]]:
    """Generate the files and return (folder below the prefix, [path]) for each, as setuptools expects in data_files."""
    sys.path.insert(0, str(ROOT))  # setuptools loads this module by its path, so the package is not importable
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
