"""Whole weights of an adapter that replace the base's: modules_to_save, a resized vocabulary, stacked experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from streamconv.checkpoint.safetensors import SourceTensor
from streamconv.errors import RunWarning
from streamconv.lazy.node import LazyTensor
from streamconv.lora.base import N_VOCAB
from streamconv.lora.files import parse_name
from streamconv.lora.merge.experts import one_by_one
from streamconv.lora.merge.weights import Finding, Made, Step, Weights, WholeWeight, finding, is_end, is_stored
from streamconv.lora.specs import Adapter
from streamconv.recipe.language import Model, Stored
from streamconv.recipe.spelling import Speller

# Kinds of tensors (files.py) that replace one of the base's, with the suffix of its name there. Others, such as
# stacked experts, are of unknown kind until they are found in the base.
REPLACING: Mapping[str, str] = {"weight": ".weight", "norm": ".weight", "bias": ".bias", "unknown": ""}
_FROZEN = (".base_layer.weight", ".original_module.weight")

_Named = Mapping[str, tuple[str, Stored]]  # by stored name: the adapter's module and its tensor


@dataclass(frozen=True, slots=True)
class _Found:
    """The whole weights of an adapter.

    Attributes:
        frozen: Copies of the base's that PEFT saved beside the trained ones. They are used only for an embedding or
            head with an enlarged vocabulary, to which factors are then added.
        trained: Weights that were trained as a whole.
    """

    frozen: _Named
    trained: _Named
    findings: Sequence[Finding]
    warnings: Sequence[RunWarning]


def replace_whole(weights: Weights, adapter: Adapter) -> Step:
    """Replace the base's weights by the adapter's whole weights."""
    model, found = weights.model, _whole_weights(weights.model, adapter)
    named = {**found.frozen, **found.trained}
    findings = list(found.findings)
    unsaved = adapter.file.unsaved(model.recipe, is_tied=model.is_tied)
    findings += [Finding(adapter, problem) for problem in unsaved]
    if found.trained and adapter.weight != 1:
        what = "whole weights (modules_to_save) replace those of the base, so they can be merged only with weight 1"
        findings.append(finding(adapter, "weight", what))
    n_vocab = _grown_vocabulary(model, named) or weights.n_vocab
    made: dict[str, LazyTensor] = {}
    stored, wholes = dict(weights.stored), dict(weights.wholes)
    for name, (module, tensor) in named.items():
        shape = _original(model, name).shape
        expected = (n_vocab, *shape[1:]) if is_end(name, model) else shape
        whole = WholeWeight(adapter, tensor, name in found.trained)
        other = wholes.setdefault(name, whole)
        if tensor.shape != expected:
            shapes = f"has shape {list(tensor.shape)}, but in the base it is {list(expected)}"
            findings.append(finding(adapter, "shape", shapes, module))
        elif other is not whole and other.excludes(whole):
            what = f"{name} is also replaced by {other.adapter.label}"
            findings.append(finding(adapter, "twice", what, module))
        elif whole.is_trained:
            made[name] = tensor.lazy()
        else:
            stored[name] = tensor
    replaced = replace(weights, n_vocab=n_vocab, stored=stored, wholes=wholes).changed(adapter, made)
    return Step(replaced, findings, found.warnings)


def _grown_vocabulary(model: Model, named: _Named) -> int | None:
    """The number of tokens of an adapter's embedding and head, if it differs from the base's."""
    n_vocab = max(
        (t.shape[0] for name, (_, t) in named.items() if is_end(name, model) and len(t.shape) == 2), default=0
    )
    return None if n_vocab == model.dims[N_VOCAB] else n_vocab


def _whole_weights(model: Model, adapter: Adapter) -> _Found:
    whole = {
        full_name: (role, module, module + REPLACING.get(role, ".weight"))
        for full_name in adapter.file.shard.tensors
        for role, module in [parse_name(full_name)]
        if role in REPLACING or full_name.endswith(_FROZEN)
    }
    speller = Speller(model.recipe, (name for _, _, name in whole.values()))
    frozen: dict[str, tuple[str, Stored]] = {}
    trained: dict[str, tuple[str, Stored]] = {}
    strange: dict[str, list[str]] = defaultdict(list)
    for full_name, (role, module, spelled) in whole.items():
        tensor, is_frozen = adapter.file.shard.tensors[full_name], full_name.endswith(_FROZEN)
        name = speller.spell(spelled)
        if not is_stored(name, model):
            experts = _experts(model, module, tensor)
            if experts.keys() & model.stored.keys():
                trained |= {one: (module, Made(expert)) for one, expert in experts.items()}
            else:
                strange["tensor" if role == "unknown" else role].append(module)
        elif is_frozen and is_end(name, model) and tensor.shape != _original(model, name).shape:
            frozen[name] = module, tensor
        elif not is_frozen and (name not in trained or ".modules_to_save." in full_name):
            trained[name] = module, tensor  # with a resized vocabulary PEFT saves trained ends under two names
    return _Found(
        {name: frozen[name] for name in frozen if name not in trained},
        trained,
        [
            finding(adapter, "no-module", f"the base ({model.recipe.arch}) has no such {what}", *modules)
            for what, modules in strange.items()
        ],
        speller.warnings,
    )


def _original(model: Model, name: str) -> Stored:
    """The base's tensor `name`; for a tied head the embedding."""
    return model.stored.get(name) or model.stored[model.recipe.embedding]


def _experts(model: Model, name: str, stack: SourceTensor) -> dict[str, LazyTensor]:
    """The single experts of a stack that an adapter has as whole weights; empty for another tensor."""
    is_known = len(stack.shape) == 3 and model.recipe.find(name) is not None
    return dict(one_by_one(model, name, stack.lazy())) if is_known else {}
