"""The reference that docs/adding-an-architecture.md is held to is what transformers computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cases import GOLDENS
from tests.oracles import reference
from tests.tools import arcee

pytestmark = pytest.mark.parity


def test_the_committed_logits_are_transformers(tmp_path: Path) -> None:
    logits = reference.logits(arcee.build(tmp_path / "Arcee-tiny"), [1, 33, 120, 7, 300, 201, 64, 90])
    np.testing.assert_allclose(np.load(GOLDENS / "arcee.logits.npy"), logits, atol=1e-4)
