"""docs/json.md against what the commands print: every field is there, and described, with its types."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from streamconv.cli import main
from tests import tiny

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
ROW = re.compile(r"\| `([^`]+)` \| ([^|]+) \| [^|]+ \|")
TYPES = {
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", list: "array", dict: "object",
}  # fmt: skip

Fields = dict[str, set[str]]
# Objects whose keys are data; what is below them has * for the key, or is left alone where anything may stand there.
MAPS = {"types", "metadata_types", "calls", "options", "terms"}
OPAQUE = {"metadata"}


def described() -> dict[str, Fields]:
    """Fields with their types, by the page's headings."""
    sections: dict[str, Fields] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            fields = sections.setdefault(line[3:], {})
        elif match := ROW.fullmatch(line):
            assert match[1] not in fields, f"{match[1]} twice"
            fields[match[1]] = set(match[2].replace(" or ", ", ").split(", "))
    return sections


def fields_of(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, type) of everything in `value`, as metadata.*, outputs[].nbytes."""
    if path:
        yield path, TYPES[type(value)]
    name = path.rpartition(".")[2]
    if isinstance(value, dict) and name not in OPAQUE:
        for key, item in value.items():
            step = "*" if name in MAPS else key
            yield from fields_of(item, f"{path}.{step}" if path else step)
    elif isinstance(value, list):
        for item in value:
            yield from fields_of(item, f"{path}[]")


def union(*values: dict[str, Any]) -> Fields:
    found: Fields = defaultdict(set)
    for value in values:
        for path, kind in fields_of(value):
            found[path].add(kind)
    return {path: kinds for path, kinds in found.items() if not path.endswith("[]") or kinds != {"object"}}


def say(*words: str | Path) -> list[dict[str, Any]]:
    """The JSON lines that a call prints."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
        main([str(word) for word in words])
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fields]:
    """What calls of all kinds print, by the page's headings."""
    folder = tmp_path_factory.mktemp("json")
    source = tiny.llama(folder / "src")
    adapter = tiny.peft_adapter(folder / "adapter", source)
    other = tiny.peft_adapter(folder / "other", source, dora=True)
    out, lora = folder / "m.gguf", folder / "a.gguf"
    (folder / "partner").mkdir()
    broken = tiny.llama(folder / "broken")
    (broken / "tokenizer.json").unlink()
    tensors = tiny.tensors_of(broken)
    tensors["model.norm.weight"] = tiny.Tensor.of(tensors["model.norm.weight"].float32() * float("nan"), "F32")
    tiny.write_safetensors(broken / "model.safetensors", tensors)
    nan = tiny.llama(folder / "nan")
    tiny.write_safetensors(nan / "model.safetensors", tensors)
    scaled = tiny.lfm2moe(folder / "scaled", config={"routed_scaling_factor": 2.5})
    runs = [
        *say("convert", source, "-o", out, "--json", "--sha256", "--profile", folder / "profile.json"),
        *say("convert", source, "--dry-run", "--json", "--adapter", adapter),
        *say("convert", nan, "-o", folder / "nan.gguf", "--json", "--verify"),
        *say("lora", adapter, "--base", source, "-o", lora, "--json"),
        *say("quantize", out, "-o", folder / "quantised.gguf", "--outtype", "q8_0", "--json"),
        *say("verify", out, "--source", source, "--json"),
        *say("verify", out, "--source", source, "--error", "--json"),
    ]
    errors = [
        *say("convert", source, "-o", out, "--json"),
        *say("verify", out, "--source", nan, "--json"),
        *say("convert", "--json"),
        *say("lora", other, "--base", source, "-o", lora, "--json"),
    ]
    shown = [*say("inspect", out, "--json"), *say("inspect", broken, "--json"), *say("inspect", adapter, "--json")]
    torn = folder / "torn.gguf"
    torn.write_bytes(out.read_bytes()[:-5000])
    shown += say("inspect", torn, "--json")
    jobs = folder / "jobs.toml"
    jobs.write_text(
        '[[job]]\nsource = "src"\noutput = "x.gguf"\nadapter = "adapter"\n'
        '[[job]]\nsource = "none"\noutput = "y.gguf"\nmax_memory = "200M"\nsplit_max_size = "1G"\n'
        '[[job]]\ncommand = "lora"\nsource = "adapter"\nbase = "src"\noutput = "z.gguf"\n'
    )
    planned = say("batch", jobs, "--dry-run", "--json")
    finished = say("batch", jobs, "--json")
    for line in finished:
        for part in ("report", "error"):
            if part in line:
                line[part] = {}
    return {
        "convert, lora, quantize, verify": union(*runs),
        "Profiles": union(json.loads((folder / "profile.json").read_text())),
        "Errors": union(*errors),
        "inspect": union(*shown),
        "batch: a line for each job that ends": union(*finished),
        "batch --dry-run": union(*planned),
        "quants": union(*say("quants", source, "--json"), *say("quants", scaled, "--json")),
        "architectures": union(*say("architectures", "--json")),
        "OUT.manifest.json": union(json.loads((folder / "m.gguf.manifest.json").read_text())),
    }


def test_every_field_is_described_with_its_types(said: dict[str, Fields]) -> None:
    page = described()
    assert page.keys() == said.keys()
    for heading, fields in said.items():
        described_here = page[heading]
        assert fields.keys() - described_here.keys() == set(), heading
        assert described_here.keys() - fields.keys() == set(), heading
        for path, kinds in fields.items():
            assert kinds <= described_here[path], f"{heading}: {path} is {kinds}, the page says {described_here[path]}"
