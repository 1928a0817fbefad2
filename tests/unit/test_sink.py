"""One output from its first byte to its name: order, counting, locking, refusals, resuming, what stays behind."""

from __future__ import annotations

import os
import random
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamconv.errors import (
    BudgetError,
    DestinationError,
    Interrupted,
    InterruptedByTerm,
    ResumeError,
    SourceError,
    SourceReadError,
    StreamconvError,
    VerifyError,
)
from streamconv.lazy.scratch import aligned_buffer
from streamconv.output.destination import resolve
from streamconv.output.sink import Coverage, Sink
from tests.fault.calls import Call, syncs_skipped, watched
from tests.fault.trial import OLD, content

NBYTES = 5 * 8192 + 4097
IDENTITY = {"option outtype": "bf16", "source a.safetensors": "12 34 ab"}


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


@pytest.fixture
def data() -> NDArray[np.uint8]:
    return content(5, NBYTES)


def create(dst: Path, *, force: bool = False, restart: bool = False, nbytes: int = NBYTES) -> Sink:
    return Sink.create(resolve(dst), nbytes, identity=IDENTITY, force=force, restart=restart)


def write(sink: Sink, data: NDArray[np.uint8], start: int, end: int) -> None:
    buffer = aligned_buffer(end - start)
    buffer[:] = data[start:end]
    sink.write(start, buffer)


def names(dst: Path) -> set[str]:
    return {path.name for path in dst.parent.iterdir()}


def interrupt(dst: Path, data: NDArray[np.uint8], prefix: int = 8192, *, force: bool = False) -> None:
    """A run that is stopped after `prefix` bytes, recorded, and one chunk more."""
    with pytest.raises(KeyboardInterrupt), create(dst, force=force) as sink:
        if prefix:
            write(sink, data, 0, prefix)
            sink.record(prefix, {"n": [1, prefix]})
        write(sink, data, prefix, prefix + 8192)
        raise KeyboardInterrupt


# ---------------------------------------------------------------- a whole run


@given(st.lists(st.integers(1, NBYTES - 1), unique=True, max_size=9), st.randoms(use_true_random=False))
def test_any_pieces_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], chance: random.Random
) -> None:
    dst = tmp_path_factory.mktemp("pieces") / "out.gguf"
    data = content(5, NBYTES)
    borders = [0, *sorted(cuts), NBYTES]
    pieces = list(pairwise(borders))
    chance.shuffle(pieces)
    with syncs_skipped(), create(dst) as sink:
        for start, end in pieces:
            write(sink, data, start, end)
        assert sink.seal() == dst
    assert dst.read_bytes() == data.tobytes()
    assert names(dst) == {"out.gguf"}


def test_from_many_threads(dst: Path) -> None:
    data = content(6, 64 * 8192)
    with create(dst, nbytes=data.nbytes) as sink, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: write(sink, data, start, start + 8192), range(0, data.nbytes, 8192)))
        sink.seal()
    assert dst.read_bytes() == data.tobytes()


def test_the_destination_appears_last(dst: Path, data: NDArray[np.uint8]) -> None:
    with create(dst) as sink:
        assert names(dst) == {"out.gguf.part", "out.gguf.part.journal"}
        assert dst.with_name("out.gguf.part").stat().st_size == NBYTES
        write(sink, data, 0, NBYTES)
        sink.complete()
        assert names(dst) == {"out.gguf.part", "out.gguf.part.journal"}
        assert sink.readable_path.read_bytes() == data.tobytes()
        sink.publish()
        assert sink.readable_path == dst
        assert names(dst) == {"out.gguf", "out.gguf.part.journal"}
    assert names(dst) == {"out.gguf"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(dst: Path, data: NDArray[np.uint8], mask: int) -> None:
    before = os.umask(mask)
    try:
        with create(dst) as sink:
            write(sink, data, 0, NBYTES)
            sink.seal()
    finally:
        os.umask(before)
    assert stat.S_IMODE(dst.stat().st_mode) == 0o666 & ~mask


def test_a_missing_byte_is_a_bug_of_ours(dst: Path, data: NDArray[np.uint8]) -> None:
    with pytest.raises(StreamconvError, match=f"{8192} of {NBYTES} bytes") as caught, create(dst) as sink:
        write(sink, data, 0, 8192)
        write(sink, data, 8193, NBYTES)
        sink.seal()
    assert caught.value.exit_code == 1
    assert not dst.exists()


def test_bytes_are_written_once_and_inside(dst: Path, data: NDArray[np.uint8]) -> None:
    with create(dst) as sink:
        write(sink, data, 8192, 16384)
        for start, end in ((8192, 16384), (0, 8193), (16383, 16384), (0, 20000)):
            with pytest.raises(ValueError, match="written twice"):
                write(sink, data, start, end)
        for offset in (-1, NBYTES - 8191, NBYTES):
            with pytest.raises(ValueError, match="lie outside"):
                sink.write(offset, aligned_buffer(8192))
        with pytest.raises(ValueError, match="were written"):
            sink.record(8192, {})
    with pytest.raises(ValueError, match="at least one byte"):
        create(dst, nbytes=0)


@given(st.lists(st.integers(1, 199), unique=True), st.integers(0, 60), st.randoms(use_true_random=False))
def test_coverage_counts_like_a_set(cuts: list[int], prefix: int, chance: random.Random) -> None:
    borders = [prefix, *sorted(cut for cut in cuts if cut > prefix), 200]
    pieces = list(pairwise(borders))
    chance.shuffle(pieces)
    coverage, there = Coverage(prefix), set(range(prefix))
    for start, end in pieces:
        coverage.add(start, end)
        there |= set(range(start, end))
        assert coverage.prefix == min(set(range(201)) - there)
        with pytest.raises(ValueError, match="twice"):
            coverage.add(end - 1, end)
    assert coverage.prefix == 200


# ---------------------------------------------------------------- refusals


def test_an_existing_file_is_refused_and_kept(dst: Path) -> None:
    dst.write_bytes(OLD)
    with pytest.raises(DestinationError, match="exists already") as caught:
        create(dst)
    assert caught.value.hint is not None
    assert "--force" in caught.value.hint
    assert (dst.read_bytes(), names(dst)) == (OLD, {"out.gguf"})


def test_a_file_that_appears_meanwhile_is_kept(dst: Path, data: NDArray[np.uint8]) -> None:
    with pytest.raises(DestinationError, match="exists already"), create(dst) as sink:
        write(sink, data, 0, NBYTES)
        dst.write_bytes(OLD)
        sink.seal()
    assert dst.read_bytes() == OLD
    with create(dst, force=True) as sink:  # nothing of the work was lost
        assert sink.resumed_nbytes == NBYTES
        sink.seal()
    assert dst.read_bytes() == data.tobytes()
    assert names(dst) == {"out.gguf"}


def test_force_replaces_at_the_end(dst: Path, data: NDArray[np.uint8]) -> None:
    dst.write_bytes(OLD)
    with create(dst, force=True) as sink:
        write(sink, data, 0, NBYTES)
        sink.complete()
        assert dst.read_bytes() == OLD
        sink.publish()
    assert dst.read_bytes() == data.tobytes()


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path, dst: Path, data: NDArray[np.uint8]) -> None:
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "model.gguf"
    target.write_bytes(OLD)
    dst.symlink_to(target)
    with pytest.raises(DestinationError, match="exists already"):
        create(dst)
    with create(dst, force=True) as sink:
        assert names(target) == {"model.gguf", "model.gguf.part", "model.gguf.part.journal"}
        write(sink, data, 0, NBYTES)
        assert sink.seal() == target
    assert dst.is_symlink()
    assert dst.read_bytes() == data.tobytes()


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing/out.gguf", "does not exist"), ("n" * 250, "name is too long"), (".", "is a directory")],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(DestinationError, match=words):
        create(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_name_that_leaves_no_room_for_the_journal(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="name is too long"):
        create(tmp_path / ("n" * 245))  # .part would just fit
    assert not list(tmp_path.iterdir())


def test_a_read_only_place(tmp_path: Path) -> None:
    place = tmp_path
    if os.geteuid() == 0:  # whom no mode stops
        place = Path("/sys")
    else:
        place.chmod(0o555)
    with pytest.raises(DestinationError, match=r"permission denied|read-only|does not allow"):
        create(place / "out.gguf")


def test_too_large_a_file_leaves_nothing(dst: Path) -> None:
    with pytest.raises(DestinationError, match="needs"):
        create(dst, nbytes=1 << 60)
    assert not names(dst)


def test_two_runs(dst: Path, data: NDArray[np.uint8]) -> None:
    with create(dst) as first:
        write(first, data, 0, 8192)
        for restart in (False, True):
            with pytest.raises(DestinationError, match="another run is writing it"):
                create(dst, force=True, restart=restart)
        assert names(dst) == {"out.gguf.part", "out.gguf.part.journal"}
        write(first, data, 8192, NBYTES)
        first.seal()
    assert dst.read_bytes() == data.tobytes()


def test_a_run_that_begins_while_another_ends(dst: Path, data: NDArray[np.uint8]) -> None:
    """It is refused until the first one's journal, which the lock is on, has gone."""
    with create(dst) as first:
        write(first, data, 0, NBYTES)
        first.seal()
        with pytest.raises(DestinationError) as caught:
            create(dst, force=True)
        assert caught.value.code == "locked"
    second = create(dst, force=True)
    assert names(dst) == {"out.gguf", "out.gguf.part", "out.gguf.part.journal"}
    with second:
        write(second, data, 0, NBYTES)
        second.seal()
    assert names(dst) == {"out.gguf"}


def test_without_locks_there_is_a_note(dst: Path) -> None:
    def handle(call: Call) -> object:
        if call.name == "flock":
            raise OSError(95, "")
        return call.do()

    with watched(handle), create(dst) as sink:
        assert [note.code for note in sink.notes] == ["no-lock"]


# ---------------------------------------------------------------- what stays behind


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        Interrupted("stop", code="interrupted"),
        InterruptedByTerm("stop", code="interrupted"),
        DestinationError("full", code="no-space"),
        SourceReadError("the disk failed", code="read-failed"),
        BudgetError("verifying takes more", code="memory-bound"),
        MemoryError(),
        ZeroDivisionError("of the caller's progress"),
        SystemExit(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_work_that_was_done_is_kept(dst: Path, data: NDArray[np.uint8], error: BaseException) -> None:
    with pytest.raises(type(error)), create(dst) as sink:
        write(sink, data, 0, 8192)
        sink.record(8192, {})
        raise error
    assert names(dst) == {"out.gguf.part", "out.gguf.part.journal"}
    with create(dst) as sink:
        assert sink.resumed_nbytes == 8192


@pytest.mark.parametrize(
    "error",
    [SourceError("changed", code="source-changed"), VerifyError("differs", code="differs")],
    ids=lambda error: type(error).__name__,
)
def test_bytes_that_are_wrong_are_not_kept(dst: Path, data: NDArray[np.uint8], error: BaseException) -> None:
    with pytest.raises(type(error)), create(dst) as sink:
        write(sink, data, 0, 8192)
        raise error
    assert not names(dst)


@pytest.mark.parametrize(
    "error",
    [SourceError("changed", code="source-changed"), MemoryError(), ZeroDivisionError()],
    ids=lambda error: type(error).__name__,
)
def test_what_had_not_begun_leaves_nothing(dst: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), create(dst):
        raise error
    assert not names(dst)


# ---------------------------------------------------------------- files that are not streamconv's


def refused_as_foreign(dst: Path) -> None:
    """Whatever the options are, the run is refused and nothing in the folder changes."""
    before = {path.name: (path.read_bytes(), path.stat()) for path in dst.parent.iterdir()}
    for force, restart in product((False, True), repeat=2):
        with pytest.raises(DestinationError) as caught:
            create(dst, force=force, restart=restart)
        assert (caught.value.code, caught.value.exit_code) == ("part-foreign", 5)
    assert {path.name: (path.read_bytes(), path.stat()) for path in dst.parent.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"my half-finished download", b"GGUF" + bytes(NBYTES - 4)], ids=len)
def test_a_part_file_without_a_journal_is_not_touched(dst: Path, content: bytes) -> None:
    dst.with_name("out.gguf.part").write_bytes(content)
    refused_as_foreign(dst)


@pytest.mark.parametrize("journal", [b"", b"my notes", bytes(4096), b"0123456789abcdef" * 3], ids=len)
def test_a_part_file_beside_a_journal_that_says_nothing(dst: Path, data: NDArray[np.uint8], journal: bytes) -> None:
    interrupt(dst, data)
    dst.with_name("out.gguf.part.journal").write_bytes(journal)
    refused_as_foreign(dst)


def test_somebody_s_notes_under_the_journal_s_name_are_not_touched(dst: Path) -> None:
    dst.with_name("out.gguf.part.journal").write_text("what I did this week")
    refused_as_foreign(dst)


@pytest.mark.parametrize("torn", [b"", bytes(2000), b"0123456789ab", b"0123456789abcdef" * 2 + b' {"ident'], ids=len)
def test_a_journal_alone_that_a_power_cut_tore_is_begun_again(dst: Path, data: NDArray[np.uint8], torn: bytes) -> None:
    dst.with_name("out.gguf.part.journal").write_bytes(torn)
    with create(dst) as sink:
        write(sink, data, 0, NBYTES)
        sink.seal()
    assert names(dst) == {"out.gguf"}


def test_a_part_file_that_came_after_the_rename_is_not_touched(dst: Path, data: NDArray[np.uint8]) -> None:
    """The journal's own has become the destination by then."""
    stop_after_rename(dst, data)
    dst.with_name("out.gguf.part").write_bytes(b"my half-finished download")
    for restart in (False, True):
        with pytest.raises(DestinationError) as caught:
            Sink.create(resolve(dst), NBYTES, identity={"other": "1"}, force=True, restart=restart)
        assert caught.value.code == "part-foreign"
    with create(dst) as sink:
        assert sink.resumed_nbytes == NBYTES
        sink.seal()
    assert names(dst) == {"out.gguf", "out.gguf.part"}
    assert dst.with_name("out.gguf.part").read_bytes() == b"my half-finished download"


def test_another_conversion_s_work_is_not_discarded_unless_asked(dst: Path, data: NDArray[np.uint8]) -> None:
    interrupt(dst, data)
    left = {path.name: path.read_bytes() for path in dst.parent.iterdir()}
    other = IDENTITY | {"option outtype": "q8_0"}
    for force in (False, True):
        with pytest.raises(ResumeError) as caught:
            Sink.create(resolve(dst), NBYTES, identity=other, force=force)
        assert (caught.value.code, caught.value.exit_code) == ("resume-mismatch", 3)
        assert "--restart" in (caught.value.hint or "")
        assert "outtype" in caught.value.message
    assert {path.name: path.read_bytes() for path in dst.parent.iterdir()} == left
    with Sink.create(resolve(dst), NBYTES, identity=other, restart=True) as sink:
        assert sink.resumed_nbytes == 0
        write(sink, data, 0, NBYTES)
        sink.seal()
    assert names(dst) == {"out.gguf"}


def test_of_a_set_that_cannot_go_on_the_parts_that_can_are_kept(tmp_path: Path, data: NDArray[np.uint8]) -> None:
    paths = [tmp_path / f"out-{n}.gguf" for n in (1, 2)]
    for path in paths:
        interrupt(path, data)
    with pytest.raises(ResumeError), create(paths[0]):
        Sink.create(resolve(paths[1]), NBYTES, identity={"other": "1"})
    for path in paths:
        with create(path) as sink:
            assert sink.resumed_nbytes == 8192


def test_of_several_outputs_one_cannot_be_written(tmp_path: Path) -> None:
    """A refusal before any work leaves nothing, of the others neither."""
    paths = [tmp_path / f"out-{n}.gguf" for n in (1, 2, 3)]
    paths[2].write_bytes(OLD)
    with pytest.raises(DestinationError, match="exists already"), create(paths[0]), create(paths[1]):
        create(paths[2])
    assert list(tmp_path.iterdir()) == [paths[2]]


def test_what_an_earlier_run_did_outlives_a_refusal(tmp_path: Path, data: NDArray[np.uint8]) -> None:
    paths = [tmp_path / f"out-{n}.gguf" for n in (1, 2)]
    interrupt(paths[0], data)
    paths[1].write_bytes(OLD)
    with pytest.raises(DestinationError, match="exists already"), create(paths[0]):
        create(paths[1])
    with create(paths[0]) as sink:
        assert sink.resumed_nbytes == 8192


def test_a_sink_left_unsealed_leaves_nothing(dst: Path) -> None:
    with create(dst):
        pass
    assert not names(dst)


def n_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_are_closed(dst: Path, data: NDArray[np.uint8]) -> None:
    before = n_descriptors()
    interrupt(dst, data)
    for restart in (False, True):
        with create(dst, restart=restart, force=True) as sink:
            if restart:
                write(sink, data, 0, NBYTES)
                sink.seal()
    with pytest.raises(DestinationError):
        create(dst)
    with pytest.raises(DestinationError):
        create(dst, force=True, nbytes=1 << 60)
    assert n_descriptors() == before


def test_leaving_waits_for_writes(dst: Path, data: NDArray[np.uint8]) -> None:
    """A descriptor closed under a write could be another file's by then."""
    begun, go_on = threading.Event(), threading.Event()
    open_during_write = []

    def handle(call: Call) -> object:
        if call.name == "pwrite" and call.path.endswith(".part") and not begun.is_set():
            begun.set()
            go_on.wait()
            open_during_write.append(call.path)
        return call.do()

    def leave() -> None:
        sink.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        left.set()

    left = threading.Event()
    with watched(handle):
        sink = create(dst).__enter__()
        writer = threading.Thread(target=write, args=(sink, data, 0, 8192))
        writer.start()
        begun.wait()
        leaver = threading.Thread(target=leave)
        leaver.start()
        while not sink._is_closed:
            pass
        with pytest.raises(ValueError, match="after the sink was left"):
            write(sink, data, 8192, 16384)
        assert not left.is_set()
        go_on.set()
        writer.join()
        leaver.join()
    assert open_during_write == [str(dst.with_name("out.gguf.part"))]


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("force", [False, True])
def test_resumed(dst: Path, data: NDArray[np.uint8], force: bool) -> None:
    if force:
        dst.write_bytes(OLD)
    interrupt(dst, data, 16384, force=force)
    with create(dst, force=force) as sink:
        assert (sink.resumed_nbytes, sink.resumed_state) == (16384, {"n": [1, 16384]})
        assert not sink.notes
        with pytest.raises(ValueError, match="written twice"):
            write(sink, data, 8192, 16384)
        write(sink, data, 16384, NBYTES)
        sink.seal()
    assert dst.read_bytes() == data.tobytes()
    assert names(dst) == {"out.gguf"}


def test_resumed_twice(dst: Path, data: NDArray[np.uint8]) -> None:
    interrupt(dst, data, 8192)
    with pytest.raises(KeyboardInterrupt), create(dst) as sink:
        write(sink, data, 8192, 24576)
        sink.record(24576, {"n": [2, 2]})
        raise KeyboardInterrupt
    with create(dst) as sink:
        assert (sink.resumed_nbytes, sink.resumed_state) == (24576, {"n": [2, 2]})
        write(sink, data, 24576, NBYTES)
        sink.seal()
    assert dst.read_bytes() == data.tobytes()


def test_with_nothing_to_resume_it_starts_anew(dst: Path, data: NDArray[np.uint8]) -> None:
    with create(dst) as sink:
        assert (sink.resumed_nbytes, dict(sink.resumed_state), sink.notes) == (0, {}, ())
        write(sink, data, 0, NBYTES)
        sink.seal()
    assert dst.read_bytes() == data.tobytes()


def test_resume_does_not_imply_force(dst: Path, data: NDArray[np.uint8]) -> None:
    dst.write_bytes(OLD)
    interrupt(dst, data, force=True)
    left = {name: (dst.parent / name).read_bytes() for name in names(dst)}
    with pytest.raises(DestinationError, match="exists already"):
        create(dst)
    assert {name: (dst.parent / name).read_bytes() for name in names(dst)} == left


def test_another_conversion_is_not_resumed(dst: Path, data: NDArray[np.uint8]) -> None:
    interrupt(dst, data)
    left = {name: (dst.parent / name).read_bytes() for name in names(dst)}
    other = {"option outtype": "q8_0", "source b.safetensors": "56 78 cd"}
    with pytest.raises(SourceError) as caught:
        Sink.create(resolve(dst), NBYTES + 1, identity=other)
    for words in (
        "option outtype (was bf16, is q8_0)",
        "a.safetensors (removed)",
        "b.safetensors (added)",
        "output size",
    ):
        assert words in caught.value.message
    assert {name: (dst.parent / name).read_bytes() for name in names(dst)} == left


def test_restart_discards_what_is_there(dst: Path, data: NDArray[np.uint8]) -> None:
    interrupt(dst, data)
    inode = dst.with_name("out.gguf.part").stat().st_ino
    kept = os.open(dst.with_name("out.gguf.part"), os.O_RDONLY)  # so that its inode is not used again
    with create(dst, restart=True) as sink:
        assert not sink.notes
        assert sink.resumed_nbytes == 0
        assert dst.with_name("out.gguf.part").stat().st_ino != inode
        write(sink, data, 0, NBYTES)
        sink.seal()
    os.close(kept)
    assert dst.read_bytes() == data.tobytes()


@pytest.mark.parametrize("damage", ["shorter part", "longer part"])
def test_what_cannot_be_trusted_is_begun_anew(dst: Path, data: NDArray[np.uint8], damage: str) -> None:
    interrupt(dst, data, 16384)
    os.truncate(dst.with_name("out.gguf.part"), 8192 if damage == "shorter part" else NBYTES + 1)
    with create(dst) as sink:
        assert sink.resumed_nbytes == 0
        assert [note.code for note in sink.notes] == ["stale-part"]
        write(sink, data, 0, NBYTES)
        sink.seal()
    assert dst.read_bytes() == data.tobytes()
    assert names(dst) == {"out.gguf"}


def test_a_journal_alone_means_nothing(dst: Path, data: NDArray[np.uint8]) -> None:
    interrupt(dst, data)
    dst.with_name("out.gguf.part").unlink()
    with create(dst) as sink:
        assert (sink.resumed_nbytes, sink.notes) == (0, ())
        write(sink, data, 0, NBYTES)
        sink.seal()
    assert dst.read_bytes() == data.tobytes()


def stop_after_rename(dst: Path, data: NDArray[np.uint8]) -> None:
    """As a kill between the rename and the end does: the output is there, and so is the journal."""
    with create(dst, force=True) as sink:
        write(sink, data, 0, NBYTES)
        sink.seal({"n": [9, 9]})
        journal = dst.with_name("out.gguf.part.journal").read_bytes()
    dst.with_name("out.gguf.part.journal").write_bytes(journal)


def test_a_run_killed_after_its_rename_is_done(dst: Path, data: NDArray[np.uint8]) -> None:
    stop_after_rename(dst, data)
    inode = dst.stat().st_ino
    with create(dst) as sink:
        assert (sink.resumed_nbytes, sink.resumed_state) == (NBYTES, {"n": [9, 9]})
        assert sink.seal() == dst
    assert (dst.stat().st_ino, dst.read_bytes()) == (inode, data.tobytes())
    assert names(dst) == {"out.gguf"}


def test_a_finished_part_that_was_changed_is_begun_anew(dst: Path, data: NDArray[np.uint8]) -> None:
    with pytest.raises(KeyboardInterrupt), create(dst) as sink:
        write(sink, data, 0, NBYTES)
        sink.complete()
        raise KeyboardInterrupt
    part = dst.with_name("out.gguf.part")
    with part.open("r+b") as file:
        file.seek(20000)
        file.write(b"what")
    with create(dst) as sink:
        assert (sink.resumed_nbytes, [note.code for note in sink.notes]) == (0, ["stale-part"])
        write(sink, data, 0, NBYTES)
        sink.seal()
    assert dst.read_bytes() == data.tobytes()


def test_a_finished_part_is_published_as_often_as_it_takes(dst: Path, data: NDArray[np.uint8]) -> None:
    """Taking it up changes nothing of it by which it is known."""
    for attempt in range(3):
        with pytest.raises(KeyboardInterrupt), create(dst) as sink:
            assert sink.resumed_nbytes == (NBYTES if attempt else 0)
            if not attempt:
                write(sink, data, 0, NBYTES)
                sink.complete()
            raise KeyboardInterrupt
    with create(dst) as sink:
        sink.seal()
    assert dst.read_bytes() == data.tobytes()


@pytest.mark.parametrize("way", ["removed", "replaced"])
def test_only_the_file_that_was_written_becomes_the_destination(dst: Path, data: NDArray[np.uint8], way: str) -> None:
    dst.write_bytes(OLD)
    part = dst.with_name("out.gguf.part")
    with (
        pytest.raises(DestinationError, match="removed or replaced by another program"),
        create(dst, force=True) as sink,
    ):
        write(sink, data, 0, NBYTES)
        part.unlink()
        if way == "replaced":
            part.write_bytes(data[::-1].tobytes())
        sink.seal()
    assert dst.read_bytes() == OLD
    assert part.exists() == (way == "replaced")


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("way", ["directory", "link"])
def test_something_else_in_the_journal_s_place(tmp_path: Path, dst: Path, restart: bool, way: str) -> None:
    journal = dst.with_name("out.gguf.part.journal")
    if way == "directory":
        journal.mkdir()
    else:
        journal.symlink_to("elsewhere")
    with pytest.raises(DestinationError) as caught:
        create(dst, restart=restart)
    assert (
        str(caught.value)
        == f"{journal}: is not a regular file, but has the name of the unfinished output (move it away)"
    )
    assert names(dst) == {journal.name}


def test_an_old_file_can_go_before_its_successor_comes(dst: Path, data: NDArray[np.uint8]) -> None:
    dst.write_bytes(OLD)
    with create(dst, force=True) as sink:
        write(sink, data, 0, NBYTES)
        sink.complete()
        sink.withdraw_old()
        assert not dst.exists()
        sink.publish()
        sink.withdraw_old()  # it is no old one now
    assert dst.read_bytes() == data.tobytes()
    with pytest.raises(DestinationError), create(dst) as sink:
        raise AssertionError("without force there is nothing to withdraw")


@pytest.mark.parametrize("change", ["content", "file", "identity"])
def test_a_file_is_not_taken_for_the_one_that_was_renamed(dst: Path, data: NDArray[np.uint8], change: str) -> None:
    stop_after_rename(dst, data)
    identity = dict(IDENTITY)
    match change:
        case "content":
            dst.write_bytes(data[::-1].tobytes())
        case "file":
            dst.with_name("other").write_bytes(data.tobytes())
            dst.with_name("other").replace(dst)
        case "identity":
            identity["option outtype"] = "f16"
    before = dst.read_bytes()
    with pytest.raises(DestinationError, match="exists already"):
        Sink.create(resolve(dst), NBYTES, identity=identity)
    assert dst.read_bytes() == before
    with Sink.create(resolve(dst), NBYTES, identity=identity, force=True) as sink:
        assert sink.resumed_nbytes == 0
        write(sink, data, 0, NBYTES)
        sink.seal()
    assert names(dst) == {"out.gguf"}


def test_an_old_journal_does_not_outlive_a_new_run(dst: Path, data: NDArray[np.uint8]) -> None:
    stop_after_rename(dst, data)
    with create(dst, force=True, restart=True) as sink:
        assert not sink.notes
        write(sink, data, 0, NBYTES)
        sink.seal()
    assert names(dst) == {"out.gguf"}


def test_several_outputs_are_published_together(tmp_path: Path, data: NDArray[np.uint8]) -> None:
    """Stopped between two renames, the whole set is resumed: those that are there are recognised."""
    paths = [tmp_path / f"out-{n}.gguf" for n in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt), create(paths[0]) as one, create(paths[1]) as two, create(paths[2]) as three:
        for sink in (one, two, three):
            write(sink, data, 0, NBYTES)
            sink.complete({"n": [0, 1]})
        three.publish()
        raise KeyboardInterrupt
    with (
        create(paths[0]) as one,
        create(paths[1]) as two,
        create(paths[2]) as three,
    ):
        assert {sink.resumed_nbytes for sink in (one, two, three)} == {NBYTES}
        for sink in (three, two, one):
            sink.seal()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
