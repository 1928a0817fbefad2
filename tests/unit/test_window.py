"""Mapped reads: the same bytes as positioned ones, whatever happens to a file meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

import streamconv
from streamconv.budget import Budget, resident_nbytes
from streamconv.engine.layout import CHUNK_NBYTES, CHUNKS_WRITING, Io, PlacedTensor, make_layout, prove_memory
from streamconv.engine.pool import _fill_step, fill_chunk
from streamconv.errors import SourceError, UsageError
from streamconv.files import local, window
from streamconv.files.local import LocalBlob
from streamconv.files.window import WINDOW_NBYTES, Unread, Window, mapping_module
from streamconv.ggml.encode import EncodeError, best_kernel
from streamconv.ggml.rows import Encode
from streamconv.lazy.dtype import BF16
from streamconv.lazy.leaves import Source
from streamconv.lazy.node import TensorSpec, Workspace, peak_nbytes, read
from streamconv.lazy.scratch import Scratch
from tests import tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mapped reads are for Linux")

T = GGMLQuantizationType
RNG = np.random.default_rng(22)
NAN = 0x7FC1


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[LocalBlob]:
    """Three windows and a bit."""
    path = tmp_path / "blob"
    path.write_bytes(RNG.bytes(3 * WINDOW_NBYTES + 12_345))
    with LocalBlob(path) as opened:
        yield opened


def content(blob: LocalBlob) -> bytes:
    return Path(str(blob.path)).read_bytes()


def test_this_machine_maps(blob: LocalBlob) -> None:
    """Else none of the tests below would test anything."""
    assert mapping_module() is not None and best_kernel().borrows and blob.is_mapped


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, 1),
        (5, 100),
        (WINDOW_NBYTES - 7, 7),
        (WINDOW_NBYTES, WINDOW_NBYTES),
        (3 * WINDOW_NBYTES, 12_345),  # the file's last bytes
        (3 * WINDOW_NBYTES + 12_344, 1),
    ],
)
def test_what_is_lent(blob: LocalBlob, offset: int, nbytes: int) -> None:
    with Window().lend(blob, offset, nbytes) as lent:
        assert lent is not None and lent.tobytes() == content(blob)[offset : offset + nbytes]
        assert not lent.flags.writeable


def test_what_lies_across_a_border_is_not_lent(blob: LocalBlob) -> None:
    worker = Window()
    for nbytes in (8, WINDOW_NBYTES, 2 * WINDOW_NBYTES):
        with worker.lend(blob, WINDOW_NBYTES - 7, nbytes) as lent:
            assert lent is None
    assert worker.rows_before_border(WINDOW_NBYTES - 7, 3, 100) == 2
    assert worker.rows_before_border(WINDOW_NBYTES - 7, 3, 1) == 1
    assert worker.rows_before_border(WINDOW_NBYTES - 7, 8, 100) == 1


def test_all_rows_but_those_across_borders_are_lent(tmp_path: Path) -> None:
    """A tensor of 5 windows, its rows not a divisor of anything."""
    shape = (10_007, 1001)
    path = tmp_path / "weights"
    path.write_bytes(RNG.integers(0, 0x3F80, shape, dtype=np.uint16).tobytes())
    reads: list[int] = []

    class Counted(LocalBlob):
        def read_into(self, offset: int, buffer: Any) -> None:
            reads.append(len(buffer))
            super().read_into(offset, buffer)

    with Counted(path) as opened:
        layout = make_layout(
            [], [PlacedTensor("made", Source("made", opened, 0, TensorSpec(shape, BF16)), ("made",), T.BF16)]
        )
        (step,) = layout.steps
        out = np.empty(layout.nbytes, dtype=np.uint8)
        fill_chunk(layout, 0, out, Workspace(Scratch(step.scratch_nbytes), window=Window()))
        assert out[step.offset :][: step.nbytes].tobytes() == path.read_bytes()
        assert reads == [2 * shape[1]] * (opened.nbytes // WINDOW_NBYTES)


def test_what_lies_beyond_the_end_is_not_lent(blob: LocalBlob) -> None:
    with Window().lend(blob, blob.nbytes - 5, 6) as lent:
        assert lent is None


def resident_file_nbytes(path: Path) -> int:
    """How much of a file this process has mapped, by /proc."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    total, inside = 0, False
    for line in lines:
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Size:"):
            total += int(line.split()[1]) << 10
    return total


def test_one_window_is_mapped_at_a_time_and_given_back(blob: LocalBlob, monkeypatch: pytest.MonkeyPatch) -> None:
    path, worker = Path(str(blob.path)), Window()
    expected = content(blob)
    real = LocalBlob.map

    def alone(self: LocalBlob, offset: int, nbytes: int) -> Any:
        assert resident_file_nbytes(path) == 0, "the one before is still mapped"
        return real(self, offset, nbytes)

    monkeypatch.setattr(LocalBlob, "map", alone)
    for offset in range(0, blob.nbytes - 100_000, 99_991):
        with worker.lend(blob, offset, 100_000) as lent:
            assert lent is None or lent.tobytes() == expected[offset : offset + 100_000]
            del lent
        assert 0 < resident_file_nbytes(path) <= WINDOW_NBYTES
    worker.close()
    assert resident_file_nbytes(path) == 0


def test_a_file_that_is_cut_while_it_is_lent_is_unread(blob: LocalBlob) -> None:
    """What numpy read was zeros, and no signal came; the next loan sees that the bytes are gone."""
    worker = Window()
    with pytest.raises(Unread), worker.lend(blob, WINDOW_NBYTES, WINDOW_NBYTES) as lent:
        assert lent is not None
        os.truncate(str(blob.path), WINDOW_NBYTES + 4096)
        assert not lent[8192:].any()
    with worker.lend(blob, WINDOW_NBYTES, WINDOW_NBYTES) as lent:
        assert lent is None
    with worker.lend(blob, 0, WINDOW_NBYTES) as lent:
        assert lent is not None and lent.tobytes() == content(blob)[:WINDOW_NBYTES]


def test_a_step_whose_loan_failed_is_made_again_and_counted_once(tmp_path: Path) -> None:
    """Here by a file that is whole again when it is read: the same bytes, and each NaN in the tally once."""
    shape = (64, 256)
    values = RNG.integers(0, 0x4000, shape, dtype=np.uint16)
    values[3, 7] = values[60, 200] = NAN
    path = tmp_path / "weights"
    path.write_bytes(values.tobytes())
    with LocalBlob(path) as opened:
        tensor = Encode(Source("made", opened, 0, TensorSpec(shape, BF16)), "made", T.F16)
        worker = Window()

        class Failing(Window):
            def lend(self, *arguments: Any) -> Any:
                return failing(worker.lend(*arguments))

        from contextlib import contextmanager

        @contextmanager
        def failing(loan: Any) -> Iterator[Any]:
            with loan as lent:
                yield lent
            raise Unread

        made = []
        for work_window in (None, worker, Failing()):
            out = np.empty(tensor.spec.nbytes, dtype=np.uint8)
            work = Workspace(Scratch(peak_nbytes(tensor, shape[0])), window=work_window)
            read(tensor, range(shape[0]), out, work)
            made.append(out.tobytes())
            assert work.tally["made"].n_nan == 2
    assert made[0] == made[1] == made[2]


def test_a_value_that_does_not_fit_is_looked_for_in_memory_of_our_own(tmp_path: Path) -> None:
    values = np.full((4, 32), 0x3F80, dtype=np.uint16)
    values[2, 5] = 0x7F00  # 1.7e38
    path = tmp_path / "weights"
    path.write_bytes(values.tobytes())
    reads: list[int] = []

    class Counted(LocalBlob):
        def read_into(self, offset: int, buffer: Any) -> None:
            reads.append(offset)
            super().read_into(offset, buffer)

    with Counted(path) as opened:
        tensor = Encode(Source("made", opened, 0, TensorSpec((4, 32), BF16)), "made", T.F16)
        work = Workspace(Scratch(peak_nbytes(tensor, 4)), window=Window())
        with pytest.raises(EncodeError, match="does not fit F16"):
            read(tensor, range(4), np.empty(tensor.spec.nbytes, dtype=np.uint8), work)
    assert reads == [0]


def test_one_loan_fills_all_rows_before_a_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call of the encoder; a file that is cut meanwhile is read, a value that does not fit is named as read."""
    shape = (3000, 512)
    path = tmp_path / "weights"
    values = RNG.integers(0, 0x3F80, shape, dtype=np.uint16)
    path.write_bytes(values.tobytes())
    with LocalBlob(path) as opened:
        source = Source("made", opened, 0, TensorSpec(shape, BF16))
        (step,) = make_layout([], [PlacedTensor("made", source, ("made",), T.F16)]).steps
        lengths: list[int] = []
        real = Encode.apply
        monkeypatch.setattr(
            Encode, "apply", lambda self, rows, *words: (lengths.append(len(rows)), real(self, rows, *words))[1]
        )
        work = Workspace(Scratch(step.scratch_nbytes), window=Window())
        out = np.empty(step.nbytes, dtype=np.uint8)
        _fill_step(step, 0, out, work)
        assert lengths == [3000] and step.slab_rows == 512
        wide = (values.astype(np.uint32) << 16).view(np.float32)
        assert out.tobytes() == wide.astype(np.float16).tobytes()
    values[2000, 5] = 0x7F00
    path.write_bytes(values.tobytes())
    with LocalBlob(path) as opened:
        step.tensor.parents[0].file = opened  # type: ignore[attr-defined]
        with pytest.raises(SourceError) as caught:
            _fill_step(step, 0, out, Workspace(Scratch(step.scratch_nbytes), window=Window()))
        assert caught.value.code == "value-range" and caught.value.tensor == "made"


@pytest.mark.parametrize("maps", [False, True])
def test_a_value_that_a_change_of_the_file_brought_is_that_change(tmp_path: Path, maps: bool) -> None:
    path = tmp_path / "weights"
    path.write_bytes(np.zeros((64, 512), np.uint16).tobytes())
    with LocalBlob(path) as opened:
        source = Source("made", opened, 0, TensorSpec((64, 512), BF16))
        (step,) = make_layout([], [PlacedTensor("made", source, ("made",), T.F16)]).steps
        path.write_bytes(np.full((64, 512), 0x7F00, np.uint16).tobytes())
        os.utime(path, ns=(1, 1))
        work = Workspace(Scratch(step.scratch_nbytes), window=Window() if maps else None)
        with pytest.raises(SourceError) as caught:
            _fill_step(step, 0, np.empty(step.nbytes, dtype=np.uint8), work)
    assert (caught.value.code, caught.value.file) == ("source-changed", str(path))


# ---------------------------------------------------------------- the signal


PROGRAM = """
import mmap, os, signal, sys
import numpy as np
from pathlib import Path
from streamconv.files.local import LocalBlob
from streamconv.files.window import Window

path = Path(sys.argv[1])
path.write_bytes(bytes(range(256)) * 40_000)
blob, worker, how = LocalBlob(path), Window(), sys.argv[2]
other = path.with_name("other")
other.write_bytes(bytes(1 << 20))
file = open(other, "r+b")
foreign = mmap.mmap(file.fileno(), 1 << 20, prot=mmap.PROT_READ)
with worker.lend(blob, 0, 100) as lent:
    if how == "foreign":
        os.truncate(other, 0)
        foreign[5000]  # no window: the process dies as it would have
del lent
worker.close()
if how == "after":
    os.truncate(other, 0)
    foreign[5000]
print("alive")
"""


@pytest.mark.parametrize("how", ["foreign", "after"])
def test_a_fault_elsewhere_goes_to_the_previous_handler(tmp_path: Path, how: str) -> None:
    """Python's faulthandler, which says where it was and ends the process by the signal."""
    command = [sys.executable, "-X", "faulthandler", "-c", PROGRAM, str(tmp_path / "blob"), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGBUS and "Bus error" in done.stderr and "alive" not in done.stdout
    command.remove("faulthandler"), command.remove("-X")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGBUS and not done.stderr


# ---------------------------------------------------------------- whole conversions


KINDS: dict[str, Any] = {
    "lfm2": tiny.lfm2,
    "lfm2moe": tiny.lfm2moe,
    "llama": lambda folder: tiny.llama(folder, n_shards=3),
    "float16": lambda folder: tiny.llama(folder, dtype="F16"),
    "float32": lambda folder: tiny.lfm2(folder, dtype="F32"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outtype", ["auto", "f32", "f16", "q8_0", "q4_k_m", "iq4_nl", "tq2_0"])
def test_both_ways_give_the_same_bytes(tmp_path: Path, kind: str, outtype: str) -> None:
    source = KINDS[kind](tmp_path / "Some-Model")
    made = {}
    for io in ("mapped", "positioned", None):
        out = tmp_path / f"{io}.gguf"
        streamconv.convert(source, out, outtype=outtype, io=io, threads=3)
        made[io] = out.read_bytes()
    assert made["mapped"] == made["positioned"] == made[None]


@pytest.mark.parametrize("dora", [False, True])
def test_both_ways_give_the_same_merge(tmp_path: Path, dora: bool) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, dora=dora)
    for io in ("mapped", "positioned"):
        streamconv.convert(base, tmp_path / f"{io}.gguf", adapters=[adapter], outtype="q8_0", io=io)
        streamconv.convert_adapter(tiny.peft_adapter(tmp_path / "plain", base), base, tmp_path / f"{io}-a.gguf", io=io)
    assert (tmp_path / "mapped.gguf").read_bytes() == (tmp_path / "positioned.gguf").read_bytes()
    assert (tmp_path / "mapped-a.gguf").read_bytes() == (tmp_path / "positioned-a.gguf").read_bytes()


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets that are mapped."""
    offsets: list[int] = []
    real = LocalBlob.map

    def noted(self: LocalBlob, offset: int, nbytes: int) -> Any:
        offsets.append(offset)
        return real(self, offset, nbytes)

    monkeypatch.setattr(LocalBlob, "map", noted)
    return offsets


def test_local_files_are_mapped_by_default(tmp_path: Path, maps: list[int]) -> None:
    streamconv.convert(tiny.lfm2(tmp_path / "src"), tmp_path / "out.gguf")
    assert maps


def test_positioned_reads_map_nothing(tmp_path: Path, maps: list[int]) -> None:
    streamconv.convert(tiny.lfm2(tmp_path / "src"), tmp_path / "out.gguf", io="positioned", verify=True)
    assert not maps


def test_a_network_filesystem_is_not_mapped_unless_asked(
    tmp_path: Path, maps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "is_local", lambda fd: False)
    source = tiny.lfm2(tmp_path / "src")
    streamconv.convert(source, tmp_path / "out.gguf")
    assert not maps
    streamconv.convert(source, tmp_path / "out2.gguf", io="mapped")
    assert maps and (tmp_path / "out.gguf").read_bytes() == (tmp_path / "out2.gguf").read_bytes()


def test_nfs_and_fuse_are_no_local_filesystems(monkeypatch: pytest.MonkeyPatch) -> None:
    nfs, cifs, smb2, fuse, plan9, ceph = 0x6969, 0xFF534D42, 0xFE534D42, 0x65735546, 0x01021997, 0x00C36400
    for number in (nfs, cifs, smb2, fuse, plan9, ceph):

        class Module:
            @staticmethod
            def filesystem(fd: int, number: int = number) -> int:
                return number

        monkeypatch.setattr(window, "mapping_module", Module)
        assert not window.is_local(0)


@pytest.mark.parametrize("missing", ["kernel", "system"])
def test_without_the_kernel_or_the_system_sources_are_read(
    tmp_path: Path, maps: list[int], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    from streamconv.api import run

    if missing == "kernel":
        monkeypatch.setenv("STREAMCONV_KERNELS", "0")
    else:
        monkeypatch.setattr(run, "mapping_module", lambda: None)
    source = tiny.lfm2(tmp_path / "src")
    streamconv.convert(source, tmp_path / "out.gguf")
    assert not maps
    with pytest.raises(UsageError) as caught:
        streamconv.convert(source, tmp_path / "out2.gguf", io="mapped")
    assert caught.value.code == "io-mapped" and not (tmp_path / "out2.gguf").exists()


def test_a_kernel_that_cannot_populate_a_window_maps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 5.14 answers EINVAL."""

    class Module:
        class Window:
            def __init__(self, *words: int) -> None:
                pass

            def populate(self, *words: int) -> None:
                raise OSError(errno.EINVAL, "Invalid argument")

    assert mapping_module() is not None
    monkeypatch.setattr(window.importlib, "import_module", lambda name: Module)
    mapping_module.cache_clear()
    try:
        assert mapping_module() is None and not window.is_local(0)
    finally:
        mapping_module.cache_clear()


def test_another_word_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        streamconv.convert(tmp_path, io="direct")
    assert caught.value.code == "word-unknown"


# ---------------------------------------------------------------- memory


def layout_of(shape: tuple[int, ...]) -> Any:
    source = Source("made", None, 0, TensorSpec(shape, BF16))  # type: ignore[arg-type]
    return make_layout([], [PlacedTensor("made", source, ("made",), T.BF16)])


def test_windows_are_counted() -> None:
    layout = layout_of((100_000, 2048))
    proofs = {
        io: prove_memory([layout], Budget(1 << 40), threads=2, io=io) for io in Io
    }  # fmt: skip
    assert proofs[Io.POSITIONED].window == 0 < proofs[Io.MAPPED].window == proofs[Io.AUTO].window
    assert {io: proof.terms.get("windows") for io, proof in proofs.items()} == {
        Io.POSITIONED: None,
        Io.MAPPED: 2 * WINDOW_NBYTES,
        Io.AUTO: 2 * WINDOW_NBYTES,
    }


def test_where_windows_would_cost_workers_sources_are_read() -> None:
    layout, process = layout_of((100_000, 2048)), resident_nbytes()[0] + (64 << 20)
    whole = prove_memory([layout], Budget(1 << 40, process), threads=2, io=Io.AUTO)
    for io, allowed, mapped in (
        (Io.AUTO, whole.projected, whole.window),
        (Io.AUTO, whole.projected - 1, 0),
        (Io.MAPPED, whole.projected - 1, whole.window),
    ):
        proof = prove_memory([layout], Budget(allowed, process), threads=2, io=io)
        assert (proof.window, proof.workers) == (mapped, 2) and proof.projected <= allowed
        is_largest = (proof.chunk, proof.writing) == (CHUNK_NBYTES[0], CHUNKS_WRITING[0])
        assert is_largest == (io is Io.AUTO)
