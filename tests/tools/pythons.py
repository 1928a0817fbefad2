"""The interpreters of this machine that the package is meant for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
_NEEDED = "import ensurepip, ssl, venv, zlib"  # Debian's Python has venv, and no ensurepip without python3-venv


def installed() -> dict[str, str]:
    """{version: path}, oldest first, of those that can make an environment: on the PATH, pyenv's, or this one."""
    return {version: path for version in VERSIONS if (path := _find(version)) is not None}


def _find(version: str) -> str | None:
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    built = sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")))
    this = [sys.executable] if sys.version.startswith(f"{version}.") else []  # it need not be on the PATH
    for candidate in (shutil.which(f"python{version}"), *built, *this):
        if candidate and subprocess.run([candidate, "-c", _NEEDED], capture_output=True).returncode == 0:
            return candidate
    return None
