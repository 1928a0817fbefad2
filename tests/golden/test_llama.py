"""Llama against llama.cpp's converter and its runtime: heads, biases, RoPE scalings, and every kind of tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import cases
from tests.extras import sentencepiece, tokenizers
from tests.golden.conftest import Workshop
from tests.oracles import ggufs, runtime

F32_KL = 1e-8
BUILT = [name for name in cases.MODELS if name.startswith("llama")]


def golden(name: str, outtype: str) -> dict[str, Any]:
    """llama.cpp's file of a case, given or built."""
    if name.endswith("-given"):
        made: dict[str, Any] = cases.given_golden(name)[f"llamacpp:{outtype}"]
        return made
    return cases.golden(name, outtype)


@pytest.mark.parametrize("outtype", cases.OUTTYPES)
@pytest.mark.parametrize("name", ["llama-given", *BUILT])
def test_tensors_and_shared_keys_are_llama_cpps(workshop: Workshop, name: str, outtype: str) -> None:
    ours, theirs = workshop.read(name, outtype), golden(name, outtype)
    assert ggufs.tensor_faults(ours, theirs) == []
    assert ggufs.key_faults(ours, theirs) == []
    assert ggufs.layout_faults(ours.path) == []


@pytest.mark.parametrize("name", ["llama-given", *BUILT])
def test_nothing_of_llama_cpps_keys_is_missing(workshop: Workshop, name: str) -> None:
    assert golden(name, "f32")["kv"].keys() - workshop.read(name).keys.keys() == set()


def test_given_model_at_run_time(workshop: Workshop) -> None:
    logprobs = runtime.next_token_logprobs(workshop.gguf("llama-given"), cases.given_ids())
    assert runtime.kl(cases.given_logits("llama-given"), logprobs) < F32_KL


@pytest.mark.parametrize("name", BUILT)
def test_run_time_predicts_what_transformers_does(workshop: Workshop, name: str) -> None:
    with runtime.Runtime(workshop.gguf(name)) as model:
        logprobs = np.stack([model.next_logprobs(cases.IDS[: position + 1]) for position in cases.POSITIONS])
    assert runtime.kl(cases.logits(name), logprobs) < F32_KL


U32, F32, STRING = ("UINT32",), ("FLOAT32",), ("STRING",)


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("llama", {}),
        ("llama-linear", {"type": (STRING, "linear"), "factor": (F32, 4.0)}),
        (
            "llama-yarn",
            {"type": (STRING, "yarn"), "factor": (F32, 4.0), "original_context_length": (U32, 160)},
        ),
    ],
)
def test_keys_of_rope(workshop: Workshop, name: str, scaling: dict[str, Any]) -> None:
    keys = {key: (entry.type, entry.value) for key, entry in workshop.read(name).keys.items()}
    base = 500000.0 if name == "llama" else 10000.0
    size = {"llama": 24, "llama-linear": 16, "llama-yarn": 8}[name]
    rope = {"dimension_count": (U32, size), "freq_base": (F32, base)}
    wanted = rope | {f"scaling.{key}": value for key, value in scaling.items()}
    assert {key.removeprefix("llama.rope."): value for key, value in keys.items() if ".rope." in key} == wanted
    assert keys["llama.attention.key_length"] == keys["llama.attention.value_length"] == (U32, size)


def test_llama3s_factors_are_a_tensor(workshop: Workshop) -> None:
    factors = workshop.read("llama").tensors["rope_freqs.weight"]
    assert (factors.shape, factors.type) == ((12,), "F32")
    assert "rope_freqs.weight" not in workshop.read("llama-yarn").tensors


@pytest.mark.parametrize("name", [name for name in BUILT if name != "llama-spm"])
def test_run_time_tokenizes_as_the_reference_does(workshop: Workshop, name: str) -> None:
    reference = tokenizers.Tokenizer.from_file(str(workshop.source(name) / "tokenizer.json"))
    with runtime.Runtime(workshop.gguf(name)) as model:
        for text in cases.TEXTS:
            assert model.tokenize(text) == reference.encode(text, add_special_tokens=False).ids, text


def test_run_time_tokenizes_as_sentencepiece_does(workshop: Workshop) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(workshop.source("llama-spm") / "tokenizer.model"))
    with runtime.Runtime(workshop.gguf("llama-spm")) as model:
        for text in cases.SPM_TEXTS:
            assert model.tokenize(text, parse_special=False) == reference.encode(text), text
