"""Change a source at a random moment of a command that reads it, over and over: `python -m tests.fault.shards`.

A shard, an adapter or a GGUF file is truncated, replaced by another file, or rewritten in place, while a process
converts, merges, quantises or verifies it. Whatever the moment, the process ends by itself: with the right bytes, where
all that changed had been read, or with exit code 3 and an error that names the file. It never ends by a signal, never
with other bytes, and never with the verdict that a file differs from a source that it was not compared with.

The change comes once the files are open: one that is being rewritten by then has the time of its rewriting already.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamconv
from benchmarks import adapters, shapes, vocabulary
from streamconv.errors import StreamconvError
from streamconv.gguf.reader import GGUFFile

SHAPE = shapes.Shape("made", 512, 1536, 8, 8, 4, (2, 5), vocabulary.SMALL, n_shards=2)  # 40 MB


def truncate(path: Path, chance: random.Random, other: bytes) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def replace(path: Path, chance: random.Random, other: bytes) -> None:
    """By a file of the same size, as a download does that is finished under another name."""
    new = path.with_suffix(".new")
    new.write_bytes(other)
    new.replace(path)


def rewrite(path: Path, chance: random.Random, other: bytes) -> None:
    """In place, from a random position on."""
    start = chance.randrange(len(other))
    with path.open("r+b") as file:
        file.seek(start)
        file.write(other[start:])


def write_anew(path: Path, chance: random.Random, other: bytes) -> None:
    """As `cp` does over a file that is there: it is emptied first."""
    path.write_bytes(other)


CHANGES: tuple[Callable[[Path, random.Random, bytes], None], ...] = (truncate, replace, rewrite, write_anew)


def _other_weights(path: Path) -> bytes:
    """The same header, and every weight another: some are numbers that no type of 16 bits holds, or none at all."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    if path.suffix == ".gguf":
        with GGUFFile.open(path) as file:
            start = file.data_offset
    content[start:] = content[start:].translate(bytes(value ^ 0x41 for value in range(256)))
    return bytes(content)


Begin = Callable[[int, int], None]


@dataclass(frozen=True)
class Command:
    """A command on the files of a source folder.

    Attributes:
        run: What it does in that folder, with `progress` and how sources are read; its output is "out.gguf" there.
        reads: Patterns of the files that may change meanwhile.
    """

    run: Callable[[Path, Begin, str], object]
    reads: tuple[str, ...] = ("model/*.safetensors",)


def _convert(outtype: str, **options: Any) -> Command:
    def run(folder: Path, begin: Begin, io: str) -> object:
        return streamconv.convert(
            folder / "model", folder / "out.gguf", outtype=outtype, io=io, threads=2, progress=begin, **options
        )

    return Command(run)


def _merge(folder: Path, begin: Begin, io: str) -> object:
    return streamconv.convert(
        folder / "model",
        folder / "out.gguf",
        adapters=[folder / "adapter"],
        outtype="bf16",
        io=io,
        threads=2,
        progress=begin,
    )


def _lora(folder: Path, begin: Begin, io: str) -> object:
    return streamconv.convert_adapter(
        folder / "adapter", folder / "model", folder / "out.gguf", io=io, threads=2, progress=begin
    )


def _quantize(folder: Path, begin: Begin, io: str) -> object:
    return streamconv.quantize(
        folder / "made.gguf", folder / "out.gguf", outtype="q8_0", io=io, threads=2, progress=begin
    )


def _verify(folder: Path, begin: Begin, io: str) -> object:
    return streamconv.verify(folder / "made.gguf", folder / "model", threads=2, progress=begin)


def _measure(folder: Path, begin: Begin, io: str) -> object:
    return streamconv.verify(folder / "made.gguf", folder / "model", threads=2, progress=begin, error=True)


ADAPTER, MADE = "adapter/*.safetensors", "made.gguf"
COMMANDS: dict[str, Command] = {
    "bf16": _convert("bf16"),
    "q8_0": _convert("q8_0"),
    "f16": _convert("f16"),
    "convert --verify": _convert("bf16", verify=True),
    "merge": Command(_merge, ("model/*.safetensors", ADAPTER)),
    "lora": Command(_lora, (ADAPTER,)),
    "quantize": Command(_quantize, (MADE,)),
    "verify": Command(_verify, ("model/*.safetensors", MADE)),
    "verify --error": Command(_measure, ("model/*.safetensors", MADE)),
}


class Trials:
    """One source folder that is made again for each trial, and what each command makes of it."""

    def __init__(self, directory: Path, io: str, commands: Sequence[str] = tuple(COMMANDS)) -> None:
        self.directory, self.io, self.commands = directory, io, commands
        self.whole, self.source = directory / "whole", directory / "source"
        self.whole.mkdir()
        shutil.copytree(shapes.checkpoint(SHAPE, directory / "cache"), self.whole / "model")
        shutil.copytree(adapters.adapter(SHAPE, directory / "cache"), self.whole / "adapter")
        streamconv.convert(self.whole / "model", self.whole / MADE, outtype="bf16")
        self.out = self.source / "out.gguf"
        self.expected: dict[str, bytes] = {}
        self.seconds: dict[str, float] = {}
        for command in commands:
            self._copy()
            pid = self._start(command)
            started = time.perf_counter()
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, (self.directory / "error").read_text()
            self.seconds[command] = time.perf_counter() - started
            self.expected[command] = self.out.read_bytes() if self.out.exists() else b""

    def trial(self, chance: random.Random, command: str | None = None) -> str:
        """What came of one change: "done", or the error's code. AssertionError on anything else."""
        command, change = command or chance.choice(self.commands), chance.choice(CHANGES)
        self._copy()
        file = chance.choice(sorted(path for one in COMMANDS[command].reads for path in self.source.glob(one)))
        other = _other_weights(file)
        pid = self._start(command)
        time.sleep(chance.random() ** 2 * self.seconds[command])  # most while it reads, some while it writes and syncs
        change(file, chance, other)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        what = f"{change.__name__} of {file.name} during {command}"
        if code == 0:
            found = self.out.read_bytes() if self.out.exists() else b""
            assert found == self.expected[command], f"other bytes after {what}"
            return "done"
        said = (self.directory / "error").read_text()
        assert code == 3 and file.name in said, f"exit {code} after {what}: {said}"
        assert not self.out.exists(), what
        return said.split()[0]

    def _copy(self) -> None:
        shutil.rmtree(self.source, ignore_errors=True)
        shutil.copytree(self.whole, self.source)
        (self.directory / "error").write_text("none")

    def _start(self, command: str) -> int:
        """The process of a command, once it has opened its sources and begins."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writing)
            os.read(reading, 1)
            os.close(reading)
            return pid
        code = 1

        def begin(done: int, total: int) -> None:
            if done == 0:
                os.write(writing, b".")

        try:
            COMMANDS[command].run(self.source, begin, self.io)
            code = 0
        except StreamconvError as error:
            (self.directory / "error").write_text(f"{error.code} {error}")
            code = error.exit_code
        except BaseException:
            (self.directory / "error").write_text(traceback.format_exc())
        finally:
            os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=300)
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument("--directory", type=Path, help="on the filesystem to try; default: that of temporary files")
    parser.add_argument("--io", choices=("mapped", "positioned"), default="mapped")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    chance, ends = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        trials = Trials(Path(name), options.io)
        for _ in range(options.changes):
            ends[trials.trial(chance)] += 1
    told = ", ".join(f"{count} {end}" for end, count in ends.most_common())
    print(f"{options.changes} changes of a file that is read ({options.io}): {told}; no signal, no other byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
