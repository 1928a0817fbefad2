"""Pair the tensors of a file by name with their expected rows, and visit them slab by slab on several threads.

tensors.py compares the slabs, errors.py measures them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from streamconv.engine.job import Job
from streamconv.engine.layout import slab_rows
from streamconv.errors import VerifyError
from streamconv.ggml.encode import Kernel
from streamconv.ggml.rows import Encode
from streamconv.gguf.entries import StoredTensor
from streamconv.gguf.names import spellings
from streamconv.gguf.reader import GGUFFile
from streamconv.lazy.node import Workspace, peak_nbytes
from streamconv.lazy.scratch import Scratch
from streamconv.threads import start_threads


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the file and its expected rows, in the type used for the comparison."""

    expected: Encode
    file: GGUFFile
    stored: StoredTensor

    @property
    def slab_rows(self) -> int:
        return slab_rows(self.expected)


Pairing = Callable[[Encode, GGUFFile, StoredTensor], Pair]
Visit = Callable[[Pair, range, Workspace], None]


def match(job: Job, files: Sequence[GGUFFile], pair: Pairing) -> Iterator[Pair]:
    """Yield each tensor of the job with the tensor of the same name, in any dialect, in the files.

    Raises:
        VerifyError: The files have other tensors, or one has another shape.
    """
    unclaimed = {name: (file, tensor) for file in files for name, tensor in file.tensors.items()}
    missing = []
    for step in job.steps:
        name = next((name for name in spellings(step.target) if name in unclaimed), None)
        if name is None:
            missing.append(step.target)
            continue
        file, stored = unclaimed.pop(name)
        if stored.shape != step.tensor.spec.shape:
            shapes = f"{list(stored.shape)}, but according to the source it should be {list(step.tensor.spec.shape)}"
            raise VerifyError(f"has shape {shapes}", file=file.path, tensor=name, code="shape-differs")
        yield pair(step.tensor, file, stored)
    for what, names in (("lacks", missing), ("unlike the source, has", list(unclaimed))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise VerifyError(
                f"the file {what} {names[0]}{more}", file=files[0].path, tensor=names[0], code="tensors-differ"
            )


@contextmanager
def unchanged(job: Job, files: Sequence[GGUFFile]) -> Iterator[None]:
    """Check after the block that files and sources have not changed during it.

    Raises:
        SourceError: One has changed. This replaces a difference found in the block.
    """
    try:
        yield
    except VerifyError:
        _check_unchanged(job, files)
        raise
    _check_unchanged(job, files)


def _check_unchanged(job: Job, files: Sequence[GGUFFile]) -> None:
    for file in files:
        file.file.check_unchanged()
    for shard in job.shards:
        shard.check_unchanged()


class _Visits:
    """Slabs in file order, for any number of threads; what each raises, by where it is in the files."""

    def __init__(self, pairs: Sequence[Pair], visit: Visit, kernel: Kernel) -> None:
        self._visit, self._kernel = visit, kernel
        self._todo = iter(
            (pair, range(start, min(start + pair.slab_rows, pair.expected.spec.n_rows)))
            for pair in sorted(pairs, key=lambda pair: pair.stored.offset)
            for start in range(0, pair.expected.spec.n_rows, pair.slab_rows)
        )
        self._scratch_nbytes = max((peak_nbytes(pair.expected, pair.slab_rows, kernel) for pair in pairs), default=0)
        self.total_nbytes = sum(pair.expected.spec.nbytes for pair in pairs)
        self.done_nbytes = 0
        self._lock, self.stop = threading.Lock(), threading.Event()
        self._failures = queue.SimpleQueue[tuple[int, int, BaseException]]()

    def work(self) -> None:
        """One thread's share."""
        workspace = Workspace(Scratch(self._scratch_nbytes), self._kernel)
        while not self.stop.is_set():
            with self._lock:
                item = next(self._todo, None)
            if item is None:
                return
            pair, rows = item
            try:
                self._visit(pair, rows, workspace)
                with self._lock:
                    self.done_nbytes += len(rows) * pair.expected.spec.row_nbytes
            except BaseException as error:  # raised again in the calling thread
                self._failures.put((pair.stored.offset, rows.start, error))
                self.stop.set()

    def settle(self) -> None:
        """Raises the first failure in file order, once no thread works."""
        found = []
        while not self._failures.empty():
            found.append(self._failures.get())
        if found:
            raise min(found, key=lambda failure: failure[:2])[2]


def visit_slabs(
    pairs: Sequence[Pair],
    visit: Visit,
    kernel: Kernel,
    *,
    threads: int,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], Exception | None],
) -> None:
    """Call `visit` with each slab, in file order, on `threads` threads with `kernel`; the first that raises counts.

    progress(done, total): of the bytes of the expected rows, from the calling thread.
    """
    visits = _Visits(pairs, visit, kernel)
    progress(0, visits.total_nbytes)
    workers = [threading.Thread(target=visits.work, daemon=True) for _ in range(max(1, threads))]
    try:
        start_threads(workers)
        for worker in workers:
            while worker.is_alive():
                worker.join(0.1)
                progress(visits.done_nbytes, visits.total_nbytes)
                if (reason := cancelled()) is not None:
                    raise reason
        progress(visits.done_nbytes, visits.total_nbytes)
    finally:
        visits.stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    visits.settle()
