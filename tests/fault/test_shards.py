"""A few of the trials that `make kills` runs by the hundred."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fault.shards import Conversion


@pytest.mark.parametrize("io", ["mapped", "positioned"])
def test_a_shard_that_changes_while_it_is_converted(tmp_path: Path, io: str) -> None:
    conversion = Conversion(tmp_path, io)
    chance = random.Random(14)
    ends = {conversion.trial(chance) for _ in range(8)}
    assert ends - {"done"}
