"""What is quantised beside all else that a run does: batches, dry runs, interruptions, Modelfiles, and bad numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from streamconv.cli import main
from streamconv.errors import Interrupted, SourceError, UsageError, VerifyError
from streamconv.report import Report
from tests import block_rows, quantised_models, tiny
from tests.oracles import runtime
from tests.raising import raises
from tests.tools import gguf_bytes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.lfm2(tmp_path_factory.mktemp("source") / "lfm2", hidden=256, ff=512)


def shapes(source: Path) -> dict[str, tuple[int, ...]]:
    plan = streamconv.convert(source, outtype="f32", dry_run=True).plan
    assert plan is not None
    return {row.target: row.shape for row in plan}


def test_a_list_of_outtypes_is_a_job_of_each(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantised_models.write_imatrix(tmp_path / "m.dat", shapes(source))
    (tmp_path / "jobs.toml").write_text(
        f'[defaults]\nverify = true\n[[job]]\nsource = "{source}"\noutput = "out/{{name}}-{{outtype}}.gguf"\n'
        'outtype = ["Q4_K", "q6_k", "bf16"]\nimatrix = "m.dat"\ntensor_type = ["attn_v=q8_0"]\n'
    )
    assert main(["batch", str(tmp_path / "jobs.toml"), "--quiet", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(line["report"]["outtype"] for line in lines) == ["bf16", "q4_k_m", "q6_k"]
    assert all(line["report"]["verified"] for line in lines)
    assert "Q8_0" in next(line for line in lines if line["report"]["outtype"] == "q6_k")["report"]["types"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"lfm2-{n}.gguf" for n in ("q4_k_m", "q6_k", "bf16")
    }
    assert main(["batch", str(tmp_path / "jobs.toml"), "--quiet", "--json"]) == 0
    assert {json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()} == {"skipped"}
    (tmp_path / "m.dat").write_bytes((tmp_path / "m.dat").read_bytes())  # another time: no longer up to date
    assert main(["batch", str(tmp_path / "jobs.toml"), "--quiet", "--json"]) == 8


def stopped(source: Path, out: Path, **options: str) -> None:
    with pytest.raises(Interrupted):
        streamconv.convert(source, out, cancel=lambda: True, **options)  # type: ignore[arg-type]


def test_a_run_goes_on_only_with_the_same_types_and_importances(source: Path, tmp_path: Path) -> None:
    imatrix = quantised_models.write_imatrix(tmp_path / "m.dat", shapes(source))
    whole = streamconv.convert(source, tmp_path / "whole.gguf", outtype="q4_k_m", imatrix=imatrix)
    out = tmp_path / "x.gguf"
    stopped(source, out, outtype="q4_k_m", imatrix=str(imatrix))
    for options in ({"outtype": "q4_k_m"}, {"outtype": "q4_k_s", "imatrix": imatrix}):
        with raises(SourceError, code="resume-mismatch"):
            streamconv.convert(source, out, **options)  # type: ignore[arg-type]
    imatrix.write_bytes(imatrix.read_bytes())  # other bytes, perhaps: another time
    with raises(SourceError, code="resume-mismatch"):
        streamconv.convert(source, out, outtype="q4_k_m", imatrix=imatrix)
    report = streamconv.convert(source, out, outtype="q4_k_m", imatrix=imatrix, restart=True)
    assert report.nbytes == whole.nbytes
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    stopped(source, tmp_path / "y.gguf", outtype="q4_k_m", imatrix=str(imatrix))
    streamconv.convert(source, tmp_path / "y.gguf", outtype="q4_k_m", imatrix=imatrix)
    assert (tmp_path / "y.gguf").read_bytes() == out.read_bytes()


def test_a_dry_run_says_each_type(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = streamconv.convert(source, outtype="q4_k_m", dry_run=True)
    assert planned.plan is not None and planned.output.name.endswith("Q4_K_M.gguf")
    assert list(tmp_path.iterdir()) == []
    made = streamconv.convert(source, outtype="q4_k_m", modelfile=True)
    assert made.nbytes == planned.nbytes and made.types == planned.types
    modelfile = (tmp_path / made.output.name.replace(".gguf", ".Modelfile")).read_text()
    assert f"FROM ./{made.output.name}" in modelfile


def test_numpy_gives_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imatrix = quantised_models.write_imatrix(tmp_path / "m.dat", shapes(source))

    def made(name: str) -> bytes:
        streamconv.convert(source, tmp_path / name, outtype="q4_k_m", imatrix=imatrix)
        return (tmp_path / name).read_bytes()

    compiled = made("c.gguf")
    monkeypatch.setenv("STREAMCONV_KERNELS", "0")
    assert made("numpy.gguf") == compiled


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e9])
@pytest.mark.parametrize("outtype", ["q4_k_m", "q5_0", "iq4_xs"])
def test_a_number_that_no_block_holds_is_named_and_nothing_is_left(value: float, outtype: str, tmp_path: Path) -> None:
    source = tiny.lfm2(tmp_path / "src", hidden=256, ff=512)
    tensors = tiny.tensors_of(source)
    name = "model.layers.1.feed_forward.w1.weight"
    numbers = tensors[name].float32().copy()
    numbers[3, 77] = value
    tiny.write_safetensors(source / "model.safetensors", tensors | {name: tiny.Tensor.of(numbers, "BF16")})
    with raises(SourceError, code="value-range") as caught:
        streamconv.convert(source, tmp_path / "x.gguf", outtype=outtype)
    assert caught.value.tensor == "blk.1.ffn_gate.weight"
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_an_adapter_is_not_quantised(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base)
    with raises(UsageError, code="word-unknown"):
        streamconv.convert_adapter(adapter, base, tmp_path / "x.gguf", outtype="q4_k_m")
    words = ["lora", str(adapter), "--base", str(base), "-o", str(tmp_path / "x.gguf"), "--outtype", "q4_k_m"]
    assert main(words) == 2
    assert not (tmp_path / "x.gguf").exists()


def test_importances_of_another_model_are_refused(source: Path, tmp_path: Path) -> None:
    other = tiny.llama(tmp_path / "other", hidden=64)
    imatrix = quantised_models.write_imatrix(tmp_path / "m.dat", shapes(other))
    with pytest.raises(SourceError) as caught:
        streamconv.convert(source, tmp_path / "x.gguf", outtype="q4_k_m", imatrix=imatrix)
    assert caught.value.code in ("imatrix-size", "imatrix-no-match")
    with raises(SourceError, code="cannot-open"):
        streamconv.convert(source, tmp_path / "x.gguf", outtype="q4_k_m", imatrix=tmp_path / "none.dat")
    assert not (tmp_path / "x.gguf").exists()


def test_an_option_that_changes_nothing_is_a_warning(source: Path, tmp_path: Path) -> None:
    def warned(**options: Any) -> list[str]:
        report = streamconv.convert(source, tmp_path / "x.gguf", dry_run=True, **options)
        return [f"{one.code} {one.message}" for one in report.warnings if one.code.startswith("t")]

    assert warned(outtype="q4_k_m", tensor_type=["ATTN_V=q8_0", "attn_k=f16"]) == []
    for outtype in ("q4_k_m", "q8_0", "bf16"):
        for pattern in ("atn_v", "_norm"):  # none has it; those that have it stay F32
            (said,) = warned(outtype=outtype, tensor_type=[f"{pattern}=q5_0", "attn_k=q5_1"])
            assert said.startswith("tensor-type-unused ") and pattern in said
    (said,) = warned(outtype="q4_k_m", tensor_type=["attn_v=q4_0", "blk.2.attn_v=q8_0"])  # the first decides
    assert "blk.2.attn_v" in said
    report = streamconv.convert(source, outtype="q4_k_m", leave_output_tensor=True, dry_run=True)  # a tied model
    assert [one.code for one in report.warnings] == ["leave-output-unused"]
    untied = tiny.llama(tmp_path / "untied", hidden=256, ff=256, n_layers=1, tied=False)
    assert streamconv.convert(untied, outtype="q4_k_m", leave_output_tensor=True, dry_run=True).warnings == []


def test_types_that_rows_do_not_divide_into_are_a_warning(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "llama", hidden=96, ff=256, n_layers=2)
    lossless = streamconv.convert(source, tmp_path / "f.gguf", outtype="f32")
    assert lossless.warnings == []
    for report in (
        streamconv.convert(source, tmp_path / "x.gguf", outtype="q4_k_m", tensor_type=["attn_q=q6_k"]),
        streamconv.quantize(lossless.output, tmp_path / "y.gguf", outtype="q4_k_m", tensor_type=["attn_q=q6_k"]),
    ):
        fallen, unused = report.warnings
        assert (fallen.code, unused.code) == ("type-fallback", "tensor-type-unused")
        # All but ffn_down's, whose rows have 256 elements, and the embedding's, for which Q8_0 is a rule.
        assert fallen.message.startswith("12 of 20 ") and "Q4_K and Q6_K" in fallen.message
    assert streamconv.quantize(lossless.output, tmp_path / "z.gguf", outtype="q8_0").warnings == []
    narrow = tiny.llama(tmp_path / "narrow", hidden=96, ff=72, n_layers=2)
    (fallen,) = streamconv.convert(narrow, outtype="q8_0", dry_run=True).warnings
    assert (fallen.code, fallen.message[:8]) == ("type-fallback", "2 of 20 ")  # ffn_down
    for outtype in ("f32", "f16", "bf16"):
        assert streamconv.convert(narrow, outtype=outtype, dry_run=True).warnings == []


def test_what_has_no_numbers_stays_or_is_refused(tmp_path: Path) -> None:
    kept, integers = np.arange(20, dtype=np.int32).reshape(4, 5), gguf_bytes.I32
    rows = block_rows.rows("gaussian", (3, 256), 1)

    def written(name: str) -> Path:
        infos = [
            gguf_bytes.tensor(name, kept.shape[::-1], integers, 0),
            gguf_bytes.tensor("blk.0.attn_q.weight", rows.shape[::-1], gguf_bytes.F32, 96),
        ]
        keys = [gguf_bytes.key("general.architecture", gguf_bytes.STRING, gguf_bytes.text("llama"))]
        data = kept.tobytes() + bytes(16) + rows.tobytes()
        (tmp_path / "in.gguf").write_bytes(gguf_bytes.gguf(keys, infos, data))
        return tmp_path / "in.gguf"

    with raises(SourceError, code="type-unreadable"):
        streamconv.quantize(written("blk.0.ids.weight"), tmp_path / "x.gguf", outtype="q4_k_m", allow_requantize=True)
    assert not (tmp_path / "x.gguf").exists()
    source = written("blk.0.ffn_gate_tid2eid.weight")
    made = streamconv.quantize(source, tmp_path / "x.gguf", outtype="q4_k_m", verify=True)
    assert set(made.types) == {"I32", "Q4_K"} and streamconv.verify(made.output, source).verified
    kept[3, 2] += 1
    with raises(VerifyError, code="value-differs") as caught:
        streamconv.verify(made.output, written("blk.0.ffn_gate_tid2eid.weight"))
    assert "row 3, column 2" in str(caught.value)


@pytest.mark.parametrize(
    ("outtype", "way_out"),
    [("f16", "streamconv convert"), ("IQ2_XS", "llama-quantize"), ("Q2_0", "llama-quantize"), (None, "q4_k_m")],
)
def test_an_outtype_of_another_program_says_which(
    outtype: str | None, way_out: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lossless = streamconv.convert(source, tmp_path / "f.gguf").output
    words = ["quantize", str(lossless), "-o", str(tmp_path / "x.gguf"), "--json"]
    assert main([*words, *(["--outtype", outtype] if outtype else [])]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "word-unknown" and way_out in error["hint"]


def distance(source: Path, folder: Path, outtype: str) -> float:
    """KL of the next token's distribution between the lossless file and one of `outtype`."""
    found = []
    for name in ("bf16", outtype):
        report: Report = streamconv.convert(source, folder / f"{name}.gguf", outtype=name, force=True)
        found.append(np.asarray(runtime.next_token_logprobs(report.output, [1, 9, 77, 203, 5])))
    return runtime.kl(found[0], found[1])


def test_llama_cpp_runs_what_was_quantised(source: Path, tmp_path: Path) -> None:
    far = {outtype: distance(source, tmp_path, outtype) for outtype in ("q8_0", "q6_k", "q4_k_m", "q2_k")}
    assert 0 < far["q6_k"] < far["q4_k_m"] < far["q2_k"] < np.inf
    assert far["q8_0"] < far["q4_k_m"]
