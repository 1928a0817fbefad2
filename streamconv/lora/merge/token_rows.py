"""Rows of an embedding or head that an adapter trained whole: PEFT's trainable_token_indices."""

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

HEAD_MODULE = "lm_head"  # transformers' name of it


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows that were trained whole, and their numbers in the order of the rows."""

    numbers: tuple[int, ...]
    tensor: Stored

    def over(self, tensor: LazyTensor) -> LazyTensor:
        """`tensor` with these rows in place of its own."""
        rows = self.tensor.lazy()
        if rows.spec.dtype != tensor.spec.dtype:
            tensor, rows = widened(tensor), widened(rows)
        index = np.arange(tensor.spec.n_rows)
        index[list(self.numbers)] = tensor.spec.n_rows + np.arange(len(self.numbers))
        return IndexRows(Concatenate([tensor, rows]), index)

    def is_same(self, other: TokenRows) -> bool:
        return self.numbers == other.numbers and has_same_numbers(self.tensor, other.tensor)


def replace_rows(weights: Weights, adapter: Adapter, config: LoraConfig) -> Step:
    """The adapter's trained rows in place of those that the weights have by now."""
    deltas = adapter.file.by_module("tokens")
    placed, findings = _placed_rows(weights, adapter, config, deltas)
    findings += _missing_rows(weights, adapter, config, deltas)
    model = weights.model
    if not has_own_head(model) and model.recipe.head in placed:
        head = placed.pop(model.recipe.head)
        if (embedding := placed.get(model.recipe.embedding)) is None or not embedding.is_same(head):
            findings.append(finding(adapter, "tying", "its rows of the embedding and of the tied head differ"))
    made = {name: rows.over(weights.now(name)) for name, rows in placed.items()}
    origins = [f"{name} rows {rows.numbers}" for name, rows in placed.items()]
    return Step(weights.changed(adapter, made), findings, origins=origins)


def _placed_rows(
    weights: Weights, adapter: Adapter, config: LoraConfig, deltas: Mapping[str, SourceTensor]
) -> tuple[dict[str, TokenRows], list[Finding]]:
    """By stored name the rows that have a place, and what is wrong with the others. `deltas`: rows by module."""
    recipe = weights.recipe
    speller = Speller(recipe, (f"{module}.weight" for module in deltas))
    placed: dict[str, TokenRows] = {}
    findings = []
    for module, tensor in deltas.items():
        name, numbers = speller.spell(f"{module}.weight"), _numbers_of(module, config)
        if not is_stored(name, weights.model):
            findings.append(finding(adapter, "no-module", f"the base ({recipe.arch}) has no such module", module))
        elif numbers is None:
            what = "the configuration does not say of which tokens its rows are"
            findings.append(finding(adapter, "tokens", what, module))
        elif fault := _rows_fault(weights, adapter, name, TokenRows(numbers, tensor)):
            findings.append(finding(adapter, "tokens", fault, module))
        else:
            placed[name] = TokenRows(numbers, tensor)
    return placed, findings


def _numbers_of(module: str, config: LoraConfig) -> tuple[int, ...] | None:
    """The tokens whose rows of `module` were trained; None where the configuration does not say."""
    numbers = next((rows for key, rows in config.token_rows.items() if f".{module}".endswith(f".{key}")), None)
    if numbers is None and module.endswith(HEAD_MODULE):
        return config.token_rows.get("embed_tokens")  # of a tied model, whose head PEFT wraps as well
    return numbers


def _missing_rows(
    weights: Weights, adapter: Adapter, config: LoraConfig, modules: Collection[str]
) -> Iterator[Finding]:
    """The configuration's rows that an adapter with rows of other modules lacks."""
    for key, numbers in config.token_rows.items():
        is_tied_head = key.endswith(HEAD_MODULE) and not has_own_head(weights.model)
        if modules and numbers and not is_tied_head and not any(f".{one}".endswith(f".{key}") for one in modules):
            what = f"trainable_token_indices has rows of {key}, and they are missing"
            yield finding(adapter, "tokens", what)


def _rows_fault(weights: Weights, adapter: Adapter, name: str, rows: TokenRows) -> str | None:
    """Why trained rows cannot replace those of `name`."""
    shape, numbers = weights.now(name).spec.shape, rows.numbers
    if len(shape) == 2 and (beyond := max(numbers, default=0)) >= shape[0]:
        return f"trainable_token_indices has {beyond}, and {name} {shape[0]} rows: the adapter's base was another"
    if len(shape) != 2 or rows.tensor.shape != (len(numbers), shape[1]):
        return f"trained rows {list(rows.tensor.shape)} of {len(numbers)} tokens do not fit {name} {list(shape)}"
    if adapter.weight != 1:
        return "trained rows replace the base's: they merge at weight 1 alone"
    if others := weights.changed_by.get(name):
        return f"{name} is changed by {others[0].label} as well"
    return None
