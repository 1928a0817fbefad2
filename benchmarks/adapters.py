"""LoRA adapters of rank 16 on every matrix of a model except the embedding, in PEFT's format.

Values are random and small, as trained ones are; speed and memory do not depend on them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save_file

from benchmarks.shapes import Shape, tensors_of

RANK: Final = 16


def adapter(shape: Shape, cache: Path) -> Path:
    """The folder of the adapter in `cache`, made if it is not there."""
    folder = cache / f"{shape.name}-lora-{RANK}"
    if folder.is_dir():
        return folder
    rng = np.random.default_rng(0)
    factors = {}
    for tensor in tensors_of(shape):
        if len(tensor.shape) == 2 and "embed" not in tensor.name:
            n_out, n_in = tensor.shape
            module = f"base_model.model.{tensor.name.removesuffix('.weight')}"
            for name, size in (("lora_A", (RANK, n_in)), ("lora_B", (n_out, RANK))):
                factors[f"{module}.{name}.weight"] = rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(factors, part / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (part / "adapter_config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
    part.rename(folder)
    return folder
