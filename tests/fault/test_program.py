"""Whole conversions, killed, interrupted, starved of disk, and robbed of their sources."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from streamconv.cli import main
from streamconv.errors import DestinationError, SourceError
from streamconv.options import SplitOptions
from tests.families import build as families
from tests.fault.calls import Call, syncs_skipped, watched
from tests.fault.kills import kill_at_random
from tests.fault.program import Finished, Program, empty, make_source, small_steps
from tests.fault.trial import OLD, in_child, kill_self
from tests.raising import raises

WAYS = {"one file": SplitOptions(), "three parts": SplitOptions(max_tensors=14)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "Made-Model")


def counts(call: Call) -> bool:
    """Whether it changes something. To start a transfer does not; without direct writes each chunk would do so."""
    return call.changes_something and call.name != "sync_file_range"


def at_call(number: int, action: Callable[[], object]) -> Callable[[Call], object]:
    """A handler that acts before the call of this number that counts; syncs are not waited for."""
    seen = 0

    def handle(call: Call) -> object:
        nonlocal seen
        if counts(call):
            seen += 1
            if seen == number:
                action()
        return None if call.name in ("fsync", "fdatasync") else call.do()

    return handle


def count_calls(program: Program) -> int:
    calls: list[Call] = []

    def note(call: Call) -> object:
        calls.append(call)
        return call.do()

    with watched(note):
        program.run()
    return sum(map(counts, calls))


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_every_call(source: Path, tmp_path: Path, way: str) -> None:
    whole = Program(source, empty(tmp_path / "whole") / "out.gguf", WAYS[way])
    expected = Finished.of(whole)
    assert any(code == "non-finite" for code, _, _ in expected.warnings)
    n_calls = count_calls(whole)
    assert n_calls > 40
    n_resumed = 0
    # Of the parts, every third call, and all of those that put them in each other's place.
    numbers = [n for n in range(1, n_calls + 1) if way == "one file" or n % 3 == 0 or n > n_calls - 20]
    for number in numbers:
        program = Program(source, empty(tmp_path / str(number)) / "out.gguf", WAYS[way])
        program.put_old(set(expected.outputs))

        def work(program: Program = program, number: int = number) -> None:
            with watched(at_call(number, kill_self)):
                program.run()

        assert in_child(work) == signal.SIGKILL
        expected.assert_old_or_new(program)
        program.threads = 2
        with syncs_skipped():
            report = program.run()
        n_resumed += report.resumed
        expected.assert_same(program, report)
        shutil.rmtree(program.dst.parent)
    assert n_resumed > len(numbers) // 4


@pytest.mark.parametrize("replaces", [False, True])
def test_a_model_with_its_projector_killed_at_every_call(tmp_path: Path, replaces: bool) -> None:
    """Most of all between the renames of the two; the run that goes on needs no --force.

    Once both have their names, and the journal of one is gone, a further run is refused as after any finished one.
    """
    source = families.checkpoint("lfm2-vl", tmp_path / "LFM2-VL")
    whole = Program(source, empty(tmp_path / "whole") / "out.gguf", force=replaces)
    expected = Finished.of(whole)
    assert set(expected.outputs) == {"out.gguf", "mmproj-out.gguf"}
    shutil.rmtree(whole.dst.parent)
    whole.dst.parent.mkdir()
    n_calls, states = count_calls(whole), set()
    for number in [n for n in range(1, n_calls + 1) if n % 160 == 0 or n > n_calls - 14]:
        program = Program(source, empty(tmp_path / str(number)) / "out.gguf", force=replaces)
        program.put_old(set(expected.outputs) if replaces else set())

        def work(program: Program = program, number: int = number) -> None:
            with watched(at_call(number, kill_self)):
                program.run()

        assert in_child(work) == signal.SIGKILL
        states.add(tuple(sorted((name, data == OLD) for name, data in program.outputs().items())))
        if replaces:
            expected.assert_old_or_new(program)
        is_done = (
            program.outputs() == expected.outputs and not (program.dst.parent / "mmproj-out.gguf.part.journal").exists()
        )
        with syncs_skipped():
            if is_done and not replaces:
                with raises(DestinationError, code="exists"):
                    program.run()
                assert program.outputs() == expected.outputs
            else:
                expected.assert_same(program, program.run())
        shutil.rmtree(program.dst.parent)
    assert (("mmproj-out.gguf", False),) in states  # killed between the two


def test_killed_at_any_moment(source: Path, tmp_path: Path) -> None:
    chance = random.Random(5)
    expected = Finished.of(Program(source, empty(tmp_path / "whole") / "out.gguf"))
    n_kills = 0
    for number in range(10):
        program = Program(source, empty(tmp_path / str(number)) / "out.gguf", threads=3)
        program.put_old(set(expected.outputs))
        for _ in range(2):
            with syncs_skipped():
                n_kills += kill_at_random(program, chance.randrange(1, 20))
            expected.assert_old_or_new(program)
        expected.assert_same(program, program.run())
    assert n_kills >= 8


# ---------------------------------------------------------------- signals


def interrupted(program: Program, number: int, action: Callable[[], object], *options: str) -> int:
    """The command's exit code when `action` is done at its call of this number; stderr is left in a file."""
    codes, stderr = (program.dst.parent.parent / name for name in ("code", "stderr"))

    def work() -> None:
        arguments = ["convert", str(program.source), "-o", str(program.dst), "--outtype", "bf16", "--force", "--quiet"]
        with stderr.open("w") as file, redirect_stderr(file), small_steps(), watched(at_call(number, action)):
            codes.write_text(str(main([*arguments, *options])))

    assert in_child(work) == 0
    return int(codes.read_text())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", [1, 6, 13, 26, 37])
def test_signals(source: Path, tmp_path: Path, number: signal.Signals, code: int, moment: int) -> None:
    expected = Finished.of(Program(source, empty(tmp_path / "whole") / "out.gguf"))
    program = Program(source, empty(tmp_path / "out") / "out.gguf")
    program.dst.write_bytes(OLD)
    assert interrupted(program, moment, lambda: os.kill(os.getpid(), number)) == code
    message = (tmp_path / "stderr").read_text()
    assert message.count("\n") == 1
    assert "run it again" in message
    assert program.dst.read_bytes() == OLD
    left = program.left_behind()
    assert left == (set() if moment < 10 else {"out.gguf.part", "out.gguf.part.journal"})
    said = re.search(r"out\.gguf\.part \(([\d,]+) bytes\): ([\d,]+) bytes of \1 bytes are kept", message)
    assert (said is not None) == bool(left)
    report = program.run()
    # The record that a signal interrupts may be there, and not be counted.
    assert said is None or report.resumed_nbytes - (64 << 10) <= int(said[2].replace(",", "")) <= report.resumed_nbytes
    # The thread that writes makes 33 calls at most, even where the one that records comes late; a record takes 3.
    assert report.resumed >= (moment == 37)
    expected.assert_same(program, report)


# ---------------------------------------------------------------- disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("moment", [3, 12, 25, 34])
def test_a_disk_that_fails(source: Path, tmp_path: Path, code: int, moment: int) -> None:
    expected = Finished.of(Program(source, empty(tmp_path / "whole") / "out.gguf"))
    program = Program(source, empty(tmp_path / "out") / "out.gguf")
    program.dst.write_bytes(OLD)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    assert interrupted(program, moment, fail) == 5
    assert (tmp_path / "stderr").read_text().count("\n") == 1
    assert program.dst.read_bytes() == OLD
    assert bool(program.left_behind()) == (moment > 10)
    expected.assert_same(program, program.run())


# ---------------------------------------------------------------- sources


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def replace(shard: Path) -> None:
    other = shard.with_name("other")
    other.write_bytes(shard.read_bytes())
    other.replace(shard)


def rewrite(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(bytes(40))


@pytest.mark.parametrize("change", [truncate, replace, rewrite, Path.unlink], ids=lambda change: change.__name__)
@pytest.mark.parametrize("moment", [12, 20, 27])
def test_a_source_that_changes(source: Path, tmp_path: Path, change: Callable[[Path], None], moment: int) -> None:
    """The old file, our error, and nothing that could ever be resumed."""
    copy = shutil.copytree(source, tmp_path / "copy")
    shard = sorted(copy.glob("*.safetensors"))[-1]
    program = Program(copy, empty(tmp_path / "out") / "out.gguf")
    program.dst.write_bytes(OLD)
    assert interrupted(program, moment, lambda: change(shard)) == 3
    message = (tmp_path / "stderr").read_text()
    assert shard.name in message
    assert message.count("\n") == 1
    assert program.outputs() == {"out.gguf": OLD}
    assert not program.left_behind()


@pytest.mark.parametrize("change", [replace, rewrite])
def test_a_source_that_changed_before_resuming(source: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    program = Program(copy, empty(tmp_path / "out") / "out.gguf")
    assert interrupted(program, 26, lambda: os.kill(os.getpid(), signal.SIGINT)) == 130
    shard = sorted(copy.glob("*.safetensors"))[0]
    change(shard)
    os.utime(shard, ns=(1, 1))
    left = program.left_behind()
    with pytest.raises(SourceError, match=shard.name):
        program.run()
    assert program.left_behind() == left


def test_options_that_changed_before_resuming(source: Path, tmp_path: Path) -> None:
    program = Program(source, empty(tmp_path / "out") / "out.gguf")
    assert interrupted(program, 26, lambda: os.kill(os.getpid(), signal.SIGINT)) == 130
    assert interrupted(program, 10**6, kill_self, "--outtype", "q8_0") == 3
    assert "outtype" in (tmp_path / "stderr").read_text()


def test_what_changed_before_resuming_is_named(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    program = Program(copy, empty(tmp_path / "out") / "out.gguf")
    assert interrupted(program, 26, lambda: os.kill(os.getpid(), signal.SIGINT)) == 130
    assert interrupted(program, 10**6, kill_self, "--name", "Another") == 3
    assert "general.name (was Copy, is Another)" in (tmp_path / "stderr").read_text()
    for name, change, words in (
        ("config.json", ("1000000.0", "500000.0"), "lfm2.rope.freq_base (was 1000000.0, is 500000.0)"),
        ("tokenizer.json", ('"<|im_end|>"', '"<|im_enb|>"'), "tokenizer.ggml.tokens (changed)"),
    ):
        text = (copy / name).read_text()
        assert change[0] in text
        (copy / name).write_text(text.replace(*change))
        assert interrupted(program, 10**6, kill_self, "--resume") == 3
        assert words in (tmp_path / "stderr").read_text()
        (copy / name).write_text(text)
    program.run()
    assert not program.left_behind()


def test_two_runs_at_once(source: Path, tmp_path: Path) -> None:
    program = Program(source, empty(tmp_path / "out") / "out.gguf")
    errors: list[DestinationError] = []

    def second() -> None:
        if not errors:
            with raises(DestinationError, code="locked") as caught:
                program.run()
            errors.append(caught.value)

    with watched(at_call(14, second)):
        Program(source, program.dst).run()
    assert len(errors) == 1
    assert not program.left_behind()
