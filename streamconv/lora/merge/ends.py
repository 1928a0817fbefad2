"""Embedding and head of a merged model, and the configuration and tokenizer that follow from them.

On a tied base, PEFT changes only the embedding or only the head, so the merged model gets a separate `output.weight`.
MLX trains the shared matrix, as PEFT does with `ensure_weight_tying`: then both change, and the model stays tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from streamconv.checkpoint.config import Config
from streamconv.files.store import Place
from streamconv.lora.base import N_VOCAB
from streamconv.lora.merge.weights import Finding, Step, Weights, finding, has_own_head
from streamconv.lora.specs import Adapter
from streamconv.metadata.vocab.choice import Tokenizers
from streamconv.metadata.vocab.files import has_tokens


def settle_ends(weights: Weights, tying: Sequence[Adapter]) -> Step:
    """Untie the head if only the embedding changed. `tying`: the adapters that change both as one matrix."""
    head, embedding = weights.recipe.head, weights.recipe.embedding
    is_one, findings = _is_one(weights, tying)
    if is_one and head not in weights.made:  # a copy: the base's, or that of the enlarged vocabulary
        weights = replace(weights, stored={name: weights.stored[name] for name in weights.stored if name != head})
    if not is_one and embedding in weights.made and head not in weights.made and head not in weights.stored:
        weights = replace(weights, made={**weights.made, head: weights.stored[embedding].lazy()})
    return Step(weights, findings)


def outgrown(weights: Weights) -> Iterator[Finding]:
    """Yield a finding for an embedding or head that has too few rows for the new vocabulary."""
    for name in (weights.recipe.embedding, weights.recipe.head):
        tensor = weights.now(name) if name in weights.made or name in weights.stored else None
        if tensor is not None and tensor.spec.shape[0] != weights.n_vocab:
            grew = f"the vocabulary grew from {tensor.spec.shape[0]} to {weights.n_vocab} tokens"
            what = f"{grew}, but the adapter has no {name} of that size"
            yield finding(next(_ends_from(weights)), "vocabulary", what)


def _is_one(weights: Weights, tying: Sequence[Adapter]) -> tuple[bool, list[Finding]]:
    """Whether adapters that changed the embedding of a tied base changed the head too."""
    if has_own_head(weights.model):
        return False, []
    of_embedding = weights.changed_by.get(weights.recipe.embedding, ())
    of_head = weights.changed_by.get(weights.recipe.head, ())
    of_both = [adapter for adapter in of_embedding if adapter in tying]
    others = [adapter for adapter in (*of_embedding, *of_head) if adapter not in of_both]
    if of_both and others:
        what = f"{of_both[0].label} changes embedding and head as one matrix, but this adapter changes only one of them"
        return True, [finding(others[0], "tying", what)]
    return bool(of_both), []


def _ends_from(weights: Weights) -> Iterator[Adapter]:
    """The adapters that replaced or changed an embedding or head, those with whole weights first."""
    ends = (weights.recipe.embedding, weights.recipe.head)
    yield from (weights.wholes[name].adapter for name in ends if name in weights.wholes)
    yield from (adapter for name in ends for adapter in weights.changed_by.get(name, ()))


def merged_config(weights: Weights) -> Config:
    """Return the base's configuration with the values of the merged model."""
    base, recipe = weights.model, weights.recipe
    raw = dict(base.config.raw)
    if weights.has_grown:
        raw[recipe.dims[N_VOCAB].label] = weights.n_vocab
    if recipe.head in weights.made or recipe.head in weights.stored.keys() - base.stored.keys():
        raw |= {key: False for key in recipe.tie_keys if key in raw}
    return Config(raw, base.config.file, base.config.parent)


def find_tokenizers(
    weights: Weights, directory: Place, adapters: Sequence[Adapter]
) -> tuple[Tokenizers, list[Finding]]:
    """Return the folders with a tokenizer. An adapter that changed embedding or head has the trained one."""
    findings = []
    beside = [adapter.file.directory for adapter in _ends_from(weights)]
    with_rows = next(filter(has_tokens, beside), None)
    if with_rows is None and weights.has_grown:
        what = (
            f"the vocabulary has {weights.n_vocab} tokens, the base's has {weights.model.dims[N_VOCAB]}, but no "
            "tokenizer is beside the adapter: save it there with tokenizer.save_pretrained(folder)"
        )
        findings.append(finding(next(_ends_from(weights)), "tokenizer", what))
    folders = tuple(dict.fromkeys(adapter.file.directory for adapter in adapters))
    return Tokenizers(directory, folders, with_rows), findings
