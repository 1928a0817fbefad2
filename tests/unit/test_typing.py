"""The public names as mypy sees them (`make types` asks pyright, too): right uses pass, wrong ones are refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import streamconv

USES = Path(__file__).parents[1] / "typing" / "public_names.py"
ROOT = Path(__file__).parents[2]


def mypy(file: Path) -> list[str]:
    """The errors that mypy finds."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def test_right_uses_pass_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    assert mypy(USES) == []  # an ignore that is not needed would be an error
    text = USES.read_text(encoding="utf-8")
    wrong = [number for number, line in enumerate(text.splitlines(), 1) if "# type: ignore" in line]
    bare = tmp_path / "bare.py"
    bare.write_text(re.sub(r"  # type: ignore.*", "", text), encoding="utf-8")
    assert sorted({int(line.split(":")[1]) for line in mypy(bare)}) == wrong


def test_every_public_name_is_used() -> None:
    text = USES.read_text(encoding="utf-8")
    assert [name for name in streamconv.__all__ if not re.search(rf"\b{name}\b", text)] == []
