"""Which file's word counts for a special token: the order of precedence, what disagrees, what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamconv.metadata.vocab.companions import Companions, token_id, token_text
from streamconv.metadata.vocab.files import TokenizerFiles
from streamconv.metadata.vocab.special_tokens import Tokens, find_ids, find_roles
from tests import vocab_cases, vocab_keys
from tests.tiny import tokenizer as tiny
from tests.vocab_cases import BOS, END, EOS, TURN, sequence, special, template

ADDED = {text: index for index, text in enumerate(tiny.SPECIALS)}
WORDS = ADDED | {"the": 30}


def companions(**files: Any) -> Companions:
    empty: dict[str, Any] = {
        name: {} for name in ("config", "tokenizer_config", "special_tokens_map", "generation_config")
    }
    return Companions(TokenizerFiles(Path("x")), templates=Path("x"), **(empty | files))


def ids_of(n_vocab: int = 40, post_processor: Any = None, **files: Any) -> tuple[dict[str, int], list[str]]:
    beside = companions(**files)
    ids, warnings = find_ids(find_roles(beside, post_processor), beside, Tokens(n_vocab, ADDED.get, WORDS.get))
    return ids, [warning.code for warning in warnings]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"tokenizer_config": {"eos_token": END}, "config": {"eos_token_id": 4}}, {"eos": 4}),
        ({"tokenizer_config": {"eos_token": {"content": END}}}, {"eos": 4}),
        ({"config": {"eos_token_id": 7}, "tokenizer_config": {"eos_token": "the"}}, {"eos": 7}),
        ({"tokenizer_config": {"eos_token": "the"}}, {"eos": 30}),
        ({"special_tokens_map": {"eos_token": {"content": "the"}}}, {"eos": 30}),
        ({"special_tokens_map": {"eos_token": "the"}, "config": {"eos_token_id": 8}}, {"eos": 8}),
        ({"special_tokens_map": {"eos_token": "the"}, "generation_config": {"eos_token_id": 30}}, {"eos": 30}),
        ({"generation_config": {"eos_token_id": [9, 10]}}, {"eos": 9}),
        ({"config": {"eos_token_id": [11, 12]}}, {"eos": 11}),
        ({"config": {"eos_token_id": [11, 12]}, "generation_config": {"eos_token_id": 12}}, {"eos": 12}),
        ({"config": {"eos_token_id": None, "text_config": {"eos_token_id": 5}}}, {"eos": 5}),
        ({"config": {"text_config": [5]}}, {}),
        ({"config": {"pad_token_id": -1, "bos_token_id": True, "eos_token_id": 2.0, "unk_token_id": "3"}}, {}),
        ({"config": {"eos_token_id": []}, "generation_config": {"eos_token_id": ["a"]}}, {}),
        ({"tokenizer_config": {"eos_token": 5, "bos_token": None, "pad_token": {"content": 3}}}, {}),
        (
            {"tokenizer_config": {"mask_token": TURN, "unk_token": END, "cls_token": "the"}},
            {"mask": 3, "unk": 4, "bos": 30},
        ),
    ],
)
def test_precedence(files: dict[str, Any], expected: dict[str, int]) -> None:
    assert ids_of(**files) == (expected, [])


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ({"tokenizer_config": {"eos_token": END}, "config": {"eos_token_id": 2}}, 4),
        ({"tokenizer_config": {"eos_token": END}, "config": {"eos_token_id": [2, 3]}}, 4),
        ({"tokenizer_config": {"eos_token": END}, "generation_config": {"eos_token_id": 2}}, 4),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [2, 6]}}, 5),
    ],
)
def test_disagreement(files: dict[str, Any], chosen: int) -> None:
    assert ids_of(**files) == ({"eos": chosen}, ["special-token-disagreement"])


@pytest.mark.parametrize(("other", "words"), [(9, "nothing to do"), (8, "only if answers do not end")])
def test_the_warning_says_whether_to_act(other: int, words: str) -> None:
    """llama.cpp ends an answer at tokens of known texts, whatever eos is."""
    beside = companions(tokenizer_config={"eos_token": END}, generation_config={"eos_token_id": other})
    tokens = Tokens(40, (ADDED | {"<|im_end|>": 9}).get, WORDS.get)
    _, (warning,) = find_ids(find_roles(beside, None), beside, tokens)
    assert words in warning.message


def test_one_among_several_is_no_disagreement() -> None:
    files = {"tokenizer_config": {"eos_token": END}, "generation_config": {"eos_token_id": [2, 4]}}
    assert ids_of(**files) == ({"eos": 4}, [])


def test_an_id_beyond_the_rows_is_left_out() -> None:
    assert ids_of(config={"eos_token_id": 40}, generation_config={"eos_token_id": 39}) == (
        {"eos": 39},
        ["special-token-range"],
    )
    assert ids_of(config={"pad_token_id": 10**30}) == ({}, ["special-token-range"])


def test_code_llama_s_end_of_infill() -> None:
    words = WORDS | {"▁<EOT>": 33}
    beside = companions()
    ids, _ = find_ids(find_roles(beside, None), beside, Tokens(40, ADDED.get, words.get))
    assert ids == {"eot": 33}


@pytest.mark.parametrize(
    ("single", "pair", "texts", "add"),
    [
        ([sequence("A")], [], {}, {}),
        ([special(BOS), sequence("A")], [], {"bos": BOS, "cls": BOS}, {"bos": True}),
        ([sequence("A"), special(END)], [], {"eos": END}, {"eos": True}),
        (
            [special(BOS), sequence("A"), special(END)],
            [special(BOS), sequence("A"), sequence("B"), special(END)],
            {"bos": BOS, "cls": BOS, "eos": END},
            {"bos": True, "eos": True},
        ),
        (
            [special(BOS), sequence("A")],
            [special(BOS), sequence("A"), special(TURN), sequence("B")],
            {"bos": BOS, "cls": BOS},
            {"bos": True, "sep": False},
        ),
        (
            [special(BOS), sequence("A"), special(END)],
            [special(BOS), sequence("A"), special(END), special(END), sequence("B"), special(END)],
            {"bos": BOS, "cls": BOS, "eos": END, "sep": END},
            {"bos": True, "eos": True, "sep": True},
        ),
    ],
)
def test_templates(single: list[Any], pair: list[Any], texts: dict[str, str], add: dict[str, bool]) -> None:
    roles = find_roles(companions(), template(single, pair))
    assert (roles.texts, roles.add) == (texts, add)


def test_the_post_processor_decides_what_is_added() -> None:
    config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": False, "add_eos_token": True}
    roles = find_roles(companions(tokenizer_config=config), template([special(BOS), sequence("A")], []))
    assert roles.add == {"bos": True, "eos": True}


def test_another_end_in_the_template_makes_the_config_s_the_end_of_a_turn() -> None:
    beside = companions(tokenizer_config={"eos_token": EOS})
    roles = find_roles(beside, template([sequence("A"), special(END)], []))
    assert (roles.texts["eos"], roles.texts["eot"]) == (END, EOS)


@pytest.mark.parametrize(
    "post_processor",
    [
        None,
        3,
        [],
        {"type": 3},
        {"type": "Sequence", "processors": [None, 3, {"type": "TemplateProcessing"}]},
        {"type": "TemplateProcessing", "single": 3, "pair": {}},
        {"type": "TemplateProcessing", "single": [1, 2], "pair": [None, None, None]},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": 3}, {"SpecialToken": {"id": []}}], "pair": None},
    ],
)
def test_a_malformed_post_processor_says_nothing(post_processor: Any) -> None:
    roles = find_roles(companions(), post_processor)
    assert (roles.texts, roles.add) == ({}, {})


def test_roberta_without_its_fields() -> None:
    assert find_roles(companions(), {"type": "RobertaProcessing", "cls": 3, "sep": []}).texts == {}


@pytest.mark.parametrize(
    ("entry", "text"),
    [("a", "a"), ("", None), (None, None), (3, None), ({"content": "a"}, "a"), ({"content": ""}, None), ([], None)],
)
def test_token_text(entry: Any, text: str | None) -> None:
    assert token_text(entry) == text


@pytest.mark.parametrize(
    ("entry", "id_"),
    [
        (3, 3),
        (0, 0),
        (-1, None),
        (True, None),
        (1.0, None),
        ("1", None),
        ([4, 5], 4),
        ([], None),
        ([True], None),
        ({}, None),
    ],
)
def test_token_id(entry: Any, id_: int | None) -> None:
    assert token_id(entry) == id_


def test_bos_and_eos_that_no_file_names(tmp_path: Path) -> None:
    """llama.cpp would take token 11 for both, and put it before a text under this name of the pre-tokenizer."""
    tiny.write_bpe(tmp_path, pre="llama-bpe")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    vocabulary = vocab_keys.read(tmp_path, tiny.N_BPE_TOKENS)
    values = vocab_keys.values(vocabulary)
    assert vocab_keys.codes(vocabulary) == ["special-token-missing"] * 2
    assert "tokenizer.ggml.bos_token_id" not in values
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.add_eos_token"] is False


def test_bos_is_not_added_where_nothing_asks_for_it(tmp_path: Path) -> None:
    tiny.write_bpe(tmp_path, pre="lfm2")
    vocab_cases.edit(tmp_path / "tokenizer_config.json", lambda value: value.pop("add_bos_token"))
    values = vocab_keys.values(vocab_keys.read(tmp_path, tiny.N_BPE_TOKENS, default_pre="lfm2"))
    assert values["tokenizer.ggml.add_bos_token"] is False


def test_a_special_token_that_is_half_a_character_is_none(tmp_path: Path) -> None:
    tiny.write_bpe(tmp_path, pre="llama-bpe")
    vocab_cases.edit(tmp_path / "special_tokens_map.json", lambda value: value.pop("eos_token"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\\\ud800", "bos_token": "<|startoftext|>"}')
    vocabulary = vocab_keys.read(tmp_path, tiny.N_BPE_TOKENS)
    assert "tokenizer.ggml.eos_token_id" not in vocab_keys.values(vocabulary)
