"""Checkpoints in memory, for tests that need tensors but no files.

Provides stored tensors without a file, binds them to a config, and reads all rows of a lazy tensor as an array.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from streamconv.checkpoint.config import Config
from streamconv.gguf.format import PackedArray, Scalar
from streamconv.lazy.leaves import Resident
from streamconv.lazy.node import LazyTensor, Workspace, peak_nbytes, read
from streamconv.lazy.scratch import Scratch
from streamconv.recipe.bind import bind
from streamconv.recipe.language import Model, Recipe
from streamconv.recipe.registry import find_recipe
from tests import tiny

CONFIG = Path("model") / "config.json"
ABSENT = tiny.ABSENT


@dataclass(frozen=True)
class Stored:
    """A tensor as bind sees it."""

    values: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def lazy(self) -> LazyTensor:
        return Resident(self.values)


def made(shapes: Mapping[str, Sequence[int]]) -> dict[str, Stored]:
    """Tensors of these shapes, filled with noise that their names decide."""
    return {name: Stored(tiny.noise(name, shape, 1.0)) for name, shape in shapes.items()}


def loaded(directory: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The config and the tensors of a checkpoint on disk."""
    raw = json.loads((directory / "config.json").read_text())
    return raw, {name: Stored(tensor.float32()) for name, tensor in tiny.tensors_of(directory).items()}


def config(raw: Mapping[str, Any], **overrides: Any) -> Config:
    """A config with some keys replaced, or left out where ABSENT."""
    return Config({key: value for key, value in {**raw, **overrides}.items() if value is not ABSENT}, CONFIG)


def bound(
    raw: Mapping[str, Any], stored: Mapping[str, Stored], recipe: Recipe | None = None, **overrides: Any
) -> Model:
    """The model that these tensors are with this config."""
    read = config(raw, **overrides)
    return bind(recipe or find_recipe(read), read, stored)


def raw(tensor: LazyTensor) -> NDArray[np.uint8]:
    """All rows of a lazy tensor as bytes [rows, bytes of a row]."""
    n_rows = tensor.spec.n_rows
    out = np.empty(tensor.spec.nbytes, dtype=np.uint8)
    read(tensor, range(n_rows), out, Workspace(Scratch(peak_nbytes(tensor, n_rows))))
    return out.reshape(n_rows, -1)


def values(tensor: LazyTensor) -> NDArray[np.float32]:
    """All rows of a lazy tensor of F32."""
    return raw(tensor).view(np.float32).reshape(tensor.spec.shape)


def target(model: Model, name: str) -> NDArray[np.float32]:
    """The values of one target."""
    (found,) = (one for one in model.targets if one.name == name)
    return values(found.tensor)


def keys(model: Model) -> dict[str, Any]:
    """The architecture's keys without their prefix; arrays as lists."""
    entries = model.keys()
    return {entry.key.partition(".")[2]: _plain(entry.value) for entry in entries}


def _plain(value: Scalar | PackedArray) -> Any:
    if not isinstance(value, PackedArray):
        return value
    return np.frombuffer(value.payload, "?" if value.element == GGUFValueType.BOOL else "<u4").tolist()
