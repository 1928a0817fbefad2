"""Whole files, tensor by tensor as llama-quantize makes them: goldens of tests/tools/make_quantised_goldens.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

import streamconv
from streamconv.cli import main
from streamconv.errors import SourceError, UsageError, VerifyError
from tests import quantised_models, tiny
from tests.oracles import runtime
from tests.quantised_models import LOSSLESS, MODELS, Case
from tests.raising import raises
from tests.tools.make_quantised_goldens import GOLDENS, WHOLE, digest

BY_MODEL = {model: [case for case in quantised_models.cases() if case.model == model] for model in MODELS}


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    return dict(json.loads(GOLDENS.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a model, with the importance matrix for it beside."""
    folder = tmp_path_factory.mktemp("models")

    def made(model: str) -> Path:
        if not (folder / model).exists():
            MODELS[model](folder / model)
            streamconv.convert(folder / model, folder / f"{model}.gguf", outtype=LOSSLESS[model])
            tensors = gguf.GGUFReader(folder / f"{model}.gguf").tensors
            shapes = {tensor.name: tuple(map(int, tensor.shape))[::-1] for tensor in tensors}
            quantised_models.write_imatrix(folder / f"{model}.dat", shapes)
        return folder / model

    return made


def converted(case: Case, source: Path, out: Path) -> Path:
    imatrix = source.with_name(f"{source.name}.dat") if case.weighted else None
    streamconv.convert(source, out, outtype=case.outtype, imatrix=imatrix, force=True, **case.options)
    return out


@pytest.mark.parametrize("model", MODELS)
def test_the_bytes_of_llama_quantize(
    model: str, source: Callable[[str], Path], expected: dict[str, str], tmp_path: Path
) -> None:
    wrong = []
    for case in BY_MODEL[model]:
        made = digest(converted(case, source(model), tmp_path / "x.gguf"))
        if made != expected[str(case)]:
            wrong.append((str(case), made, expected[str(case)]))
    assert len(BY_MODEL[model]) > 35
    assert not wrong


@pytest.mark.parametrize("model", MODELS)
def test_verify_takes_the_types_from_the_file(model: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    chosen = [case for case in BY_MODEL[model] if case.options or case.outtype in ("q3_k_m", "q6_k", "iq4_xs")]
    assert len(chosen) > 8
    for case in chosen:
        out = converted(case, source(model), tmp_path / "x.gguf")
        imatrix = source(model).with_name(f"{model}.dat") if case.weighted else None
        report = streamconv.verify(out, source(model), imatrix=imatrix)
        assert report.verified and report.outtype == case.outtype, case


def test_a_file_of_an_importance_matrix_is_verified_with_it(source: Callable[[str], Path], tmp_path: Path) -> None:
    model = source("lfm2")
    out = converted(Case("lfm2", "q4_k_m", weighted=True), model, tmp_path / "x.gguf")
    with raises(UsageError, code="imatrix-missing") as caught:
        streamconv.verify(out, model)
    assert "lfm2.dat" in str(caught.value) and caught.value.exit_code == 2
    plain = converted(Case("lfm2", "q4_k_m"), model, tmp_path / "y.gguf")
    with raises(VerifyError, code="value-differs"):
        streamconv.verify(plain, model, imatrix=model.with_name("lfm2.dat"))
    bf16 = converted(Case("lfm2", "bf16", weighted=True), model, tmp_path / "z.gguf")
    assert streamconv.verify(bf16, model).verified  # nothing in it was weighed


def test_convert_verifies_what_it_quantised(source: Callable[[str], Path], tmp_path: Path) -> None:
    model = source("lfm2moe")
    imatrix = model.with_name("lfm2moe.dat")
    report = streamconv.convert(model, tmp_path / "x.gguf", outtype="iq4_nl", imatrix=imatrix, verify=True)
    assert report.verified
    keys = {field.name: field.contents() for field in gguf.GGUFReader(tmp_path / "x.gguf").fields.values()}
    assert keys["quantize.imatrix.file"] == "lfm2moe.dat"
    assert keys["general.quantization_version"] == 2


def test_llama_cpp_predicts_the_same_to_the_bit_as_with_llama_quantize_s_file(tmp_path: Path) -> None:
    source = quantised_models.smallest(tmp_path / "lfm2")
    for outtype in ("q4_k_m", "q4_k_s"):
        streamconv.convert(source, tmp_path / f"{outtype}.gguf", outtype=outtype)
    files = (WHOLE, tmp_path / "q4_k_m.gguf", tmp_path / "q4_k_s.gguf")
    theirs, ours, other = (runtime.next_token_logprobs(file, [1, 9, 77, 203, 5]).tobytes() for file in files)
    assert ours == theirs != other
    assert digest(WHOLE) == digest(tmp_path / "q4_k_m.gguf")
    assert streamconv.verify(WHOLE, source).outtype == "q4_k_m"


def test_a_merged_adapter_is_quantised_as_the_merged_model_is(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", hidden=256, ff=512, n_heads=4, dtype="BF16")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base)
    streamconv.convert(base, tmp_path / "q.gguf", outtype="q4_k_m", adapters=[adapter])
    assert streamconv.verify(tmp_path / "q.gguf", base, adapters=[adapter]).verified
    with raises(VerifyError, code="value-differs"):
        streamconv.verify(tmp_path / "q.gguf", base)


@pytest.mark.parametrize("outtype", ["q4_k_m", "q2_k"])
def test_any_number_of_threads_and_parts_gives_the_same_bytes(outtype: str, tmp_path: Path) -> None:
    source = tiny.lfm2(tmp_path / "lfm2", hidden=256, ff=512)
    one = tmp_path / "one.gguf"
    streamconv.convert(source, one, outtype=outtype, threads=1)
    streamconv.convert(source, tmp_path / "many.gguf", outtype=outtype, threads=4, io="positioned")
    assert one.read_bytes() == (tmp_path / "many.gguf").read_bytes()
    split = streamconv.SplitOptions(max_tensors=7)
    report = streamconv.convert(source, tmp_path / "parts.gguf", outtype=outtype, split=split)
    assert len(report.outputs) > 3
    assert streamconv.verify(report.outputs[0].path, source).outtype == outtype


@pytest.mark.parametrize("model", MODELS)
def test_a_gguf_file_as_the_source(
    model: str, source: Callable[[str], Path], expected: dict[str, str], tmp_path: Path
) -> None:
    src = source(model).with_name(f"{model}.gguf")
    chosen = [case for case in BY_MODEL[model] if case.options or case.weighted or case.outtype in ("q4_k_m", "q2_k")]
    assert len(chosen) > 20
    for case in chosen:
        imatrix = src.with_suffix(".dat") if case.weighted else None
        out = tmp_path / "x.gguf"
        streamconv.quantize(src, out, outtype=case.outtype, imatrix=imatrix, force=True, **case.options)
        assert digest(out) == expected[str(case)], case
    made = {field.name: field.contents() for field in gguf.GGUFReader(out).fields.values()}
    for field in gguf.GGUFReader(src).fields.values():
        if field.name not in ("general.file_type", "GGUF.kv_count"):
            assert made[field.name] == field.contents(), field.name


def test_a_split_set_as_the_source(source: Callable[[str], Path], expected: dict[str, str], tmp_path: Path) -> None:
    split = streamconv.SplitOptions(max_tensors=9)
    streamconv.convert(source("lfm2"), tmp_path / "s.gguf", outtype="bf16", split=split)
    first = min(tmp_path.glob("s-00001-of-*.gguf"))
    report = streamconv.quantize(first, tmp_path / "x.gguf", outtype="Q4_K", verify=True)
    assert report.verified and report.outtype == "q4_k_m"
    assert digest(tmp_path / "x.gguf") == expected["lfm2 q4_k_m"]
    assert "split.count" not in gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert streamconv.verify(tmp_path / "x.gguf", source("lfm2")).verified
    plan = streamconv.quantize(first.rename(tmp_path / first.name), outtype="q4_k_m", dry_run=True)
    assert plan.output.name == "s-Q4_K_M.gguf"
    parts = streamconv.quantize(first, tmp_path / "y.gguf", outtype="q4_k_m", split=split)
    assert len(parts.outputs) > 3
    assert streamconv.verify(parts.outputs[0].path, source("lfm2")).verified


@pytest.mark.parametrize("first", quantised_models.AGAIN)
def test_quantised_again(first: str, source: Callable[[str], Path], expected: dict[str, str], tmp_path: Path) -> None:
    src = tmp_path / "first.gguf"
    streamconv.convert(source("lfm2"), src, outtype=first)
    for other in quantised_models.AGAIN[first]:
        with raises(SourceError, code="requantize"):
            streamconv.quantize(src, tmp_path / "x.gguf", outtype=other)
        assert not (tmp_path / "x.gguf").exists()
        streamconv.quantize(src, tmp_path / f"{other}.gguf", outtype=other, allow_requantize=True, verify=True)
        assert digest(tmp_path / f"{other}.gguf") == expected[f"{first} again {other}"], other


def test_the_commands(source: Callable[[str], Path], expected: dict[str, str], tmp_path: Path) -> None:
    src = source("lfm2").with_name("lfm2.gguf")
    out = tmp_path / "x.gguf"
    assert main(["quantize", str(src), "-o", str(out), "--outtype", "Q5_K_S", "--quiet"]) == 0
    assert digest(out) == expected["lfm2 q5_k_s"]
    assert main(["quantize", str(src), "-o", str(out), "--quiet"]) == 2  # no outtype
    assert main(["quantize", str(src), "-o", str(out), "--outtype", "q4_k_m", "--quiet"]) == 5  # it is there
    said = [
        "--tensor-type",
        "Attn_V=q8_0",
        "--tensor-type",
        "ffn_(up|gate).*=iq4_xs",
        "--tensor-type",
        "blk\\.0\\.=f16",
    ]
    words = ["convert", str(source("lfm2")), "-o", str(out), "--outtype", "q4_k_m", *said, "--force", "--quiet"]
    assert main(words) == 0
    (name,) = [name for name in expected if name.startswith("lfm2 q4_k_m tensor_type")]
    assert digest(out) == expected[name]


def test_a_type_that_needs_importances_is_refused_without(source: Callable[[str], Path], tmp_path: Path) -> None:
    with raises(UsageError, code="imatrix-missing"):
        streamconv.convert(source("lfm2"), tmp_path / "x.gguf", outtype="q2_k_s")
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_go_together(source: Callable[[str], Path], tmp_path: Path) -> None:
    for options, code in (
        ({"outtype": "bf16", "leave_output_tensor": True}, "option-conflict"),
        ({"outtype": "q4_k_m", "tensor_type": "attn=q8_0"}, "argument-type"),
        ({"outtype": "q4_k_m", "tensor_type": ["attn"]}, "tensor-type-syntax"),
        ({"outtype": "q4_k_m", "tensor_type": ["attn_(=q8_0"]}, "tensor-type-syntax"),
        ({"outtype": "q4_k_m", "tensor_type": ["blk.[[:digit:]]=q8_0"]}, "tensor-type-syntax"),
        ({"outtype": "q4_k_m", "output_tensor_type": "q9_9"}, "type-unknown"),
        ({"outtype": "q4"}, "word-unknown"),
    ):
        with raises(UsageError, code=code):
            streamconv.convert(source("lfm2"), tmp_path / "x.gguf", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
