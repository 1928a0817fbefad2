"""Real models, there and back: a published GGUF, made a checkpoint, converted, is itself again.

Its tensors must be those of the published file to the bit (dequantised by gguf-py), and its distribution that of
transformers. The published files themselves predict a little else, since on quantised weights llama.cpp rounds
activations to 8 bits as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

import streamconv
from tests import cases, tiny
from tests.oracles import deltas, ggufs, reference, runtime
from tests.parity.conftest import MEMORY
from tests.tools import llama_cpp, published

pytestmark = pytest.mark.parity


@dataclass(frozen=True)
class Real:
    """What is asked of one model.

    Attributes:
        prompt: After which the likeliest token leads by `margin` nats at each of the 16 that follow.
        dtype: Of the checkpoint.
        kl: What is allowed between ours and transformers, and between ours and the published file.
        norms: How far norms may be from the published ones; those of Gemma were less 1 for a while.
    """

    prompt: str
    dtype: str
    kl: tuple[float, float]
    margin: float = 0.5
    norms: float = 0.0


REAL = {
    "smollm2-135m-instruct": Real("1, 2, 3, 4, 5, 6, 7, 8,", "F32", (1e-8, 1e-3)),
    "qwen2.5-coder-0.5b-instruct": Real("1, 2, 3, 4, 5, 6, 7, 8,", "F16", (1e-8, 1e-2)),
    "gemma-3-270m": Real("1, 2, 3, 4, 5, 6, 7, 8,", "F32", (1e-6, 1e-1), norms=2.0**-22),
}
NAMES = list(REAL)


class Converted:
    """Ours of each model, made once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str) -> Path:
        dst = self._root / f"{name}.gguf"
        if not dst.exists():
            streamconv.convert(source(name), dst, outtype="f32", max_memory=MEMORY)
        return dst


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(tmp_path_factory.mktemp("published"))


@cache
def original_of(name: str) -> ggufs.Gguf:
    return ggufs.read(published.original(name))


def source(name: str) -> Path:
    return published.checkpoint(name, REAL[name].dtype)


def library(src: Path) -> Callable[[str], list[int]]:
    """The ids of the library that defines them, without BOS."""
    if (src / "tokenizer.json").exists():
        fast = tokenizers.Tokenizer.from_file(str(src / "tokenizer.json"))
        return lambda text: list(fast.encode(text, add_special_tokens=False).ids)
    return sentencepiece.SentencePieceProcessor(model_file=str(src / "tokenizer.model")).encode  # type: ignore[no-any-return]


def prompt(name: str) -> list[int]:
    """Its ids, BOS before them where the model was trained so."""
    original = original_of(name)
    bos = [original["tokenizer.ggml.bos_token_id"]] if name.startswith("gemma") else []
    return bos + library(source(name))(REAL[name].prompt)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_published_file(converted: Converted, name: str) -> None:
    ours, original = ggufs.read(converted(name)), original_of(name)
    assert ours.tensors.keys() == original.tensors.keys()
    stored = {"F32": np.float32, "F16": np.float16}[REAL[name].dtype]
    for tensor in original.tensors:
        allowed = REAL[name].norms if tensor.endswith("_norm.weight") else 0.0
        distance = np.abs(ours.float64(tensor) - original.float64(tensor).astype(stored).astype(np.float64)).max()
        assert distance <= allowed, tensor


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_transformers(converted: Converted, name: str) -> None:
    ids = prompt(name)
    last = range(len(ids))[-3:]  # the runtime gives a vocabulary's probabilities as text
    logits = reference.logits(source(name), ids)[list(last)]
    assert runtime.kl(logits, runtime.next_token_logprobs(converted(name), ids, positions=last)) < REAL[name].kl[0]


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_those_of_the_published_file(converted: Converted, name: str) -> None:
    """Which computes in 8 bits what ours computes in 32, so that only the likeliest tokens are the very same."""
    ids = prompt(name)
    last, file = [len(ids) - 1], published.original(name)
    ours = runtime.next_token_logprobs(converted(name), ids, positions=last)
    assert runtime.kl(ours, runtime.next_token_logprobs(file, ids, positions=last)) < REAL[name].kl[1]
    expected, margins = reference.greedy(source(name), ids, 16)
    assert min(margins) > REAL[name].margin
    assert runtime.greedy(converted(name), ids, 16) == runtime.greedy(file, ids, 16) == expected


@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_is_that_of_the_published_file(converted: Converted, name: str) -> None:
    ours, original = ggufs.read(converted(name)), original_of(name)
    for key, entry in original.keys.items():
        if key.startswith("tokenizer.ggml.") and (key in ours.keys or entry.value is not False):
            assert ours[key] == entry.value, key


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_library(converted: Converted, name: str) -> None:
    ids = library(source(name))
    with runtime.Runtime(converted(name)) as loaded:
        for text in cases.TEXTS:
            assert loaded.tokenize(text) == ids(text)


@pytest.mark.parametrize(
    ("name", "outtype"), [(NAMES[0], "bf16"), (NAMES[0], "q8_0"), (NAMES[1], "q8_0"), (NAMES[2], "bf16")]
)
def test_tensors_and_keys_are_llama_cpps(tmp_path: Path, name: str, outtype: str) -> None:
    src = source(name)
    theirs = ggufs.read(llama_cpp.convert(src, tmp_path / "theirs.gguf", outtype, pre=published.MODELS[name].pre))
    golden = theirs.golden()
    streamconv.convert(src, tmp_path / "ours.gguf", outtype=outtype, max_memory=MEMORY)
    ours = ggufs.read(tmp_path / "ours.gguf")
    assert ggufs.tensor_faults(ours, golden) + ggufs.key_faults(ours, golden) == []


def test_the_vocabulary_of_a_distillation(tmp_path: Path) -> None:
    """DeepSeek's into Qwen, of which packages carry the first part alone: its 152,064 tokens, and no weights."""
    name = "deepseek-r1-distill-qwen-7b"
    src, original = published.vocabulary(name), published.keys(name)
    streamconv.convert(src, tmp_path / "ours.gguf", outtype="f16", max_memory=MEMORY)
    ours = ggufs.read(tmp_path / "ours.gguf")
    for key in original:
        if key.startswith("tokenizer.ggml.") and key != "tokenizer.ggml.pre":
            assert ours[key] == original[key], key
    # Two names of one pre-tokenizer: the runtime splits the same under both.
    assert (ours["tokenizer.ggml.pre"], original["tokenizer.ggml.pre"]) == ("qwen2", "deepseek-r1-qwen")
    ids = library(src)
    with runtime.Runtime(tmp_path / "ours.gguf") as loaded:
        for text in (*cases.TEXTS, "<｜User｜>Hi<｜Assistant｜><think>\n\n</think>\n\n"):
            assert loaded.tokenize(text) == ids(text)


HEADS = {"attn_q": 9, "attn_k": 3}


@pytest.mark.parametrize(
    "drawn", [{}, {"rslora": True}, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}}]
)
def test_an_adapter_on_a_real_model(converted: Converted, tmp_path: Path, drawn: dict[str, object]) -> None:
    name = "smollm2-135m-instruct"
    src, base, ids = source(name), converted(name), prompt(name)
    adapter = tiny.peft_adapter(tmp_path / "adapter", src, alpha=4, **drawn)  # type: ignore[arg-type]
    dst = tmp_path / "adapter.gguf"
    streamconv.convert_adapter(adapter, base, dst, max_memory=MEMORY)
    trained = deltas.placed(reference.deltas(src, adapter), HEADS)
    assert max(deltas.distances(deltas.applied(ggufs.read(dst)), trained).values()) < 1e-6
    logprobs = runtime.next_token_logprobs(base, ids, [(dst, 1.0)])
    assert runtime.kl(reference.logits(src, ids, adapter), logprobs) < 1e-8
