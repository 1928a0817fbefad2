"""The dims of a drafted recipe: a letter for every extent of a shape, and the config key with its value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf.constants import MODEL_TENSOR

from streamconv.recipe.draft.sources import Source
from streamconv.recipe.registry import all_recipes

TODO = "TODO"
FUSED = (2, 3, 4)  # numbers of parts in a fused tensor: gate and up, the three parts of a short convolution
SPARE_LETTERS = "BCGIJNOPQRSTWXYZ"  # letters that are not in DIM_KEYS

# The tensor and the axis that give the value of a dim if the config does not have the usual key for it.
LOCATED = {"V": (MODEL_TENSOR.TOKEN_EMBD, 0), "H": (MODEL_TENSOR.TOKEN_EMBD, 1), "F": (MODEL_TENSOR.FFN_UP, 0)}

# Axes whose extent is a product of dims even if a single dim has the same value: the axis, and the product.
PRODUCTS = {
    MODEL_TENSOR.ATTN_Q: (0, "A*D"),
    MODEL_TENSOR.ATTN_K: (0, "K*D"),
    MODEL_TENSOR.ATTN_V: (0, "K*D"),
    MODEL_TENSOR.ATTN_OUT: (1, "A*D"),
}


@dataclass(frozen=True, slots=True)
class DraftDims:
    """The dims of a draft, by letter.

    Attributes:
        config_keys: The config key of each dim; TODO if no key has its value.
        values: The values of the dims that are known.
    """

    config_keys: Mapping[str, str]
    values: Mapping[str, int]

    def spelled(self, source: Source) -> tuple[str, list[str]]:
        """Return the shape of a source in dims, and the questions about it that a person must answer."""
        position, product = PRODUCTS.get(source.tensor, (-1, "")) if source.tensor else (-1, "")
        spelled, notes = [], []
        for i, extent in enumerate(source.shapes[0]):
            spellings = _spellings(self.values, extent, product if i == position else "") if extent > 1 else []
            spelled.append(spellings[0] if spellings else str(extent))
            if len(spellings) > 1:
                notes.append(f"is {extent} {' or '.join(spellings)}?")
        if len(source.shapes) > 1:
            notes.append(f"shapes differ: {', '.join(map(str, source.shapes[:3]))}")
        return " ".join(spelled), list(dict.fromkeys(notes))


def guess_dims(config: Mapping[str, Any], sources: Sequence[Source], n_layers: int) -> DraftDims:
    """Return the dims that other recipes have too, and a new letter for every extent that they do not explain."""
    keys, values = _known_dims(config, sources, n_layers)
    for extent in sorted({n for source in sources for shape in source.shapes for n in shape if n > 1}):
        free = [letter for letter in SPARE_LETTERS if letter not in keys]
        if not _spellings(values, extent) and free:
            keys[free[0]], values[free[0]] = _key_of(config, extent), extent
    return DraftDims(keys, values)


def _known_dims(
    config: Mapping[str, Any], sources: Sequence[Source], n_layers: int
) -> tuple[dict[str, str], dict[str, int]]:
    usual = [(letter, dim.config) for recipe in all_recipes() for letter, dim in recipe.dims.items()]
    keys = {letter: key for letter, key in usual if isinstance(key, str) and _number(config, key)}
    values: dict[str, int] = {}
    keys.setdefault("L", _key_of(config, n_layers, "layer"))
    for letter, (tensor, axis) in LOCATED.items():
        shape = next((s.shapes[0] for s in sources if s.tensor == tensor and len(s.shapes[0]) == 2), None)
        if letter not in keys and shape is not None:
            keys[letter], values[letter] = _key_of(config, shape[axis]), shape[axis]
    keys.setdefault("V", TODO)
    if n_experts := max((source.n_experts for source in sources), default=0):
        keys.setdefault("E", _key_of(config, n_experts, "expert"))
        values["E"] = n_experts
    values |= {letter: _number(config, key) for letter, key in keys.items() if _number(config, key)}
    if "D" not in keys and values.get("H", 0) >= values.get("A", 0) > 0:
        keys["D"], values["D"] = "head_dim", values["H"] // values["A"]
    return keys, values


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if type(value) is int and value > 0 else 0


def _key_of(config: Mapping[str, Any], value: int, word: str = "") -> str:
    """Return the config key that has `value`, and `word` in its name; TODO if there is none."""
    return next((key for key in config if word in key and value > 1 and _number(config, key) == value), TODO)


def _spellings(values: Mapping[str, int], extent: int, product: str = "") -> list[str]:
    """Return the possible expressions for an extent in dims; there are several if dims have the same value."""
    known = {letter: value for letter, value in values.items() if letter not in "LU"}
    products = [f"{a}*D" for a in "AK" if known.get(a, 0) * known.get("D", 0) == extent]
    if product in products:
        return [product]
    fused = [f"{n}*{letter}" for letter in "HMF" for n in FUSED if known.get(letter, 0) * n == extent]
    return [letter for letter, value in known.items() if value == extent] or products or fused
