"""Merged models against PEFT's `merge_and_unload`, base in float32: weights within rounding, the same predictions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from tests import cases, tiny
from tests.oracles import deltas, ggufs, reference, runtime
from tests.parity.conftest import MEMORY, Sources
from tests.parity.test_adapters import BASES
from tests.parity.test_adapters import draw as draw_adapter

pytestmark = pytest.mark.parity

N_DRAWS = 8
EPS32 = 2.0**-23


def draw(rng: random.Random, targets: tuple[str, ...]) -> dict[str, Any]:
    return draw_adapter(rng, targets) | {"dora": rng.random() < 0.6}


def bounds(base: Path, adapter: Path) -> dict[str, np.ndarray[Any, Any]]:
    """(r + 4) eps (|W| + |s| |B| |A|) for each changed weight, its rows scaled as DoRA scales them."""
    scale_of, weights = reference.scales(base, adapter), tiny.tensors_of(base)
    changes, magnitudes = deltas.trained(adapter, scale_of.__getitem__), deltas.magnitudes(adapter)
    found = {}
    for module, (size, rank) in deltas.sizes(adapter, scale_of.__getitem__).items():
        weight = weights.get(f"{module}.weight", weights["model.embed_tokens.weight"]).float32().astype(np.float64)
        bound = (rank + 4) * EPS32 * (np.abs(weight) + size)
        if module in magnitudes:
            axis = 0 if module == "model.embed_tokens" else 1
            norms = np.linalg.norm(weight + changes[module], axis=axis, keepdims=True)
            bound *= np.expand_dims(magnitudes[module], axis) / norms
        found[module] = bound
    return found


def check(base: Path, adapter: Path, heads: dict[str, int] | None, dst: Path, kl: float) -> None:
    streamconv.convert(base, dst, outtype="f32", adapters=[adapter], max_memory=MEMORY)
    ours, theirs = ggufs.read(dst), reference.merged(base, adapter)
    for module, bound in bounds(base, adapter).items():
        ((target, wanted),) = deltas.placed({module: theirs[f"{module}.weight"].astype(np.float64)}, heads).items()
        ((_, allowed),) = deltas.placed({module: bound}, heads).items()
        assert (np.abs(ours.float64(target) - wanted) <= allowed).all(), target
    logits = reference.logits(base, cases.IDS, adapter, merge=True)
    assert runtime.kl(logits, runtime.next_token_logprobs(dst, cases.IDS)) < kl


@pytest.mark.parametrize("number", range(N_DRAWS))
@pytest.mark.parametrize("base_name", BASES)
def test_drawn(sources: Sources, tmp_path: Path, base_name: str, number: int) -> None:
    targets, heads = BASES[base_name]
    base = sources.model(base_name)
    drawn = draw(random.Random(f"merge {base_name} {number}"), targets)
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, seed=3000 + number, **drawn)
    check(base, adapter, heads, tmp_path / "merged.gguf", 1e-6 if base_name == "lfm2moe" else 1e-8)


@pytest.mark.parametrize("name", cases.MERGES)
def test_cases_that_only_a_merge_can_carry(sources: Sources, tmp_path: Path, name: str) -> None:
    adapter, base = sources.adapter(name)
    check(base, adapter, BASES[base.name][1], tmp_path / "merged.gguf", 1e-8)
    logits = reference.logits(base, cases.IDS, adapter, merge=True)[list(cases.POSITIONS)]
    assert runtime.kl(cases.logits(name), runtime.normalized(logits)) < 1e-11
