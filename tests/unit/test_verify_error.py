"""`verify --error`: the relative RMS error of each tensor, against numbers that this test computes from both files."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

import streamconv
from streamconv import errors
from streamconv.check import errors as measuring
from streamconv.cli import main
from streamconv.ggml.blocks import BLOCK_TYPES
from streamconv.ggml.encode import best_kernel
from streamconv.ggml.rows import Encode
from streamconv.gguf.reader import GGUFFile
from streamconv.lazy.leaves import Resident
from streamconv.lazy.node import Workspace, peak_nbytes
from streamconv.lazy.scratch import Scratch
from streamconv.report import RelativeErrors
from tests import tiny
from tests.tiny.files import read_safetensors, write_safetensors

Numbers = dict[str, NDArray[np.float64]]


def numbers(path: Path) -> Numbers:
    """The tensors of a GGUF file in float64, as gguf-py reads and decodes them."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found[tensor.name] = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float64)
    return found


def relative(ours: list[NDArray[np.float64]], theirs: list[NDArray[np.float64]]) -> float:
    error = sum(float(((a - b) ** 2).sum()) for a, b in zip(ours, theirs, strict=True))
    return math.sqrt(error / sum(float((b**2).sum()) for b in theirs))


def check(found: RelativeErrors | None, made: Numbers, exact: Numbers) -> None:
    assert found is not None
    assert {one.name for one in found.tensors} == made.keys() == exact.keys()
    for one in found.tensors:
        assert one.relative_rms == pytest.approx(relative([made[one.name]], [exact[one.name]]), rel=1e-6, abs=0)
    assert found.relative_rms == pytest.approx(relative([made[n] for n in made], [exact[n] for n in made]), rel=1e-6)
    errors_in_order = [one.relative_rms or 0.0 for one in found.tensors]
    assert errors_in_order == sorted(errors_in_order, reverse=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.lfm2(tmp_path_factory.mktemp("lfm2") / "model", hidden=256, ff=512, n_layers=6, attention=(2, 4))


@pytest.fixture(scope="module")
def exact(source: Path) -> Path:
    out = source.parent / "exact.gguf"
    streamconv.convert(source, out, outtype="f32")
    return out


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0", "q6_k", "q4_k_m", "iq4_xs", "q2_k", "q4_0", "tq2_0"])
def test_errors_are_those_of_the_decoded_numbers(outtype: str, source: Path, exact: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    streamconv.convert(source, out, outtype=outtype)
    report = streamconv.verify(out, source, error=True)
    check(report.errors, numbers(out), numbers(exact))
    assert report.verified is None  # nothing was compared
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert report.errors is not None
    assert {one.name: one.type for one in report.errors.tensors} == types
    assert report.types.keys() == set(types.values())
    n_bits = 8 * sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(out).tensors)
    assert report.errors.bits_per_weight == pytest.approx(n_bits / report.n_parameters)


def test_threads_and_slabs_change_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.gguf"
    streamconv.convert(source, out, outtype="q4_k_m")
    expected = streamconv.verify(out, source, error=True, threads=1).errors
    monkeypatch.setattr("streamconv.engine.layout.SLAB_NBYTES", 1 << 13)
    monkeypatch.setattr("streamconv.check.errors.PIECE", 1 << 9)
    for threads in (1, 3):
        found = streamconv.verify(out, source, error=True, threads=threads).errors
        assert found is not None and expected is not None
        for one, other in zip(found.tensors, expected.tensors, strict=True):
            assert (one.name, one.relative_rms) == (other.name, pytest.approx(other.relative_rms, rel=1e-8))


def test_files_that_cannot_be_made_here_are_measured(source: Path, exact: Path, tmp_path: Path) -> None:
    """Another tool's: random IQ3_S and MXFP4, other bytes than ours, and an importance matrix that nobody has."""
    rng = np.random.default_rng(1)
    out = tmp_path / "x.gguf"
    reader, writer = gguf.GGUFReader(exact), gguf.GGUFWriter(out, "lfm2")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    writer.add_string("quantize.imatrix.file", "theirs.dat")
    types = [gguf.GGMLQuantizationType.IQ3_S, gguf.GGMLQuantizationType.MXFP4, gguf.GGMLQuantizationType.Q5_K]
    for number, tensor in enumerate(reader.tensors):
        if len(tensor.shape) != 2 or tensor.shape[0] % 256:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        type_ = types[number % 3]
        n_elements, nbytes = gguf.GGML_QUANT_SIZES[type_]
        shape = (int(tensor.shape[1]), int(tensor.shape[0]) // n_elements * nbytes)
        writer.add_tensor(tensor.name, rng.integers(0, 60, shape, dtype=np.uint8), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check(streamconv.verify(out, source, error=True).errors, numbers(out), numbers(exact))


@pytest.mark.parametrize("outtype", ["bf16", "q8_0"])
def test_a_gguf_file_as_the_source(outtype: str, source: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "first.gguf", tmp_path / "x.gguf"
    streamconv.convert(source, first, outtype=outtype)
    streamconv.quantize(first, out, outtype="q4_k_m", allow_requantize=True)
    check(streamconv.verify(out, first, error=True).errors, numbers(out), numbers(first))
    assert streamconv.verify(out, first).verified
    itself = streamconv.verify(first, first, error=True).errors
    assert itself is not None and itself.relative_rms == 0


def test_a_gguf_source_is_compared_with(source: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "first.gguf", tmp_path / "x.gguf"
    streamconv.convert(source, first, outtype="bf16")
    streamconv.quantize(first, out, outtype="q4_k_m")
    data = bytearray(out.read_bytes())
    data[-1000] ^= 0x40
    out.write_bytes(data)
    with pytest.raises(errors.VerifyError) as caught:
        streamconv.verify(out, first)
    assert caught.value.code == "value-differs"


def test_splits_and_merges(source: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", source, targets=("q_proj", "v_proj", "w1", "w2"))
    merged, exact = tmp_path / "merged.gguf", tmp_path / "exact.gguf"
    split = streamconv.SplitOptions(max_tensors=9)
    report = streamconv.convert(source, merged, adapters=[adapter], outtype="q4_k_m", split=split)
    streamconv.convert(source, exact, adapters=[adapter], outtype="f32")
    made: Numbers = {}
    for output in report.outputs:
        made |= numbers(output.path)
    first = report.outputs[0].path
    check(streamconv.verify(first, source, adapters=[adapter], error=True).errors, made, numbers(exact))
    without = streamconv.verify(first, source, error=True).errors
    with_it = streamconv.verify(first, source, adapters=[adapter], error=True).errors
    assert with_it is not None and without is not None
    assert (with_it.relative_rms or 0) < (without.relative_rms or 0)


def test_an_adapter_of_its_own(source: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", source, targets=("q_proj", "v_proj", "w1", "w2"))
    streamconv.convert_adapter(adapter, source, tmp_path / "f32.gguf", outtype="f32")
    streamconv.convert_adapter(adapter, source, tmp_path / "f16.gguf", outtype="f16")
    found = streamconv.verify(tmp_path / "f16.gguf", adapter, base=source, error=True).errors
    check(found, numbers(tmp_path / "f16.gguf"), numbers(tmp_path / "f32.gguf"))


def test_what_is_not_finite_has_no_error(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "llama", dtype="BF16")
    path = source / "model.safetensors"
    tensors = read_safetensors(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    data = bytearray(tensors[name].data)
    data[0:2] = b"\xc0\x7f"  # a NaN
    write_safetensors(path, tensors | {name: tensors[name].__class__("BF16", tensors[name].shape, bytes(data))})
    streamconv.convert(source, tmp_path / "x.gguf", outtype="f16")
    report = streamconv.verify(tmp_path / "x.gguf", source, error=True)
    assert report.errors is not None and report.errors.relative_rms is None
    assert report.errors.tensors[0].name == "blk.0.attn_q.weight"
    assert report.errors.tensors[0].relative_rms is None
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["errors"]["relative_rms"] is None


def test_other_tensors_are_no_error_but_a_mismatch(source: Path, tmp_path: Path) -> None:
    other = tiny.lfm2(tmp_path / "other", hidden=256, ff=512, n_layers=5, attention=(2, 4))
    streamconv.convert(other, tmp_path / "x.gguf", outtype="q4_k_m")
    with pytest.raises(errors.VerifyError) as caught:
        streamconv.verify(tmp_path / "x.gguf", source, error=True)
    assert caught.value.code == "tensors-differ"


def test_memory_stays_within_the_proof(source: Path, tmp_path: Path) -> None:
    streamconv.convert(source, tmp_path / "x.gguf", outtype="q4_k_m")
    report = streamconv.verify(tmp_path / "x.gguf", source, error=True)
    assert report.memory is not None
    assert sum(report.memory["terms"].values()) == report.memory["projected"]
    with pytest.raises(errors.BudgetError):
        streamconv.verify(tmp_path / "x.gguf", source, error=True, max_memory="8MiB")


@pytest.mark.parametrize("shape", [(300, 768), (1, 1 << 20), (5, 327_680)])
@pytest.mark.parametrize("type_", [gguf.GGMLQuantizationType.BF16, *BLOCK_TYPES])
def test_measuring_takes_what_it_declares(
    shape: tuple[int, int], type_: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    made = Encode(Resident(tiny.noise("x", shape, 1.0)), "x", type_)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "x")
    writer.add_tensor("x", np.full((shape[0], made.spec.row_nbytes), 7, np.uint8), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        pair = measuring._pair(made, file, file.tensors["x"])  # which decodes once, with what is imported for that
        scratch = peak_nbytes(pair.expected, pair.slab_rows, best_kernel())
        work = Workspace(Scratch(scratch), best_kernel())
        tracemalloc.start()
        try:
            measuring._Sums().add(pair, range(pair.slab_rows), work)
            assert tracemalloc.get_traced_memory()[1] <= measuring._worker_nbytes(pair.expected) - scratch
        finally:
            tracemalloc.stop()


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "x.gguf", tmp_path / "x.png"
    streamconv.convert(source, out, outtype="q4_k_m")
    command = ["verify", str(out), "--source", str(source)]
    assert main([*command, "--error"]) == 0
    head, *lines, tail = capsys.readouterr().out.splitlines()
    found = streamconv.verify(out, source, error=True).errors
    assert found is not None
    shown = [one for one in found.tensors if one.relative_rms]
    assert f"{found.relative_rms:.6f}" in head
    assert [line.split() for line in lines] == [[f"{one.relative_rms:.6f}", one.type, one.name] for one in shown]
    assert tail.split()[0] == str(len(found.tensors) - len(shown))
    assert main([*command, "--error", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["errors"]
    assert said["relative_rms"] == found.relative_rms
    assert [tensor["name"] for tensor in said["tensors"]] == [one.name for one in found.tensors]
    assert main([*command, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out
    assert main([*command, "--plot", str(picture)]) == 5  # it is there
    assert main([*command, "--plot", str(picture), "--force"]) == 0
    for file in (out, source / "config.json", source / "model.safetensors"):
        before = file.read_bytes()
        assert main([*command, "--plot", str(file), "--force"]) == 5
        assert file.read_bytes() == before
    assert main([*command, "--plot", str(tmp_path / "missing" / "x.png")]) == 5


def test_without_matplotlib(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamconv.convert(source, tmp_path / "x.gguf", outtype="q4_k_m")
    monkeypatch.setattr("streamconv.check.picture.find_spec", lambda name: None)
    with pytest.raises(errors.UsageError) as caught:
        streamconv.verify(tmp_path / "x.gguf", source, plot=tmp_path / "x.png")
    assert caught.value.code == "extra-missing"
