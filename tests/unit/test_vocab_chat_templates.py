"""Chat templates: which file wins, names as keys, and text that is carried as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamconv.errors import SourceError
from streamconv.metadata.vocab.chat_templates import MAX_NBYTES, chat_template_keys
from streamconv.metadata.vocab.companions import Companions
from streamconv.metadata.vocab.files import TokenizerFiles
from tests.raising import raises
from tests.vocab_keys import unpacked

EVIL = "{% for x in ().__class__.__base__.__subclasses__() %}{{ x('rm -rf /') }}{% endfor %}\r\n\x00 ü 🚀"


def templates(directory: Path, in_config: Any = None) -> tuple[dict[str, Any], list[str]]:
    beside = Companions(TokenizerFiles(directory), {}, {"chat_template": in_config}, {}, {}, directory)
    keys, warnings = chat_template_keys(beside)
    return {entry.key: unpacked(entry.value) for entry in keys}, [warning.code for warning in warnings]


@pytest.mark.parametrize(("model_type", "codes"), [("mistral", ["chat-template-missing"]), ("llama", [])])
def test_mistral_without_a_template_is_warned_of(model_type: str, codes: list[str], tmp_path: Path) -> None:
    beside = Companions(TokenizerFiles(tmp_path), {"model_type": model_type}, {}, {}, {}, tmp_path)
    keys, warnings = chat_template_keys(beside)
    assert (keys, [warning.code for warning in warnings]) == ([], codes)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert chat_template_keys(beside)[1] == []


def test_none(tmp_path: Path) -> None:
    assert templates(tmp_path) == ({}, [])
    assert templates(tmp_path, "") == ({}, [])
    assert templates(tmp_path, []) == ({}, [])


def test_text_is_carried_not_run(tmp_path: Path) -> None:
    assert templates(tmp_path, EVIL) == ({"tokenizer.chat_template": EVIL}, [])


def test_the_config_wins_with_a_warning_where_the_file_differs(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file")
    assert templates(tmp_path, "config") == ({"tokenizer.chat_template": "config"}, ["chat-template-twice"])
    assert templates(tmp_path, "file") == ({"tokenizer.chat_template": "file"}, [])
    assert templates(tmp_path) == ({"tokenizer.chat_template": "file"}, [])


def test_the_newer_file_wins(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert templates(tmp_path) == ({"tokenizer.chat_template": "old"}, [])
    (tmp_path / "chat_template.jinja").write_text("new")
    assert templates(tmp_path) == ({"tokenizer.chat_template": "new"}, [])


def test_names(tmp_path: Path) -> None:
    value = [{"name": n, "template": n.upper()} for n in ("tool use", "default", "rag-2", "")]
    keys, _ = templates(tmp_path, value)
    assert keys == {
        "tokenizer.chat_template": "DEFAULT",
        "tokenizer.chat_template.rag_2": "RAG-2",
        "tokenizer.chat_template.tool_use": "TOOL USE",
        "tokenizer.chat_templates": ["rag_2", "tool_use"],
    }


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3, "chat-template-malformed"),
        ({"default": "x"}, "chat-template-malformed"),
        ([{"name": "x"}], "chat-template-malformed"),
        ([{"name": 1, "template": "x"}], "chat-template-malformed"),
        ([3], "chat-template-malformed"),
        ([{"name": n, "template": "x"} for n in ("a-b", "a.b")], "chat-template-names"),
        ([{"name": "n" * 70_000, "template": "x"}], "chat-template-names"),
        ("\ud800", "not-utf8"),
        ("x" * (MAX_NBYTES + 1), "chat-template-size"),
    ],
)
def test_hostile_values(value: Any, problem: str, tmp_path: Path) -> None:
    with raises(SourceError, code=problem):
        templates(tmp_path, value)


def test_hostile_files(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"ab\xff")
    with pytest.raises(SourceError, match="not UTF-8 at byte 2"):
        templates(tmp_path)
    path.write_bytes(b"x" * (MAX_NBYTES + 1))
    with pytest.raises(SourceError, match="larger than the limit of 1,048,576"):
        templates(tmp_path)
    path.unlink()
    path.mkdir()
    with raises(SourceError, code="not-regular-file"):
        templates(tmp_path)


def test_a_name_as_long_as_a_key_can_be(tmp_path: Path) -> None:
    name = "n" * (65_535 - len("tokenizer.chat_template."))
    keys, _ = templates(tmp_path, [{"name": name, "template": "x"}])
    assert keys[f"tokenizer.chat_template.{name}"] == "x"
    with raises(SourceError, code="chat-template-names"):
        templates(tmp_path, [{"name": f"{name}n", "template": "x"}])
