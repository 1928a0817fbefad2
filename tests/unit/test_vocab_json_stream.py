"""The streaming JSON reader: any window gives what json.loads gives, and what is not JSON is a placed error."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamconv.errors import SourceError
from streamconv.metadata.vocab import json_stream, tokenizer_json
from streamconv.metadata.vocab.json_stream import FLAT, STRING, EntryKind, JsonStream
from tests.raising import raises

LARGE = 1 << 30
NUMBERS = EntryKind("a number", b"[", rb"[0-9]++", b"]")
STRINGS = EntryKind("a string", b"[", STRING, b"]")

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
same_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "file.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return path


def test_no_group_that_can_match_in_two_ways_is_repeated_possessively() -> None:
    """Python before 3.11.5 gets that wrong (gh-106052), and none of the later ones would show it."""
    assert STRING.count(b"*") == STRING.count(b"*+") and not re.search(rb"[|?{]", STRING.replace(b"(?:", b""))
    kinds = [kind for kind in vars(tokenizer_json).values() if isinstance(kind, EntryKind)]
    patterns = [json_stream._PLAIN.pattern, *(kind.run.pattern for kind in kinds)]
    patterns = [text.replace(STRING, b"STRING") for text in patterns]
    assert len(patterns) > 4
    assert not [text for text in patterns if re.search(rb"\)(?:[*+?]|\{[0-9,]+\})\+", text)]


def load(path: Path) -> Any:
    with JsonStream(path, LARGE) as stream:
        value = stream.value(LARGE)
        stream.end()
    return value


@same_file
@given(tree=trees, indent=st.sampled_from([None, 0, 3]), ascii_=st.booleans(), window=st.integers(1, 40))
def test_any_window_reads_any_value(tree: Any, indent: int | None, ascii_: bool, window: int, tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(tree, indent=indent, ensure_ascii=ascii_))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "WINDOW_NBYTES", window)
        assert load(path) == tree


@same_file
@given(texts=st.lists(st.text(), max_size=30), ascii_=st.booleans(), window=st.integers(1, 40))
def test_any_window_gives_the_same_strings(texts: list[str], ascii_: bool, window: int, tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(texts, ensure_ascii=ascii_, indent=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "WINDOW_NBYTES", window)
        patch.setattr(json_stream, "MAX_ENTRY_NBYTES", 2000)
        with JsonStream(path, LARGE) as stream:
            read = [text.decode() for batch in stream.batches(STRINGS) for text in batch.strings()[0]]
            stream.end()
    assert read == texts


def test_batches_are_bounded_and_tile_the_array(tmp_path: Path) -> None:
    numbers = list(range(3 * json_stream.BATCH + 7))
    path = write(tmp_path, json.dumps(numbers))
    with JsonStream(path, LARGE) as stream:
        batches = list(stream.batches(NUMBERS))
        stream.end()
    assert [len(batch.text.rstrip(b",").split(b",")) for batch in batches[:3]] == [json_stream.BATCH] * 3
    assert [int(n) for batch in batches for n in batch.text.rstrip(b",").split(b",")] == numbers
    assert all(path.read_bytes()[b.position :].startswith(b.text) for b in batches)


def test_members_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a\\u0062": [1, {"x": []}, "]"], "c": {}, "d": []}')
    with JsonStream(path, LARGE) as stream:
        seen = {key: stream.value(LARGE) for key in stream.members()}
        stream.end()
    assert seen == {"ab": [1, {"x": []}, "]"], "c": {}, "d": []}


def test_objects_in_batches(tmp_path: Path) -> None:
    objects = [{"a": [], "b": '}]\\"'}, {}, {"c": 1.5}]
    flat = [{"b": '}]"\\'}, {}, {"c": 1.5, "d": None}]
    kind = EntryKind("an object", b"[", rb"\{" + FLAT + rb"\}", b"]")
    path = write(tmp_path, json.dumps(flat, indent=1))
    with JsonStream(path, LARGE) as stream:
        assert [value for batch in stream.batches(kind) for value in batch.values(path)] == flat
    with (
        JsonStream(write(tmp_path, json.dumps(objects)), LARGE) as stream,
        raises(SourceError, code="json-malformed"),
    ):
        list(stream.batches(kind))
    with JsonStream(write(tmp_path, '[{"a":1,"a":2}]'), LARGE) as stream:
        (batch,) = stream.batches(kind)
    with raises(SourceError, code="json-malformed"):
        batch.values(path)


def test_what_is_passed_over_leaves_the_next_value(tmp_path: Path) -> None:
    skipped = json.dumps([["a]", {"b": '"'}], {"c": [[]]}, "x" * 3000, 1.5, None] * 50)
    path = write(tmp_path, f'{{"skipped": {skipped}, "kept": 7}}')
    with JsonStream(path, LARGE) as stream:
        for key in stream.members():
            if key == "kept":
                assert stream.value(99) == 7
            else:
                stream.skip()


def test_a_value_of_many_objects_is_larger_than_its_text(tmp_path: Path) -> None:
    text = json.dumps([[]] * 50)
    with JsonStream(write(tmp_path, f'{{"a": {text}}}'), LARGE) as stream:
        assert [stream.value_or(2 * len(text) + 50, "large") for _ in stream.members()] == ["large"]


def test_an_oversized_value_is_passed_over_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"a": "x" * 100, "b": 7}))
    with JsonStream(path, LARGE) as stream:
        assert [stream.value_or(50, "large") for _ in stream.members()] == ["large", 7]
    with (
        JsonStream(path, LARGE) as stream,
        pytest.raises(SourceError, match="may take more than 50 bytes of memory"),
    ):
        for _ in stream.members():
            stream.value(50)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "this is an empty file"),
        (" ", "the file ends where a value"),
        ("[1", "the file ends where"),
        ('"abc', "a string of at most"),
        ('{"a" 1}', "expected ':'|malformed"),
        ("[1 2]", "malformed"),
        ("[1,]", "malformed"),
        ("[1}", "expected a value"),
        ("nul", "malformed"),
        ("1.2.3", "malformed"),
        ("NaN", "NaN is not a JSON number"),
        ("-Infinity", "is not a JSON number"),
        ('"\t"', "expected|malformed|string"),
        ('"\\x"', "malformed"),
        ('{"a":1,"a":2}', "duplicate key 'a'"),
        ("[" * 100 + "]" * 100, "nested deeper than 64"),
        ("7 8", "expected the end of the file, found '8'"),
        ("9" * 5000, "malformed"),
        (b"\xff", "not UTF-8|expected"),
        (b'"\xc3"', "not UTF-8"),
        (b" \xef\xbb\xbf1", "malformed|expected"),
        (b"\xef\xbb\xbf\xef\xbb\xbf1", "malformed|expected"),
    ],
)
def test_malformed_values(text: str | bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=problem) as caught:
        load(write(tmp_path, text))
    assert caught.value.file == str(tmp_path / "file.json")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = write(tmp_path, "version https://git-lfs.github.com/spec/v1\n")
    with JsonStream(path, LARGE) as stream, pytest.raises(SourceError, match=r"a Git LFS pointer.* .fetch the content"):
        list(stream.members())


@pytest.mark.parametrize(
    "text",
    [" ", "[", "{}", '["a"', '["a",]', '["a" "b"]', '["a",1]', '[,"a"]', '["a\n"]', '["a"}', '[["a"]]', "null"],
)
def test_malformed_batches(text: str, tmp_path: Path) -> None:
    with (
        JsonStream(write(tmp_path, text), LARGE) as stream,
        pytest.raises(SourceError, match=r"^.*byte \d+: expected|ends"),
    ):
        list(stream.batches(STRINGS))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('["\\ud800"]', "surrogate"),
        ('["\\udc00"]', "surrogate"),
        ('["\\ud800\\u0041"]', "surrogate"),
        ('["\\u0041\\udc00"]', "surrogate"),
        ('["\\x41"]', "escape"),
        ('["\\u12g4"]', "escape"),
        ('["\\u12"]', "escape"),
        (b'["\xed\xa0\x80"]', "utf-8"),
        (b'["\xff"]', "utf-8"),
        (b'["\xfd"]', "utf-8"),
    ],
)
def test_what_is_no_text_in_a_batch(text: str | bytes, problem: str, tmp_path: Path) -> None:
    with JsonStream(write(tmp_path, text), LARGE) as stream:
        (batch,) = stream.batches(STRINGS)
    with pytest.raises(ValueError, match=problem):
        batch.strings()


@pytest.mark.parametrize(
    ("text", "strings"),
    [
        (r'"\\"', ["\\"]),
        (r'"\\\""', ['\\"']),
        (r'"\\u0041"', ["\\u0041"]),
        (r'"\u005c\u0022"', ['\\"']),
        (r'"\ud83d\ude80"', ["🚀"]),
        (r'"\/\b\f\n\r\t"', ["/\b\f\n\r\t"]),
        (r'"\u0000","\u0001\u007f"', ["\0", "\1\x7f"]),
        (r'"","\\",""', ["", "\\", ""]),
    ],
)
def test_escapes(text: str, strings: list[str], tmp_path: Path) -> None:
    with JsonStream(write(tmp_path, f"[{text}]"), LARGE) as stream:
        assert [s.decode() for batch in stream.batches(STRINGS) for s in batch.strings()[0]] == strings
    assert json.loads(f"[{text}]") == strings


@pytest.mark.parametrize("n_before", [0, 1000, 60_000, 130_000])
def test_an_entry_is_bounded_wherever_it_stands(n_before: int, tmp_path: Path) -> None:
    longest = "x" * (json_stream.MAX_ENTRY_NBYTES - 10)
    for text, problem in ((longest, None), (longest + "y" * 10, "expected a string, found '\"xxx")):
        path = write(tmp_path, json.dumps([*["a"] * (n_before // 5), text, "b"]))
        with JsonStream(path, LARGE) as stream:
            if problem is None:
                assert sum(len(batch.strings()[0]) for batch in stream.batches(STRINGS)) == n_before // 5 + 2
            else:
                with pytest.raises(SourceError, match=problem):
                    list(stream.batches(STRINGS))


def test_white_space_without_end_is_read_in_windows(tmp_path: Path) -> None:
    path = write(tmp_path, b"[1," + b" " * (3 << 20) + b"2" + b"\n" * (3 << 20) + b"]")
    with JsonStream(path, LARGE) as stream:
        tracemalloc.start()
        numbers = [int(batch.text.strip(b" \n,")) for batch in stream.batches(NUMBERS)]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert numbers == [1, 2]
    assert peak < 4 * (json_stream.WINDOW_NBYTES + json_stream.MAX_ENTRY_NBYTES)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="over the limit of 3"):
        JsonStream(write(tmp_path, "1234"), 3)
    with raises(SourceError, code="cannot-open"):
        JsonStream(tmp_path / "missing.json", LARGE)
    with raises(SourceError, code="not-regular-file"):
        JsonStream(tmp_path, LARGE)


def test_keys_are_bounded(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({str(n): n for n in range(json_stream.MAX_KEYS + 1)}))
    with JsonStream(path, LARGE) as stream, pytest.raises(SourceError, match="more than 1,024 keys"):
        for _ in stream.members():
            stream.skip()


@same_file
@given(data=st.binary(max_size=60), window=st.integers(1, 20))
def test_any_bytes_end_in_a_value_or_an_error(data: bytes, window: int, tmp_path: Path) -> None:
    path = write(tmp_path, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "WINDOW_NBYTES", window)
        try:
            value = load(path)
        except SourceError:
            return
    assert value == json.loads(data.decode("utf-8"))


@same_file
@given(
    parts=st.lists(st.sampled_from([*'{}[],:"\\ \n1-e', "true", "null", '"a"', "\\u", "NaN", "\x00", "é"]), max_size=25)
)
def test_any_mix_of_json_ends_in_a_value_or_an_error(parts: list[str], tmp_path: Path) -> None:
    text = "".join(parts)
    try:
        value = load(write(tmp_path, text))
    except SourceError:
        return
    assert value == json.loads(text)
