"""What all tests share: hypothesis without clocks or chance, and parity tests only where asked for (`-m parity`)."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("streamconv", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("streamconv")

PARITY = Path(__file__).parent / "parity"


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs ignore SIGINT, and so would the processes that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.option.markexpr = config.option.markexpr or "not parity and not slow"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Parity modules import torch at their head, so an environment without it must not even collect them."""
    asked = "parity" in config.option.markexpr.replace("not parity", "")
    return True if collection_path == PARITY and not asked else None
