"""Adapters that PEFT itself made and saved: carried exactly, or refused for what PEFT says they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from peft.tuners.lora.config import VeloraConfig

import streamconv
from streamconv.checkpoint.config import Config
from streamconv.errors import SourceError
from streamconv.files.strict_json import load_object
from streamconv.lora.config import read_lora_config
from tests import tiny
from tests.oracles import reference, runtime
from tests.tools import published

pytestmark = pytest.mark.parity

F32_KL = 1e-8
ROOM = 8 << 30  # torch is in this process
IDS = [1, 33, 120, 7, 201]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"), tied=False)


def made_by_peft(base: Path, adapter: Path, settings: dict[str, Any]) -> None:
    """Have PEFT make an adapter, move every parameter of it by noise, and save it."""
    torch.manual_seed(7)
    config = peft.LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | settings)
    model = peft.get_peft_model(reference.load(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(str(adapter))


def logits_of_peft(base: Path, adapter: Path) -> NDArray[Any]:
    """Logits of the saved adapter, loaded again: PEFT sorts patterns when it saves them, and the first one counts."""
    model = peft.PeftModel.from_pretrained(reference.load(base), str(adapter)).eval()
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([IDS])).logits[0].float())


CARRIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.1\..*": 2, "k_proj": 5}},
    "off": {"lora_alpha": 0},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "biases where there are none": {"bias": "all"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "velora": {"velora_config": VeloraConfig(num_groups=8)},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "matrices as parameters": {
        "target_modules": [],
        "target_parameters": ["self_attn.q_proj.weight", "mlp.up_proj.weight"],
    },
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_peft_saves_predicts_what_peft_does(tmp_path: Path, llama: Path, name: str) -> None:
    made_by_peft(llama, tmp_path / "adapter", CARRIED[name])
    streamconv.convert(llama, tmp_path / "base.gguf", outtype="f32", max_memory=ROOM)
    streamconv.convert_adapter(tmp_path / "adapter", llama, tmp_path / "a.gguf", outtype="f32", max_memory=ROOM)
    logprobs = runtime.next_token_logprobs(tmp_path / "base.gguf", IDS, [(tmp_path / "a.gguf", 1.0)])
    assert runtime.kl(logits_of_peft(llama, tmp_path / "adapter"), logprobs) < F32_KL


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA changes the full matrix"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "lm_head: a whole trained weight"),
    "a norm": ({"modules_to_save": ["input_layernorm"]}, "a trained norm"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "tokens": ({"trainable_token_indices": [3, 5]}, "trainable_token_indices"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_gguf_adapter_can_carry(tmp_path: Path, llama: Path, name: str) -> None:
    settings, words = REFUSED[name]
    made_by_peft(llama, tmp_path / "adapter", settings)
    with pytest.raises(SourceError, match=words):
        streamconv.convert_adapter(tmp_path / "adapter", llama, tmp_path / "a.gguf", max_memory=ROOM)


SCALES: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "fractions": {"alpha": 3.5, "r": 3},
    "first match wins": {"alpha_pattern": {"self_attn.q_proj": 3, "q_proj": 5, "layers.1.self_attn.q_proj": 7}},
    "regular expressions": {"alpha_pattern": {r"model\.layers\.[1-9]\.mlp\..*": 3, r".*\.(k|v)_proj": 5}},
    "parts of names": {"alpha_pattern": {"proj": 3, "attn.q_proj": 5, "self_attn": 7}},
    "whole names": {"rank_pattern": {"model.layers.0.mlp.up_proj": 3}, "alpha_pattern": {"lm_head": 5}},
    "both": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 5, "q_proj": 7}, "rslora": True},
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_are_pefts(tmp_path: Path, llama: Path, name: str) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, **SCALES[name])
    path = adapter / "adapter_config.json"
    ours = read_lora_config(Config(load_object(path), path))
    modules = {
        module.removeprefix("base_model.model."): layer
        for module, layer in reference.load(llama, adapter).named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert len(modules) == 14
    for module, layer in modules.items():
        assert ours.rank(module) == layer.r["default"]
        assert ours.scale(module, layer.r["default"]) == pytest.approx(layer.scaling["default"], rel=1e-15)


def test_a_real_model_predicts_what_peft_does(tmp_path: Path) -> None:
    """SmolLM2-135M with its published weights, an adapter with every kind of scale, the whole path."""
    checkpoint = published.checkpoint("smollm2-135m-instruct")
    adapter = tiny.peft_adapter(
        tmp_path / "adapter", checkpoint, r=6, rslora=True, rank_pattern={"q_proj": 10}, alpha_pattern={"o_proj": 5}
    )
    base, dst = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    streamconv.convert(checkpoint, base, outtype="f32", max_memory=ROOM)
    streamconv.convert_adapter(adapter, base, dst, outtype="f32", max_memory=ROOM)
    ids = runtime.tokenize(base, "The fastest way to the sea is")
    logprobs = runtime.next_token_logprobs(base, ids, [(dst, 1.0)])
    assert runtime.kl(reference.logits(checkpoint, ids, adapter), logprobs) < F32_KL
