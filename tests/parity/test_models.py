"""Models of random shapes: transformers in float32 and llama.cpp on streamconv's F32 file predict the same.

This adds variety that the committed cases lack. A draw depends only on its number, so a failure can be repeated alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamconv
from tests import cases, tiny
from tests.oracles import reference, runtime
from tests.parity.conftest import MEMORY
from tests.tiny import ABSENT

pytestmark = pytest.mark.parity

N_DRAWS = 12


def draw_attention(rng: random.Random, n_layers: int) -> list[int]:
    """Some layers, never all: llama.cpp aborts on an LFM2 without a layer of convolution."""
    return sorted(rng.sample(range(n_layers), rng.randint(1, n_layers - 1)))


def draw_lfm2_config(rng: random.Random) -> dict[str, Any]:
    """RoPE's base in either place or in none, and keys left out that have the default's value anyway."""
    ropes: list[dict[str, Any]] = [
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rope_parameters": ABSENT, "rope_theta": 50000.0},
        {"rope_parameters": ABSENT},
        {"rope_parameters": None, "rope_theta": 20000.0},
    ]
    defaults = ["norm_eps", "block_ffn_dim_multiplier", "use_cache", "initializer_range", "conv_bias"]
    return rng.choice(ropes) | dict.fromkeys(rng.sample(defaults, rng.randint(0, len(defaults))), ABSENT)


def draw_lfm2(rng: random.Random) -> dict[str, Any]:
    n_layers = rng.randint(2, 6)
    ways: list[tuple[str, ...]] = [("layer_types",), ("full_attn_idxs",), ("layer_types", "full_attn_idxs")]
    n_kv_heads = rng.choice([1, 2, 3])
    return {
        "n_layers": n_layers,
        "attention": draw_attention(rng, n_layers),
        "n_heads": n_kv_heads * rng.choice([1, 2]),
        "n_kv_heads": n_kv_heads,
        "hidden": 96,
        "ff": 16 * rng.randint(2, 9),
        "conv_l": rng.choice([3, 4]),
        "tied": rng.random() < 0.5,
        "auto_adjust": rng.random() < 0.5,
        "layers_by": rng.choice(ways),
        "dtype": rng.choice(["F32", "BF16", "F16"]),
        "n_shards": rng.randint(1, 3),
        "config": draw_lfm2_config(rng),
    }


def draw_lfm2moe(rng: random.Random) -> dict[str, Any]:
    n_layers = rng.randint(2, 4)
    n_experts = rng.randint(3, 8)
    return {
        "n_layers": n_layers,
        "attention": draw_attention(rng, n_layers),
        "n_dense": rng.randint(0, n_layers - 1),
        "n_experts": n_experts,
        "n_used": rng.randint(1, n_experts - 1),
        "moe_ff": 16 * rng.randint(1, 6),
        "tied": rng.random() < 0.5,
        "stacked": rng.random() < 0.3,
        "expert_bias": rng.random() < 0.7,
        "dtype": rng.choice(["F32", "BF16"]),
        "config": {"routed_scaling_factor": rng.choice([1.0, 1.0, 2.0, 0.5])},
    }


def draw_llama(rng: random.Random) -> dict[str, Any]:
    n_kv_heads = rng.choice([1, 2, 4])
    scalings: list[dict[str, Any] | None] = [
        None,
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 48,
        },
    ]
    return {
        "n_layers": rng.randint(1, 3),
        "n_heads": n_kv_heads * rng.choice([1, 2]),
        "n_kv_heads": n_kv_heads,
        "hidden": 64,
        "head_dim": rng.choice([None, 8, 24]),
        "ff": 16 * rng.randint(2, 9),
        "tied": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "rope_theta": rng.choice([10000.0, 500000.0]),
        "rope_scaling": rng.choice(scalings),
        "rope_parameters": rng.random() < 0.5,
        "tokenizer": rng.choice(["llama-bpe", "smollm", "spm", "spm-model", "spm-json"]),
        "dtype": rng.choice(["F32", "BF16", "F16"]),
    }


Draw = Callable[[random.Random], dict[str, Any]]
KINDS: dict[str, tuple[cases.Builder, Draw, float]] = {
    "lfm2": (tiny.lfm2, draw_lfm2, 1e-8),
    "lfm2moe": (tiny.lfm2moe, draw_lfm2moe, 1e-6),
    "llama": (tiny.llama, draw_llama, 1e-8),
}


@pytest.mark.parametrize("number", range(N_DRAWS))
@pytest.mark.parametrize("kind", KINDS)
def test_predictions(tmp_path: Path, kind: str, number: int) -> None:
    builder, draw, bound = KINDS[kind]
    drawn = draw(random.Random(f"{kind} {number}"))
    src = builder(tmp_path / kind, seed=1000 + number, **drawn)
    streamconv.convert(src, tmp_path / "ours.gguf", outtype="f32", max_memory=MEMORY)
    logprobs = runtime.next_token_logprobs(tmp_path / "ours.gguf", cases.IDS)
    assert runtime.kl(reference.logits(src, cases.IDS), logprobs) < bound, drawn


def test_a_prompt_of_hundreds_of_tokens(tmp_path: Path) -> None:
    """Where scaled RoPE and convolution states have long left their first values."""
    ids = [(37 * i + i * i) % 300 + 5 for i in range(400)]
    for name in ("lfm2", "llama", "llama-yarn", "llama-linear"):
        src = cases.build(name, tmp_path)
        streamconv.convert(src, tmp_path / f"{name}.gguf", outtype="f32", max_memory=MEMORY)
        logprobs = runtime.next_token_logprobs(tmp_path / f"{name}.gguf", ids, positions=(399,))
        assert runtime.kl(reference.logits(src, ids)[[399]], logprobs) < 1e-8, name
