"""The table of families and the page about it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.families import build, table
from tests.tools import architecture_docs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def test_the_page_lists_where_llama_cpps_converter_is_not_the_reference() -> None:
    _, _, listed = PAGE.read_text(encoding="utf-8").partition("compares the two -->\n")
    assert listed.split("\n") == ["", *table.exceptions(), ""]


def test_each_entry_has_its_references() -> None:
    assert {path.name for path in build.DATA.iterdir()} == set(table.FAMILIES)


def test_seeds_differ() -> None:
    seeds = [family.seed for family in table.FAMILIES.values()]
    assert len(seeds) == len(set(seeds))


@pytest.mark.parametrize("name", table.FAMILIES)
def test_dimensions_are_pairwise_distinct(name: str) -> None:
    """A matrix whose extents are equal would hide a transposition."""
    tensors = {tensor: shape for tensor, (_, *shape) in build.spec(name)["tensors"].items() if "vision" not in tensor}
    shapes = {tuple(shape) for shape in tensors.values() if len(shape) > 1}
    square = {shape for shape in shapes if len(shape) == 2 and shape[0] == shape[1]}
    config = json.loads((build.DATA / name / "config.json").read_text(encoding="utf-8"))
    hidden = config.get("text_config", config)["hidden_size"]
    assert square <= {(hidden, hidden)}, square  # q and o, where a head is a fraction of the hidden size
    assert all(math.prod(shape) < 2**23 for shape in shapes)


def test_the_list_of_architectures_is_that_of_their_files() -> None:
    assert architecture_docs.PATH.read_text(encoding="utf-8") == architecture_docs.render()
