"""Divide an adapter among the outputs of a model with several, and merge each share.

PEFT trains a vision model as one; its changes to the tower are merged into the projector's file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from streamconv.lora.base import N_VOCAB
from streamconv.lora.config import LoraConfig, read_lora_config
from streamconv.lora.files import LoraFile, parse_name
from streamconv.lora.merge.factors import add_products, base_of
from streamconv.lora.merge.weights import Step, Weights
from streamconv.lora.merge.whole import replace_whole
from streamconv.lora.specs import Adapter
from streamconv.recipe.language import Model, Output


@dataclass(frozen=True, slots=True)
class Shares:
    """The share of an adapter for the model (or None), and for each further output that it changes, by role."""

    of_model: Adapter | None
    of_outputs: Mapping[str, Adapter]


def shares_of(adapter: Adapter, outputs: Sequence[Model]) -> Shares:
    """Divide an adapter between a model and its further `outputs`."""
    by_role: dict[str, set[str]] = {}
    for full_name in adapter.file.shard.tensors:
        owner = next((other.recipe for other in outputs if _owns(other.recipe, full_name)), None)
        by_role.setdefault("" if owner is None else owner.role, set()).add(full_name)
    others = {role: names for role, names in by_role.items() if role}
    if not others:
        return Shares(adapter, {})
    own = by_role.get("")
    return Shares(
        _share(adapter, own) if own else None, {role: _share(adapter, names) for role, names in others.items()}
    )


def _owns(output: Output, full_name: str) -> bool:
    """Whether a tensor of an adapter belongs to an output, under any of its names."""
    _, module = parse_name(full_name)
    names = (module, f"{module}.weight", f"{module}.bias")
    return any(output.find(f"{prefix}{name}") for prefix in ("", "model.") for name in names)


def _share(adapter: Adapter, names: set[str]) -> Adapter:
    """The adapter restricted to these tensors."""
    shard = copy.copy(adapter.file.shard)
    shard.tensors = {name: tensor for name, tensor in shard.tensors.items() if name in names}
    file = LoraFile(adapter.file.directory, adapter.file.config, shard)
    file.sort()
    return replace(adapter, file=file)


def merge_output(output: Model, shares: Sequence[Adapter]) -> Step:
    """Return a further output with the adapters' shares merged; its tensors then have the recipe's names."""
    stored = {output.recipe.canonical(name): tensor for name, tensor in output.stored.items()}
    model = replace(output, stored=stored, dims=output.dims | {N_VOCAB: 0})  # it has no tokens
    step = Step(Weights.of(model))
    for share in shares:
        step = step.then(replace_whole(step.weights, share))
    base = base_of(output.config.file.parent, step.weights)
    for share in shares:
        config = _config(read_lora_config(share.file.config))
        step = step.then(add_products(step.weights, base, share, config, is_single=len(shares) == 1))
    return step


def _config(config: LoraConfig) -> LoraConfig:
    """The configuration without its settings for tokens and experts."""
    own = copy.copy(config)
    own.token_rows, own.target_parameters = {}, ()
    return own
