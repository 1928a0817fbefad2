"""docs/python.md: its examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import tiny

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.lfm2(tmp_path / "LFM2-1.2B")
    for example in EXAMPLES:
        exec(compile(example, str(PAGE), "exec"), {})
    made = {path.name: path.stat().st_size for path in tmp_path.glob("*.gguf")}
    assert set(made) == {"LFM2-1.2B-q8_0.gguf", "m.gguf"}
    said = capsys.readouterr().out
    assert f"LFM2-1.2B-q8_0.gguf {made['LFM2-1.2B-q8_0.gguf']} True\n" in said
    assert f"{made['m.gguf']} {made['m.gguf']}\n" in said
