"""An environment at one end of what pyproject.toml admits: `make lowest` and `make newest`.

`python -m tests.tools.environment lowest FOLDER` takes the oldest Python of this machine and installs, of each
requirement of the package and of its extra `test`, the very version that is declared as its minimum; `newest` takes
the newest Python and the newest release of everything.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.tools import pythons

ROOT = Path(__file__).parents[2]
EXTRA = "test"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<extras>[\w,-]+)\])?(?:>=(?P<minimum>[\d.]+))?")


def minima(project: dict[str, Any], extra: str = EXTRA) -> dict[str, str]:
    """{name: lowest version} of all that the package and its `extra` require, extras of its own followed.

    Raises:
        ValueError: a requirement has no minimum, or is written in another form than `name>=version`.
    """
    return dict(_minima(project, [*project["dependencies"], *project["optional-dependencies"][extra]]))


def _minima(project: dict[str, Any], requirements: list[str]) -> Iterator[tuple[str, str]]:
    for requirement in requirements:
        parts = _REQUIREMENT.fullmatch(requirement)
        if parts is not None and parts["name"] == project["name"] and parts["extras"]:
            for extra in parts["extras"].split(","):
                yield from _minima(project, project["optional-dependencies"][extra])
        elif parts is not None and parts["minimum"] and not parts["extras"]:
            yield parts["name"], parts["minimum"]
        else:
            raise ValueError(f"pyproject.toml: {requirement!r} does not declare a minimum as name>=version")


def main() -> int:
    end, folder = sys.argv[1], Path(sys.argv[2])
    found = pythons.installed()
    version = {"lowest": min, "newest": max}[end](found, key=lambda text: int(text.partition(".")[2]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = minima(project) if end == "lowest" else {}
    subprocess.run([found[version], "-m", "venv", "--clear", folder], check=True)
    (folder / "pins.txt").write_text("".join(f"{name}=={pin}\n" for name, pin in pins.items()), encoding="utf-8")
    pip = [folder / "bin" / "python", "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "-c", folder / "pins.txt", "-e", f"{ROOT}[{EXTRA}]"], check=True)
    subprocess.run([*pip, "check"], check=True)
    print(f"{end}: Python {version}; {' '.join(f'{name}=={pin}' for name, pin in pins.items()) or 'newest releases'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
