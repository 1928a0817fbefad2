"""Models of the built and given cases, and what streamconv makes of them, each made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

import streamconv
from tests import cases
from tests.oracles import ggufs


class Workshop:
    """Sources and outputs under one folder, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def source(self, name: str) -> Path:
        """The checkpoint of a case, given or built."""
        if name.endswith("-given"):
            return cases.GIVEN / name
        src = self._root / "sources"
        return src / name if (src / name).exists() else cases.build(name, src)

    def gguf(self, name: str, outtype: str = "f32", dialect: str = "llama.cpp") -> Path:
        """The case converted by streamconv."""
        dst = self._root / f"{name}-{outtype}-{dialect}.gguf"
        if not dst.exists():
            streamconv.convert(self.source(name), dst, outtype=outtype, dialect=dialect)
        return dst

    def read(self, name: str, outtype: str = "f32", dialect: str = "llama.cpp") -> ggufs.Gguf:
        return ggufs.read(self.gguf(name, outtype, dialect))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("golden"))
