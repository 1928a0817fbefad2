"""The ends of a merged model, embedding and head, and what follows from them: its configuration and its tokenizer.

On a tied base PEFT leaves the head as it was where an adapter changes the embedding, and the embedding where it changes
the head, so the model gets an `output.weight` of its own. MLX trains the one matrix that both are, as PEFT does with
`ensure_weight_tying`: there both change, and the model stays tied.
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
    """A head untied whose embedding changed, unless both are one; `tying`: the adapters that change both as one."""
    head, embedding = weights.recipe.head, weights.recipe.embedding
    is_one, findings = _is_one(weights, tying)
    if is_one and head not in weights.made:  # a copy, in the base or of the grown rows
        weights = replace(weights, stored={name: weights.stored[name] for name in weights.stored if name != head})
    if not is_one and embedding in weights.made and head not in weights.made and head not in weights.stored:
        weights = replace(weights, made={**weights.made, head: weights.stored[embedding].lazy()})
    return Step(weights, findings)


def outgrown(weights: Weights) -> Iterator[Finding]:
    """An embedding or head that the vocabulary outgrew."""
    for name in (weights.recipe.embedding, weights.recipe.head):
        tensor = weights.now(name) if name in weights.made or name in weights.stored else None
        if tensor is not None and tensor.spec.shape[0] != weights.n_vocab:
            grew = f"the vocabulary grew from {tensor.spec.shape[0]} to {weights.n_vocab} tokens"
            what = f"{grew}, and the adapter has no {name} of that size"
            yield finding(next(_ends_from(weights)), "vocabulary", what)


def _is_one(weights: Weights, tying: Sequence[Adapter]) -> tuple[bool, list[Finding]]:
    """Whether an adapter that changed the embedding of a tied base changed the head with it."""
    if has_own_head(weights.model):
        return False, []
    of_embedding = weights.changed_by.get(weights.recipe.embedding, ())
    of_head = weights.changed_by.get(weights.recipe.head, ())
    of_both = [adapter for adapter in of_embedding if adapter in tying]
    others = [adapter for adapter in (*of_embedding, *of_head) if adapter not in of_both]
    if of_both and others:
        what = f"{of_both[0].label} changes embedding and head as one, and this one changes one of them"
        return True, [finding(others[0], "tying", what)]
    return bool(of_both), []


def _ends_from(weights: Weights) -> Iterator[Adapter]:
    """The adapters that brought or changed an embedding or a head: whole ones first."""
    ends = (weights.recipe.embedding, weights.recipe.head)
    yield from (weights.wholes[name].adapter for name in ends if name in weights.wholes)
    yield from (adapter for name in ends for adapter in weights.changed_by.get(name, ()))


def merged_config(weights: Weights) -> Config:
    """The base's configuration, as it would be of the merged model."""
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
    """Where the tokenizer may lie. An adapter that brought or changed embedding or head has the trained one."""
    findings = []
    beside = [adapter.file.directory for adapter in _ends_from(weights)]
    with_rows = next(filter(has_tokens, beside), None)
    if with_rows is None and weights.has_grown:
        what = (
            f"the vocabulary has {weights.n_vocab} tokens, the base's {weights.model.dims[N_VOCAB]}, and there is no "
            "tokenizer beside the adapter: tokenizer.save_pretrained(folder) puts it there"
        )
        findings.append(finding(next(_ends_from(weights)), "tokenizer", what))
    folders = tuple(dict.fromkeys(adapter.file.directory for adapter in adapters))
    return Tokenizers(directory, folders, with_rows), findings
