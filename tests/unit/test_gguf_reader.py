"""Strangers' GGUF files: what gguf-py writes is read exactly; what lies is an error or a listed problem, at no cost."""

from __future__ import annotations

import errno
import os
import struct
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType

from streamconv.errors import SourceError
from streamconv.files import local as cursor
from streamconv.gguf import header as gguf_header
from streamconv.gguf.entries import Span, refuse
from streamconv.gguf.format import KeyValue, PackedArray, TensorInfo, encode_header
from streamconv.gguf.reader import GGUFFile
from tests.attacks.gguf_files import FATAL, LISTED, U64_MAX
from tests.oracles import ggufs
from tests.raising import raises
from tests.tools import gguf_bytes as raw

CASES = Path(__file__).parents[1] / "data" / "cases"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, Span) else value


def all_values(path: Path) -> Path:
    """Every value type, alone and in arrays, empty ones too, and tensors of several types, by gguf-py's writer."""
    writer = gguf.GGUFWriter(path, "llama")
    kinds = {
        GGUFValueType.UINT8: [0, 255],
        GGUFValueType.INT8: [-128, 127],
        GGUFValueType.UINT16: [0, 65535],
        GGUFValueType.INT16: [-32768, 32767],
        GGUFValueType.UINT32: [0, 2**32 - 1],
        GGUFValueType.INT32: [-(2**31), 2**31 - 1],
        GGUFValueType.FLOAT32: [1.5, -0.1],
        GGUFValueType.BOOL: [True, False],
        GGUFValueType.UINT64: [0, U64_MAX],
        GGUFValueType.INT64: [-(2**63), 2**63 - 1],
        GGUFValueType.FLOAT64: [0.1, 1e300],
        GGUFValueType.STRING: ["Grüße, 世界 🌍", ""],
    }
    for kind, values in kinds.items():
        for i, value in enumerate(values):
            writer.add_key_value(f"one.{kind.name}.{i}", value, kind)
        writer.add_key_value(f"many.{kind.name}", values * 3, GGUFValueType.ARRAY, sub_type=kind)
    rng = np.random.default_rng(7)
    writer.add_tensor("a.weight", rng.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("b.weight", rng.standard_normal((2, 7, 64)).astype(np.float16))
    blocks = gguf.quantize(rng.standard_normal((5, 96)).astype(np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("c.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("d.bias", rng.standard_normal(11).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=["all_values", "llama-given.base"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return all_values(tmp_path / "all.gguf") if request.param == "all_values" else CASES / f"{request.param}.gguf"


class TestWhatIsRight:
    def test_equal_to_gguf_pys_reader(self, made: Path) -> None:
        theirs = ggufs.read(made)
        with GGUFFile.open(made) as ours:
            assert ours.problems == ()
            assert list(ours.keys) == list(theirs.keys)
            for name, entry in theirs.keys.items():
                expected = entry.type[0].lower() if len(entry.type) == 1 else f"array[{entry.type[1].lower()}]"
                assert (name, ours.keys[name].type_name) == (name, expected)
                assert (name, plain(ours.keys[name].value)) == (name, entry.value)
            assert list(ours.tensors) == list(theirs.tensors)
            for name, stored in theirs.tensors.items():
                mine = ours.tensors[name]
                assert (mine.shape, mine.type_name) == (stored.shape, stored.type)
                assert (mine.offset - ours.data_offset, mine.nbytes) == (stored.offset, len(stored.raw))
                content = bytearray(len(stored.raw))
                ours.read_into(mine, 0, content)
                assert content == stored.raw.tobytes()

    def test_same_through_the_smallest_window_and_shortest_reads(
        self, made: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def look() -> list[Any]:
            with GGUFFile.open(made) as file:
                keys = [(key.name, key.type, plain(key.value)) for key in file.keys.values()]
                return [keys, list(file.tensors.values()), file.data_offset]

        whole = look()
        preadv = os.preadv
        monkeypatch.setattr(cursor, "WINDOW_NBYTES", 11)
        monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
        assert look() == whole

    def test_what_our_own_encoder_writes(self, tmp_path: Path) -> None:
        keys = [
            KeyValue.string("general.architecture", "lfm2"),
            KeyValue.array("empty.strings", PackedArray.of_strings([])),
            KeyValue.array("empty.numbers", PackedArray.of_numbers(GGUFValueType.UINT32, [])),
            KeyValue.array("flags", PackedArray.of_numbers(GGUFValueType.BOOL, [True, False, True])),
            KeyValue.array("lfm2.attention.head_count_kv", PackedArray.of_numbers(GGUFValueType.UINT32, [0, 8, 0])),
            KeyValue.u32("general.alignment", 64),
        ]
        infos = [
            TensorInfo("scalar", (), GGMLQuantizationType.F32, 0),
            TensorInfo("e", (3, 0), GGMLQuantizationType.F32, 64),
        ]
        path = write(tmp_path / "own.gguf", b"".join(encode_header(keys, infos, 64).pieces) + bytes(64))
        with GGUFFile.open(path) as file:
            assert [(key.name, key.type_name, plain(key.value)) for key in file.keys.values()] == [
                ("general.architecture", "string", "lfm2"),
                ("empty.strings", "array[string]", []),
                ("empty.numbers", "array[uint32]", []),
                ("flags", "array[bool]", [True, False, True]),
                ("lfm2.attention.head_count_kv", "array[uint32]", [0, 8, 0]),
                ("general.alignment", "uint32", 64),
            ]
            assert [(t.name, t.shape, t.nbytes) for t in file.tensors.values()] == [("scalar", (), 4), ("e", (3, 0), 0)]
            assert (file.problems, file.alignment, file.data_offset % 64) == ((), 64, 0)

    def test_keys_alone_and_version_2(self, tmp_path: Path) -> None:
        path = write(tmp_path / "keys.gguf", raw.gguf([raw.number("n", "I", 7)], version=2)[:-9])
        with GGUFFile.open(path) as file:
            assert (file.version, file.problems, file.scalar("n", int)) == (2, (), 7)

    def test_scalar_asks_for_exactly_the_type(self, tmp_path: Path) -> None:
        keys = [raw.number("n", "I", 7), raw.number("b", "?", True), raw.array("a", raw.NUMBERS["I"], b"", 0)]
        with GGUFFile.open(write(tmp_path / "x.gguf", raw.gguf(keys))) as file:
            assert (file.scalar("n", int), file.scalar("b", bool), file.scalar("none", str)) == (7, True, None)
            for name, kind in (("n", str), ("n", float), ("b", int), ("a", int)):
                with pytest.raises(SourceError, match=f"key {name} is of type .*, expected {kind.__name__}"):
                    file.scalar(name, kind)

    def test_arrays_and_long_strings_stay_in_the_file(self, tmp_path: Path) -> None:
        long = "äé" * gguf_header.MAX_TEXT_NBYTES
        tokens = ["x" * 70_000, "kurz", "y" * 150_000, "", "ende"]
        keys = [
            raw.key("long", raw.STRING, raw.text(long)),
            raw.array("tokens", raw.STRING, b"".join(map(raw.text, tokens)), len(tokens)),
            raw.number("last", "I", 42),
        ]
        with GGUFFile.open(write(tmp_path / "x.gguf", raw.gguf(keys))) as file:
            assert file.scalar("last", int) == 42
            span = file.keys["long"].value
            assert isinstance(span, Span) and list(span) == [long]
            assert span.first(1, text_nbytes=5) == ["äé"]  # a character that is cut is left out, not mangled
            span = file.keys["tokens"].value
            assert isinstance(span, Span) and (len(span), list(span)) == (5, tokens)
            assert span.first(3, text_nbytes=4) == ["xxxx", "kurz", "yyyy"]
            with raises(SourceError, code="key-type"):
                file.scalar("long", str)


class Cost:
    """What a piece of work took: traced memory and Python calls, which a clock cannot disturb."""

    def __enter__(self) -> Cost:
        self.n_calls = 0
        tracemalloc.start()
        sys.setprofile(self._count)
        return self

    def _count(self, frame: object, event: str, argument: object) -> None:
        self.n_calls += event == "call"

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)
        self.peak_nbytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    def check(self, nbytes: int) -> None:
        assert self.peak_nbytes < (1 << 20) + 8 * nbytes
        assert self.n_calls < 300 + nbytes


@pytest.mark.parametrize(("content", "code"), FATAL.values(), ids=FATAL.keys())
def test_fatal(content: bytes, code: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", content)
    with raises(SourceError, code=code) as caught, Cost() as cost:
        GGUFFile.open(path)
    cost.check(len(content))
    assert "\n" not in str(caught.value)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(("content", "code"), LISTED.values(), ids=LISTED.keys())
def test_listed(content: bytes, code: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", content)
    with Cost() as cost, GGUFFile.open(path) as file:
        pass
    cost.check(len(content))
    assert code in [problem.code for problem in file.problems]
    assert len(file.problems) <= 2
    with pytest.raises(SourceError, match=f"^{path}: "):
        refuse(file.problems)
    refuse(file.problems, ignore={problem.code for problem in file.problems})


class TestLimits:
    def test_names_and_values_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gguf_header, "MAX_KEPT_NBYTES", 1 << 20)
        many_keys = raw.gguf([raw.number(f"key.{i}", "I", i) for i in range(4000)])
        many_tensors = raw.gguf(tensors=[raw.tensor(f"tensor.{i:050d}", (2**40 + i, 2**20 + i)) for i in range(4000)])
        wide_text = raw.gguf([raw.key(f"{i}", raw.STRING, raw.text("🌍" + "x" * 60_000)) for i in range(40)])
        for content in (many_keys, many_tensors, wide_text):
            path = write(tmp_path / "x.gguf", content)
            with pytest.raises(SourceError, match="take more than 1 MiB of memory"), Cost() as cost:
                GGUFFile.open(path)
            assert cost.peak_nbytes < 2 << 20

    def test_header_of_a_sparse_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.gguf", raw.gguf([raw.array("a", raw.STRING, b"", 2**40)]))
        os.truncate(path, 1 << 40)
        with pytest.raises(SourceError, match="key a extends beyond byte 134,217,728"), Cost() as cost:
            GGUFFile.open(path)
        cost.check(0)

    def test_problems_listed(self, tmp_path: Path) -> None:
        tensors = [raw.tensor(f"t.{i}", (3,), 99) for i in range(gguf_header.MAX_PROBLEMS + 23)]
        with GGUFFile.open(write(tmp_path / "x.gguf", raw.gguf(tensors=tensors))) as file:
            assert len(file.tensors) == gguf_header.MAX_PROBLEMS + 23
            assert len(file.problems) == gguf_header.MAX_PROBLEMS + 1
            assert file.problems[-1].message == "23 more problems are not listed"


class TestReading:
    @pytest.fixture()
    def path(self, tmp_path: Path) -> Path:
        keys = [raw.array("a", raw.STRING, b"".join(raw.text(f"token {i}") for i in range(9000)), 9000)]
        tensors = [raw.tensor("t", (5, 3)), raw.tensor("u", (7,), offset=64)]
        return write(tmp_path / "x.gguf", raw.gguf(keys, tensors, bytes(range(64)) + bytes(range(100, 128))))

    def test_at_an_offset(self, path: Path) -> None:
        content = np.empty(6, dtype=np.uint8)
        with GGUFFile.open(path) as file:
            file.read_into(file.tensors["u"], 3, content)
            assert content.tolist() == [103, 104, 105, 106, 107, 108]
            with pytest.raises(SourceError, match="u: has 28 bytes, not 29"):
                file.read_into(file.tensors["u"], 23, content)

    def test_no_weight_is_read_while_opening(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        preadv, ends = os.preadv, []

        def spy(fd: int, views: Sequence[memoryview], offset: int) -> int:
            ends.append(offset + len(views[0]))
            return preadv(fd, views, offset)

        monkeypatch.setattr(os, "preadv", spy)
        monkeypatch.setattr(cursor, "WINDOW_NBYTES", 1024)
        with GGUFFile.open(path) as file:
            assert max(ends) < file.data_offset + 1024

    def test_a_file_that_shrinks(self, path: Path) -> None:
        with GGUFFile.open(path) as file:
            os.truncate(path, 100)
            with pytest.raises(SourceError, match=r"ends at byte .*do not change the file"):
                file.read_into(file.tensors["t"], 0, bytearray(60))
            with pytest.raises(SourceError, match="ends at byte 100"):
                list(file.keys["a"].value)  # type: ignore[arg-type]

    def test_an_array_that_changes(self, path: Path) -> None:
        with GGUFFile.open(path) as file:
            with path.open("r+b") as writer:
                writer.seek(file.keys["a"].value.offset)  # type: ignore[union-attr]
                writer.write(struct.pack("<Q", 2**62))
            with raises(SourceError, code="out-of-bounds"):
                list(file.keys["a"].value)  # type: ignore[arg-type]

    def test_after_closing(self, path: Path) -> None:
        with GGUFFile.open(path) as file:
            pass
        with raises(SourceError, code="read-failed"):
            file.read_into(file.tensors["t"], 0, bytearray(60))

    def test_a_disk_that_fails(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(SourceError, match=f"^{path}: cannot be read at byte 0: Input/output error"):
            GGUFFile.open(path)

    def test_nothing_stays_open_after_an_error(self, path: Path) -> None:
        before = sorted(Path("/dev/fd").iterdir())
        os.truncate(path, 100)
        with pytest.raises(SourceError):
            GGUFFile.open(path)
        assert sorted(Path("/dev/fd").iterdir()) == before


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path, message in (
        (tmp_path / "none.gguf", "cannot be opened: No such file or directory"),
        (tmp_path, "is not a regular file"),
        (fifo, "is not a regular file"),
        (tmp_path / "a\0b", "cannot be opened: embedded null byte"),
    ):
        with pytest.raises(SourceError, match=message):
            GGUFFile.open(path)


def test_an_error_names_a_tensor_without_obeying_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", raw.gguf(tensors=[raw.tensor("\x1b[2J\nt", (1, 1, 1, 1, 1))]))
    with pytest.raises(SourceError) as caught:
        GGUFFile.open(path)
    assert str(caught.value) == f"{path}: \\x1b[2J\\nt: 5 dimensions, GGUF allows 4"
