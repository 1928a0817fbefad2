"""A few of the trials that `make kills` runs by the hundred."""

from __future__ import annotations

import random
from pathlib import Path

from tests.fault.shards import Trials


def test_a_mapped_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    commands = ("f16", "merge", "lora", "quantize", "verify")
    trials, chance = Trials(tmp_path, "mapped", commands), random.Random(14)
    ends = {trials.trial(chance, command) for command in commands * 2}
    assert ends - {"done"}


def test_a_source_that_changes_while_it_is_read_at_positions(tmp_path: Path) -> None:
    trials, chance = Trials(tmp_path, "positioned", ("q8_0", "verify")), random.Random(14)
    for command in trials.commands:
        trials.trial(chance, command)
