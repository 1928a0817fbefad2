"""Writing past the page cache and all the ways in which a system can decline, split or fail it."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamconv.engine.layout import CHUNK_NBYTES
from streamconv.lazy.scratch import aligned_buffer
from streamconv.output import directio
from streamconv.output.directio import ChunkFile, rename_new, reserve, sync_directory
from tests.fault.calls import Call, Handler, watched
from tests.fault.trial import content

NBYTES = 3 * 65536 + 12288 + 5


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def fill(fd: int, path: Path, handler: Handler = lambda call: call.do(), shift: int = 0) -> list[Call]:
    """Write known bytes in four pieces with `handler` in between; the calls made. `shift` spoils the alignment."""
    calls = []

    def note(call: Call) -> object:
        calls.append(call)
        return handler(call)

    with watched(note):
        file = ChunkFile(fd, path)
        data = content(3, NBYTES)
        for offset in range(0, NBYTES, 65536):
            piece = data[offset : offset + 65536]
            buffer = aligned_buffer(65536 + shift)[shift : shift + piece.nbytes]
            buffer[:] = piece
            file.write(buffer, offset)
        file.sync()
        file.close()
    assert path.read_bytes() == data.tobytes()
    return calls


def direct_pieces(fd: int, calls: list[Call]) -> list[int]:
    """Lengths of the direct writes."""
    return [len(call.arguments[1]) for call in calls if call.name == "pwrite" and call.arguments[0] != fd]


def test_whole_pages_go_directly_and_the_rest_through_the_cache(fd: int, tmp_path: Path) -> None:
    calls = fill(fd, tmp_path / "file")
    through_cache = [call.arguments[1:] for call in calls if call.name == "pwrite" and call.arguments[0] == fd]
    assert [(len(view), offset) for view, offset in through_cache] == [(5, NBYTES - 5)]
    assert direct_pieces(fd, calls) == [65536] * 3 + [12288]


@pytest.mark.parametrize("page_nbytes", [4096, 16384, 65536])
def test_chunks_are_whole_pages_of_every_size(page_nbytes: int) -> None:
    """So two threads never write into one page, and each buffer starts where the system's own pages do."""
    assert not any(nbytes % page_nbytes for nbytes in CHUNK_NBYTES)
    assert not aligned_buffer(1).ctypes.data % os.sysconf("SC_PAGE_SIZE")


def test_an_unaligned_buffer_goes_through_the_cache(fd: int, tmp_path: Path) -> None:
    assert not direct_pieces(fd, fill(fd, tmp_path / "file", shift=64))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_direct_access_refused(fd: int, tmp_path: Path, code: int) -> None:
    def handle(call: Call) -> object:
        if call.name == "open" and call.arguments[1] & os.O_DIRECT:
            raise OSError(code, "")
        return call.do()

    calls = fill(fd, tmp_path / "file", handle)
    assert not direct_pieces(fd, calls)
    assert {call.name for call in calls} >= {"pwrite", "sync_file_range"}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_direct_writes_refused(fd: int, tmp_path: Path, code: int) -> None:
    def handle(call: Call) -> object:
        if call.name == "pwrite" and call.arguments[0] != fd:
            raise OSError(code, "")
        return call.do()

    assert len(direct_pieces(fd, fill(fd, tmp_path / "file", handle))) == 1  # asked once


def test_no_system_support_at_all(fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: none of the calls exists."""
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(directio, "WRITE_BEHIND_NBYTES", 1)
    monkeypatch.setattr(directio, "_libc", object)
    monkeypatch.delattr(os, "O_DIRECT")
    file = ChunkFile(fd, tmp_path / "file")
    assert not reserve(fd, 10)
    file.write(content(3, 10), 0)
    file.sync_data()
    file.close()
    rename_new(tmp_path / "file", tmp_path / "renamed")
    assert (tmp_path / "renamed").read_bytes() == content(3, 10).tobytes()


@pytest.mark.parametrize("seed", range(8))
def test_split_writes_are_continued(fd: int, tmp_path: Path, seed: int) -> None:
    """The system may take any part of a piece, and end within a block."""
    chance = random.Random(seed)

    def handle(call: Call) -> object:
        if call.name != "pwrite":
            return call.do()
        _, view, offset = call.arguments
        n_taken = min(len(view), chance.choice([512, 4096, 40_000, 1 + chance.randrange(len(view))]))
        return os.pwritev(fd, [view[:n_taken]], offset)

    assert sum(call.name == "pwrite" for call in fill(fd, tmp_path / "file", handle)) > 8


@pytest.mark.parametrize("direct", [True, False])
def test_a_write_that_takes_nothing_is_a_fault(fd: int, tmp_path: Path, direct: bool) -> None:
    def handle(call: Call) -> object:
        if call.name == "pwrite" and (call.arguments[0] != fd) == direct:
            return 0
        return call.do()

    with pytest.raises(OSError, match="error"):
        fill(fd, tmp_path / "file", handle)


@pytest.mark.parametrize("name", ["open", "pwrite", "fsync"])
def test_faults_come_through(fd: int, tmp_path: Path, name: str) -> None:
    def handle(call: Call) -> object:
        if call.name == name:
            raise OSError(errno.EIO, "broken")
        return call.do()

    with pytest.raises(OSError, match="broken"):
        fill(fd, tmp_path / "file", handle)


def without_direct(call: Call) -> object:
    if call.name == "open" and call.arguments[1] & os.O_DIRECT:
        raise OSError(errno.EINVAL, "")
    return call.do()


def test_the_page_cache_is_emptied_behind(fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directio, "WRITE_BEHIND_NBYTES", 65536)
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, length, advice: dropped.append((start, length, advice)))
    calls = fill(fd, tmp_path / "file", without_direct)
    ranges = [call.arguments for call in calls if call.name == "sync_file_range"]
    assert [(r[1].value, r[2].value) for r in ranges if r[3] == 2] == [
        (0, 65536), (65536, 65536), (131072, 65536), (196608, 12293),
    ]  # fmt: skip
    assert [(r[1].value, r[2].value) for r in ranges if r[3] == 7] == [(0, 65536), (65536, 65536), (131072, 65536)]
    assert dropped == [(start, 65536, os.POSIX_FADV_DONTNEED) for start in (0, 65536, 131072)]


def test_writing_behind_asks_another_descriptor_than_sync(
    fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells a disk's fault once to each descriptor: asked through `fd`, `sync` would not hear of it."""
    monkeypatch.setattr(directio, "WRITE_BEHIND_NBYTES", 1)
    calls = fill(fd, tmp_path / "file", without_direct)
    assert all(call.arguments[0] != fd for call in calls if call.name == "sync_file_range")
    assert [call.arguments[0] for call in calls if call.name == "fsync"] == [fd]


def test_a_fault_while_writing_behind_is_a_fault(fd: int, tmp_path: Path) -> None:
    def handle(call: Call) -> object:
        if call.name == "sync_file_range":
            raise OSError(errno.EIO, "broken")
        return without_direct(call)

    with pytest.raises(OSError, match="Input/output error"):
        fill(fd, tmp_path / "file", handle)


def test_an_interrupted_call_is_made_again(fd: int) -> None:
    n_calls = 0

    def handle(call: Call) -> object:
        nonlocal n_calls
        n_calls += 1
        if call.name == "fallocate" and n_calls < 3:
            raise InterruptedError(errno.EINTR, "")
        return call.do()

    with watched(handle):
        assert reserve(fd, 4096)
    assert n_calls == 3


def test_another_file_under_the_name(fd: int, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    (tmp_path / "other").replace(tmp_path / "file")
    with pytest.raises(OSError, match="replaced"):
        ChunkFile(fd, tmp_path / "file")


@pytest.mark.parametrize("code", [None, errno.EINVAL, errno.ENOSYS])
def test_a_new_name_is_never_an_old_one(tmp_path: Path, code: int | None) -> None:
    """With the system's own call, and without it."""

    def handle(call: Call) -> object:
        if call.name == "renameat2" and code:
            raise OSError(code, "")
        return call.do()

    src, dst = tmp_path / "src", tmp_path / "dst"
    src.write_bytes(b"new")
    dst.write_bytes(b"old")
    with watched(handle):
        with pytest.raises(FileExistsError) as caught:
            rename_new(src, dst)
        assert caught.value.filename == str(dst)
        assert (src.read_bytes(), dst.read_bytes()) == (b"new", b"old")
        dst.unlink()
        rename_new(src, dst)
    assert dst.read_bytes() == b"new"
    assert not src.exists()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_directories_that_cannot_be_synced(tmp_path: Path, code: int) -> None:
    refused = []

    def handle(call: Call) -> object:
        if call.name == "fsync":
            refused.append(call.path)
            raise OSError(code, "broken")
        return call.do()

    with watched(handle):
        if code == errno.EINVAL:
            sync_directory(tmp_path)
        else:
            with pytest.raises(OSError, match="broken"):
                sync_directory(tmp_path)
    assert refused == [str(tmp_path)]


def test_a_directory_that_cannot_be_listed(tmp_path: Path) -> None:
    refused = []

    def handle(call: Call) -> object:
        refused.append((call.name, call.path))
        raise PermissionError(errno.EACCES, "")

    with watched(handle):
        sync_directory(tmp_path)
    assert refused == [("open", str(tmp_path))]
