"""Adapters made tensor by tensor, for tests of one odd tensor or one odd key of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import streamconv
from streamconv.checkpoint.config import Config
from streamconv.lora.config import LoraConfig, read_lora_config
from tests import tiny
from tests.oracles import ggufs

PEFT = {"peft_type": "LORA", "r": 8, "lora_alpha": 12}
Q = "model.layers.0.self_attn.q_proj"


def config(raw: Mapping[str, Any], scale: float | None = None) -> LoraConfig:
    """An adapter_config.json in memory, as it is read."""
    return read_lora_config(Config(raw, Path("adapter") / "adapter_config.json"), scale)


def factors(
    module: str, n_out: int, n_in: int, r: int = 8, prefix: str = "base_model.model."
) -> dict[str, tiny.Tensor]:
    """A pair as PEFT stores it, filled with noise that its name decides."""
    return {
        f"{prefix}{module}.lora_A.weight": noise(f"{module}.a", (r, n_in)),
        f"{prefix}{module}.lora_B.weight": noise(f"{module}.b", (n_out, r)),
    }


def noise(name: str, shape: tuple[int, ...], dtype: str = "F32") -> tiny.Tensor:
    return tiny.Tensor.of(tiny.noise(name, shape, 0.3), dtype)


def turned(tensor: tiny.Tensor) -> tiny.Tensor:
    return tiny.Tensor.of(tensor.float32().T, tensor.dtype)


def write(
    directory: Path,
    tensors: Mapping[str, tiny.Tensor],
    settings: Mapping[str, Any] = PEFT,
    name: str = "adapter_model.safetensors",
) -> Path:
    """An adapter of these tensors and this configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    tiny.write_safetensors(directory / name, tensors)
    tiny.write_json(directory / "adapter_config.json", dict(settings))
    return directory


def edit(adapter: Path, **settings: Any) -> Path:
    """The adapter with keys of its configuration replaced."""
    import json

    path = adapter / "adapter_config.json"
    tiny.write_json(path, json.loads(path.read_text()) | settings)
    return adapter


def convert(adapter: Path, base: Path, **options: Any) -> ggufs.Gguf:
    """The adapter as streamconv writes it, read by gguf-py."""
    dst = adapter / "out.gguf"
    streamconv.convert_adapter(adapter, base, dst, force=True, **options)
    assert ggufs.layout_faults(dst) == []
    return ggufs.read(dst)


def delta(file: ggufs.Gguf, target: str) -> NDArray[np.float64]:
    """What llama.cpp adds to `target`: alpha / r * B @ A."""
    a, b = file.float64(f"{target}.lora_a"), file.float64(f"{target}.lora_b")
    scale: NDArray[np.float64] = file["adapter.lora.alpha"] / b.shape[-1] * (b @ a)
    return scale
