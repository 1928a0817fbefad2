"""The cases with committed references: files in data/cases, or seeded builders here with references in data/goldens.

tools/make_goldens.py makes the references. A built case is compared with the digest that its references were made from,
so that drift fails loudly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import tiny
from tests.oracles import ggufs

DATA = Path(__file__).parent / "data"
GIVEN = DATA / "cases"
GOLDENS = DATA / "goldens"
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")

IDS = (1, 33, 120, 7, 300, 201, 64, 90)  # the prompt of the built cases' logits
POSITIONS = (1, 4, 7)  # the positions of IDS whose logits are kept

Builder = Callable[..., Path]  # (directory), or for an adapter (directory, base)

# Digits, contractions, runs of space and of newlines, letters of several scripts, emoji, and tokens that are no text.
TEXTS = (
    "Hello world, don't worry: it'll be 12345 or 1999!",
    "the  quick   brown\tfox\n\n\n  over\n the dog\r\n",
    "x=1+2==3 ... (they) we're I'VE 's over123 123over",
    "Füür é они 我们 ʼn ١٢٣ ½ 🚀🦙 naïve\u200dco\u0301te",
    "<|im_start|>user\nhi <tool> the<tool>the<|im_end|>\n",
    "   leading and trailing   ",
    "\n",
)
SPM_TEXTS = (
    "hello world, the quick brown  foxes don't 123 ü é 我们 🚀",
    " leading and trailing  ",
    "over\nthe\tthing",
    "12345 ... 's",
)

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160}
_LFM2_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3")

MODELS: dict[str, Builder] = {
    "lfm2": tiny.lfm2,
    "lfm2-untied": partial(tiny.lfm2, seed=11, tied=False, attention=(0, 2), ff=80, dtype="F16", n_shards=2),
    "lfm2-idxs": partial(tiny.lfm2, seed=12, attention=(1,), layers_by=("full_attn_idxs",), dtype="F32"),
    "lfm2moe": tiny.lfm2moe,
    "lfm2moe-stacked": partial(tiny.lfm2moe, stacked=True),
    "lfm2moe-unbiased": partial(tiny.lfm2moe, seed=21, expert_bias=False, moe_ff=80),
    "lfm2moe-scaled": partial(tiny.lfm2moe, seed=22, tied=False, config={"routed_scaling_factor": 2.5}),
    "llama": partial(
        tiny.llama,
        seed=31,
        head_dim=24,
        tied=False,
        attention_bias=True,
        mlp_bias=True,
        rope_theta=500000.0,
        rope_scaling=_LLAMA3,
    ),
    "llama-linear": partial(
        tiny.llama,
        seed=32,
        n_kv_heads=1,
        ff=80,
        dtype="BF16",
        n_shards=2,
        rope_parameters=False,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
        tokenizer="smollm",
    ),
    "llama-yarn": partial(tiny.llama, seed=33, n_heads=8, n_kv_heads=4, dtype="F16", rope_scaling=_YARN),
    "llama-spm": partial(tiny.llama, seed=34, n_heads=2, n_kv_heads=2, tokenizer="spm"),
}

# What llama.cpp must be told of a case's pre-tokenizer, since the vocabulary is not a published one.
PRE = {name: "llama-bpe" if name.startswith("llama") else "lfm2" for name in MODELS} | {"llama-linear": "smollm"}

ADAPTERS: dict[str, tuple[str, Builder]] = {
    "llama-plain": ("llama", tiny.peft_adapter),
    "llama-rslora": ("llama", partial(tiny.peft_adapter, seed=41, r=6, alpha=9, rslora=True)),
    "llama-patterns": (
        "llama",
        partial(
            tiny.peft_adapter,
            seed=42,
            r=4,
            alpha=8,
            rank_pattern={"q_proj": 6, r"layers\.1\.self_attn\.k_proj": 2},
            alpha_pattern={"model.layers.0.self_attn.q_proj": 3, "o_proj": 1, "proj": 50},
        ),
    ),
    "llama-wide": ("llama", partial(tiny.peft_adapter, seed=43, r=72, alpha=72)),
    "llama-layer": ("llama", partial(tiny.peft_adapter, seed=44, r=5, layers=(1,))),
    "llama-bf16": ("llama", partial(tiny.peft_adapter, seed=45, dtype="BF16")),
    "llama-f16": ("llama", partial(tiny.peft_adapter, seed=46, dtype="F16")),
    "llama-ends": (
        "llama",
        partial(tiny.peft_adapter, seed=47, r=5, targets=("embed_tokens", "lm_head", "q_proj", "k_proj")),
    ),
    "lfm2-plain": ("lfm2", partial(tiny.peft_adapter, seed=51, targets=_LFM2_TARGETS)),
    "lfm2moe-plain": ("lfm2moe", partial(tiny.peft_adapter, seed=52, targets=_LFM2_TARGETS)),
}

# Adapters that only a merge can carry.
MERGES: dict[str, tuple[str, Builder]] = {
    "llama-dora": ("llama", partial(tiny.peft_adapter, seed=61, dora=True)),
    "llama-dora-ends": (
        "llama",
        partial(tiny.peft_adapter, seed=62, r=4, dora=True, rslora=True, targets=("embed_tokens", "lm_head", "v_proj")),
    ),
    "llama-linear-head": (
        "llama-linear",
        partial(tiny.peft_adapter, seed=63, targets=("q_proj", "k_proj"), modules_to_save=("lm_head",)),
    ),
    "lfm2-dora": ("lfm2", partial(tiny.peft_adapter, seed=64, targets=_LFM2_TARGETS, dora=True, dtype="BF16")),
}


def build(name: str, directory: Path) -> Path:
    """The model of that name under `directory`, the very one that the references were made from."""
    return _checked(name, MODELS[name](directory / name))


def build_adapter(name: str, directory: Path) -> tuple[Path, Path]:
    """The adapter of that name and its base, both built under `directory`."""
    base_name, builder = (ADAPTERS | MERGES)[name]
    base = directory / base_name
    if not base.exists():
        build(base_name, directory)
    return _checked(name, builder(directory / name, base)), base


@cache
def record(name: str) -> Any:
    """What is committed of a built case: its digest, and what llama.cpp made of it."""
    return json.loads((GOLDENS / f"{name}.json").read_text())


def golden(name: str, outtype: str) -> dict[str, Any]:
    """llama.cpp's file of a built case, in the form of `tests.oracles.ggufs`; KeyError where it made none."""
    return ggufs.unpacked(record(name)["llamacpp"], outtype)


def logits(name: str) -> NDArray[np.float32]:
    """Reference logits [POSITIONS, vocab] of a built case for IDS."""
    return np.asarray(np.load(GOLDENS / f"{name}.logits.npy"))


@cache
def given_golden(name: str) -> Any:
    """All that is committed of a case in data/cases, by who made it (`llamacpp:f32`, ..., `ollama_seed`)."""
    return json.loads((GIVEN / f"{name}.golden.json").read_text())


def given_ids() -> list[int]:
    """The prompt of the logits in data/cases."""
    return list(json.loads((GIVEN / "ids.json").read_text()))


def given_logits(name: str) -> NDArray[np.float32]:
    """Reference logits [all positions, vocab] of a case in data/cases for `given_ids`."""
    return np.asarray(np.load(GIVEN / f"{name}.logits.npy"))


def _checked(name: str, built: Path) -> Path:
    digest = tiny.digest(built)
    assert digest == record(name)["digest"], f"{name} drifted from what its references were made of"
    return built
