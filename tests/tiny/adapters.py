"""LoRA adapters on tiny checkpoints, as PEFT and MLX store them, every factor non-zero."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny.files import NOTHING, Config, Float, Tensor, noise, tensors_of, write_config, write_safetensors


def peft_adapter(
    directory: Path,
    base: Path,
    *,
    targets: Iterable[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    layers: Iterable[int] | None = None,
    seed: int = 4,
    r: int = 8,
    alpha: float = 12,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] = NOTHING,
    alpha_pattern: Mapping[str, float] = NOTHING,
    dtype: str = "F32",
    prefix: str = "base_model.model.",
    dora: bool = False,
    modules_to_save: Iterable[str] = (),
    config: Config = NOTHING,
) -> Path:
    """A PEFT LoRA adapter on the modules of `base` whose last name is in `targets`, `embed_tokens` and `lm_head` too.

    `dora` adds magnitudes near the norms of W's rows (of its columns for embeddings); `modules_to_save` adds whole
    replacement weights of these modules.
    """
    directory.mkdir(parents=True, exist_ok=True)
    targets, modules_to_save = list(targets), list(modules_to_save)
    tensors: dict[str, Tensor] = {}
    for module, weight in _modules(base, targets, layers):
        rank = next((value for key, value in rank_pattern.items() if re.match(rf"(.*\.)?({key})$", module)), r)
        a, b = _factors(module, weight.shape, rank, seed)
        embedding = module.endswith("embed_tokens")
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        parts = dict(zip(names, (b.T, a.T) if embedding else (a, b), strict=True))
        if dora:
            norms = _row_norms(weight.float32().T if embedding else weight.float32())
            parts["lora_magnitude_vector"] = norms * (1 + noise(f"{module}.magnitude", norms.shape, 0.2, seed))
        tensors |= {f"{prefix}{module}.{name}": Tensor.of(values, dtype) for name, values in parts.items()}
        if module in ("model.embed_tokens", "lm_head"):  # PEFT saves these, as the vocabulary might have grown
            tensors[f"{prefix}{module}.base_layer.weight"] = weight
    for module, weight in _modules(base, modules_to_save, None):
        moved = weight.float32() + noise(f"{module}.saved", weight.shape, 0.1, seed)
        tensors[f"{prefix}{module}.weight"] = Tensor.of(moved, dtype)
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    write_config(
        directory / "adapter_config.json",
        _PEFT_CONFIG
        | {
            "alpha_pattern": dict(alpha_pattern),
            "lora_alpha": alpha,
            "layers_to_transform": None if layers is None else list(layers),
            "modules_to_save": modules_to_save or None,
            "r": r,
            "rank_pattern": dict(rank_pattern),
            "target_modules": targets,
            "use_dora": dora,
            "use_rslora": rslora,
        },
        config,
    )
    return directory


def mlx_adapter(
    directory: Path,
    base: Path,
    *,
    targets: Iterable[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    layers: Iterable[int] | None = None,
    seed: int = 4,
    r: int = 8,
    scale: float = 1.5,
    dtype: str = "F32",
    config: Config = NOTHING,
) -> Path:
    """An MLX LoRA adapter: at the same seed, targets and rank the values of `peft_adapter`, both factors transposed.

    An embedding's factors are stored as they are, those of `peft_adapter` being transposed there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, weight in _modules(base, list(targets), layers):
        a, b = _factors(module, weight.shape, r, seed)
        if module.endswith("embed_tokens"):  # LoRAEmbedding: lora_a [tokens, r], lora_b [r, hidden]
            a, b = b.T, a.T
        tensors |= {f"{module}.lora_a": Tensor.of(a.T, dtype), f"{module}.lora_b": Tensor.of(b.T, dtype)}
    write_safetensors(directory / "adapters.safetensors", tensors)
    settings = {
        "fine_tune_type": "lora",
        "model": base.name,
        "num_layers": -1,
        "lora_parameters": {"rank": r, "dropout": 0.0, "scale": scale},
    }
    write_config(directory / "adapter_config.json", settings, config)
    return directory


def _modules(base: Path, targets: Sequence[str], layers: Iterable[int] | None) -> list[tuple[str, Tensor]]:
    """Linear modules of `base` by their last name, with their weights; ValueError for a target that is not there.

    Experts are no modules for PEFT, as transformers holds them as stacked parameters; a tied base has its head.
    """
    wanted = None if layers is None else {str(layer) for layer in layers}
    found: list[tuple[str, Tensor]] = []
    tensors = tensors_of(base)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        parts = module.split(".")
        if leaf != "weight" or parts[-1] not in targets or "experts" in parts:
            continue
        if wanted is None or "layers" not in parts or parts[2] in wanted:
            found.append((module, tensor))
    missing = set(targets) - {module.rpartition(".")[2] for module, _ in found}
    if missing:
        raise ValueError(f"{base} has no module named {sorted(missing)}")
    return sorted(found, key=lambda item: item[0])


def _row_norms(weight: Float) -> Float:
    """Exactly rounded, since a BLAS sums in an order of its own."""
    return np.array([math.sqrt(math.fsum(row * row)) for row in weight.astype(np.float64)], dtype=np.float32)


def _factors(module: str, shape: tuple[int, ...], r: int, seed: int) -> tuple[Float, Float]:
    """A [r, in] and B [out, r] whose product is a tenth of the size of a weight of `shape`."""
    n_out, n_in = shape
    a = noise(f"{module}.lora_A", (r, n_in), 1 / math.sqrt(n_in), seed)
    return a, noise(f"{module}.lora_B", (n_out, r), 0.1 / math.sqrt(r), seed)


_PEFT_CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
