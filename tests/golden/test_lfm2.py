"""LFM2 against llama.cpp's converter, its runtime, and the converter of Ollama's first LFM2 release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import streamconv
from tests import cases
from tests.extras import tokenizers
from tests.golden.conftest import Workshop
from tests.oracles import ggufs, runtime

F32_KL = 1e-8


@pytest.mark.parametrize("outtype", cases.OUTTYPES)
def test_tensors_and_shared_keys_are_llama_cpps(workshop: Workshop, outtype: str) -> None:
    ours, golden = workshop.read("lfm2-given", outtype), cases.given_golden("lfm2-given")[f"llamacpp:{outtype}"]
    assert ggufs.tensor_faults(ours, golden) == []
    assert ggufs.key_faults(ours, golden) == []
    assert ggufs.layout_faults(ours.path) == []


def test_nothing_of_llama_cpps_keys_is_missing(workshop: Workshop) -> None:
    ours, golden = workshop.read("lfm2-given"), cases.given_golden("lfm2-given")["llamacpp:f32"]
    assert golden["kv"].keys() - ours.keys.keys() == set()


@pytest.mark.parametrize(
    ("key", "type_", "value"),
    [
        ("lfm2.vocab_size", ("UINT32",), 320),
        ("lfm2.block_count", ("UINT32",), 4),
        ("lfm2.embedding_length", ("UINT32",), 64),
        ("lfm2.feed_forward_length", ("UINT32",), 96),
        ("lfm2.context_length", ("UINT32",), 640),
        ("lfm2.attention.head_count", ("UINT32",), 4),
        ("lfm2.attention.head_count_kv", ("ARRAY", "UINT32"), [0, 0, 2, 0]),
        ("lfm2.attention.key_length", ("UINT32",), 16),
        ("lfm2.attention.value_length", ("UINT32",), 16),
        ("lfm2.attention.layer_norm_rms_epsilon", ("FLOAT32",), pytest.approx(1e-5, rel=1e-7)),
        ("lfm2.rope.freq_base", ("FLOAT32",), 1000000.0),
        ("lfm2.shortconv.l_cache", ("UINT32",), 3),
    ],
)
def test_the_twelve_keys(workshop: Workshop, key: str, type_: tuple[str, ...], value: Any) -> None:
    entry = workshop.read("lfm2-given").keys[key]
    assert (entry.type, entry.value) == (type_, value)


def test_no_other_lfm2_key_is_written(workshop: Workshop) -> None:
    assert sum(key.startswith("lfm2.") for key in workshop.read("lfm2-given").keys) == 12


def test_legacy_dialect_has_ollamas_tensors(workshop: Workshop) -> None:
    ours = workshop.read("lfm2-given", "bf16", "ollama-legacy")
    assert ggufs.tensor_faults(ours, cases.given_golden("lfm2-given")["ollama_seed"]) == []


def test_dialects_differ_in_one_name(workshop: Workshop) -> None:
    modern = workshop.read("lfm2-given", "bf16").golden()
    legacy = workshop.read("lfm2-given", "bf16", "ollama-legacy").golden()
    modern["tensors"]["output_norm.weight"] = modern["tensors"].pop("token_embd_norm.weight")
    assert modern["tensors"] == legacy["tensors"]
    assert modern["kv"] == legacy["kv"]


def test_run_time_predicts_what_transformers_does(workshop: Workshop) -> None:
    logprobs = runtime.next_token_logprobs(workshop.gguf("lfm2-given"), cases.given_ids())
    assert runtime.kl(cases.given_logits("lfm2-given"), logprobs) < F32_KL


def test_run_time_refuses_the_legacy_name(workshop: Workshop) -> None:
    outcome = runtime.load(workshop.gguf("lfm2-given", "f32", "ollama-legacy"))
    assert outcome.status == "refused"
    assert "token_embd_norm.weight" in outcome.log


def test_run_time_tokenizes_as_tokenizers_does(workshop: Workshop) -> None:
    library = tokenizers.Tokenizer.from_file(str(workshop.source("lfm2-given") / "tokenizer.json"))
    for text in cases.TEXTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert runtime.tokenize(workshop.gguf("lfm2-given"), text, add_special=True) == [1, *ids]


def test_shards_leave_no_trace(workshop: Workshop, tmp_path: Path) -> None:
    sharded = workshop.source("lfm2-untied")
    assert len(list(sharded.glob("*.safetensors"))) == 2
    single = cases.MODELS["lfm2-untied"](tmp_path / "lfm2-untied", n_shards=1)
    streamconv.convert(single, tmp_path / "single.gguf", outtype="f32")
    ours, split = ggufs.read(tmp_path / "single.gguf").golden(), workshop.read("lfm2-untied").golden()
    assert (ours["tensors"], ours["kv"]) == (split["tensors"], split["kv"])
