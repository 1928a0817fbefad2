"""Rows of an embedding or head that were trained as a whole: PEFT's trainable_token_indices."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from streamconv.checkpoint.safetensors import SourceTensor
from streamconv.lazy.arithmetic import widened
from streamconv.lazy.indexing import IndexRows
from streamconv.lazy.node import LazyTensor
from streamconv.lazy.views import Concatenate
from streamconv.lora.config import LoraConfig
from streamconv.lora.merge.weights import Finding, Step, Weights, finding, has_own_head, is_stored
from streamconv.lora.specs import Adapter
from streamconv.recipe.language import Stored
from streamconv.recipe.spelling import Speller, has_same_numbers

HEAD_MODULE = "lm_head"  # its name in transformers


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Trained rows, and their row numbers in the same order."""

    numbers: tuple[int, ...]
    tensor: Stored

    def over(self, tensor: LazyTensor) -> LazyTensor:
        """Return `tensor` with these rows replaced."""
        rows = self.tensor.lazy()
        if rows.spec.dtype != tensor.spec.dtype:
            tensor, rows = widened(tensor), widened(rows)
        index = np.arange(tensor.spec.n_rows)
        index[list(self.numbers)] = tensor.spec.n_rows + np.arange(len(self.numbers))
        return IndexRows(Concatenate([tensor, rows]), index)

    def is_same(self, other: TokenRows) -> bool:
        return self.numbers == other.numbers and has_same_numbers(self.tensor, other.tensor)


def replace_rows(weights: Weights, adapter: Adapter, config: LoraConfig) -> Step:
    """Replace rows of the weights by the adapter's trained rows."""
    deltas = adapter.file.by_module("tokens")
    placed, findings = _placed_rows(weights, adapter, config, deltas)
    findings += _missing_rows(weights, adapter, config, deltas)
    model = weights.model
    if not has_own_head(model) and model.recipe.head in placed:
        head = placed.pop(model.recipe.head)
        if (embedding := placed.get(model.recipe.embedding)) is None or not embedding.is_same(head):
            findings.append(finding(adapter, "tying", "its rows for the embedding and for the tied head differ"))
    made = {name: rows.over(weights.now(name)) for name, rows in placed.items()}
    origins = [f"{name} rows {rows.numbers}" for name, rows in placed.items()]
    return Step(weights.changed(adapter, made), findings, origins=origins)


def _placed_rows(
    weights: Weights, adapter: Adapter, config: LoraConfig, deltas: Mapping[str, SourceTensor]
) -> tuple[dict[str, TokenRows], list[Finding]]:
    """The rows by stored name, and problems with the others. `deltas`: rows by module."""
    recipe = weights.recipe
    speller = Speller(recipe, (f"{module}.weight" for module in deltas))
    placed: dict[str, TokenRows] = {}
    findings = []
    for module, tensor in deltas.items():
        name, numbers = speller.spell(f"{module}.weight"), _numbers_of(module, config)
        if not is_stored(name, weights.model):
            findings.append(finding(adapter, "no-module", f"the base ({recipe.arch}) has no such module", module))
        elif numbers is None:
            what = "the configuration does not say which tokens its rows are for"
            findings.append(finding(adapter, "tokens", what, module))
        elif fault := _rows_fault(weights, adapter, name, TokenRows(numbers, tensor)):
            findings.append(finding(adapter, "tokens", fault, module))
        else:
            placed[name] = TokenRows(numbers, tensor)
    return placed, findings


def _numbers_of(module: str, config: LoraConfig) -> tuple[int, ...] | None:
    """The tokens whose rows of `module` were trained; None if the configuration does not list them."""
    numbers = next((rows for key, rows in config.token_rows.items() if f".{module}".endswith(f".{key}")), None)
    if numbers is None and module.endswith(HEAD_MODULE):
        return config.token_rows.get("embed_tokens")  # in a tied model, PEFT wraps the head as well
    return numbers


def _missing_rows(
    weights: Weights, adapter: Adapter, config: LoraConfig, modules: Collection[str]
) -> Iterator[Finding]:
    """Problems for rows that the configuration lists but that an adapter with other rows lacks."""
    for key, numbers in config.token_rows.items():
        is_tied_head = key.endswith(HEAD_MODULE) and not has_own_head(weights.model)
        if modules and numbers and not is_tied_head and not any(f".{one}".endswith(f".{key}") for one in modules):
            what = f"trainable_token_indices lists rows of {key}, but they are missing"
            yield finding(adapter, "tokens", what)


def _rows_fault(weights: Weights, adapter: Adapter, name: str, rows: TokenRows) -> str | None:
    """Why trained rows cannot replace those of `name`."""
    shape, numbers = weights.now(name).spec.shape, rows.numbers
    if len(shape) == 2 and (beyond := max(numbers, default=0)) >= shape[0]:
        return f"trainable_token_indices has {beyond}, but {name} has {shape[0]} rows: wrong base"
    if len(shape) != 2 or rows.tensor.shape != (len(numbers), shape[1]):
        return f"trained rows {list(rows.tensor.shape)} of {len(numbers)} tokens do not fit {name} {list(shape)}"
    if adapter.weight != 1:
        return "trained rows replace those of the base, so they can be merged only with weight 1"
    if others := weights.changed_by.get(name):
        return f"{name} is also changed by {others[0].label}"
    return None
