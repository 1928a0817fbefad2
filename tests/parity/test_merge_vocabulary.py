"""Adapters of a grown vocabulary, and of tied ends, as PEFT saves them: merged, they predict what PEFT's model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray

import streamconv
from tests import cases, tiny
from tests.oracles import reference, runtime

pytestmark = pytest.mark.parity

F32_KL = 1e-8
ROOM = 8 << 30  # torch is in this process
N_TOKENS = 380

GROWN: dict[str, dict[str, Any]] = {
    "saved with the vocabulary": {"target_modules": ["q_proj", "up_proj"]},
    "trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "trained by factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
}


def train_and_save(model: Any, adapter: Path, settings: dict[str, Any]) -> NDArray[Any]:
    """Have PEFT make an adapter, move what it trains, and save it; the adapted model's logits."""
    torch.manual_seed(11)
    config = peft.LoraConfig(**{"r": 6, "lora_alpha": 9, "task_type": "CAUSAL_LM"} | settings)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(str(adapter))
    with torch.inference_mode():
        return np.asarray(adapted(torch.tensor([list(cases.IDS)])).logits[0].float())


def check(base: Path, adapter: Path, logits: NDArray[Any], dst: Path) -> None:
    streamconv.convert(base, dst, outtype="f32", adapters=[adapter], max_memory=ROOM)
    assert runtime.kl(logits, runtime.next_token_logprobs(dst, cases.IDS)) < F32_KL


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", GROWN)
def test_a_grown_vocabulary(tmp_path: Path, how: str, tied: bool) -> None:
    base = tiny.llama(tmp_path / "base", vocab=N_TOKENS, tied=tied)
    tiny.write_bpe(base, pre="llama-bpe", n_tokens=N_TOKENS)
    model = reference.load(base)
    torch.manual_seed(5)
    model.resize_token_embeddings(tiny.N_BPE_TOKENS + 4)
    logits = train_and_save(model, tmp_path / "adapter", GROWN[how])
    tiny.write_bpe(tmp_path / "adapter", pre="llama-bpe")
    check(base, tmp_path / "adapter", logits, tmp_path / "merged.gguf")


def test_a_grown_embedding_of_a_tied_base_is_its_head(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", vocab=N_TOKENS)
    tiny.write_bpe(base, pre="llama-bpe", n_tokens=N_TOKENS)
    model = reference.load(base)
    torch.manual_seed(6)
    model.resize_token_embeddings(tiny.N_BPE_TOKENS + 4)
    logits = train_and_save(model, tmp_path / "adapter", {"target_modules": ["q_proj", "embed_tokens"]})
    tiny.write_bpe(tmp_path / "adapter", pre="llama-bpe")
    check(base, tmp_path / "adapter", logits, tmp_path / "merged.gguf")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["lm_head"]},
    ],
    ids=["embedding", "whole embedding", "whole head", "tied", "head"],
)
def test_ends_of_a_tied_base(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = tiny.llama(tmp_path / "base")
    logits = train_and_save(reference.load(base), tmp_path / "adapter", settings)
    check(base, tmp_path / "adapter", logits, tmp_path / "merged.gguf")
