"""Another version of streamconv, where EARLIER names the Python of an environment that has it.

Fair: the same command line, the same source, and an environment with the same versions of what both import. `-P` keeps
the current folder, and with it the version at hand, out of the other's way.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from benchmarks.converters import Converter


def converter() -> Converter | None:
    """The other version, or None where EARLIER is not set.

    Raises FileNotFoundError, with a line for the user, where that is no program.
    """
    if not (named := os.environ.get("EARLIER")):
        return None
    python = Path(named).expanduser()
    if shutil.which(python) is None:
        raise FileNotFoundError(f"EARLIER={named} is no program: name the Python of its environment")

    def command(src: Path, dst: Path, outtype: str) -> list[str]:
        words = ["convert", str(src), "-o", str(dst), "--outtype", outtype, "--quiet", "--json"]
        return [str(python.absolute()), "-P", "-m", "streamconv", *words]

    return Converter("earlier", command)
