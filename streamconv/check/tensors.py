"""Compare a GGUF file with its source: every tensor is computed again and compared row by row, in bounded memory.

Files of any tool are accepted: tensors are matched by name, in any order, each in the type that it has. The reference
is computed along the general path, with the numpy kernels, in slabs of rows, and without the writer's code.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.budget import Budget, too_small
from streamconv.check.keys import compare_keys
from streamconv.engine.job import Job
from streamconv.engine.layout import MAX_WORKERS, MODULES_NBYTES, THREAD_NBYTES, MemoryProof, Step, slab_rows
from streamconv.errors import RunWarning, VerifyError
from streamconv.ggml import encode as codecs
from streamconv.ggml.element_types import VERIFIABLE
from streamconv.ggml.rows import Encode
from streamconv.gguf.names import spellings
from streamconv.gguf.reader import GGUFFile, StoredTensor, refuse
from streamconv.lazy.node import Workspace, peak_nbytes, read
from streamconv.lazy.scratch import Scratch
from streamconv.threads import start_threads

LISTED_NBYTES = 2 << 10  # what a tensor of the file takes in the lists of what is compared
_VALUE_ARRAYS = 6  # of float32: two rows, what gguf makes on the way to either, and their comparison


@dataclass(frozen=True, slots=True)
class _Pair:
    """A tensor of the file and the rows that it should have."""

    expected: Encode
    file: GGUFFile
    stored: StoredTensor
    slab_rows: int


def compare(
    job: Job,
    paths: Sequence[Path],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], Exception | None] = lambda: None,
) -> list[RunWarning]:
    """What is only another look of the files, if together they are what `job` would write, but for order and types.

    threads: as many as were reserved (`comparer_nbytes`).
    progress(done, total): of the tensors' bytes, called from the calling thread with 0, now and then, and at the end.
    VerifyError naming the first key, or tensor, row and values, that differ; SourceError where a file's structure is
    not what a strict loader takes.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(GGUFFile.open(path)) for path in paths]
        for file in files:
            refuse(file.problems)
        warnings = compare_keys(job, files[0])
        pairs = list(_match(job, files))
        _compare_tensors(pairs, threads, progress or (lambda done, total: None), cancelled)
        for shard in job.shards:
            shard.check_unchanged()
    return warnings


def comparer_nbytes(steps: Iterable[Step]) -> int:
    """What one thread takes to compare the tensors of a file with their sources."""
    return THREAD_NBYTES + max((_worker_nbytes(step.tensor) for step in steps), default=0)


def listed_nbytes(steps: Iterable[Step]) -> int:
    """What the lists of the tensors that are compared take."""
    return sum(1 for _ in steps) * LISTED_NBYTES


def prove_comparison(steps: Sequence[Step], budget: Budget, *, threads: int) -> MemoryProof:
    """How many threads can compare these tensors under the bound; BudgetError where none can."""
    budget.reserve("modules", MODULES_NBYTES)
    budget.settle()
    comparer, listed = comparer_nbytes(steps), listed_nbytes(steps)
    workers = max(1, min(threads, MAX_WORKERS, (budget.allowed - budget.held - listed) // comparer))
    comparing = workers * comparer + listed
    proof = MemoryProof(
        budget.allowed, dict(budget.terms), 0, 0, workers, comparing=comparing, largest=0, planning=budget.past
    )
    if proof.projected > budget.allowed:
        raise too_small(budget.allowed, proof.projected)
    return proof


def _worker_nbytes(tensor: Encode) -> int:
    """The slab as it should be and as it is, what making it takes, and one row's values where the two differ."""
    n_rows = slab_rows(tensor)
    values = _VALUE_ARRAYS * 4 * tensor.spec.n_columns
    return 3 * n_rows * tensor.spec.row_nbytes + peak_nbytes(tensor, n_rows) + values


# ---------------------------------------------------------------- tensors


def _match(job: Job, files: Sequence[GGUFFile]) -> Iterator[_Pair]:
    """Each tensor of the job with the one of the files that bears its name in any dialect."""
    unclaimed = {name: (file, tensor) for file in files for name, tensor in file.tensors.items()}
    missing = []
    for step in job.steps:
        name = next((name for name in spellings(step.target) if name in unclaimed), None)
        if name is None:
            missing.append(step.target)
            continue
        file, stored = unclaimed.pop(name)
        if stored.shape != step.tensor.spec.shape:
            shapes = f"{list(stored.shape)}, by its source {list(step.tensor.spec.shape)}"
            raise VerifyError(f"has shape {shapes}", file=file.path, tensor=name, code="shape-differs")
        if stored.type not in VERIFIABLE:
            raise VerifyError(
                f"type {stored.type_name} cannot be made from the source here",
                file=file.path,
                tensor=name,
                hint=f"files of {', '.join(type_.name for type_ in sorted(VERIFIABLE))} can be verified",
                code="type-unverifiable",
            )
        yield _pair(step.tensor, file, stored, stored.type)
    for what, names in (("lacks", missing), ("holds, and its source does not,", list(unclaimed))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise VerifyError(
                f"the file {what} {names[0]}{more}", file=files[0].path, tensor=names[0], code="tensors-differ"
            )


def _pair(made: Encode, file: GGUFFile, stored: StoredTensor, type_: GGMLQuantizationType) -> _Pair:
    rows, *weights = made.parents
    expected = Encode(rows, stored.name, type_, *weights)
    return _Pair(expected, file, stored, slab_rows(expected))


class _Comparison:
    """Slabs in file order, for any number of threads; what each finds, by where it is in the files."""

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        self._todo = iter(
            (pair, range(start, min(start + pair.slab_rows, pair.expected.spec.n_rows)))
            for pair in sorted(pairs, key=lambda pair: pair.stored.offset)
            for start in range(0, pair.expected.spec.n_rows, pair.slab_rows)
        )
        self._scratch_nbytes = max((peak_nbytes(pair.expected, pair.slab_rows) for pair in pairs), default=0)
        self.total_nbytes = sum(pair.expected.spec.nbytes for pair in pairs)
        self.done_nbytes = 0
        self._lock, self.stop = threading.Lock(), threading.Event()
        self._failures = queue.SimpleQueue[tuple[int, int, BaseException]]()

    def work(self) -> None:
        """One thread's share."""
        workspace = Workspace(Scratch(self._scratch_nbytes), codecs.REFERENCE)
        while not self.stop.is_set():
            with self._lock:
                item = next(self._todo, None)
            if item is None:
                return
            pair, rows = item
            try:
                _compare_rows(pair, rows, workspace)
                with self._lock:
                    self.done_nbytes += len(rows) * pair.expected.spec.row_nbytes
            except BaseException as error:  # carried to the calling thread
                self._failures.put((pair.stored.offset, rows.start, error))
                self.stop.set()

    def settle(self) -> None:
        """Raises the first failure in file order, once no thread works."""
        found = []
        while not self._failures.empty():
            found.append(self._failures.get())
        if found:
            raise min(found, key=lambda failure: failure[:2])[2]


def _compare_tensors(
    pairs: Sequence[_Pair],
    threads: int,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], Exception | None],
) -> None:
    """Slabs in file order on `threads` threads; the first difference in that order is the one raised."""
    comparison = _Comparison(pairs)
    progress(0, comparison.total_nbytes)
    workers = [threading.Thread(target=comparison.work, daemon=True) for _ in range(max(1, threads))]
    try:
        start_threads(workers)
        for worker in workers:
            while worker.is_alive():
                worker.join(0.1)
                progress(comparison.done_nbytes, comparison.total_nbytes)
                if (reason := cancelled()) is not None:
                    raise reason
        progress(comparison.done_nbytes, comparison.total_nbytes)
    finally:
        comparison.stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    comparison.settle()


def _compare_rows(pair: _Pair, rows: range, work: Workspace) -> None:
    width = pair.expected.spec.row_nbytes
    expected = np.empty(len(rows) * width, dtype=np.uint8)
    found = np.empty(len(rows) * width, dtype=np.uint8)
    try:
        read(pair.expected, rows, expected, work)
    except codecs.EncodeError as error:
        raise VerifyError(
            f"its source does not fit its type: {error.reason}", tensor=pair.stored.name, code="value-range"
        ) from None
    pair.file.read_into(pair.stored, rows.start * width, found)
    differing = (expected != found).reshape(len(rows), width).any(axis=1)
    for row in np.flatnonzero(differing).tolist():
        _compare_values(pair, rows.start + row, *(data[row * width :][:width] for data in (expected, found)))


def _compare_values(pair: _Pair, row: int, expected: NDArray[np.uint8], found: NDArray[np.uint8]) -> None:
    """VerifyError where a row of other bytes has other values too."""
    type_ = pair.expected.type
    ours, theirs = _values(expected, type_), _values(found, type_)
    # Two NaNs are the same value, whatever their payload: other tools make them quiet.
    differ = (ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs))
    if not differ.any():
        return
    column = int(np.argmax(differ))
    spec = pair.expected.spec
    where = f"element {row}" if len(spec.shape) == 1 else f"row {row}, column {column}"
    raise VerifyError(
        f"{where} is {theirs[column]:.9g}, by its source it is {ours[column]:.9g} "
        f"({type_.name}; {np.count_nonzero(differ)} of {differ.size} values of the row differ)",
        file=pair.file.path,
        tensor=pair.stored.name,
        code="value-differs",
    )


def _values(row: NDArray[np.uint8], type_: GGMLQuantizationType) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    return dequantize(row, type_)
