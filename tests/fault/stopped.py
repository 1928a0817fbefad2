"""The whole command in its own process, stopped by real signals; signals.py runs this.

Builds a checkpoint, starts a child that runs the command and reports each chunk that it wrote, and checks the state
afterwards. Records are made small, so that a run of a fraction of a second has many.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests import tiny

OLD = b"what was there before"
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
# By then the command has given its signals back, and Python takes a while to end.
EXIT_CODES_WHEN_DONE = {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: -signal.SIGTERM, signal.SIGKILL: 0}

# Small chunks and records; a byte on the pipe for each chunk.
_CHILD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from streamconv.engine import layout as plan
from streamconv.api import run
from streamconv.engine import pool as stream
from streamconv.output import sink
from streamconv.cli import main
reports = int(sys.argv[1])
plan.CHUNK_NBYTES = stream.CHUNK_NBYTES = (1 << 16,)
stream.RECORD_NBYTES = 1 << 18
write = sink.Sink.write
def reported(self, offset, view):
    write(self, offset, view)
    os.write(reports, b".")
sink.Sink.write = reported
sys.exit(main(sys.argv[2:]))
"""


@dataclass
class Program:
    """One conversion of `src` to `dst`, run as often as it takes."""

    src: Path
    dst: Path
    options: Sequence[str] = ("--outtype", "f32", "--threads", "2")

    @classmethod
    def make(cls, directory: Path) -> Program:
        """A checkpoint of 2 MB in `directory`, and a destination that holds something."""
        src = tiny.llama(directory / "src", ff=1100, n_layers=3, dtype="BF16")
        (directory / "out").mkdir()
        dst = directory / "out" / "model.gguf"
        dst.write_bytes(OLD)
        return cls(src, dst)

    @cached_property
    def expected(self) -> str:
        """The digest of an undisturbed run's file."""
        dst = self.dst.parent.parent / "undisturbed.gguf"
        Program(self.src, dst, self.options).run()
        return digest(dst)

    def command(self) -> list[str]:
        return ["convert", str(self.src), "-o", str(self.dst), "--force", "--quiet", *self.options]

    def run(self) -> None:
        """To its end, which must be a good one."""
        running = Running(self.command())
        running.steps(1 << 30)
        code, printed = running.end()
        assert code == 0, printed

    def stop_at(self, n_steps: int, number: signal.Signals) -> Stopped:
        """Stopped by a signal when it has written `n_steps` chunks, or so."""
        running = Running(self.command())
        running.steps(n_steps)
        started = time.monotonic()
        running.process.send_signal(number)
        running.steps(1 << 30)
        code, printed = running.end()
        return Stopped(code, printed, time.monotonic() - started)

    def left_behind(self) -> set[str]:
        return {path.name for path in self.dst.parent.iterdir()} - {self.dst.name}

    def assert_old_or_new(self) -> None:
        assert self.dst.read_bytes() == OLD or digest(self.dst) == self.expected

    def assert_done(self) -> None:
        assert digest(self.dst) == self.expected
        assert not self.left_behind()


@dataclass(frozen=True)
class Stopped:
    """How a run ended that was sent a signal, and how long that took."""

    code: int
    printed: str
    seconds: float


class Running:
    """A child, and the pipe on which it reports."""

    def __init__(self, words: Sequence[str]) -> None:
        self._reports, reports = os.pipe()
        child = [sys.executable, "-c", _CHILD, str(reports), *words]
        self.process = subprocess.Popen(
            child, pass_fds=(reports,), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        os.close(reports)

    def steps(self, n: int) -> None:
        """Wait until it has written `n` more chunks, or ended."""
        while n and os.read(self._reports, 1):
            n -= 1

    def end(self) -> tuple[int, str]:
        """(exit code, all that was printed) once it has ended."""
        printed = self.process.communicate()[0]
        os.close(self._reports)
        return self.process.returncode, printed


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stop_and_resume(program: Program, chance: random.Random, numbers: Sequence[signal.Signals]) -> list[Stopped]:
    """Stop the program at up to four random moments, check what must hold after each, and let it finish."""
    stops = []
    for _ in range(chance.randrange(1, 5)):
        number = chance.choice(numbers)
        stopped = program.stop_at(chance.randrange(1, 60), number)
        if stopped.code in (0, EXIT_CODES_WHEN_DONE[number]):  # it was faster
            program.assert_done()
            return stops
        assert stopped.code == EXIT_CODES[number], stopped.printed
        if number != signal.SIGKILL:
            assert "run it again to continue" in stopped.printed
            assert stopped.printed.count("\n") == 1, stopped.printed
        program.assert_old_or_new()
        stops.append(stopped)
    program.run()
    program.assert_done()
    return stops
