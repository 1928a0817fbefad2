"""tokenizer.json read in batches against a reference that loads it whole: the same content, or a StreamconvError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamconv.errors import SourceError
from streamconv.metadata.vocab import json_stream
from streamconv.metadata.vocab.json_stream import BATCH
from streamconv.metadata.vocab.tokenizer_json import (
    MAX_PART_NBYTES,
    PARTS,
    TOO_LARGE,
    TokenizerJson,
    read_tokenizer_json,
)
from tests.vocab_cases import added
from tests.vocab_keys import unpacked

N_VOCAB = 40
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
Edit = Callable[[dict[str, Any]], object]


def document(pairs: bool = True) -> dict[str, Any]:
    """A tokenizer.json with all that its reader looks at, and few bytes, so that a random change hits something."""
    tokens = ["a", "b", 'q"', "\\", "é", "🚀", "ab", "abé", '"', '""', "\\\\", "Ġ", "Ġa", "{[", "]}", ",", ":", "\n"]
    merges = [["a", "b"], ["ab", "é"], ["Ġ", "a"], ['"', '"'], ["\\", "\\"]]
    return {
        "version": "1.0",
        "added_tokens": [added(0, "a", special=True), added(30, "<é>", normalized=False)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel"},
        "post_processor": {"x": [1, {}]},
        "decoder": None,
        "model": {
            "type": "BPE",
            "ignore_merges": False,
            "vocab": {token: 2 * index for index, token in enumerate(tokens)},
            "merges": merges if pairs else [" ".join(pair) for pair in merges],
        },
    }


def write(directory: Path, content: Any, **options: Any) -> Path:
    path = directory / "tokenizer.json"
    text = content if isinstance(content, bytes) else json.dumps(content, **options).encode("utf-8", "surrogatepass")
    path.write_bytes(text)
    return path


def content(tokenizer: TokenizerJson) -> dict[str, Any]:
    """What was read, in plain values."""
    merges = tokenizer.merges
    return {
        "added": [
            (token.id, token.text.decode(), *(getattr(token, name) for name in FLAGS)) for token in tokenizer.added
        ],
        "parts": tokenizer.parts,
        "model": tokenizer.model,
        "vocab": {text.decode(): id_ for text, id_ in tokenizer.vocab.items()},
        "merges": None if merges is None else unpacked(merges.lines),
        "ranks": None if merges is None else {int(i): int(merges.ranks[i]) for i in np.flatnonzero(merges.ranks >= 0)},
        "grouped": None if merges is None else merges.grouped,
    }


class Refused(Exception):
    """The reference does not take this file."""


def reference(text: bytes, n_vocab: int) -> dict[str, Any]:
    """The same content by json.loads and plain loops."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        demand(len(dict(pairs)) == len(pairs))
        return dict(pairs)

    def demand(truth: object) -> None:
        if not truth:
            raise Refused

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=lambda _: demand(False))
    except (ValueError, RecursionError):
        raise Refused from None
    demand(isinstance(value, dict) and isinstance(value.get("model"), dict))
    tokens = value.get("added_tokens", [])
    demand(isinstance(tokens, list))
    for token in tokens:
        demand(isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"])
        demand(type(token.get("id")) is int and 0 <= token["id"] < n_vocab)
        demand(all(isinstance(token.get(name, False), bool) for name in FLAGS))
        demand(is_text(token["content"]))
    model = value["model"]
    vocab = model.get("vocab", {}) if isinstance(model.get("vocab"), dict) else {}
    demand(all(type(id_) is int and 0 <= id_ < n_vocab and is_text(text) for text, id_ in vocab.items()))
    merges = model.get("merges")
    demand("merges" not in model or isinstance(merges, list))
    lines, ranks, made = [], {}, []
    for rank, merge in enumerate(merges or []):
        demand(type(merge) is type((merges or [])[0]))
        pair = merge.split(" ") if isinstance(merge, str) else merge
        demand(isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair))
        demand(all(token in vocab for token in (*pair, "".join(pair))))
        made.append(vocab["".join(pair)])
        ranks.setdefault(made[-1], rank)
        lines.append(" ".join(part.replace(" ", "Ġ") for part in pair))
    return {
        "added": [(token["id"], token["content"], *(token.get(name, False) for name in FLAGS)) for token in tokens],
        "parts": {name: value.get(name) for name in PARTS},
        "model": {key: part for key, part in model.items() if key not in ("vocab", "merges")},
        "vocab": vocab,
        "merges": None if merges is None else lines,
        "ranks": None if merges is None else ranks,
        "grouped": None
        if merges is None
        else sum(a != b for a, b in zip([-1, *made], made, strict=False)) == len(ranks),
    }


def is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_content_is_the_reference_s(pairs: bool, options: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, document(pairs), **options)
    read = content(read_tokenizer_json(path, N_VOCAB))
    assert read == reference(path.read_bytes(), N_VOCAB)
    assert read["merges"] == ["a b", "ab é", "Ġ a", '" "', "\\ \\"]


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), pairs=st.booleans(), ascii_=st.booleans(), window=st.sampled_from([3, 17, 1 << 17]))
def test_a_changed_file_gives_its_content_or_an_error(
    data: st.DataObject, pairs: bool, ascii_: bool, window: int, tmp_path: Path
) -> None:
    text = json.dumps(document(pairs), ensure_ascii=ascii_).encode()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.integers(0, 12))
        snippet = data.draw(st.binary(max_size=4) | st.sampled_from([text[a : a + 9] for a in range(0, len(text), 7)]))
        text = text[:start] + snippet + text[end:]
    path = write(tmp_path, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "WINDOW_NBYTES", window)
        try:
            read = content(read_tokenizer_json(path, N_VOCAB))
        except SourceError:
            return
    if read["vocab"]:  # no vocabulary, or Unigram's, is passed over, and refused later
        assert read == reference(text, N_VOCAB)


def test_many_batches(tmp_path: Path) -> None:
    """A border of a batch falls on each kind of entry; ranks and groups go on across it."""
    n_words = BATCH + 100
    letters = {chr(0x4E00 + index): index for index in range(n_words)}
    words = {f"{letter}!": n_words + index for index, letter in enumerate(letters)}
    value = document()
    value["model"] |= {"vocab": letters | words | {"!": 2 * n_words}, "merges": [[letter, "!"] for letter in letters]}
    path = write(tmp_path, value)
    tokenizer = read_tokenizer_json(path, 2 * n_words + 1)
    assert content(tokenizer) == reference(path.read_bytes(), 2 * n_words + 1)
    assert tokenizer.merges is not None and tokenizer.merges.grouped
    assert tokenizer.merges.ranks[n_words : 2 * n_words].tolist() == list(range(n_words))


@pytest.mark.parametrize("shift", [0, 1])
def test_merges_of_one_token_stay_together_across_batches(shift: int, tmp_path: Path) -> None:
    """Of two merges for each token, a border of a batch parts a pair with one shift or the other."""
    letters = [chr(0x4E00 + index) for index in range(2 * BATCH)]
    tokens = ["!", "!!", "?", "?!", *letters, *(f"{x}!" for x in letters), *(f"{x}!!" for x in letters)]
    merges = [["?", "!"]] * shift + [pair for x in letters for pair in ([f"{x}!", "!"], [x, "!!"])]
    value = document()
    value["model"] |= {"vocab": {token: index for index, token in enumerate(tokens)}, "merges": merges}
    value["added_tokens"] = []
    tokenizer = read_tokenizer_json(write(tmp_path, value, ensure_ascii=False), len(tokens))
    assert tokenizer.merges is not None and tokenizer.merges.grouped
    assert tokenizer.merges.lines.length == len(merges)


def test_a_token_made_twice_keeps_its_first_rank(tmp_path: Path) -> None:
    value = document()
    value["model"]["vocab"] |= {"bé": 36, "ba": 38}
    value["model"]["merges"] = [["a", "b"], ["b", "é"], ["a", "bé"], ["b", "a"], ["ab", "é"]]
    tokenizer = read_tokenizer_json(write(tmp_path, value), N_VOCAB)
    assert tokenizer.merges is not None
    assert tokenizer.merges.ranks[tokenizer.vocab["abé".encode()]] == 2
    assert not tokenizer.merges.grouped


def test_merges_before_the_vocabulary(tmp_path: Path) -> None:
    value = document()
    model = value["model"]
    value["model"] = {"merges": model["merges"], "vocab": model["vocab"], "type": "BPE"}
    path = write(tmp_path, value)
    assert content(read_tokenizer_json(path, N_VOCAB)) == reference(path.read_bytes(), N_VOCAB)


def test_spaces_in_parts_become_byte_level_letters(tmp_path: Path) -> None:
    value = document()
    value["model"]["vocab"] |= {" ": 36, " a": 38}
    value["model"]["merges"] = [["a", "b"], [" ", "a"]]
    read = content(read_tokenizer_json(write(tmp_path, value), N_VOCAB))
    assert read["merges"] == ["a b", "Ġ a"]
    assert read["ranks"] == {12: 0, 38: 1}


def test_without_tokens(tmp_path: Path) -> None:
    tokenizer = read_tokenizer_json(write(tmp_path, document()), N_VOCAB, tokens=False)
    assert (tokenizer.vocab, tokenizer.merges, len(tokenizer.added)) == ({}, None, 2)
    assert tokenizer.model == {"type": "BPE", "ignore_merges": False}


def test_a_part_too_large_is_of_no_known_kind(tmp_path: Path) -> None:
    value = document() | {"normalizer": {"type": "Precompiled", "map": "x" * MAX_PART_NBYTES}}
    assert read_tokenizer_json(write(tmp_path, value), N_VOCAB).parts["normalizer"] == TOO_LARGE


def vocab_edit(**tokens: Any) -> Edit:
    return lambda value: value["model"]["vocab"].update(tokens)


def merges_edit(*merges: Any) -> Edit:
    return lambda value: value["model"].update(merges=list(merges))


def added_edit(**fields: Any) -> Edit:
    return lambda value: value["added_tokens"][0].update(fields)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (vocab_edit(x=N_VOCAB), "token 'x' has id 40, but the model has only 40 rows"),
        (vocab_edit(x=10**9), "token 'x' has id 1,000,000,000, but the model has only 40 rows"),
        (vocab_edit(x=10**12), 'expected a token and its id, then .* found \'"x": 1000000000000'),
        (vocab_edit(x=-1), 'expected a token and its id, found \'"x": -1'),
        (vocab_edit(x=1.5), "expected a token and its id, then ',' or '}', found '\"x\": 1.5"),
        (vocab_edit(x=True), 'expected a token and its id, found \'"x": true'),
        (vocab_edit(x=None), "expected a token and its id"),
        (vocab_edit(x="1"), "expected a token and its id"),
        (vocab_edit(x={}), "expected a token and its id"),
        (vocab_edit(**{"\ud800": 39}), "surrogate"),
        (vocab_edit(**{f"t{n}": 1 for n in range(60)}), "more tokens than the model's 40 rows"),
        (merges_edit("ab"), "merge 'ab' is not two tokens separated by one space"),
        (merges_edit("a b", "a  b"), "merge 'a  b' is not two tokens separated by one space"),
        (merges_edit("a b", "a b é"), "merge 'a b é' is not two tokens separated by one space"),
        (merges_edit(" a"), "merge of '' and 'a' names '', which is not a token"),
        (merges_edit("a b", "a x"), "merge of 'a' and 'x' names 'x', which is not a token"),
        (merges_edit("b a"), "merge of 'b' and 'a' names 'ba', which is not a token"),
        (merges_edit(["a", "b"], ["a", ""]), "merge of 'a' and '' names '', which is not a token"),
        (merges_edit(["a", "b", "é"]), "expected a merge such as"),
        (merges_edit(["a"]), "expected a merge such as"),
        (merges_edit(["a", "b"], "a b"), "expected a merge such as"),
        (merges_edit(["a", 1]), "expected a merge such as"),
        (merges_edit(1), "expected a merge such as"),
        (lambda value: value["model"].update(merges={}), r"expected '\['"),
        (lambda value: value["model"].update(vocab=3), "merge of 'a' and 'b' names 'a', which is not a token"),
        (lambda value: value.update(model=[]), "expected '{'"),
        (lambda value: value.pop("model"), "the file has no 'model'"),
        (added_edit(id=-1), r"added token 'a' has the id -1, not a whole number from 0 to 2\^64 - 1"),
        (added_edit(id=2**64), rf"added token 'a' has the id {2**64}, not a whole number from 0 to 2\^64 - 1"),
        (added_edit(id=1.0), "has the id 1.0, not a whole number"),
        (added_edit(id=True), "has the id True, not a whole number"),
        (added_edit(id="1"), "has the id '1', not a whole number"),
        (added_edit(id=None), "has the id None, not a whole number"),
        (added_edit(content=""), "'content' of an added token must be a string, not ''"),
        (added_edit(content=None), "'content' of an added token must be a string, not None"),
        (added_edit(content="\udfff"), "half of a surrogate pair"),
        (added_edit(special=1), "is 1; it must be true or false"),
        (added_edit(rstrip="no"), "is 'no'; it must be true or false"),
        (lambda value: value.update(added_tokens=[[]]), r"expected an added token, found '\[\]"),
        (lambda value: value.update(added_tokens={}), r"expected '\['"),
        (lambda value: value.update(added_tokens=[added(1, "x")] * 41), "more added tokens than the model's 40 rows"),
        (
            lambda value: value.update(added_tokens=[added(n, "x" * 60_000) for n in range(30)]),
            "more added tokens than the model's 40 rows, or their texts are too long",
        ),
        (added_edit(content="x" * 70_000), "expected an added token, found"),
        (added_edit(more=[]), "expected an added token, found"),
        (
            lambda value: value.update(post_processor={"x": "y" * MAX_PART_NBYTES}),
            "take more than 262,144 bytes of memory",
        ),
        (lambda value: value.update(normalizer=json.loads("[" * 70 + "]" * 70)), "nested deeper than 64"),
    ],
)
def test_hostile_content(edit: Edit, problem: str, tmp_path: Path) -> None:
    value = document()
    edit(value)
    path = write(tmp_path, value)
    with pytest.raises(SourceError, match=problem) as caught:
        read_tokenizer_json(path, N_VOCAB)
    assert caught.value.file == str(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"b": 2', '"a": 2', "token 'a' occurs twice, with ids 0 and 2"),
        ('"b": 2', '"a": 0', "token 'a' occurs twice, with ids 0 and 0"),
        ('"b": 2', '"\\u0061": 2', "token 'a' occurs twice, with ids 0 and 2"),
        ('"b": 2', '"b": 02', "then ',' or '}', found '\"b\": 02"),
        ('"b": 2', '"b": 2e0', "then ',' or '}', found '\"b\": 2e0"),
        ('"b": 2,', '"b": 2', "then ',' or '}', found '\"b\": 2 \"q"),
        ('"b": 2,', '"b": 2,,', "expected a token and its id, found ', "),
        ('["ab", "\\u00e9"]', '["ab" "\\u00e9"]', "expected a merge such as"),
        ('"BPE"', '"BPE", "type": "BPE"', "duplicate key 'type'"),
        ('"version"', '"model"', "expected '{', found"),
        ('"1.0"', "1.0.0", "malformed"),
        ('"1.0"', "NaN", "NaN is not a JSON number"),
    ],
)
def test_hostile_spelling(old: str, new: str, problem: str, tmp_path: Path) -> None:
    text = json.dumps(document())
    assert text.count(old) == 1
    path = write(tmp_path, text.replace(old, new).encode())
    with pytest.raises(SourceError, match=problem):
        read_tokenizer_json(path, N_VOCAB)


def test_a_token_that_stands_in_two_batches(tmp_path: Path) -> None:
    tokens = ", ".join(f'"t{index}": {index}' for index in range(BATCH + 5))
    path = write(tmp_path, f'{{"model": {{"vocab": {{{tokens}, "t3": 3}}}}}}'.encode())
    with pytest.raises(SourceError, match="token 't3' occurs twice, with ids 3 and 3"):
        read_tokenizer_json(path, BATCH + 10)


@pytest.mark.parametrize("raw", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xfd", b"\xfe"])
def test_what_is_no_utf8_has_its_place(raw: bytes, tmp_path: Path) -> None:
    text = json.dumps(document()).encode().replace(b'"abc', b'"abc').replace(b'"{["', b'"' + raw + b'"')
    with pytest.raises(SourceError, match=f"byte {text.index(raw):,}: not UTF-8"):
        read_tokenizer_json(write(tmp_path, text), N_VOCAB)


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    text = json.dumps(document()).encode()
    for end in range(len(text)):
        with pytest.raises(SourceError):
            read_tokenizer_json(write(tmp_path, text[:end]), N_VOCAB)
