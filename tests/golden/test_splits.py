"""One model as several files: llama.cpp's rules, its loader, and the promises about parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter

import streamconv
from streamconv.api import run as running
from streamconv.errors import DestinationError, Interrupted, SourceError, UsageError, VerifyError
from streamconv.ggml.element_types import tensor_nbytes
from streamconv.options import SplitOptions
from tests import cases, tiny
from tests.oracles import runtime
from tests.raising import raises

LIMITS = [SplitOptions(60_000), SplitOptions(None, 7), SplitOptions(70_000, 5), SplitOptions(1), SplitOptions(None, 1)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.lfm2(tmp_path / "src", n_shards=2)


def fields(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_cuts_are_where_llama_cpps_writer_puts_them(tmp_path: Path, source: Path, limits: SplitOptions) -> None:
    whole = streamconv.convert(source, tmp_path / "whole.gguf", outtype="q8_0", dry_run=True).plan
    assert whole is not None
    writer = GGUFWriter(
        None, "lfm2", split_max_tensors=limits.max_tensors or 0, split_max_size=limits.max_nbytes or 0, dry_run=False
    )
    for row in whole:
        kind = streamconv_type(row.type)
        shape = row.shape
        assert tensor_nbytes(shape, kind) == row.nbytes
        writer.add_tensor_info(row.target, byte_shape(row.nbytes, shape), "uint8", row.nbytes, raw_dtype=kind)
    theirs = [list(part) for part in writer.tensors]
    report = streamconv.convert(source, tmp_path / "m.gguf", outtype="q8_0", split=limits)
    count = len(report.outputs)
    assert [output.path.name for output in report.outputs] == [
        f"m-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)
    ]
    assert [[tensor.name for tensor in GGUFReader(output.path).tensors] for output in report.outputs] == theirs


def streamconv_type(name: str) -> object:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[name]


def byte_shape(nbytes: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of bytes as gguf's writer takes it for types that it did not encode itself."""
    n_rows = 1
    for extent in shape[:-1]:
        n_rows *= extent
    return (*shape[:-1], nbytes // n_rows)


def test_part_1_has_all_keys_the_others_their_place(tmp_path: Path, source: Path) -> None:
    whole = streamconv.convert(source, tmp_path / "whole.gguf")
    report = streamconv.convert(source, tmp_path / "m.gguf", split=SplitOptions(80_000))
    first, *others = [fields(output.path) for output in report.outputs]
    count = len(report.outputs)
    assert count > 2
    places = [{"split.no": n, "split.count": count, "split.tensors.count": whole.n_tensors} for n in range(count)]
    assert first == fields(whole.output) | places[0]
    assert others == places[1:]
    assert (report.n_tensors, report.n_parameters) == (whole.n_tensors, whole.n_parameters)


def test_the_set_predicts_what_the_whole_does(tmp_path: Path, source: Path) -> None:
    whole = streamconv.convert(source, tmp_path / "whole.gguf")
    report = streamconv.convert(source, tmp_path / "m.gguf", split=SplitOptions(None, 9))
    assert len(report.outputs) > 2
    expected = runtime.next_token_logprobs(whole.output, cases.IDS, positions=cases.POSITIONS)
    found = runtime.next_token_logprobs(report.output, cases.IDS, positions=cases.POSITIONS)
    assert (found == expected).all()


def test_one_part_alone_has_the_same_bytes(tmp_path: Path, source: Path) -> None:
    report = streamconv.convert(source, tmp_path / "m.gguf", split=SplitOptions(80_000))
    (tmp_path / "apart").mkdir()
    for number, output in enumerate(report.outputs, start=1):
        split = SplitOptions(80_000, None, number)
        alone = streamconv.convert(source, tmp_path / "apart" / "m.gguf", split=split)
        assert [one.path.name for one in alone.outputs] == [output.path.name]
        assert alone.output.read_bytes() == output.path.read_bytes()
    streamconv.verify(tmp_path / "apart" / report.output.name, source)


def test_a_model_that_fits_is_one_file_under_its_own_name(tmp_path: Path, source: Path) -> None:
    whole = streamconv.convert(source, tmp_path / "whole.gguf")
    one = streamconv.convert(source, tmp_path / "m.gguf", split=SplitOptions(1 << 40))
    assert one.output == tmp_path / "m.gguf"
    assert one.output.read_bytes() == whole.output.read_bytes()


def test_verify_takes_the_set_and_names_what_is_wrong(tmp_path: Path, source: Path) -> None:
    split = SplitOptions(80_000)
    report = streamconv.convert(source, tmp_path / "m.gguf", split=split, verify=True)
    assert report.verified
    assert streamconv.verify(report.output, source).n_tensors == report.n_tensors
    last = report.outputs[-1].path
    content = bytearray(last.read_bytes())
    content[-40] ^= 1
    last.write_bytes(content)
    with pytest.raises(VerifyError):
        streamconv.verify(report.output, source)
    last.unlink()
    with raises(SourceError, code="split-missing"):
        streamconv.verify(report.output, source)


def test_no_part_has_its_name_before_all_are_complete(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []
    publish = running.Sink.publish

    def watched(self: running.Sink) -> None:
        if not named:
            assert not list(tmp_path.glob("*.gguf"))
            assert len(list(tmp_path.glob("*.gguf.part"))) == 4
        publish(self)
        named.append(self.readable_path.name)

    monkeypatch.setattr(running.Sink, "publish", watched)
    streamconv.convert(source, tmp_path / "m.gguf", split=SplitOptions(None, 10))
    assert named == [f"m-{number:05d}-of-00004.gguf" for number in (2, 3, 4, 1)]
    assert not list(tmp_path.glob("*.part*"))


def test_an_interrupted_set_goes_on(tmp_path: Path, source: Path) -> None:
    split = SplitOptions(None, 10)
    expected = streamconv.convert(source, tmp_path / "e.gguf", split=split)
    asked = 0

    def cancel() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    with pytest.raises(Interrupted):
        streamconv.convert(source, tmp_path / "m.gguf", split=split, cancel=cancel)
    assert not list(tmp_path.glob("m-*.gguf"))
    assert list(tmp_path.glob("m-*.gguf.part.journal"))
    report = streamconv.convert(source, tmp_path / "m.gguf", split=split, resume=True)
    for ours, theirs in zip(report.outputs, expected.outputs, strict=True):
        assert ours.path.read_bytes() == theirs.path.read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_an_existing_part_is_not_replaced(tmp_path: Path, source: Path) -> None:
    split = SplitOptions(None, 10)
    (tmp_path / "m-00003-of-00004.gguf").write_bytes(b"mine")
    with raises(DestinationError, code="exists"):
        streamconv.convert(source, tmp_path / "m.gguf", split=split)
    assert [path.name for path in tmp_path.glob("m-*")] == ["m-00003-of-00004.gguf"]
    streamconv.convert(source, tmp_path / "m.gguf", split=split, force=True)
    assert len(list(tmp_path.glob("m-*.gguf"))) == 4


def test_what_is_no_split(tmp_path: Path, source: Path) -> None:
    for wrong in ((0, None, None), (None, 0, None), (10, None, 0)):
        with pytest.raises(UsageError, match="at least 1"):
            SplitOptions(*wrong)
    with raises(UsageError, code="option-conflict"):
        SplitOptions(only_part=1)
    with pytest.raises(UsageError, match="there is no part 5: the output has 4"):
        streamconv.convert(source, tmp_path / "m.gguf", split=SplitOptions(None, 10, 5))
