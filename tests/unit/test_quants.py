"""`quants`: the sizes that it promises are those of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import streamconv
from streamconv.cli import main
from streamconv.errors import SourceError
from streamconv.ggml.mixes import MIXES
from streamconv.ggml.outtypes import OUTTYPES
from tests import tiny
from tests.raising import raises


@pytest.mark.parametrize("adapted", [False, True])
def test_sizes_are_those_of_the_files(adapted: bool, tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "llama", hidden=256, ff=512)
    adapters = [tiny.peft_adapter(tmp_path / "adapter", source)] if adapted else []
    found = streamconv.quants(source, adapters=adapters)
    assert [one.outtype for one in found.quants] == list(OUTTYPES)
    for one in found.quants:
        if one.outtype == "q2_k_s":  # which needs an importance matrix
            continue
        report = streamconv.convert(source, tmp_path / "x.gguf", outtype=one.outtype, adapters=adapters, force=True)
        assert one.nbytes == (tmp_path / "x.gguf").stat().st_size == report.nbytes, one.outtype
        assert one.types == {name: total.n_tensors for name, total in report.types.items()}
        bits = 8 * sum(total.nbytes for total in report.types.values()) / report.n_parameters
        assert one.bits_per_weight == pytest.approx(bits)
    assert found.n_parameters == report.n_parameters


def test_sizes_of_a_gguf_file_are_those_of_quantize(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "llama", hidden=96, ff=512)
    parts = streamconv.convert(source, tmp_path / "f.gguf", outtype="f32", split=streamconv.SplitOptions(max_tensors=7))
    whole = streamconv.quantize(parts.outputs[0].path, tmp_path / "q8_0.gguf", outtype="q8_0")
    found = streamconv.quants(parts.outputs[0].path)
    assert [one.outtype for one in found.quants] == [name for name in OUTTYPES if name in MIXES]
    for one in found.quants:
        if one.outtype in ("q8_0", "q5_k_m", "iq4_xs"):
            made = streamconv.quantize(parts.outputs[0].path, tmp_path / "x.gguf", outtype=one.outtype, force=True)
            assert one.nbytes == made.nbytes, one.outtype
            assert one.types == {name: total.n_tensors for name, total in made.types.items()}
    again = {one.outtype: one for one in streamconv.quants(whole.output).quants}
    assert again["q8_0"].nbytes == whole.nbytes and again["q8_0"].problem is None
    assert "--allow-requantize" in (again["q4_k_m"].problem or "")
    adapter = tiny.peft_adapter(tmp_path / "adapter", source)
    made = streamconv.convert_adapter(adapter, source, tmp_path / "adapter.gguf")
    with raises(SourceError, code="not-a-model"):
        streamconv.quants(made.output)


def test_an_outtype_that_would_be_refused_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.lfm2moe(tmp_path / "moe", hidden=256, config={"routed_scaling_factor": 2.5})
    assert main(["quants", str(source), "--json"]) == 0
    rows = {row["outtype"]: row for row in json.loads(capsys.readouterr().out)["quants"]}
    assert rows["bf16"]["nbytes"] == 0 and "2.5" in rows["bf16"]["problem"]
    assert rows["q4_k_m"]["problem"] is None and rows["q4_k_m"]["nbytes"] > 0
    assert main(["quants", str(source)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(OUTTYPES) + 2 and max(map(len, lines)) <= 120


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.llama(tmp_path / "llama")
    shard = source / "model.safetensors"
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    with shard.open("r+b") as file:  # the weights become a hole
        nbytes = shard.stat().st_size
        file.truncate(header)
        file.truncate(nbytes)
    assert streamconv.quants(source).quants[0].nbytes > 0
