"""A small output of known content, written through a Sink as the converter does: what all fault tests run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamconv.errors import RunWarning
from streamconv.lazy.scratch import aligned_buffer
from streamconv.output.destination import resolve
from streamconv.output.sink import Sink

CHUNK_NBYTES = 8192
OLD = b"what was there before"


@lru_cache(maxsize=4)
def content(seed: int, nbytes: int) -> NDArray[np.uint8]:
    """Bytes without zeros, so that what was never written cannot pass for them."""
    return np.random.default_rng(seed).integers(1, 256, nbytes, dtype=np.uint8)


@dataclass
class Trial:
    """One output: `nbytes` made from `seed`, in chunks, with a record after every `chunks_per_record`."""

    dst: Path
    seed: int = 7
    nbytes: int = 11 * CHUNK_NBYTES + 4096 + 77  # the last piece has a whole page and a bit
    chunks_per_record: int = 3
    n_threads: int = 1
    force: bool = True
    progress: Callable[[], None] = lambda: None
    notes: tuple[RunWarning, ...] = field(default=(), init=False)
    resumed_nbytes: int = field(default=-1, init=False)

    @property
    def expected(self) -> NDArray[np.uint8]:
        return content(self.seed, self.nbytes)

    def state(self, prefix: int) -> dict[str, Any]:
        """What belongs to a prefix: a resumed run must get it back with just these bytes."""
        return {"sum": [int(self.expected[:prefix].sum()), prefix]}

    def run(self, *, restart: bool = False) -> Path:
        """Write the output, or what is missing of it."""
        data = self.expected
        identity = {"seed": str(self.seed)}
        with Sink.create(resolve(self.dst), self.nbytes, identity=identity, force=self.force, restart=restart) as sink:
            self.notes, self.resumed_nbytes = sink.notes, sink.resumed_nbytes
            assert sink.resumed_state == (self.state(sink.resumed_nbytes) if sink.resumed_nbytes else {})
            step = self.chunks_per_record * CHUNK_NBYTES
            with ThreadPoolExecutor(self.n_threads) as pool:
                for start in range(sink.resumed_nbytes, self.nbytes, step):
                    end = min(start + step, self.nbytes)
                    list(pool.map(lambda offset: self._write(sink, data, offset), range(start, end, CHUNK_NBYTES)))
                    if end < self.nbytes:
                        sink.record(end, self.state(end))
                        self.progress()
            return sink.seal(self.state(self.nbytes))

    def _write(self, sink: Sink, data: NDArray[np.uint8], offset: int) -> None:
        piece = data[offset : offset + CHUNK_NBYTES]
        buffer = aligned_buffer(CHUNK_NBYTES)[: piece.nbytes]
        buffer[:] = piece
        sink.write(offset, buffer)
        self.progress()

    def left_behind(self) -> set[str]:
        """Names beside the destination."""
        return {path.name for path in self.dst.parent.iterdir()} - {self.dst.name}

    def assert_old_or_new(self) -> None:
        """The promise: never anything between the old file and the new one."""
        if self.dst.exists():
            assert self.dst.read_bytes() in (OLD, self.expected.tobytes())

    def is_done(self) -> bool:
        return self.dst.exists() and self.dst.read_bytes() == self.expected.tobytes()

    def assert_done(self) -> None:
        assert self.is_done()
        assert not self.left_behind()


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; the signal that ended it, 0 where it came to its end, -1 where it raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
