"""Verify takes each tensor's type from the file: it plans no types of its own, and reports those that are there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest

import streamconv
from streamconv.cli import main
from tests import tiny
from tests.oracles import ggufs
from tests.tiny.files import Tensor, read_safetensors, write_safetensors

OUTTYPES = ("f32", "f16", "bf16", "q8_0")
DTYPES = {"F64": "<f8", "I64": "<i8", "F16": "<f2"}


def totals(path: Path) -> dict[str, tuple[int, int]]:
    """{type: (tensors, bytes)} as gguf-py reads them."""
    found: dict[str, tuple[int, int]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        n_tensors, nbytes = found.get(tensor.tensor_type.name, (0, 0))
        found[tensor.tensor_type.name] = n_tensors + 1, nbytes + int(tensor.n_bytes)
    return found


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_a_factor_that_the_source_types_cannot_hold(outtype: str, tmp_path: Path) -> None:
    """BF16 could not hold these scaled experts; the file is not BF16."""
    source = tiny.lfm2moe(tmp_path / "moe", config={"routed_scaling_factor": 2.5})
    streamconv.convert(source, tmp_path / "x.gguf", outtype=outtype)
    report = streamconv.verify(tmp_path / "x.gguf", source)
    assert report.verified
    assert report.outtype == outtype


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_the_report_has_the_types_of_the_file(outtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.llama(tmp_path / "llama", dtype="BF16")
    out = tmp_path / "x.gguf"
    streamconv.convert(source, out, outtype=outtype)
    assert main(["verify", str(out), "--source", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outtype"] == outtype
    assert {name: (t["n_tensors"], t["nbytes"]) for name, t in found["types"].items()} == totals(out)
    assert found["outputs"][0]["nbytes"] == out.stat().st_size


def test_a_file_that_does_not_say_its_type(tmp_path: Path) -> None:
    """Without general.file_type, or with a false one, the type of most bytes names the file."""
    source = tiny.llama(tmp_path / "llama")
    streamconv.convert(source, tmp_path / "x.gguf", outtype="q8_0")
    for value, name in ((None, "without.gguf"), (0, "false.gguf"), (4096, "unknown.gguf")):
        reader = gguf.GGUFReader(tmp_path / "x.gguf")
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue
            if field.name == "general.file_type":
                if value is not None:
                    writer.add_uint32(field.name, value)
                continue
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert streamconv.verify(tmp_path / name, source).outtype == "q8_0", name


@pytest.mark.parametrize("outtype", ["f32", "f16"])
def test_an_adapters_types_are_those_of_its_file(outtype: str, tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base)
    out = tmp_path / "x.gguf"
    streamconv.convert_adapter(adapter, base, out, outtype=outtype)
    report = streamconv.verify(out, adapter, base=base)
    assert report.outtype == outtype
    assert {name: (total.n_tensors, total.nbytes) for name, total in report.types.items()} == totals(out)


def with_dropped(source: Path, dtype: str, shape: tuple[int, ...] = (8,)) -> Path:
    """The checkpoint with a tensor more, first in its file, that no recipe writes."""
    path = source / "model.safetensors"
    values = np.linspace(1, 100, math.prod(shape)).astype(DTYPES[dtype])
    dropped = {"model.layers.0.self_attn.rotary_emb.inv_freq": Tensor(dtype, shape, values.tobytes())}
    write_safetensors(path, read_safetensors(path) | dropped)
    return source


@pytest.mark.parametrize("dtype", ["F64", "I64"])
def test_auto_does_not_ask_tensors_that_are_dropped(dtype: str, tmp_path: Path) -> None:
    plain = tiny.llama(tmp_path / "plain", dtype="BF16")
    source = with_dropped(tiny.llama(tmp_path / "llama", dtype="BF16"), dtype)
    report = streamconv.convert(source, tmp_path / "x.gguf", name="x")
    assert report.outtype == "bf16"
    streamconv.convert(plain, tmp_path / "y.gguf", name="x")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    assert streamconv.verify(tmp_path / "x.gguf", source).verified


def test_a_dropped_matrix_does_not_decide_auto(tmp_path: Path) -> None:
    source = with_dropped(tiny.llama(tmp_path / "llama", dtype="BF16"), "F16", (8, 4))
    assert streamconv.convert(source, tmp_path / "x.gguf").outtype == "bf16"
    assert {tensor.type for tensor in ggufs.read(tmp_path / "x.gguf").tensors.values()} == {"BF16", "F32"}


def test_auto_of_a_batch_and_of_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = with_dropped(tiny.llama(tmp_path / "llama", dtype="BF16"), "F64")
    (tmp_path / "jobs.toml").write_text(f'[[job]]\nsource = "{source}"\noutput = "{{name}}-{{outtype}}.gguf"\n')
    assert main(["batch", str(tmp_path / "jobs.toml"), "--quiet", "--json"]) == 0
    capsys.readouterr()
    assert (tmp_path / "llama-bf16.gguf").is_file()
    assert main(["inspect", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert main(["inspect", str(source)]) == 0
    assert "outtype bf16" in capsys.readouterr().out
