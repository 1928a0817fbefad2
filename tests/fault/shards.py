"""Change a shard at a random moment of a conversion that maps it, over and over: `python -m tests.fault.shards`.

A shard is truncated, replaced by another file, or rewritten in place, while a process converts it from mapped pages.
Whatever the moment, the process ends by itself: with the right bytes, where all that changed had been read, or with
exit code 3 and an error that names the shard. It never ends by a signal, and never with other bytes.

The change comes once the shards are open: one that is being rewritten by then has the time of its rewriting already.
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
from collections.abc import Callable
from pathlib import Path

import streamconv
from benchmarks import shapes, vocabulary
from streamconv.errors import StreamconvError

SHAPE = shapes.Shape("made", 512, 1536, 8, 8, 4, (2, 5), vocabulary.SMALL, n_shards=2)  # 40 MB
OUTTYPES = ("bf16", "q8_0", "f16")


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def replace(path: Path, chance: random.Random) -> None:
    """By a file of the same size, as a download does that is finished under another name."""
    other = path.with_suffix(".new")
    other.write_bytes(_other_weights(path))
    other.replace(path)


def rewrite(path: Path, chance: random.Random) -> None:
    """In place, from a random position on."""
    content = _other_weights(path)
    start = chance.randrange(len(content))
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content[start:])


def write_anew(path: Path, chance: random.Random) -> None:
    """As `cp` does over a file that is there: it is emptied first."""
    content = _other_weights(path)
    path.write_bytes(content)


CHANGES: tuple[Callable[[Path, random.Random], None], ...] = (truncate, replace, rewrite, write_anew)


def _other_weights(path: Path) -> bytes:
    """The same header, and every weight another."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = content[start:].translate(bytes(value ^ 1 for value in range(256)))
    return bytes(content)


class Conversion:
    """One source folder that is made again for each trial, and what each type of it should be."""

    def __init__(self, directory: Path, io: str) -> None:
        self.directory, self.io = directory, io
        self.whole = shapes.checkpoint(SHAPE, directory / "cache")
        self.source, self.out = directory / "source", directory / "out.gguf"
        self.expected, self.seconds = {}, {}
        for outtype in OUTTYPES:
            self._copy()
            pid = self._start(outtype)
            started = time.perf_counter()
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            self.seconds[outtype] = time.perf_counter() - started
            self.expected[outtype] = self.out.read_bytes()

    def trial(self, chance: random.Random) -> str:
        """What came of one change: "done", or the error's code. AssertionError on anything else."""
        outtype, change = chance.choice(OUTTYPES), chance.choice(CHANGES)
        self._copy()
        shard = chance.choice(shapes.shard_paths(self.source))
        pid = self._start(outtype)
        time.sleep(chance.random() ** 2 * self.seconds[outtype])  # most while it reads, some while it writes and syncs
        change(shard, chance)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        what = f"{change.__name__} of {shard.name} during {outtype}"
        if code == 0:
            assert self.out.read_bytes() == self.expected[outtype], f"other bytes after {what}"
            return "done"
        said = (self.directory / "error").read_text()
        assert code == 3 and shard.name in said, f"exit {code} after {what}: {said}"
        assert not self.out.exists(), what
        return said.split()[0]

    def _copy(self) -> None:
        shutil.rmtree(self.source, ignore_errors=True)
        shutil.copytree(self.whole, self.source)
        for path in self.directory.glob("out.gguf*"):
            path.unlink()
        (self.directory / "error").write_text("none")

    def _start(self, outtype: str) -> int:
        """The process that converts, once it has opened its sources and begins."""
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
            streamconv.convert(self.source, self.out, outtype=outtype, io=self.io, threads=2, progress=begin)
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
        conversion = Conversion(Path(name), options.io)
        for _ in range(options.changes):
            ends[conversion.trial(chance)] += 1
    told = ", ".join(f"{count} {end}" for end, count in ends.most_common())
    print(f"{options.changes} changes of a shard during a conversion ({options.io}): {told}; no signal, no other byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
