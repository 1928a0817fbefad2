"""Destinations that are refused before any work, with words that help, and the lock."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from streamconv.errors import DestinationError
from streamconv.output.destination import Place, open_locked, reserve_space, resolve
from tests.fault.calls import Call, watched
from tests.raising import raises


def test_siblings() -> None:
    place = Place(Path("/a/b.c.gguf"))
    assert (place.part, place.journal) == (Path("/a/b.c.gguf.part"), Path("/a/b.c.gguf.part.journal"))


def test_a_link_leads_to_its_target(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("there", "dangling"):
        (tmp_path / name).symlink_to(f"disk/{name}.gguf")
    (tmp_path / "disk" / "there.gguf").touch()
    for name in ("there", "dangling"):
        assert resolve(tmp_path / name).path == tmp_path / "disk" / f"{name}.gguf"


def test_a_relative_name_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(Path("out.gguf")).path == tmp_path / "out.gguf"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("directory", "is-folder"),
        ("fifo", "not-regular-file"),
        ("loop", "link-loop"),
        ("nul\0", "file-name"),
        ("\udfff", "file-name"),
        ("file/out.gguf", "folder-missing"),
        ("n" * 300, "name-too-long"),
    ],
)
def test_what_can_never_be_written(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with raises(DestinationError, code=words) as caught:
        resolve(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_devices_and_standard_streams_are_refused() -> None:
    for path in ("/dev/null", "/dev/full"):
        with raises(DestinationError, code="not-regular-file"):
            resolve(Path(path))
    reading, writing = os.pipe()
    try:
        with raises(DestinationError, code="not-regular-file"):
            resolve(Path(f"/dev/fd/{writing}"))
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("name", ["out.gguf", "out.gguf.part", "out.gguf.part.journal"])
@pytest.mark.parametrize("way", ["itself", "hard link", "symbolic link"])
def test_a_source_is_never_written_over(tmp_path: Path, name: str, way: str) -> None:
    source = tmp_path / (name if way == "itself" else "model.safetensors")
    source.write_bytes(b"weights")
    if way == "hard link":
        (tmp_path / name).hardlink_to(source)
    if way == "symbolic link":
        (tmp_path / name).symlink_to(source)
    with raises(DestinationError, code="output-is-source"):
        resolve(tmp_path / "out.gguf", {(source.stat().st_dev, source.stat().st_ino): source})


def test_another_run_has_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf.part"
    first = open_locked(path)
    assert first.is_new
    assert first.is_locked
    with raises(DestinationError, code="locked"):
        open_locked(path)
    assert path.exists()
    first.close()
    second = open_locked(path)
    assert not second.is_new
    second.close()
    second.close()


@pytest.mark.parametrize("change", ["removed", "renamed", "replaced"])
def test_a_lock_on_a_file_that_is_gone_is_no_lock(tmp_path: Path, change: str) -> None:
    """The first run ends between the second one's open and its lock."""
    path = tmp_path / "out.gguf.part"
    path.write_bytes(b"of the first run")
    changes: dict[str, Callable[[], object]] = {
        "removed": lambda: path.unlink(),
        "renamed": lambda: path.rename(tmp_path / "out.gguf"),
        "replaced": lambda: (tmp_path / "third").replace(path),
    }
    (tmp_path / "third").write_bytes(b"of a third run")
    done: list[object] = []

    def handle(call: Call) -> object:
        if call.name == "flock" and not done:
            done.append(changes[change]())
        return call.do()

    with watched(handle):
        part = open_locked(path)
    assert part.is_new == (change != "replaced")
    assert os.path.samestat(part.status(), path.stat())
    part.close()


def test_a_part_file_that_vanishes_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf.part"
    path.touch()

    def handle(call: Call) -> object:
        if call.name == "open" and not call.arguments[1] & os.O_CREAT:
            path.unlink()
        return call.do()

    with watched(handle):
        part = open_locked(path)
    assert part.is_new
    part.close()


def test_a_race_that_never_ends_is_given_up(tmp_path: Path) -> None:
    def handle(call: Call) -> object:
        if call.name == "flock":
            Path(call.path).unlink()
        return call.do()

    with watched(handle), raises(DestinationError, code="locked"):
        open_locked(tmp_path / "out.gguf.part")


@pytest.mark.parametrize("what", ["directory", "fifo", "link"])
def test_a_part_file_must_be_a_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "out.gguf.part"
    make: dict[str, Callable[[], None]] = {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("elsewhere"),
    }
    make[what]()
    with pytest.raises(DestinationError) as caught:
        open_locked(path)
    assert caught.value.file == str(path)
    assert not (tmp_path / "elsewhere").exists()


def test_without_locks_it_goes_on(tmp_path: Path) -> None:
    def handle(call: Call) -> object:
        if call.name == "flock":
            raise OSError(errno.ENOLCK, "no locks here")
        return call.do()

    with watched(handle):
        part = open_locked(tmp_path / "out.gguf.part")
    assert not part.is_locked
    part.close()


def test_a_failing_lock_is_a_failure(tmp_path: Path) -> None:
    def handle(call: Call) -> object:
        if call.name == "flock":
            raise OSError(errno.EIO, "broken")
        return call.do()

    with watched(handle), pytest.raises(OSError, match="broken"):
        open_locked(tmp_path / "out.gguf.part")


# ---------------------------------------------------------------- space


def volume(free: int, available: int, blocks: int = 10**6) -> os.statvfs_result:
    return os.statvfs_result((4096, 4096, blocks, free, available, 0, 0, 0, 0, 255))


def unreserved(call: Call) -> object:
    """A filesystem that cannot reserve."""
    if call.name == "fallocate":
        raise OSError(errno.EOPNOTSUPP, "")
    return call.do()


def test_space_is_reserved(tmp_path: Path) -> None:
    with (tmp_path / "part").open("wb") as file:
        reserve_space(file.fileno(), 3 << 20, tmp_path)
        assert os.fstat(file.fileno()).st_size == 3 << 20
        assert os.fstat(file.fileno()).st_blocks * 512 >= 3 << 20


def test_too_little_space_is_said_with_numbers(tmp_path: Path) -> None:
    with (tmp_path / "part").open("wb") as file, pytest.raises(DestinationError) as caught:
        reserve_space(file.fileno(), 1 << 60, tmp_path / "out.gguf")
    assert "needs 1,152,921,504,606,846,976 bytes" in caught.value.message
    assert "free" in caught.value.message
    assert caught.value.file == str(tmp_path / "out.gguf")


def test_what_cannot_fit_is_not_even_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserving until it fails would take all space from everybody else for a while."""
    monkeypatch.setattr(os, "fstatvfs", lambda _: volume(free=2, available=1))
    calls = []

    def handle(call: Call) -> object:
        calls.append(call.name)
        return call.do()

    with (tmp_path / "part").open("wb") as file, watched(handle):
        with pytest.raises(DestinationError, match="needs 8,193 bytes, and its filesystem has 4,096 free"):
            reserve_space(file.fileno(), 8193, tmp_path)
        assert "fallocate" not in calls
        reserve_space(file.fileno(), 8192, tmp_path)  # the superuser's share may do, the filesystem decides
        assert "fallocate" in calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("left", "message"),
    [(1, "no-space"), (9, "no-space")],
)
def test_the_filesystem_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, left: int, message: str
) -> None:
    """Its free space is told as it is afterwards, and only where that explains the refusal: a quota is less than it."""
    room = [volume(free=9, available=9), volume(free=left, available=left)]
    monkeypatch.setattr(os, "fstatvfs", lambda _: room.pop(0))

    def handle(call: Call) -> object:
        if call.name == "fallocate":
            raise OSError(code, "full")
        return call.do()

    with (tmp_path / "part").open("wb") as file, watched(handle):
        with raises(DestinationError, code=message) as caught:
            reserve_space(file.fileno(), 8192, tmp_path)
    assert caught.value.file == str(tmp_path)


def test_where_nothing_can_be_reserved_the_free_space_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda _: volume(free=9, available=1))
    with (tmp_path / "part").open("wb") as file, watched(unreserved):
        with pytest.raises(DestinationError, match="needs 4,097 bytes, and its filesystem has 4,096 free"):
            reserve_space(file.fileno(), 4097, tmp_path)
        reserve_space(file.fileno(), 4096, tmp_path)
        assert os.fstat(file.fileno()).st_size == 4096


def test_a_filesystem_that_does_not_tell_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda _: volume(free=0, available=0, blocks=0))
    with (tmp_path / "part").open("wb") as file, watched(unreserved):
        reserve_space(file.fileno(), 1 << 40, tmp_path)
        assert os.fstat(file.fileno()).st_size == 1 << 40


def test_what_is_there_already_needs_no_more_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "part").open("w+b") as file:
        reserve_space(file.fileno(), 1 << 20, tmp_path)
        monkeypatch.setattr(os, "fstatvfs", lambda _: volume(free=0, available=0))
        reserve_space(file.fileno(), 1 << 20, tmp_path)


def test_a_lock_that_is_only_looked_for_is_waited_for(tmp_path: Path) -> None:
    """A batch takes the lock for a moment to see whether a run has it."""
    path = tmp_path / "out.gguf.part.journal"
    path.touch()
    probe = os.open(path, os.O_RDWR)
    fcntl.flock(probe, fcntl.LOCK_EX)
    timer = threading.Timer(0.03, os.close, [probe])
    timer.start()
    file = open_locked(path)
    timer.join()
    assert file.is_locked
    file.close()
