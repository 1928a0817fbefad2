"""The change that an adapter makes to a weight, in float64, from the definitions and not from any converter's code.

Covers the trained change (PEFT's and MLX's factors), the change that llama.cpp applies, llama.cpp's order of Q and K,
and a merged weight. The scale that a config means is given by the tests, module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests import tiny
from tests.oracles import ggufs

Matrix = NDArray[np.float64]

# Source and target names of the modules that adapters change, one a row.
TARGETS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.out_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
}


def target(module: str) -> str:
    """The GGUF tensor of a module of a checkpoint: `model.layers.0.mlp.up_proj` -> `blk.0.ffn_up.weight`."""
    ends = {"model.embed_tokens": "token_embd.weight", "lm_head": "output.weight"}
    if module in ends:
        return ends[module]
    _, _, layer, name = module.split(".", 3)
    return f"blk.{layer}.{TARGETS[name]}.weight"


def interleaved(weight: Matrix, n_heads: int) -> Matrix:
    """Rows [heads, 2, D/2] reordered to [heads, D/2, 2]: from Hugging Face's RoPE layout to llama.cpp's for Llama."""
    half = weight.shape[0] // n_heads // 2
    order = [head * 2 * half + part * half + i for head in range(n_heads) for i in range(half) for part in (0, 1)]
    return weight[order]


def trained(adapter: Path, scale: Callable[[str], float]) -> dict[str, Matrix]:
    """s B A by module, of an adapter as PEFT or MLX stores it; an embedding's is [V, H] like its weight."""
    return {module: scale(module) * _product(parts) for module, parts in _factors(adapter).items()}


def sizes(adapter: Path, scale: Callable[[str], float]) -> dict[str, tuple[Matrix, int]]:
    """|s| |B| |A| and the rank by module: what rounding errors of s B A are measured by."""
    return {
        module: (
            abs(scale(module)) * _product({part: np.abs(values) for part, values in parts.items()}),
            _rank(parts),
        )
        for module, parts in _factors(adapter).items()
    }


def magnitudes(adapter: Path) -> dict[str, NDArray[np.float64]]:
    """DoRA's magnitudes by module."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector"): tensor.float32().astype(
            np.float64
        )
        for name, tensor in tiny.tensors_of(adapter).items()
        if name.endswith(".lora_magnitude_vector")
    }


def _factors(adapter: Path) -> dict[str, dict[str, Matrix]]:
    factors: dict[str, dict[str, Matrix]] = {}
    for name, tensor in tiny.tensors_of(adapter).items():
        module, _, part = name.replace("base_model.model.", "").partition(".lora_")
        if part and part != "magnitude_vector":
            factors.setdefault(module, {})[part] = tensor.float32().astype(np.float64)
    return factors


def _rank(parts: Mapping[str, Matrix]) -> int:
    _, rank = parts["a"].shape if "a" in parts else next(v for k, v in parts.items() if "A" in k).T.shape
    return int(rank)


def _product(parts: Mapping[str, Matrix]) -> Matrix:
    if "embedding_A" in parts:
        return (parts["embedding_B"] @ parts["embedding_A"]).T
    if "a" in parts:
        return (parts["a"] @ parts["b"]).T
    return parts["B.weight"] @ parts["A.weight"]


def applied(adapter: ggufs.Gguf) -> dict[str, Matrix]:
    """What llama.cpp adds to each tensor of its base: s B A with s = alpha / r, or 1 where alpha is 0 or missing."""
    alpha = adapter.keys["adapter.lora.alpha"].value if "adapter.lora.alpha" in adapter.keys else 0.0
    deltas = {}
    for name in adapter.tensors:
        if not name.endswith(".lora_a"):
            continue
        base = name.removesuffix(".lora_a")
        a, b = adapter.float64(name), adapter.float64(f"{base}.lora_b")
        rank = b.shape[1]
        product = a @ b.T if base == "token_embd.weight" else b @ a
        deltas[base] = (alpha / rank if alpha else 1.0) * product
    return deltas


def expected(adapter: Path, scale: Callable[[str], float], heads: Mapping[str, int] | None = None) -> dict[str, Matrix]:
    """What must be added to each tensor of a GGUF base, see `placed`."""
    return placed(trained(adapter, scale), heads)


def placed(changes: Mapping[str, Matrix], heads: Mapping[str, int] | None = None) -> dict[str, Matrix]:
    """Matrices by module as they stand in a GGUF file, by tensor.

    heads: the heads of `attn_q` and `attn_k` where rows are interleaved (Llama), None where not.
    """
    deltas = {}
    for module, delta in changes.items():
        name = target(module)
        n_heads = (heads or {}).get(name.split(".")[-2])
        deltas[name] = interleaved(delta, n_heads) if n_heads else delta
    return deltas


def distances(ours: Mapping[str, Matrix], theirs: Mapping[str, Matrix]) -> dict[str, float]:
    """The relative Frobenius distance for each tensor; both must change the same ones."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return {name: float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name])) for name in theirs}


def merged(weight: Matrix, delta: Matrix, magnitude: NDArray[np.float64] | None = None, axis: int = 1) -> Matrix:
    """W + delta; with DoRA's `magnitude`, each row of that (each column with axis 0) scaled to its magnitude."""
    total = weight + delta
    if magnitude is None:
        return total
    return np.asarray(total * np.expand_dims(magnitude, axis) / np.linalg.norm(total, axis=axis, keepdims=True))
