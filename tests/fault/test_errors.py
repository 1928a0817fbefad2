"""Disks that fill up, fail, or give up at any call: one StreamconvError, the old file, and a run that can resume."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from streamconv.errors import DestinationError
from streamconv.output import directio
from tests.fault.calls import Call, syncs_skipped, watched
from tests.fault.trial import CHUNK_NBYTES, OLD, Trial, in_child
from tests.raising import raises


def fail_at(trial: Trial, number: int, code: int) -> str | None:
    """Run the trial with its call of this number failing; that call's name, None where there were fewer."""
    n_calls = 0
    failed = None

    def handle(call: Call) -> object:
        nonlocal n_calls, failed
        if call.changes_something and failed is None:
            n_calls += 1
            if n_calls == number:
                failed = f"{call.name} {Path(call.path).name}"
                raise OSError(code, os.strerror(code))
        return None if call.name in ("fsync", "fdatasync") else call.do()

    with watched(handle):
        trial.run()
    return failed


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_failing_call(tmp_path: Path, code: int) -> None:
    """Whichever call fails: before any work nothing stays, later the work does; the old file is untouched."""
    number = 0
    kept: list[int] = []
    nothing: list[int] = []
    while True:
        number += 1
        (tmp_path / str(number)).mkdir()
        trial = Trial(tmp_path / str(number) / "out.gguf")
        trial.dst.write_bytes(OLD)
        error = None
        try:
            if fail_at(trial, number, code) is None:
                break
        except DestinationError as exc:
            error = exc
        if error is None:  # only tidying up is allowed to fail unheard
            assert trial.is_done()
            continue
        assert "\n" not in str(error)
        assert error.hint
        trial.assert_old_or_new()
        if trial.is_done():  # renamed, and the directory's sync failed: the journal still knows it
            assert trial.left_behind() == {"out.gguf.part.journal"}
        else:
            assert trial.left_behind() in (set(), {"out.gguf.part", "out.gguf.part.journal"})
        (kept if trial.left_behind() else nothing).append(number)
        with syncs_skipped():
            trial.run()
        trial.assert_done()
    assert number > 30
    assert nothing == list(range(1, len(nothing) + 1))  # nothing stays of a run that had not begun
    assert len(kept) > 20


def test_the_disk_fills_up_all_the_same(tmp_path: Path) -> None:
    """Where a reservation is no promise (copy on write, thin volumes) the work so far is kept, and can go on."""
    trial = Trial(tmp_path / "out.gguf", force=False)
    written = 0

    def handle(call: Call) -> object:
        nonlocal written
        if call.name == "pwrite" and call.path.endswith(".part"):
            written += 1
            if written > 8:
                raise OSError(errno.ENOSPC, "")
        return call.do()

    with watched(handle), raises(DestinationError, code="no-space") as caught:
        trial.run()
    assert "again" in (caught.value.hint or "")
    assert trial.left_behind() == {"out.gguf.part", "out.gguf.part.journal"}
    trial.run()
    assert trial.resumed_nbytes == 6 * CHUNK_NBYTES
    trial.assert_done()


def test_a_full_disk_does_not_stop_the_journal(tmp_path: Path) -> None:
    """Its space is reserved with the output's, so that what others fill cannot stop a run."""
    reserved = {}

    def handle(call: Call) -> object:
        if call.name == "fallocate":
            reserved[Path(call.path).name] = (call.arguments[1], call.arguments[3].value)
        return call.do()

    trial = Trial(tmp_path / "out.gguf", force=False)
    with watched(handle):
        trial.run()
    mode, nbytes = reserved["out.gguf.part.journal"]
    assert mode == 1  # without a change of size
    assert nbytes >= 1024
    assert reserved["out.gguf.part"] == (0, trial.nbytes)


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """`ulimit -f`, for real: refused before any work."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        with raises(DestinationError, code="file-size-limit"):
            Trial(tmp_path / "out.gguf", force=False).run()
        assert not list(tmp_path.iterdir())

    assert in_child(work) == 0


@pytest.mark.parametrize("seed", range(5))
def test_short_writes(tmp_path: Path, seed: int) -> None:
    """Of the journal and of the output: what the system did not take is given again."""
    chance = random.Random(seed)

    def handle(call: Call) -> object:
        if call.name != "pwrite":
            return call.do()
        fd, view, offset = call.arguments
        n_taken = chance.choice([len(view), len(view), 1 + chance.randrange(len(view))])
        path = f"/proc/self/fd/{fd}"
        with open(path, "r+b", buffering=0) as file:  # noqa: PTH123
            return os.pwritev(file.fileno(), [view[:n_taken]], offset)

    trial = Trial(tmp_path / "out.gguf", force=False)
    with watched(handle):
        trial.run()
    trial.assert_done()


def refusing(*names: str, code: int = errno.EINVAL) -> Callable[[Call], object]:
    """A filesystem that lacks these calls; "direct" stands for O_DIRECT."""

    def handle(call: Call) -> object:
        is_direct = call.name == "open" and call.arguments[1] & os.O_DIRECT
        if call.name in names or (is_direct and "direct" in names):
            raise OSError(code, "")
        if call.name == "fsync" and "directories" in names and Path(call.path).is_dir():
            raise OSError(code, "")
        return call.do()

    return handle


@pytest.mark.parametrize(
    "names",
    [
        ("direct",),
        ("fallocate",),
        ("renameat2",),
        ("flock",),
        ("directories",),
        ("direct", "sync_file_range"),
        ("direct", "posix_fadvise"),
        ("direct", "fallocate", "renameat2", "flock", "directories", "sync_file_range", "posix_fadvise"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV], ids=errno.errorcode.get)
@pytest.mark.parametrize("force", [False, True])
def test_filesystems_that_can_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], force: bool, code: int
) -> None:
    monkeypatch.setattr(directio, "WRITE_BEHIND_NBYTES", 1)
    trial = Trial(tmp_path / "out.gguf", force=force, n_threads=2)
    with watched(refusing(*names, code=code)):
        trial.run()
    trial.assert_done()


def test_a_part_file_that_was_cut(tmp_path: Path) -> None:
    """Somebody else's hand in it is noticed before it becomes the destination."""
    trial = Trial(tmp_path / "out.gguf", force=False)

    def handle(call: Call) -> object:
        if call.name == "fsync" and call.path.endswith(".part"):
            os.truncate(call.path, 5)
        return call.do()

    with watched(handle), raises(DestinationError, code="output-changed"):
        trial.run()
    assert not trial.dst.exists()


def test_a_fault_while_removing_does_not_hide_the_first(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "out.gguf", force=False)

    def fail() -> None:
        raise ZeroDivisionError

    def handle(call: Call) -> object:
        if call.name == "unlink":
            raise OSError(errno.EIO, "")
        return call.do()

    trial.progress = fail
    with watched(handle), pytest.raises(ZeroDivisionError):
        trial.run()
