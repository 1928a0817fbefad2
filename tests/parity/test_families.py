"""The committed references of the families are what today's llama.cpp converter, transformers and PEFT make."""

from __future__ import annotations

import pytest

from tests.families.table import FAMILIES
from tests.tools import families

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", FAMILIES)
def test_references_are_as_committed(name: str) -> None:
    families.check(name)
