"""tekken.json as mistral-common carries it: its ids in the runtime, and the keys that llama.cpp's converter makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import mistral_common
import pytest
from gguf.vocab import MistralVocab
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from tests import cases, vocab_keys
from tests.oracles import runtime
from tests.unit.test_vocab_runtime import MARKS, PLAIN, SPACES

pytestmark = pytest.mark.parity

FILES = sorted((Path(mistral_common.__file__).parent / "data").glob("tekken_*.json"))
N_VOCAB = 131_072
TEXTS = (*PLAIN, *MARKS, *SPACES, *cases.TEXTS)


def test_there_are_some() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_tokens_are_mistral_commons(tmp_path: Path, file: Path) -> None:
    shutil.copy(file, tmp_path / "tekken.json")
    vocabulary = vocab_keys.read(tmp_path, N_VOCAB)
    values, theirs = vocab_keys.values(vocabulary), MistralVocab(tmp_path)
    tokens = list(theirs.all_tokens())
    assert values["tokenizer.ggml.tokens"] == [text.decode() for text, _, _ in tokens]
    assert values["tokenizer.ggml.scores"] == [score for _, score, _ in tokens]
    assert values["tokenizer.ggml.token_type"] == [int(kind) for _, _, kind in tokens]
    assert values["tokenizer.ggml.merges"] == theirs.extract_vocab_merges_from_model()
    ids = (theirs.bos_id, theirs.eos_id, theirs.unk_id, theirs.pad_id)
    assert ids == tuple(values[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "unknown", "padding"))
    library = Tekkenizer.from_file(file)
    with runtime.Runtime(vocab_keys.write_model(tmp_path / "m.gguf", vocabulary.keys, N_VOCAB)) as model:
        wrong = [t for t in TEXTS if model.tokenize(t, parse_special=False) != library.encode(t, bos=False, eos=False)]
    assert "pre-tokenizer-differs" in vocab_keys.codes(vocabulary)
    assert set(wrong) < set(MARKS)
