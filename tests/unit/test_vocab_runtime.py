"""Token ids in llama.cpp itself against the libraries that define them: each pre-tokenizer, each kind of file."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from streamconv.gguf.format import KeyValue
from streamconv.metadata.vocab.pretokenizers import (
    DIGITS,
    GPT2,
    NAMES,
    PRE_TOKENIZERS,
    PUNCTUATION,
    Runtime,
    Steps,
)
from tests import cases, vocab_cases, vocab_keys
from tests.extras import sentencepiece, tokenizers
from tests.oracles import runtime
from tests.tiny import tokenizer as tiny

PLAIN = (
    "Hello, World! The quick brown fox jumps over the lazy dog.",
    "I've been told HE'S there, 'RE you sure? 'M not sure I'll make it, 'D you? We'Ve a'lL don't DON'T",
    "3 33 333 3333 33333 333333 3333333 3.3 3..3 3...3 1,234,567.89 12½ ²³ ٣٤٥٦ ١٢٣٤ Ⅷ x²+y³=z⁴ 1st 100th",
    "  leading and   internal    spaces\t\ttabs \t mixed  ",
    "line1\nline2\r\nline3\n\n\nline4 \n \n  x\r\r",
    "trailing   ",
    "\n\n a  b",
    "\t",
    "Café naïve façade Ångström ÀÉÎ Straße ʼn ŉ '90s 'tis ǅ ǈ Ω ᾈ ˢᵘᵖ",
    "你好，世界！这是一个测试。12345 日本語のテキスト ー。「」 한국어 텍스트입니다 123",
    "Россия и Україна; мир 999 مرحبا بالعالم",
    "😀👍🏽🇺🇸 and ❤️ 👩‍👩‍👧‍👦 ok 𝐛𝐨𝐥𝐝 𝟏𝟐𝟑 𐍈𐌰 𠮷野家 ﬁ",
    "!!! ??? ... --- (parens) [x] {y} <z> ======= '''''' ```` \"\"\"\" a=b+c*d/e $100 €200 C++ .NET",
    "def foo(x):\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n//comment\n/* block */\n/path/to/",
    "http://example.com/path?x=1&y=2#frag CamelCase snake_case ALLCAPS mixedCASE iPhone don’t “quoted” — …",
    "   \n   \n\t\n  end \x01\x1b[0m",
)
MARKS = ("e\u0301 combining a\u0308o\u0308 n\u0303", "नमस्ते दुनिया हिन्दी", "ไทยภาษา สวัสดี")
SPACES = ("\u00a0nbsp\u00a0x \u3000wide\u3000space \u2003em \u200bzero", "\u2028ls\u2029ps\x0bvt\x0cff\x85nel")

# Texts that a name splits otherwise, beside those of marks and spaces.
DIFFERENT = {"tiny_aya": (PLAIN[14],), "cohere2moe": (PLAIN[14],), "superbpe": (PLAIN[2],), "youtu": (PLAIN[14],)}

ROWS = [(steps, row) for steps, names in PRE_TOKENIZERS.items() for row in names]


BY_NAME: dict[str, dict[str, Any]] = {
    DIGITS: {"type": "Digits", "individual_digits": True},
    PUNCTUATION: {"type": "Punctuation", "behavior": "Isolated"},
}


def structure(steps: Steps) -> dict[str, Any]:
    """The pre_tokenizer of a tokenizer.json that has these steps."""
    inner: list[dict[str, Any]] = []
    for step in steps[: -1 if steps[-1] == GPT2 else None]:
        split = {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        inner.append(BY_NAME.get(step, split))
    use_regex = steps[-1] == GPT2
    inner.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex})
    return {"type": "Sequence", "pretokenizers": inner}


def write_pairs_tokenizer(directory: Path, steps: Steps, ignore_merges: bool, texts: Sequence[str]) -> int:
    """A BPE that merges any two bytes that are neighbours in `texts`, so that each border of a word shows."""
    tiny.write_bpe(directory)
    value = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    letters = [tiny._letters(text) for text in texts]
    pairs = sorted({pair for text in letters for pair in pairwise(text)})
    random.Random(7).shuffle(pairs)
    merges = list({left + right: [left, right] for left, right in pairs}.values())
    tokens = [*tiny._BYTE_CHARS, *("".join(pair) for pair in merges)]
    value["pre_tokenizer"] = structure(steps)
    value["model"] |= {
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
        "ignore_merges": ignore_merges,
    }
    value["added_tokens"] = []
    (directory / "tokenizer.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return len(tokens)


def differing(directory: Path, keys: Sequence[KeyValue], n_vocab: int, ids: Callable[[str], list[int]]) -> Any:
    """A function of texts: those that llama.cpp tokenizes otherwise than `ids`."""
    model = vocab_keys.write_model(directory / "model.gguf", keys, n_vocab)

    def of(texts: Sequence[str], *, add_special: bool = False) -> list[str]:
        with runtime.Runtime(model) as llama_cpp:
            return [text for text in texts if llama_cpp.tokenize(text, add_special=add_special) != ids(text)]

    return of


@pytest.mark.parametrize(("steps", "row"), ROWS, ids=[row.name for _, row in ROWS])
def test_each_name_splits_as_its_structure_does(steps: Steps, row: Runtime, tmp_path: Path) -> None:
    texts = (*PLAIN, *MARKS, *SPACES)
    n_vocab = write_pairs_tokenizer(tmp_path, steps, row.ignore_merges, texts)
    vocabulary = vocab_keys.read(tmp_path, n_vocab, default_pre=row.name)
    assert vocab_keys.values(vocabulary)["tokenizer.ggml.pre"] == row.name
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    wrong = differing(tmp_path, vocabulary.keys, n_vocab, lambda text: reference.encode(text).ids)(texts)
    if row.differs is None:
        assert wrong == []
    else:
        assert set(wrong) <= {*MARKS, *SPACES, *DIFFERENT.get(row.name, ())} and wrong
        assert "pre-tokenizer-differs" in vocab_keys.codes(vocabulary)


WITH_SPECIALS = ("<|im_start|>user\nhi <tool> the<tool>the<|im_end|>\n", "a<|endoftext|> b")


@pytest.mark.parametrize("name", ["smollm", "gpt-2", "bos-template", "renumbered-added-token", "odd-added-tokens"])
def test_byte_level(name: str, tmp_path: Path) -> None:
    vocab_cases.CASES[name](tmp_path)
    vocabulary = vocab_keys.read(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    n_vocab = tiny.N_BPE_TOKENS + vocab_cases.N_SPARE
    wrong = differing(tmp_path, vocabulary.keys, n_vocab, lambda text: reference.encode(text).ids)
    # In the other cases tokenizer_config.json alone asks for BOS, which transformers adds and `tokenizers` does not.
    assert wrong((*PLAIN, *MARKS, *SPACES, *cases.TEXTS, *WITH_SPECIALS), add_special=name == "bos-template") == []


@pytest.mark.parametrize("fast", [True, False], ids=["tokenizer.json", "tokenizer.model"])
def test_sentencepiece(fast: bool, tmp_path: Path) -> None:
    tiny.write_spm(tmp_path, model=not fast, fast=fast)
    vocabulary = vocab_keys.read(tmp_path, tiny.N_SPM_TOKENS)
    assert vocabulary.warnings == ()
    if fast:
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        ids = differing(tmp_path, vocabulary.keys, tiny.N_SPM_TOKENS, lambda text: tokenizer.encode(text).ids)
    else:
        model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        ids = differing(tmp_path, vocabulary.keys, tiny.N_SPM_TOKENS, model.encode)
    assert ids((*PLAIN, *MARKS, *SPACES, *cases.SPM_TEXTS)) == []


OWN_PIECES = ("<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁▁▁")
WITH_OWN_PIECES = ("<start_of_turn>the\n\n    her<end_of_turn>\n\nthe world", "\n\n\n     over", "the    <end_of_turn>")


@pytest.mark.parametrize(("model", "fast"), [(True, False), (False, True), (True, True)])
def test_pieces_that_are_found_before_any_merge(model: bool, fast: bool, tmp_path: Path) -> None:
    """As Gemma's, of any of the files, though no file lists the added tokens once more."""
    own = OWN_PIECES[:-1] if fast else OWN_PIECES  # `tokenizers` looks for an added token's letters, not for spaces
    n_vocab = tiny.N_SPM_TOKENS + len(own)
    tiny.write_spm(tmp_path, model=model, fast=fast, prefix=False, own=own)
    vocabulary = vocab_keys.read(tmp_path, n_vocab)
    assert vocabulary.warnings == ()
    if fast:
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        ids = differing(tmp_path, vocabulary.keys, n_vocab, lambda text: tokenizer.encode(text).ids)
    else:
        library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        ids = differing(tmp_path, vocabulary.keys, n_vocab, library.encode)
    assert ids((*PLAIN, *MARKS, *SPACES, *cases.SPM_TEXTS, *WITH_OWN_PIECES)) == []


@pytest.mark.parametrize(
    ("scheme", "others"), [("first", [" the", "</s>the cat</s>the"]), ("always", [" the"]), ("never", [])]
)
def test_metaspace_differs_where_its_warning_says(scheme: str, others: list[str], tmp_path: Path) -> None:
    tiny.write_spm(tmp_path, model=False)
    path = tmp_path / "tokenizer.json"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    value = json.loads(path.read_text(encoding="utf-8")) | {"normalizer": None, "pre_tokenizer": metaspace}
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    reference = tokenizers.Tokenizer.from_file(str(path))
    keys = vocab_keys.read(tmp_path, tiny.N_SPM_TOKENS).keys
    ids = differing(
        tmp_path, keys, tiny.N_SPM_TOKENS, lambda text: reference.encode(text, add_special_tokens=False).ids
    )
    assert ids(("the cat", "the  cat", " the", "</s>the cat</s>the")) == others


@pytest.mark.parametrize("name", sorted(NAMES))
def test_llama_cpp_knows_every_name(name: str, tmp_path: Path) -> None:
    tiny.write_bpe(tmp_path)
    vocabulary = vocab_keys.read(tmp_path, tiny.N_BPE_TOKENS, pre=name)
    with runtime.Runtime(vocab_keys.write_model(tmp_path / "model.gguf", vocabulary.keys, tiny.N_BPE_TOKENS)):
        pass


def test_llama_cpp_refuses_other_names(tmp_path: Path) -> None:
    tiny.write_bpe(tmp_path)
    keys = vocab_keys.read(tmp_path, tiny.N_BPE_TOKENS).keys
    other = [KeyValue.string(key.key, "nonsense") if key.key == "tokenizer.ggml.pre" else key for key in keys]
    assert "nonsense" not in NAMES
    assert runtime.load(vocab_keys.write_model(tmp_path / "model.gguf", other, tiny.N_BPE_TOKENS)).status == "refused"


def test_lfm2_given(tmp_path: Path) -> None:
    source = cases.GIVEN / "lfm2-given"
    vocabulary = vocab_keys.read(source, default_pre="lfm2")
    reference = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    wrong = differing(tmp_path, vocabulary.keys, 320, lambda text: reference.encode(text).ids)
    assert wrong((*PLAIN, *MARKS, *SPACES, *cases.TEXTS, *WITH_SPECIALS)) == []


def test_texts_that_are_not_composed_differ_where_the_tokenizer_composes_them(tmp_path: Path) -> None:
    """Qwen's NFC: GGUF has no key for it, llama.cpp does nothing of the kind, and the warning says so."""
    tiny.write_bpe(tmp_path, pre="qwen2")
    vocab_cases.edit(tmp_path / "tokenizer.json", lambda value: value.update(normalizer={"type": "NFC"}))
    vocabulary = vocab_keys.read(tmp_path, tiny.N_BPE_TOKENS)
    assert vocab_keys.codes(vocabulary) == ["normalizer-ignored"]
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    composed, parted = "fünf é over", unicodedata.normalize("NFD", "fünf é over")
    wrong = differing(tmp_path, vocabulary.keys, tiny.N_BPE_TOKENS, lambda text: reference.encode(text).ids)
    assert wrong([*PLAIN[:12], composed, parted]) == [parted]
