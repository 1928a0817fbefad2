"""Every built model of every architecture: llama.cpp's tensors and keys for each outtype, its authors' predictions."""

from __future__ import annotations

import pytest

from tests import cases
from tests.extras import sentencepiece, tokenizers
from tests.golden.conftest import Workshop
from tests.oracles import ggufs, runtime

# llama.cpp's converter has no stacked experts; it must be the same file as that of the experts one by one.
GOLDEN_OF = {name: name for name in cases.MODELS} | {"lfm2moe-stacked": "lfm2moe"}

# What llama.cpp's converter does not write, and its runtime wants: a bias of zeros for each layer of experts.
ZEROS = {"lfm2moe-unbiased": {f"blk.{i}.exp_probs_b.bias" for i in (1, 2, 3)}}

# llama.cpp's converter takes no untied head of this architecture; the logits alone judge.
WITHOUT_GOLDEN = {"lfm2moe-scaled"}

CASES = [(name, outtype) for name in cases.MODELS if name not in WITHOUT_GOLDEN for outtype in cases.OUTTYPES]

# Experts are chosen by rank, so a difference of rounding could choose another; no two are that close in these cases.
KL = {name: 1e-6 if name.startswith("lfm2moe") else 1e-8 for name in cases.MODELS}


@pytest.mark.parametrize(("name", "outtype"), CASES)
def test_tensors_are_llama_cpps(workshop: Workshop, name: str, outtype: str) -> None:
    ours, golden = workshop.read(name, outtype), cases.golden(GOLDEN_OF[name], outtype)
    additional = ours.golden()["tensors"].keys() - golden["tensors"].keys()
    assert additional == ZEROS.get(name, set())
    assert all(not ours.float64(tensor).any() for tensor in additional)
    assert [fault for fault in ggufs.tensor_faults(ours, golden) if fault.split(":")[0] not in additional] == []
    assert ggufs.layout_faults(ours.path) == []


@pytest.mark.parametrize(("name", "outtype"), CASES)
def test_keys_have_llama_cpps_values(workshop: Workshop, name: str, outtype: str) -> None:
    ours, golden = workshop.read(name, outtype), cases.golden(GOLDEN_OF[name], outtype)
    if GOLDEN_OF[name] != name:
        del golden["kv"]["general.name"]
    assert ggufs.key_faults(ours, golden) == []
    assert golden["kv"].keys() - ours.keys.keys() == set()


@pytest.mark.parametrize("name", cases.MODELS)
def test_run_time_predicts_what_transformers_does(workshop: Workshop, name: str) -> None:
    logprobs = runtime.next_token_logprobs(workshop.gguf(name), cases.IDS, positions=cases.POSITIONS)
    assert runtime.kl(cases.logits(name), logprobs) < KL[name]


@pytest.mark.parametrize("name", ["lfm2", "llama", "llama-linear"])
def test_run_time_tokenizes_as_tokenizers_does(workshop: Workshop, name: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(workshop.source(name) / "tokenizer.json"))
    for text in cases.TEXTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert runtime.tokenize(workshop.gguf(name), text) == ids
        assert runtime.tokenize(workshop.gguf(name), text, add_special=True) == [1, *ids]


def test_run_time_tokenizes_as_sentencepiece_does(workshop: Workshop) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(workshop.source("llama-spm") / "tokenizer.model"))
    for text in cases.SPM_TEXTS:
        assert runtime.tokenize(workshop.gguf("llama-spm"), text) == processor.encode(text)
