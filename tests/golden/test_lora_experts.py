"""Adapters on experts and routers, as MLX and PEFT store them: the runtime predicts what the merged weights do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import streamconv
from tests import cases, loras, tiny
from tests.oracles import runtime

SCALE, RANK, N_EXPERTS = 1.5, 5, 6
LAYERS = (1, 2, 3)
NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # MLX's stacked modules, and one expert's
F32_KL = 1e-8

Tensors = dict[str, tiny.Tensor]


def changes(weights: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """An adapter as MLX stores it, the same as PEFT does, and the weights with it merged."""
    mlx, peft, merged = Tensors(), Tensors(), dict(weights)

    def add(module: str, a: np.ndarray, b: np.ndarray) -> None:
        peft[f"base_model.model.{module}.lora_A.weight"] = tiny.Tensor.of(a, "F32")
        peft[f"base_model.model.{module}.lora_B.weight"] = tiny.Tensor.of(b, "F32")
        merged[f"{module}.weight"] = tiny.Tensor.of(weights[f"{module}.weight"].float32() + SCALE * b @ a, "F32")

    for i in LAYERS:
        layer = f"model.layers.{i}.feed_forward"
        for together, alone in NAMES.items():
            n_out, n_in = weights[f"{layer}.experts.0.{alone}.weight"].shape
            a = tiny.noise(f"{i}{alone}.a", (N_EXPERTS, RANK, n_in), 0.1)
            b = tiny.noise(f"{i}{alone}.b", (N_EXPERTS, n_out, RANK), 0.1)
            mlx[f"{layer}.switch_mlp.{together}.lora_a"] = tiny.Tensor.of(a, "F32")
            mlx[f"{layer}.switch_mlp.{together}.lora_b"] = tiny.Tensor.of(b, "F32")
            for e in range(N_EXPERTS):
                add(f"{layer}.experts.{e}.{alone}", a[e], b[e])
        n_out, n_in = weights[f"{layer}.gate.weight"].shape
        a, b = tiny.noise(f"{i}gate.a", (RANK, n_in), 0.1), tiny.noise(f"{i}gate.b", (n_out, RANK), 0.1)
        mlx[f"{layer}.gate.lora_a"] = tiny.Tensor.of(a.T, "F32")
        mlx[f"{layer}.gate.lora_b"] = tiny.Tensor.of(b.T, "F32")
        add(f"{layer}.gate", a, b)
    return mlx, peft, merged


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_experts_and_routers(tmp_path: Path, factor: float) -> None:
    settings = {"routed_scaling_factor": factor}
    base = tiny.lfm2moe(tmp_path / "base", dtype="F32", config=settings)
    mlx, peft, merged = changes(tiny.tensors_of(base))
    tiny.write_safetensors(tiny.lfm2moe(tmp_path / "merged", config=settings) / "model.safetensors", merged)
    for name in ("base", "merged"):
        streamconv.convert(tmp_path / name, tmp_path / f"{name}.gguf", outtype="f32")
    expected = runtime.next_token_logprobs(tmp_path / "merged.gguf", cases.IDS)
    assert runtime.kl(expected, runtime.next_token_logprobs(tmp_path / "base.gguf", cases.IDS)) > 1
    as_mlx = {"lora_parameters": {"rank": RANK, "scale": SCALE}}
    as_peft = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK}
    for name, tensors, config in (("mlx", mlx, as_mlx), ("peft", peft, as_peft)):
        adapter = loras.write(tmp_path / name, tensors, config)
        streamconv.convert_adapter(adapter, base, tmp_path / f"{name}.gguf", outtype="f32")
        predicted = runtime.next_token_logprobs(tmp_path / "base.gguf", cases.IDS, [(tmp_path / f"{name}.gguf", 1.0)])
        assert runtime.kl(expected, predicted) < F32_KL, name
