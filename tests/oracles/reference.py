"""The models as their authors run them: transformers and PEFT in float32 on one thread. Needs torch.

Gives reference logits and merged weights. An adapter that PEFT does not load completely is an error, so that no
reference is that of half an adapter.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors
import torch
import transformers
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load(checkpoint: Path, adapter: Path | None = None, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    """The model in float32, in evaluation mode, `adapter` on it as a PeftModel; ValueError if a tensor is left over.

    kind: the class of transformers that loads it.
    """
    loaded: Any = kind.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    model, seen = loaded
    _refuse(checkpoint, {what: seen[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")})
    if adapter is not None:
        model = _adapted(model, adapter)
    return model.eval()


def logits(
    checkpoint: Path,
    ids: Sequence[int],
    adapter: Path | None = None,
    *,
    merge: bool = False,
    kind: Any = transformers.AutoModelForCausalLM,
) -> NDArray[Any]:
    """Logits float32 [len(ids), vocab]; with `merge`, of the model that `merge_and_unload` leaves."""
    model = load(checkpoint, adapter, kind)
    if merge:
        model = model.merge_and_unload()
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([list(ids)])).logits[0].float().numpy())


def hidden_states(
    checkpoint: Path, ids: Sequence[int], adapter: Path | None = None, *, merge: bool = False, kind: Any
) -> NDArray[Any]:
    """What a model without a head makes of `ids`, float32 [len(ids), hidden]; with `merge` as in `logits`."""
    model = load(checkpoint, adapter, kind)
    if merge:
        model = model.merge_and_unload()
    with torch.inference_mode():
        return np.asarray(model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0].float().numpy())


class Lfm2BidirectionalModel(transformers.Lfm2Model):
    """Liquid's retrieval models: LFM2 whose attention has no mask, and whose convolutions are centred.

    transformers 5.24 has no such class; the arithmetic is that of llama.cpp's lfm2.cpp where causal_attn is false.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.layers:
            if hasattr(layer, "conv"):
                layer.conv.forward = functools.partial(_centred, layer.conv)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        n = input_ids.shape[1]
        mask = {"full_attention": torch.zeros(1, 1, n, n), "conv": None}
        return super().forward(input_ids=input_ids, attention_mask=mask, use_cache=False)


def _centred(conv: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Lfm2ShortConv without its padding on the left."""
    b, c, x = conv.in_proj(hidden_states).transpose(-1, -2).chunk(3, dim=-2)
    weight = conv.conv.weight
    y = torch.nn.functional.conv1d(b * x, weight, padding=weight.shape[-1] // 2, groups=len(weight))
    return torch.as_tensor(conv.out_proj((c * y).transpose(-1, -2)))


def class_of(name: str) -> Any:
    """The class of transformers, or of this module."""
    return globals().get(name) or getattr(transformers, name)


def merged(checkpoint: Path, adapter: Path) -> dict[str, NDArray[np.float32]]:
    """All weights after `merge_and_unload`, the base loaded in float32, by their names in the checkpoint."""
    state = load(checkpoint, adapter).merge_and_unload().state_dict()
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def deltas(checkpoint: Path, adapter: Path) -> dict[str, NDArray[np.float64]]:
    """What PEFT adds to each module's weight, by the module's name in the checkpoint; the scale is PEFT's own."""
    found = {}
    for name, module in load(checkpoint, adapter).named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default").detach().double().numpy()
            found[name.removeprefix("base_model.model.")] = delta
    return found


def scales(checkpoint: Path, adapter: Path) -> dict[str, float]:
    """What PEFT multiplies B A by, by the module's name in the checkpoint."""
    return {
        name.removeprefix("base_model.model."): float(module.scaling["default"])
        for name, module in load(checkpoint, adapter).named_modules()
        if isinstance(module, LoraLayer)
    }


def greedy(checkpoint: Path, ids: Sequence[int], n: int) -> tuple[list[int], list[float]]:
    """The `n` likeliest tokens after `ids`, one after the other, and by how many nats each beat the second."""
    model, sequence, margins = load(checkpoint), list(ids), []
    with torch.inference_mode():
        for _ in range(n):
            top = model(torch.tensor([sequence])).logits[0, -1].topk(2)
            margins.append(float(top.values[0] - top.values[1]))
            sequence.append(int(top.indices[0]))
    return sequence[len(ids) :], margins


def _adapted(model: Any, adapter: Path) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(model, str(adapter))
    with safetensors.safe_open(adapter / "adapter_model.safetensors", "np") as file:
        n_stored = sum(".base_layer." not in name for name in file.keys())  # noqa: SIM118  (not a mapping)
    n_taken = len(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    complaints = [str(entry.message) for entry in caught if "adapter keys" in str(entry.message)]
    _refuse(adapter, {"complaints": complaints, "counts": [] if n_taken == n_stored else [n_taken, n_stored]})
    return adapted


def _refuse(what: Path, leftovers: dict[str, Any]) -> None:
    if any(leftovers.values()):
        raise ValueError(f"{what} was not taken whole: {leftovers}")
