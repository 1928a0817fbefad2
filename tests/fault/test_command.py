"""The command as people call it: real signals to its process, disks that cannot be read, places not to write."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamconv.cli import main
from tests import tiny
from tests.fault import stopped
from tests.fault.program import Program, empty, make_source, small_steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_stopped_by_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    stops = stopped.stop_and_resume(stopped.Program.make(tmp_path), random.Random(number), [number])
    assert stops


# ---------------------------------------------------------------- a source's disk


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "Made-Model")


def path_of(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()


def failing_read(monkeypatch: pytest.MonkeyPatch, after: int, fail: Callable[[int], int]) -> None:
    """os.preadv asks `fail`, with its descriptor, from its call of this number on that reads weights."""
    real, n_calls = os.preadv, 0

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        nonlocal n_calls
        is_weights = path_of(fd).suffix == ".safetensors"
        n_calls += is_weights
        return fail(fd) if is_weights and n_calls > after else real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


def fail_with(code: int) -> Callable[[int], int]:
    def fail(_: int) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("after", [1, 3, 12, 40])
def test_a_disk_that_cannot_be_read(
    source: Path, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """File and offset are named; what was written before stays, and is continued from once the disk is back."""
    program = Program(source, empty(tmp_path / "out") / "out.gguf")
    arguments = ["convert", str(source), "-o", str(program.dst), "--outtype", "bf16", "--quiet", "--threads", "1"]
    arguments += ["--io", "positioned"]
    with monkeypatch.context() as patch, small_steps():
        failing_read(patch, after, fail_with(errno.EIO))
        assert main(arguments) == 3
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert ".safetensors: cannot be read at byte " in message
    assert os.strerror(errno.EIO) in message
    assert program.outputs() == {}
    assert bool(program.left_behind()) == (after >= 12)
    with small_steps():
        assert main([*arguments, "--resume"]) == 0
    left = program.dst.read_bytes()
    program.run()
    assert program.dst.read_bytes() == left


def test_a_file_that_shrinks_between_two_reads(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mapped file would end the process here, by SIGBUS; a positioned read says how far it came."""
    program = Program(source, empty(tmp_path / "out") / "out.gguf")

    def shrink(fd: int) -> int:
        os.truncate(path_of(fd), 4096)
        return 0

    failing_read(monkeypatch, 8, shrink)
    with small_steps():
        assert (
            main(["convert", str(source), "-o", str(program.dst), "--quiet", "--threads", "1", "--io", "positioned"])
            == 3
        )
    message = capsys.readouterr().err
    assert ".safetensors: ends at byte " in message
    assert list(program.dst.parent.iterdir()) == []


# ---------------------------------------------------------------- where not to write


def test_places_not_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.lfm2(tmp_path / "source")
    weights = source / "model.safetensors"
    (tmp_path / "link.gguf").symlink_to(weights)
    os.link(weights, tmp_path / "hard.gguf")
    (tmp_path / "there.gguf").write_bytes(b"old")
    before = weights.read_bytes()
    for dst, words in {
        str(weights): "source",
        str(tmp_path / "link.gguf"): "source",
        str(tmp_path / "hard.gguf"): "source",
        str(source): "directory",
        str(tmp_path / "none" / "x.gguf"): "none",
        "/proc/x.gguf": "/proc",
        "/dev/full": "/dev/full",
        "/dev/null": "/dev/null",
        str(tmp_path / ("x" * 300)): "name",
    }.items():
        assert main(["convert", str(source), "-o", dst, "--force", "--quiet"]) == 5, dst
        message = capsys.readouterr().err
        assert words in message, message
        assert message.count("\n") == 1
    assert main(["convert", str(source), "-o", str(tmp_path / "there.gguf"), "--quiet"]) == 5
    assert "--force" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source", "link.gguf", "hard.gguf", "there.gguf"}
    assert weights.read_bytes() == before
    assert (tmp_path / "there.gguf").read_bytes() == b"old"


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """Said before any work, and not by SIGXFSZ."""
    source = tiny.lfm2(tmp_path / "source")
    (tmp_path / "out").mkdir()
    words = [sys.executable, "-m", "streamconv", "convert", str(source), "-o", str(tmp_path / "out" / "x.gguf")]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_is_full(tmp_path: Path, unbuffered: str) -> None:
    """Whether it fails in each line or at the end, where the interpreter has some words of its own."""
    source = str(tiny.lfm2(tmp_path / "source"))
    for words in (["inspect", source], ["convert", source, "-o", str(tmp_path / "x.gguf"), "--json"], ["--help"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "streamconv", *words],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            )
        assert done.returncode == 5, done.stderr
        assert done.stderr.count("\n") == 1
        assert "standard output" in done.stderr
    absent = [sys.executable, "-m", "streamconv", "inspect", str(tmp_path / "absent"), "--json"]
    with Path("/dev/full").open("w") as full:
        failed = subprocess.run(absent, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (3, 1)


# Runs the command where the names that only Linux has are missing, as they are on macOS.
WITHOUT_LINUX = """
import os, sys
for name in "sched_getaffinity memfd_create posix_fadvise fdatasync O_DIRECT copy_file_range".split():
    delattr(os, name)
from streamconv.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="takes away what Linux has")
def test_a_system_without_the_calls_of_linux(source: Path, tmp_path: Path) -> None:
    out, usual = tmp_path / "out.gguf", tmp_path / "usual.gguf"
    commands = (["convert", source, "-o", out], ["verify", out, "--source", source])
    for words in commands:
        command = [sys.executable, "-c", WITHOUT_LINUX, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert main(["convert", str(source), "-o", str(usual), "--quiet"]) == 0
    assert out.read_bytes() == usual.read_bytes()
