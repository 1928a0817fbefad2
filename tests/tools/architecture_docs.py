"""docs/architectures.md, made of the files in streamconv/architectures: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

from streamconv.recipe.registry import all_recipes

PATH = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Supported architectures

Generated from `streamconv/architectures/` by `make docs`; `streamconv architectures` prints the same. A checkpoint is
recognised by the name in `architectures` of its config.json. Adapters can be converted and merged for all of them.
[families.md](families.md) describes how each is tested, [adding-an-architecture.md](adding-an-architecture.md) how to
add one.

| models | `architectures` | GGUF |
|---|---|---|
"""


def render() -> str:
    """The page."""
    rows = sorted(
        (recipe.description, ", ".join(f"`{name}`" for name in recipe.hf_names), f"`{recipe.arch}`")
        for recipe in all_recipes()
    )
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
    sys.exit(0)
