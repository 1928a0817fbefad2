"""Adapters of drawn shapes: the change that PEFT computes, and its predictions, from our GGUF adapter at runtime."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import streamconv
from tests import cases, tiny
from tests.oracles import deltas, ggufs, reference, runtime
from tests.parity.conftest import MEMORY, Sources

pytestmark = pytest.mark.parity

N_DRAWS = 16
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LFM2 = ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3")
BASES = {
    "llama": (LLAMA, {"attn_q": 4, "attn_k": 2}),
    "llama-linear": (LLAMA, {"attn_q": 4, "attn_k": 1}),
    "lfm2": (LFM2, None),
    "lfm2-untied": (LFM2, None),
    "lfm2moe": (LFM2, None),
}


def draw(rng: random.Random, targets: tuple[str, ...]) -> dict[str, Any]:
    chosen = rng.sample(targets, rng.randint(2, len(targets)))
    return {
        "targets": chosen,
        "r": rng.choice([1, 2, 3, 8, 16, 80]),
        "alpha": rng.choice([1, 7, 16, 0.5, 32]),
        "rslora": rng.random() < 0.4,
        "rank_pattern": {rng.choice(chosen): rng.choice([1, 5, 12])} if rng.random() < 0.5 else {},
        "alpha_pattern": {rng.choice(chosen): rng.choice([2, 9, 0.25])} if rng.random() < 0.5 else {},
        "dtype": rng.choice(["F32", "F32", "BF16", "F16"]),
    }


@pytest.mark.parametrize("number", range(N_DRAWS))
@pytest.mark.parametrize("base_name", BASES)
def test_drawn(sources: Sources, tmp_path: Path, base_name: str, number: int) -> None:
    targets, heads = BASES[base_name]
    drawn = draw(random.Random(f"{base_name} {number}"), targets)
    base = sources.model(base_name)
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, seed=2000 + number, **drawn)
    dst = tmp_path / "adapter.gguf"
    streamconv.convert_adapter(adapter, base, dst, outtype="f32", max_memory=MEMORY)
    trained = deltas.placed(reference.deltas(base, adapter), heads)
    assert max(deltas.distances(deltas.applied(ggufs.read(dst)), trained).values()) < 1e-6, drawn
    base_gguf = tmp_path / "base.gguf"
    streamconv.convert(base, base_gguf, outtype="f32", max_memory=MEMORY)
    logprobs = runtime.next_token_logprobs(base_gguf, cases.IDS, [(dst, 1.0)], positions=cases.POSITIONS)
    logits = reference.logits(base, cases.IDS, adapter)[list(cases.POSITIONS)]
    assert runtime.kl(logits, logprobs) < (1e-6 if base_name == "lfm2moe" else 1e-8), drawn


@pytest.mark.parametrize("name", cases.ADAPTERS)
def test_committed_logits_are_current(sources: Sources, name: str) -> None:
    adapter, base = sources.adapter(name)
    logits = reference.logits(base, cases.IDS, adapter)[list(cases.POSITIONS)]
    assert runtime.kl(cases.logits(name), runtime.normalized(logits)) < 1e-11


@pytest.mark.parametrize("name", ["llama-rslora", "llama-patterns"])
def test_what_llama_cpps_converter_gets_wrong(sources: Sources, tmp_path: Path, name: str) -> None:
    """It ignores use_rslora and the patterns; if this fails it has learnt them, and its goldens can be compared."""
    adapter, base = sources.adapter(name)
    factors = deltas.applied(ggufs.read(_theirs(adapter, base, tmp_path)))
    trained = deltas.placed(reference.deltas(base, adapter), BASES["llama"][1])
    assert max(deltas.distances(factors, trained).values()) > 0.1


def _theirs(adapter: Path, base: Path, directory: Path) -> Path:
    from tests.tools import llama_cpp

    return llama_cpp.convert_lora(adapter, base, directory / "theirs.gguf", "f32")
