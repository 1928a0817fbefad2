"""What read_vocabulary decides: which kind a tokenizer is, what it refuses, and what it warns of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamconv.errors import SourceError, UsageError
from streamconv.metadata.vocab.pretokenizers import CL100K, GPT2, QWEN2, canonical_steps, identify, space_prefix
from tests import vocab_cases, vocab_keys
from tests.tiny import tokenizer as tiny
from tests.unit.test_vocab_runtime import ROWS, structure
from tests.vocab_cases import added, edit

N_VOCAB = tiny.N_BPE_TOKENS + vocab_cases.N_SPARE
Edit = Callable[[Any], object]


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    """A directory with a byte-level tokenizer of N_VOCAB rows, the last N_SPARE of them without a token."""
    tiny.write_bpe(tmp_path, pre="llama-bpe")
    vocab_cases.write_config(tmp_path, N_VOCAB)
    return tmp_path


def change(directory: Path, how: Edit, name: str = "tokenizer.json") -> None:
    edit(directory / name, how)


def model_edit(**fields: Any) -> Edit:
    return lambda value: value["model"].update(fields)


def refused(directory: Path, problem: str, n_vocab: int | None = None, **options: Any) -> SourceError:
    with pytest.raises(SourceError, match=problem) as caught:
        vocab_keys.read(directory, n_vocab, **options)
    assert "\n" not in str(caught.value)
    return caught.value


# Which kind


def test_no_tokenizer(tmp_path: Path) -> None:
    error = refused(tmp_path, "neither tokenizer.json nor tokenizer.model", 10)
    assert error.file == str(tmp_path)
    assert error.hint


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel", "Other", 7])
def test_unsupported_models(bpe: Path, kind: Any) -> None:
    if kind == "Unigram":
        change(bpe, model_edit(type=kind, vocab=[["a", -1.5], ["b", -2.0]]))
        change(bpe, lambda value: value["model"].pop("merges"))
    else:
        change(bpe, model_edit(type=kind))
    refused(bpe, f"tokenizer model '{kind}' is not supported")


def test_unigram_beside_its_sentencepiece_model(tmp_path: Path) -> None:
    tiny.write_spm(tmp_path)
    change(tmp_path, model_edit(type="Unigram", vocab=[["a", -1.5]]))
    change(
        tmp_path, lambda value: value.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "A" * 99999})
    )
    assert vocab_keys.values(vocab_keys.read(tmp_path, tiny.N_SPM_TOKENS))["tokenizer.ggml.model"] == "llama"


def test_a_tokenizer_model_that_is_no_sentencepiece_is_ignored_beside_byte_level_bpe(bpe: Path) -> None:
    """Llama 3 ships tiktoken's ranks under that name."""
    (bpe / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert vocab_keys.values(vocab_keys.read(bpe))["tokenizer.ggml.model"] == "gpt2"


def test_a_model_without_its_type(bpe: Path) -> None:
    change(bpe, lambda value: value["model"].pop("type"))
    assert vocab_keys.values(vocab_keys.read(bpe))["tokenizer.ggml.model"] == "gpt2"


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (model_edit(continuing_subword_prefix="##"), "uses 'continuing_subword_prefix'"),
        (model_edit(end_of_word_suffix="</w>"), "uses 'end_of_word_suffix'"),
        (model_edit(ignore_merges="yes"), "'ignore_merges' is 'yes'"),
        (model_edit(byte_fallback=1), "'byte_fallback' is 1"),
        (model_edit(vocab={}, merges=[]), "no vocabulary or no merges"),
        (lambda value: value["model"].pop("merges"), "no vocabulary or no merges"),
    ],
)
def test_models_that_llama_cpp_does_not_have(bpe: Path, how: Edit, problem: str) -> None:
    change(bpe, how)
    refused(bpe, problem)


def test_llama_style_of_unknown_structure(tmp_path: Path) -> None:
    tiny.write_spm(tmp_path, model=False)
    change(tmp_path, lambda value: value.update(normalizer={"type": "NFKC"}))
    assert "tokenizer.model" in (refused(tmp_path, "not those of a Llama tokenizer", tiny.N_SPM_TOKENS).hint or "")


# Rows and ids


def test_more_tokens_than_rows(bpe: Path) -> None:
    refused(bpe, "the model has only 300 rows", 300)


def test_rows_without_a_token_are_padded(bpe: Path) -> None:
    change(bpe, lambda value: value["added_tokens"].pop())
    values = vocab_keys.values(vocab_keys.read(bpe))
    pads = list(range(tiny.N_BPE_TOKENS, N_VOCAB))
    assert [values["tokenizer.ggml.tokens"][i] for i in pads] == [f"[PAD{i}]" for i in pads]
    assert [values["tokenizer.ggml.token_type"][i] for i in pads] == [5] * len(pads)


def test_a_hole_in_the_vocabulary_is_padded(bpe: Path) -> None:
    """tokenizers gives `<tool>` the id of another token then; the file's own number holds."""
    vocab = json.loads((bpe / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    change(bpe, lambda value: value["model"]["vocab"].pop("ÿ"))
    vocabulary = vocab_keys.read(bpe)
    values = vocab_keys.values(vocabulary)
    expected = {id_: token for token, id_ in vocab.items()} | {tiny.N_BPE_TOKENS - 1: "<tool>"}
    expected |= {id_: f"[PAD{id_}]" for id_ in (vocab["ÿ"], *range(tiny.N_BPE_TOKENS, N_VOCAB))}
    assert values["tokenizer.ggml.tokens"] == [expected[id_] for id_ in range(N_VOCAB)]
    assert values["tokenizer.ggml.token_type"][vocab["ÿ"]] == 5
    assert vocabulary.warnings == ()


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (model_edit(vocab={"a": 1, "b": 1}, merges=[]), "tokens 'a' and 'b' both have the id 1"),
        (
            lambda value: value["added_tokens"].append(added(7, "<new>")),
            "tokens '#' and '<new>' both have the id 7",
        ),
        (
            lambda value: value["added_tokens"].append(added(405, "the")),
            "token 'the' has the id [0-9]+, but 405 as an added token",
        ),
        (
            lambda value: value["added_tokens"].extend([added(404, "<x>"), added(404, "<y>")]),
            "tokens '<x>' and '<y>' both have the id 404",
        ),
        (
            lambda value: value["added_tokens"].extend([added(404, "<x>"), added(405, "<x>")]),
            "token '<x>' has the id 404, but 405 as an added token",
        ),
        (
            lambda value: value["model"]["vocab"].update({"[PAD406]": 404}),
            r"token '\[PAD406\]' would have two ids, 404 and 406",
        ),
        (
            lambda value: value["model"]["vocab"].update({"the\0x": 404}),
            r"llama.cpp reads token 404 as 'the' \(up to the NUL\), which is also token [0-9]+",
        ),
        (
            lambda value: value["added_tokens"].extend([added(404, "▁"), added(405, " ")]),
            "token ' ' has the id 404, but 405 as an added token",
        ),
    ],
)
def test_what_llama_cpp_would_abort_on(bpe: Path, how: Edit, problem: str) -> None:
    change(bpe, how)
    refused(bpe, problem)


def test_an_added_token_twice_is_one(bpe: Path) -> None:
    before = vocab_keys.values(vocab_keys.read(bpe))
    change(bpe, lambda value: value["added_tokens"].append(value["added_tokens"][0]))
    assert vocab_keys.values(vocab_keys.read(bpe)) == before


def test_added_tokens_in_any_order_are_numbered_as_tokenizers_does(bpe: Path) -> None:
    first = tiny.N_BPE_TOKENS
    change(bpe, lambda value: value["added_tokens"].extend([added(first + 1, "<y>"), added(first, "<x>")]))
    vocabulary = vocab_keys.read(bpe)
    assert vocab_keys.values(vocabulary)["tokenizer.ggml.tokens"][first : first + 2] == ["<y>", "<x>"]
    assert vocab_keys.codes(vocabulary) == ["added-token-ids"]


@pytest.mark.parametrize(("normalized", "text"), [(True, "Ġhey"), (False, " hey")])
def test_what_is_not_normalized_is_decoded(normalized: bool, text: str, bpe: Path) -> None:
    change(bpe, lambda value: value["added_tokens"].append(added(tiny.N_BPE_TOKENS, "Ġhey", normalized=normalized)))
    assert vocab_keys.values(vocab_keys.read(bpe))["tokenizer.ggml.tokens"][tiny.N_BPE_TOKENS] == text


@pytest.mark.parametrize("text", ["éé", "two words", "▁é", "<｜é｜>"])
def test_what_is_no_text_when_decoded_stays(text: str, bpe: Path) -> None:
    """`éé` spells two bytes that are no character; the others are not spelled in letters for bytes."""
    token = added(tiny.N_BPE_TOKENS, text, normalized=False)
    change(bpe, lambda value: value["added_tokens"].append(token))
    expected = text.replace("▁", " ")
    assert vocab_keys.values(vocab_keys.read(bpe))["tokenizer.ggml.tokens"][tiny.N_BPE_TOKENS] == expected


def test_added_tokens_that_take_spaces(bpe: Path) -> None:
    change(bpe, lambda value: value["added_tokens"][-1].update(lstrip=True))
    assert vocab_keys.codes(vocab_keys.read(bpe)) == ["added-token-spaces"]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"404": {"content": 1}}, "'content' of an added token must be a string, not 1"),
        ({"404": "<x>"}, "an added token must be an object, not '<x>'"),
        ({"x": {"content": "<x>"}}, "has the id 'x', not a whole number"),
        ({"-1": {"content": "<x>"}}, "has the id '-1', not a whole number"),
        ({"٣": {"content": "<x>"}}, "has the id '٣', not a whole number"),
        ([], None),
        ([1], "'added_tokens_decoder' must be an object"),
        ({"9" * 30: {"content": "<x>"}}, "not a whole number"),
        ({"9" * 15: {"content": "<x>"}}, None),
    ],
)
def test_added_tokens_of_the_config(bpe: Path, entry: Any, problem: str | None) -> None:
    change(bpe, lambda value: value.update(added_tokens_decoder=entry), "tokenizer_config.json")
    if problem:
        assert refused(bpe, problem).file == str(bpe / "tokenizer_config.json")
    else:
        assert vocab_keys.codes(vocab_keys.read(bpe)) == (["tokens-beyond-rows"] if entry else [])


# The pre-tokenizer


@pytest.mark.parametrize(("steps", "row"), ROWS, ids=[row.name for _, row in ROWS])
def test_structures_are_recognised(steps: tuple[str, ...], row: Any) -> None:
    value = structure(steps)
    assert canonical_steps(value) == steps
    nested = {"type": "Sequence", "pretokenizers": [value, {"type": "Sequence", "pretokenizers": []}]}
    assert canonical_steps(nested) == steps


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [],
        "ByteLevel",
        {"type": "ByteLevel"},
        {"type": "ByteLevel", "add_prefix_space": True},
        {"type": "Sequence", "pretokenizers": None},
        {"type": "Sequence", "pretokenizers": [3]},
        {"type": "Split", "pattern": {"Regex": CL100K}, "behavior": "Isolated"},
        structure((CL100K,))["pretokenizers"][::-1],
        {"type": "Sequence", "pretokenizers": structure((CL100K,))["pretokenizers"][::-1]},
    ],
)
def test_what_has_no_canonical_steps(value: Any) -> None:
    assert canonical_steps(value) is None


@pytest.mark.parametrize(
    ("step", "field", "wrong"),
    [
        (0, "behavior", "Removed"),
        (0, "behavior", "MergedWithPrevious"),
        (0, "pattern", {"String": CL100K}),
        (0, "pattern", {"Regex": CL100K + " "}),
        (1, "add_prefix_space", True),
        (1, "add_prefix_space", 0),
        (1, "use_regex", True),
        (1, "type", "Whitespace"),
    ],
)
def test_a_small_difference_is_another_structure(bpe: Path, step: int, field: str, wrong: Any) -> None:
    change(bpe, lambda value: value["pre_tokenizer"]["pretokenizers"][step].update({field: wrong}))
    error = refused(bpe, "the pre-tokenizer does not match any")
    assert error.file == str(bpe / "tokenizer.json")
    assert "--pre" in (error.hint or "")


def name_of(directory: Path, **options: Any) -> tuple[str, list[str]]:
    vocabulary = vocab_keys.read(directory, **options)
    return vocab_keys.values(vocabulary)["tokenizer.ggml.pre"], vocab_keys.codes(vocabulary)


def test_the_recipe_decides_between_names_of_one_structure(bpe: Path) -> None:
    assert name_of(bpe) == ("llama-bpe", [])
    assert name_of(bpe, default_pre="lfm2") == ("lfm2", [])


def test_a_known_structure_wins_over_the_recipe_s_name(bpe: Path) -> None:
    change(bpe, lambda value: value.update(pre_tokenizer=structure((QWEN2,))))
    change(bpe, model_edit(ignore_merges=False))
    assert name_of(bpe, default_pre="lfm2") == ("qwen2", [])


def test_an_unknown_structure_has_the_recipe_s_name_and_a_warning(bpe: Path) -> None:
    change(bpe, lambda value: value.update(pre_tokenizer=structure((CL100K + " ",))))
    assert name_of(bpe, default_pre="lfm2") == ("lfm2", ["pre-tokenizer-unknown"])


def test_the_recipe_s_name_is_for_bytes_alone(bpe: Path) -> None:
    change(bpe, lambda value: value.update(pre_tokenizer={"type": "Whitespace"}))
    refused(bpe, "the pre-tokenizer does not match any", default_pre="lfm2")
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    change(bpe, lambda value: value.update(pre_tokenizer=metaspace, decoder=metaspace))
    error = refused(bpe, "llama.cpp supports only byte-level BPE", default_pre="lfm2", pre="lfm2")
    assert "tokenizer.model" in (error.hint or "")


@pytest.mark.parametrize("name", ["", "nonsense", "Llama-bpe", "qwen2 "])
def test_a_name_that_llama_cpp_does_not_know_is_refused(bpe: Path, tmp_path: Path, name: str) -> None:
    for kind in ("known", "unknown"):
        with pytest.raises(UsageError) as caught:
            vocab_keys.read(bpe, pre=name, default_pre="lfm2")
        assert str(caught.value).startswith(f"--pre {name!r} is not a pre-tokenizer of llama.cpp"), kind
        assert "llama.cpp has " in str(caught.value)
        change(bpe, lambda value: value.update(pre_tokenizer={"type": "Whitespace"}))


def test_a_misspelt_name_is_corrected(bpe: Path) -> None:
    with pytest.raises(UsageError, match=r"llama\.cpp has llama-bpe, "):
        vocab_keys.read(bpe, pre="lama-bpe")


def test_the_user_s_name_wins(bpe: Path) -> None:
    assert name_of(bpe, pre="llama-bpe") == ("llama-bpe", [])
    assert name_of(bpe, pre="falcon3", default_pre="lfm2") == ("falcon3", ["pre-tokenizer-override"])
    change(bpe, lambda value: value.update(pre_tokenizer={"type": "Whitespace"}))
    assert name_of(bpe, pre="falcon3") == ("falcon3", [])


def test_normalizers(bpe: Path) -> None:
    change(bpe, lambda value: value.update(normalizer={"type": "Sequence", "normalizers": []}))
    assert name_of(bpe) == ("llama-bpe", [])
    change(bpe, lambda value: value.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}))
    assert name_of(bpe) == ("llama-bpe", ["normalizer-ignored"])
    change(bpe, lambda value: value.update(normalizer={"type": "Lowercase"}))
    refused(bpe, "the normalizer does not match any")
    assert name_of(bpe, default_pre="lfm2") == ("lfm2", ["pre-tokenizer-unknown"])


def test_ignore_merges_picks_the_name_that_has_it(bpe: Path) -> None:
    change(bpe, model_edit(ignore_merges=False))
    assert name_of(bpe) == ("smaug-bpe", [])


def test_ignored_merges_matter_where_a_token_is_made_by_none(bpe: Path) -> None:
    """Published LFM2 files say `ignore_merges: false`, and llama.cpp ignores them; the ids are the same if all tokens
    come of merges."""
    change(bpe, model_edit(ignore_merges=False))
    assert name_of(bpe, default_pre="lfm2") == ("lfm2", [])
    change(bpe, lambda value: value["model"]["merges"].pop())
    assert name_of(bpe, default_pre="lfm2") == ("lfm2", ["ignore-merges"])


def test_a_name_is_given_for_the_structure_alone() -> None:
    match = identify(structure((GPT2,)), None, False, file=Path("x"), default=None, override=None)
    assert (match.name, match.ignore_merges, match.warnings) == ("gpt-2", False, ())


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None, True),
        (REPLACE, None, False),
        ({"type": "Sequence", "normalizers": [REPLACE, PREPEND]}, None, None),
        (PREPEND, None, None),
        (None, None, None),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}, True),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}, True),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}, False),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}, None),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": [], "split": False}, None),
        (None, {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": False}, None),
        (REPLACE, {"type": "ByteLevel"}, None),
        ([], {}, None),
    ],
)
def test_space_prefix(normalizer: Any, pre_tokenizer: Any, prefix: bool | None) -> None:
    assert space_prefix(normalizer, pre_tokenizer) is prefix


def test_no_space_prefix_is_written(tmp_path: Path) -> None:
    tiny.write_spm(tmp_path, model=False)
    assert "tokenizer.ggml.add_space_prefix" not in vocab_keys.values(vocab_keys.read(tmp_path, tiny.N_SPM_TOKENS))
    change(tmp_path, lambda value: value.update(normalizer=REPLACE))
    values = vocab_keys.values(vocab_keys.read(tmp_path, tiny.N_SPM_TOKENS))
    assert values["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize(("scheme", "n"), [("first", 1), ("always", 1), ("never", 0)])
def test_a_space_that_llama_cpp_puts_elsewhere_is_a_warning(tmp_path: Path, scheme: str, n: int) -> None:
    tiny.write_spm(tmp_path, model=False)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    change(tmp_path, lambda value: value.update(normalizer=None, pre_tokenizer=metaspace))
    assert vocab_keys.codes(vocab_keys.read(tmp_path, tiny.N_SPM_TOKENS)) == ["space-prefix"] * n
    # In tokenizer_config.json it may be said otherwise.
    change(tmp_path, lambda value: value.update(add_prefix_space=scheme == "never"), "tokenizer_config.json")
    vocabulary = vocab_keys.read(tmp_path, tiny.N_SPM_TOKENS)
    assert vocab_keys.codes(vocabulary) == ["space-prefix"] * (n + 1)
    assert vocab_keys.values(vocabulary)["tokenizer.ggml.add_space_prefix"] is (scheme == "never")


# Scores that stand for merges


def test_scores_follow_the_merges(tmp_path: Path) -> None:
    tiny.write_spm(tmp_path, model=False)
    values = vocab_keys.values(vocab_keys.read(tmp_path, tiny.N_SPM_TOKENS))
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    made = ["".join(pair) for pair in model["merges"]]
    scores = [values["tokenizer.ggml.scores"][model["vocab"][token]] for token in made]
    assert scores == [-float(rank) for rank in range(len(made))]
    assert set(values["tokenizer.ggml.scores"]) - set(scores) == {-1e6}


def test_merges_that_scores_cannot_stand_for(tmp_path: Path) -> None:
    tiny.write_spm(tmp_path, model=False)
    change(tmp_path, lambda value: value["model"]["merges"].pop())
    assert vocab_keys.codes(vocab_keys.read(tmp_path, tiny.N_SPM_TOKENS)) == ["merges-without-scores"]
