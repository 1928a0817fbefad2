"""A few of the trials that `make kills` runs by the hundred."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fault.shards import COMMANDS, Trials


@pytest.mark.parametrize("io", ["mapped", "positioned"])
def test_a_source_that_changes_while_it_is_read(tmp_path: Path, io: str) -> None:
    trials = Trials(tmp_path, io)
    chance = random.Random(14)
    ends = {trials.trial(chance, command) for command in COMMANDS}
    assert ends - {"done"}
