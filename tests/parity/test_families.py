"""The committed references of the families are what today's llama.cpp converter, transformers and PEFT make.

`make parity FAMILIES="qwen3 gemma3"` tries some of them alone; all take eight minutes on two cores.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import streamconv
from tests import families, tiny
from tests.families.table import FAMILIES
from tests.oracles import reference, runtime
from tests.parity.conftest import MEMORY
from tests.tools import families as tool

pytestmark = pytest.mark.parity

NAMES = os.environ.get("FAMILIES", "").split() or list(FAMILIES)
HOLDERS = re.compile(r"\.experts\.|\.(input|output)_linear\.")  # of stacks, as against kernels of convolutions
WITH_EXPERTS = [name for name in NAMES if any(map(HOLDERS.search, families.build.spec(name)["tensors"]))]


@pytest.mark.parametrize("name", NAMES)
def test_references_are_as_committed(name: str) -> None:
    tool.check(name)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_an_adapter_on_experts(tmp_path: Path, name: str) -> None:
    """PEFT's `target_parameters`, on whatever the model of transformers holds as one parameter for all experts."""
    src = families.checkpoint(name, tmp_path / "model")
    kind: Any = getattr(transformers, FAMILIES[name].hf_name)
    model = reference.load(src, kind=kind)
    stacks = sorted(
        {
            ".".join(p.split(".")[-2:])
            for p, values in model.named_parameters()
            if values.dim() == 3 and HOLDERS.search(p)
        }
    )
    assert stacks
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=[], target_parameters=stacks, task_type="CAUSAL_LM", bias="none"
    )
    trained = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter, values in trained.named_parameters():
            if values.requires_grad:
                size = 0.1 if "lora_B" in parameter else 1.0
                noise = tiny.noise(parameter, tuple(values.shape), size / values.shape[-1] ** 0.5, 9)
                values.copy_(torch.from_numpy(noise))
    trained.save_pretrained(str(tmp_path / "adapter"))
    with torch.inference_mode():
        logits = np.asarray(trained.eval()(torch.tensor([families.IDS])).logits[0].float())[list(families.POSITIONS)]
    assert runtime.kl(families.logits(name)[0], runtime.normalized(logits)) > 1e-6, "the adapter changes nothing"
    base, merged, adapter = (tmp_path / f"{which}.gguf" for which in ("base", "merged", "adapter"))
    streamconv.convert(src, base, outtype="f32", max_memory=MEMORY)
    streamconv.convert(src, merged, outtype="f32", adapters=[tmp_path / "adapter"], max_memory=MEMORY, verify=True)
    assert runtime.kl(logits, families.run(name, merged)) < 1e-8
    streamconv.convert_adapter(tmp_path / "adapter", src, adapter, outtype="f32", max_memory=MEMORY)
    assert runtime.kl(logits, families.run(name, base, [(adapter, 1.0)])) < 1e-8
