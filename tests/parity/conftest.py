"""Sources of the built cases for the live references, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cases

MEMORY = 4 << 30  # a bound on the whole process, and torch is in this one


class Sources:
    """Checkpoints and adapters of the built cases under one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def model(self, name: str) -> Path:
        return self._root / name if (self._root / name).exists() else cases.build(name, self._root)

    def adapter(self, name: str) -> tuple[Path, Path]:
        """An adapter and its base."""
        if (self._root / name).exists():
            return self._root / name, self._root / (cases.ADAPTERS | cases.MERGES)[name][0]
        return cases.build_adapter(name, self._root)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))
