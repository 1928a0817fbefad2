"""Checkpoints and adapters as other programs save them, made from plain ones in place.

The numbers are the same; names, shapes and layouts differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny.files import NOTHING, Tensor, noise, tensors_of, write_json, write_safetensors, write_shards

Rename = Callable[[str], str]


def rewritten(
    folder: Path, tensors: Mapping[str, Tensor], *, n_shards: int = 1, metadata: Mapping[str, str] = NOTHING
) -> Path:
    """The checkpoint with other tensors in place of its own."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    if metadata:
        write_safetensors(folder / "model.safetensors", tensors, metadata)
    else:
        write_shards(folder, tensors, n_shards)
    return folder


def renamed(folder: Path, rename: Rename, *, n_shards: int = 1) -> Path:
    """The checkpoint or adapter with other names; what becomes empty is left out."""
    tensors = {new: tensor for name, tensor in tensors_of(folder).items() if (new := rename(name))}
    files = list(folder.glob("adapter*.safetensors"))
    if files:
        write_safetensors(files[0], tensors)
        return folder
    return rewritten(folder, tensors, n_shards=n_shards)


def prefixed(prefix: str) -> Rename:
    return lambda name: prefix + name


def bare(name: str) -> str:
    """As AutoModel saves a model: without its head, and without `model.`."""
    return name.removeprefix("model.") if name != "lm_head.weight" else ""


def wrapped_layers(name: str) -> str:
    """FSDP and its checkpointing wrap the model and each layer: segments stand before and inside of names."""
    inside = re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name)
    return f"_fsdp_wrapped_module.{inside}"


def as_mlx(folder: Path, *, n_shards: int = 1) -> Path:
    """An LFM2 or LFM2-MoE as mlx-lm writes it (models/lfm2_moe.py, sanitize): kernels, dense layers and experts."""
    tensors = dict(tensors_of(folder))
    is_moe = json.loads((folder / "config.json").read_text())["model_type"] == "lfm2_moe"
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    result: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith("conv.conv.weight"):
            hidden, one, width = tensor.shape
            result[name] = Tensor(tensor.dtype, (hidden, width, one), tensor.data)
        elif match := re.fullmatch(r"(.+\.feed_forward)\.experts\.(\d+)\.(w\d)\.weight", name):
            stacks.setdefault(f"{match[1]}.switch_mlp.{names[match[3]]}.weight", {})[int(match[2])] = tensor
        elif is_moe and (match := re.fullmatch(r"(.+\.feed_forward)\.(w\d)\.weight", name)):
            result[f"{match[1]}.{names[match[2]]}.weight"] = tensor
        else:
            result[name] = tensor
    for name, experts in stacks.items():
        one = experts[0]
        data = b"".join(experts[e].data for e in range(len(experts)))
        result[name] = Tensor(one.dtype, (len(experts), *one.shape), data)
    rewritten(folder, result, n_shards=n_shards, metadata={"format": "mlx"} if n_shards == 1 else NOTHING)
    return folder


def packed(name: str) -> dict[str, Tensor]:
    """One matrix as bitsandbytes stores it, 4 bit: codes, and what they need."""
    codes = np.arange(40, dtype=np.uint8)
    return {
        name: Tensor("U8", (40, 1), codes.tobytes()),
        f"{name}.absmax": Tensor.of(np.ones(5), "F32"),
        f"{name}.quant_map": Tensor.of(np.linspace(-1, 1, 16), "F32"),
        f"{name}.quant_state.bitsandbytes__nf4": Tensor("U8", (2,), b"{}"),
    }


def configured(folder: Path, name: str = "config.json", **settings: Any) -> Path:
    """The folder with keys of one of its JSON files replaced."""
    path = folder / name
    write_json(path, json.loads(path.read_text()) | settings)
    return folder


def as_retrieval(folder: Path, *modules: tuple[str, Mapping[str, Any]], **settings: Any) -> Path:
    """The checkpoint with sentence-transformers' modules after it: kind and config of each, and keys of config.json.

    A dense layer gets random numbers, in F32.
    """
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, (kind, config) in enumerate(modules, 1):
        path = f"{number}_{kind}"
        (folder / path).mkdir()
        write_json(folder / path / "config.json", config)
        if kind == "Dense":
            n_out, n_in = config["out_features"], config["in_features"]
            tensors = {"linear.weight": Tensor.of(noise(path, (n_out, n_in), 0.1), "F32")}
            if config.get("bias", True):
                tensors["linear.bias"] = Tensor.of(noise(f"{path}.bias", (n_out,), 0.1), "F32")
            write_safetensors(folder / path / "model.safetensors", tensors)
        kind_name = f"sentence_transformers.models.{kind}"
        listed.append({"idx": number, "name": str(number), "path": path, "type": kind_name})
    write_json(folder / "modules.json", listed)
    return configured(folder, **settings)
