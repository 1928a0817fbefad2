"""RoPE as configs write it, in both generations' words: llama.cpp's predictions from our files are transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from tests import tiny
from tests.oracles import reference, runtime
from tests.tiny import ABSENT

pytestmark = pytest.mark.parity

F32_KL = 1e-8
ROOM = 8 << 30  # torch is in this process
# Longer than the context that the scalings below were trained for.
IDS = [int(i) for i in np.random.RandomState(5).randint(5, 404, 48)]

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
YARN = {"factor": 4.0, "original_max_position_embeddings": 24}
ABOVE = {"rope_parameters": ABSENT, "rope_theta": 20000.0}  # as transformers 4 writes it


def distance(src: Path, dst: Path) -> float:
    """KL of llama.cpp's predictions, from what we make of `src`, to those of transformers."""
    streamconv.convert(src, dst, outtype="f32", max_memory=ROOM)
    logits = reference.logits(src, IDS)[[0, 23, 47]]
    with runtime.Runtime(dst) as model:
        logprobs = np.stack([model.next_logprobs(IDS[:n]) for n in (1, 24, 48)])
    return runtime.kl(logits, logprobs)


LLAMA: dict[str, dict[str, Any]] = {
    "new base": {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
    "old base": {"rope_parameters": ABSENT, "rope_theta": 20000.0, "rope_scaling": None},
    "no base": {"rope_parameters": ABSENT},
    "old linear": ABOVE | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "old llama3": ABOVE | {"rope_scaling": {"rope_type": "llama3"} | LLAMA3},
    "new llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0} | LLAMA3},
    "old yarn": ABOVE | {"rope_scaling": {"rope_type": "yarn"} | YARN},
    "new yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0} | YARN},
    "attention factor": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "attention_factor": 1.3} | YARN},
    "both mscales": {"rope_parameters": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.4} | YARN},
    "one mscale": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "mscale": 0.6} | YARN},
    "plain betas": {"rope_parameters": {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1} | YARN},
    "yarn from max_position_embeddings": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0}},
}
LFM2: dict[str, dict[str, Any]] = {
    "old base": {"rope_parameters": ABSENT, "rope_theta": 50.0},
    "both": {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}, "rope_theta": 7000.0},
    "scaling": {"rope_parameters": {"rope_theta": 50.0}, "rope_scaling": {"rope_theta": 7.0, "rope_type": "default"}},
    "no base": {"rope_parameters": ABSENT, "theta": 50.0},
}


@pytest.mark.parametrize("label", LLAMA)
def test_llama(tmp_path: Path, label: str) -> None:
    src = tiny.llama(tmp_path / "src", head_dim=32, config=LLAMA[label])
    assert distance(src, tmp_path / "made.gguf") < F32_KL


@pytest.mark.parametrize("label", LFM2)
@pytest.mark.parametrize("builder", [tiny.lfm2, tiny.lfm2moe])
def test_lfm2(tmp_path: Path, builder: Callable[..., Path], label: str) -> None:
    src = builder(tmp_path / "src", config=LFM2[label])
    assert distance(src, tmp_path / "made.gguf") < F32_KL
