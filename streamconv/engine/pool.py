"""Make an output file chunk by chunk. Every chunk depends only on the layout, so workers make them in any order.

A thread holds one chunk, and scratch memory while it makes it. Of several failures, the first in file order is raised.
A chunk counts as done only after its sources were checked for changes.
"""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streamconv.engine.layout import CHUNK_NBYTES, Io, Layout, MemoryProof, Step
from streamconv.errors import SourceError, StreamconvError
from streamconv.files.window import Window
from streamconv.ggml import encode as codecs
from streamconv.lazy.node import Readable, Workspace, read, read_lent
from streamconv.lazy.scratch import Scratch, aligned_buffer
from streamconv.threads import start_threads
from streamconv.timing import Stopwatch

RECORD_NBYTES = 128 << 20  # progress is synced and recorded each time this many more bytes are written


State = Mapping[str, list[int]]  # the tally as it is kept in a journal: [NaNs, infinities] by target


class Writer(Protocol):
    """The destination of chunks (output.sink.Sink)."""

    @property
    def resumed_nbytes(self) -> int: ...
    @property
    def resumed_state(self) -> State: ...
    def write(self, offset: int, view: NDArray[np.uint8]) -> None: ...
    def record(self, prefix_nbytes: int, state: State) -> None: ...


def fill_chunk(layout: Layout, start: int, out: NDArray[np.uint8], work: Workspace) -> None:
    """Fill `out` with the file's bytes from offset `start` on.

    A row that the border of a chunk cuts is made completely for both chunks.

    Raises:
        SourceError: A file cannot be read, or a value does not fit its type.
    """
    end = start + out.nbytes
    at = start
    at += layout.header.fill(out, start)
    index = max(0, bisect_right(layout.steps, at, key=lambda step: step.offset) - 1)
    for step in layout.steps[index:]:
        if step.offset >= end:
            break
        first, last = max(at, step.offset), min(end, step.offset + step.nbytes)
        if first < last:
            out[at - start : first - start] = 0  # padding
            _fill_step(step, first - step.offset, out[first - start : last - start], work)
            at = last
    out[at - start :] = 0


def _fill_step(step: Step, first: int, out: NDArray[np.uint8], work: Workspace) -> None:
    """Fill `out` with a tensor's bytes from its byte `first` on: slabs of whole rows, and cut rows at either end."""
    width = step.tensor.spec.row_nbytes
    filled = 0
    while filled < out.nbytes:
        row, cut = divmod(first + filled, width)
        if cut or out.nbytes - filled < width:
            n = min(width - cut, out.nbytes - filled)
            with work.scratch.frame():
                whole = work.scratch.take(width).view(np.uint8)
                work.counting = cut == 0  # a cut row is counted in the chunk that has its beginning
                _read(step, range(row, row + 1), whole, work)
                work.counting = True
                out[filled : filled + n] = whole[cut : cut + n]
        else:
            n = width * _fill_rows(step, range(row, row + (out.nbytes - filled) // width), out[filled:], work)
        filled += n


def _fill_rows(step: Step, rows: range, out: NDArray[np.uint8], work: Workspace) -> int:
    """Make as many of `rows` as one loan or one slab allows, at the beginning of `out`; return their number."""
    width = step.tensor.spec.row_nbytes
    lendable = step.tensor.lendable(rows, work)
    if lendable and read_lent(step.tensor, rows[:lendable], out[: lendable * width], work):
        return lendable
    n_rows = min(step.slab_rows, lendable or len(rows))
    _read(step, rows[:n_rows], out[: n_rows * width], work)
    return n_rows


def _read(step: Step, rows: range, out: NDArray[np.uint8], work: Workspace) -> None:
    try:
        read(step.tensor, rows, out, work)
    except codecs.EncodeError as error:
        for file in work.files:  # if one has changed, that is the error
            file.check_unchanged()
        largest = f"{_largest(step, work):.6g}"
        raise SourceError(
            f"{error.reason}; its largest finite magnitude is {largest}",
            tensor=step.target,
            hint="use --outtype bf16 or f32",
            code="value-range",
        ) from None


def _largest(step: Step, work: Workspace) -> float:
    """The largest finite magnitude of a tensor that could not be encoded; reads it again from the start."""
    values = step.tensor.parents[0]
    largest = 0.0
    for start in range(0, values.spec.n_rows, step.slab_rows):
        rows = range(start, min(start + step.slab_rows, values.spec.n_rows))
        with work.scratch.frame():
            slab = work.scratch.take(len(rows) * values.spec.row_nbytes).view(np.uint8)
            read(values, rows, slab, work)
            largest = max(largest, codecs.largest_finite(values.spec.dtype, slab))
    return largest


def state_of(tally: Mapping[str, codecs.Stats]) -> State:
    """The tally as it is kept in a journal."""
    return {name: [stats.n_nan, stats.n_inf] for name, stats in tally.items()}


def stream(
    layout: Layout,
    sink: Writer,
    proof: MemoryProof,
    *,
    advance: Callable[[int], None],
    cancelled: Callable[[], StreamconvError | None],
    stopwatch: Stopwatch,
) -> dict[str, codecs.Stats]:
    """Write every chunk that `sink` does not have yet.

    Args:
        layout: The file.
        sink: The destination.
        proof: The number of workers, and their memory.
        advance: Called in this thread with the number of bytes just completed.
        cancelled: Called between chunks; an error that it returns is raised.
        stopwatch: Times each phase.

    Returns:
        The counts of non-finite values by target.

    Raises:
        SourceError: A file cannot be read or has changed, or a value does not fit its type.
        DestinationError: A write failed.
    """
    pool = _Pool(layout, sink, proof, stopwatch)
    try:
        pool.start()
        pool.collect(advance, cancelled)
    finally:
        pool.stop()
    return pool.tally


class _Pool:
    """Workers that take the next chunk until none is left; the calling thread collects their results."""

    def __init__(self, layout: Layout, sink: Writer, proof: MemoryProof, stopwatch: Stopwatch) -> None:
        self.layout, self.sink, self.proof, self.stopwatch = layout, sink, proof, stopwatch
        self.tally = {name: codecs.Stats(*counts) for name, counts in sink.resumed_state.items()}
        self._n_chunks = -(-layout.nbytes // proof.chunk)
        whole = sink.resumed_nbytes >= layout.nbytes
        self._first = self._n_chunks if whole else sink.resumed_nbytes // proof.chunk
        self._next = self._first
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._finished: queue.SimpleQueue[tuple[int, dict[str, codecs.Stats] | BaseException]] = queue.SimpleQueue()
        n_threads = min(proof.workers + proof.writing, max(1, self._n_chunks - self._first))
        self._threads = [threading.Thread(target=self._work, name=f"worker-{n}", daemon=True) for n in range(n_threads)]
        # A thread needs one of these while it makes a chunk; while it writes, another thread can use it.
        self._workspaces: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
        kernel = codecs.best_kernel()
        for _ in range(min(proof.workers, n_threads)):
            window = Window(maps_all=proof.io is Io.MAPPED) if proof.window else None
            self._workspaces.put(Workspace(Scratch(proof.slab), kernel, stopwatch=stopwatch, window=window))

    def start(self) -> None:
        start_threads(self._threads)

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def collect(self, advance: Callable[[int], None], cancelled: Callable[[], StreamconvError | None]) -> None:
        """Collect results until the file is complete, and record the completed prefix as it grows."""
        prefix, recorded = self._first, min(self._first * self.proof.chunk, self.layout.nbytes)
        ahead: dict[int, dict[str, codecs.Stats]] = {}
        advance(recorded)
        while prefix < self._n_chunks:
            index, result = self._finished.get()
            if isinstance(result, BaseException):
                raise self._first_failure(index, result)
            advance(min(self.proof.chunk, self.layout.nbytes - index * self.proof.chunk))
            ahead[index] = result
            while prefix in ahead:
                self._count(ahead.pop(prefix))
                prefix += 1
            done = min(prefix * self.proof.chunk, self.layout.nbytes)
            # Records are at multiples of the largest chunk, so that a resumed run can use chunks of any size.
            if done - recorded >= RECORD_NBYTES and done % CHUNK_NBYTES[0] == 0 and done < self.layout.nbytes:
                with self.stopwatch.time("sync"):
                    self.sink.record(done, state_of(self.tally))
                recorded = done
            if (reason := cancelled()) is not None:
                raise reason

    def _count(self, counts: Mapping[str, codecs.Stats]) -> None:
        for name, stats in counts.items():
            self.tally[name] = self.tally.get(name, codecs.Stats(0, 0)) + stats

    def _first_failure(self, index: int, error: BaseException) -> BaseException:
        """The failure of the earliest chunk among those of all workers, so that it does not depend on timing."""
        self.stop()
        while not self._finished.empty():
            other, result = self._finished.get()
            if isinstance(result, BaseException) and other < index:
                index, error = other, result
        return error

    def _take(self) -> int | None:
        with self._lock:
            if self._stopping.is_set() or self._next >= self._n_chunks:
                return None
            self._next += 1
            return self._next - 1

    def _work(self) -> None:
        index = -1
        try:
            buffer = aligned_buffer(self.proof.chunk)
            while (taken := self._take()) is not None:
                index = taken
                start = index * self.proof.chunk
                out = buffer[: min(self.proof.chunk, self.layout.nbytes - start)]
                counts, files = self._fill(start, out)
                for file in files:
                    file.check_unchanged()
                with self.stopwatch.time("write"):
                    self.sink.write(start, out)
                self._finished.put((index, counts))
        except BaseException as error:  # raised again in the thread that collects
            self._stopping.set()
            self._finished.put((index, error))

    def _fill(self, start: int, out: NDArray[np.uint8]) -> tuple[dict[str, codecs.Stats], set[Readable]]:
        """Make one chunk in `out` as soon as a workspace is free; return its tally and the files that were read."""
        with self.stopwatch.time("wait"):
            work = self._workspaces.get()
        try:
            fill_chunk(self.layout, start, out, work)
            return work.tally, work.files
        finally:
            work.tally, work.files = {}, set()
            self._workspaces.put(work)
