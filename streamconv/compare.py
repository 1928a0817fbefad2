"""A GGUF file beside what its source says: every tensor is made again and compared, row by row, in bounded memory.

Owns: the comparison. Does not own: what the tensors should be (a Job says that, as for writing), how a stranger's file
is read (gguf_reader.py). Any tool's file is taken: tensors are matched by name, in any order, each in the type it has.
Invariant: the reference is the general path: numpy's kernels even where a compiled one was built, whole slabs of rows
instead of chunks, and none of the writer's code.
"""

from __future__ import annotations

import queue
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from streamconv import codecs
from streamconv.dialects import RENAMES
from streamconv.errors import VerifyError
from streamconv.gguf_format import KeyValue, PackedArray, Scalar
from streamconv.gguf_reader import GGUFFile, Span, StoredTensor, refuse
from streamconv.graph import Encode, Workspace, peak_nbytes, read
from streamconv.job import Job
from streamconv.memory import resident_nbytes
from streamconv.plan import RUN_OVERHEAD_NBYTES, SLAB_NBYTES, WORKER_OVERHEAD_NBYTES, too_small
from streamconv.scratch import Scratch

VERIFIABLE = frozenset({"F32", "F16", "BF16", "Q8_0"})
RELATIVE_TOLERANCE = 1e-6  # of a float key: others round a double once more than we do
_VALUE_ARRAYS = 6  # of float32: two rows, what gguf makes on the way to either, and their comparison
COMPARED_ARRAYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


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
    limit: int,
    threads: int = 1,
    cancelled: Callable[[], Exception | None] = lambda: None,
) -> None:
    """Nothing, if the files `paths` together are what `job` would write, but for order and types.

    limit: of the process's resident set, in bytes; fewer than `threads` threads are used where it asks for that.
    VerifyError naming the first key, or tensor, row and values, that differ; SourceError where a file's structure is
    not what a strict loader takes; BudgetError where one thread is too many.
    """
    with ExitStack() as stack:
        stack.enter_context(codecs.reference_kernels())
        files = [stack.enter_context(GGUFFile.open(path)) for path in paths]
        for file in files:
            refuse(file.problems)
        _compare_keys(job, files[0])
        pairs = list(_match(job, files))
        workers = prove_memory([pair.expected for pair in pairs], limit=limit, threads=threads)
        _compare_tensors(pairs, workers, cancelled)
        for shard in job.shards:
            shard.check_unchanged()


def prove_memory(tensors: Sequence[Encode], *, limit: int, threads: int) -> int:
    """How many threads can compare `tensors` under `limit` bytes of resident memory; BudgetError where none can."""
    worker = WORKER_OVERHEAD_NBYTES + max((_worker_nbytes(tensor) for tensor in tensors), default=0)
    fixed = resident_nbytes()[0] + RUN_OVERHEAD_NBYTES
    if fixed + worker > limit:
        raise too_small(limit, fixed + worker)
    return max(1, min(threads, (limit - fixed) // worker))


def _worker_nbytes(tensor: Encode) -> int:
    """The slab as it should be and as it is, what making it takes, and one row's values where the two differ."""
    n_rows = _slab_rows(tensor)
    values = _VALUE_ARRAYS * 4 * tensor.spec.n_columns
    return 3 * n_rows * tensor.spec.row_nbytes + peak_nbytes(tensor, n_rows) + values


# ---------------------------------------------------------------- keys


def _compare_keys(job: Job, file: GGUFFile) -> None:
    """The architecture's keys, and the vocabulary, equal in value where both have them."""
    prefixes = (f"{job.architecture}.", "adapter.", "general.architecture")
    for expected in job.keys:
        found = file.keys.get(expected.key)
        if found is None or not (expected.key.startswith(prefixes) or expected.key in COMPARED_ARRAYS):
            continue
        for index, (ours, theirs) in enumerate(_paired(expected, found.value)):
            if not _equal(ours, theirs):
                place = f"[{index}]" if isinstance(expected.value, PackedArray) else ""
                raise VerifyError(
                    f"key {expected.key}{place} is {_shown(theirs)}, by its source it is {_shown(ours)}", file=file.path
                )


def _paired(expected: KeyValue, found: Scalar | Span) -> Iterator[tuple[Scalar | None, Scalar | None]]:
    from itertools import zip_longest

    ours = unpack(expected.value) if isinstance(expected.value, PackedArray) else iter([expected.value])
    theirs = found.values() if isinstance(found, Span) else iter([found])
    return zip_longest(ours, theirs)


def unpack(array: PackedArray) -> Iterator[Scalar]:
    """The values of a packed array, one by one."""
    view = memoryview(array.payload)
    if array.element != GGUFValueType.STRING:
        yield from np.frombuffer(view, dtype=_dtype(array.element)).tolist()
        return
    at = 0
    for _ in range(array.length):
        (nbytes,) = struct.unpack_from("<Q", view, at)
        yield bytes(view[at + 8 : at + 8 + nbytes]).decode("utf-8", "backslashreplace")
        at += 8 + nbytes


def _dtype(element: GGUFValueType) -> np.dtype[np.generic]:
    from streamconv.gguf_format import SCALAR_FORMATS

    return np.dtype(SCALAR_FORMATS[element])


def _equal(ours: Scalar | None, theirs: Scalar | None) -> bool:
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return abs(ours - theirs) <= RELATIVE_TOLERANCE * abs(ours)
    return ours == theirs


def _shown(value: Scalar | None) -> str:
    return "missing" if value is None else repr(value)[:80]


# ---------------------------------------------------------------- tensors


def _match(job: Job, files: Sequence[GGUFFile]) -> Iterator[_Pair]:
    """Each tensor of the job with the one of the files that bears its name in any dialect."""
    unclaimed = {name: (file, tensor) for file in files for name, tensor in file.tensors.items()}
    missing = []
    for step in job.steps:
        names = [step.target, *_aliases(step.target)]
        name = next((name for name in names if name in unclaimed), None)
        if name is None:
            missing.append(step.target)
            continue
        file, stored = unclaimed.pop(name)
        if stored.shape != step.tensor.spec.shape:
            shapes = f"{list(stored.shape)}, by its source {list(step.tensor.spec.shape)}"
            raise VerifyError(f"has shape {shapes}", file=file.path, tensor=name)
        if stored.type is None or stored.type.name not in VERIFIABLE:
            raise VerifyError(
                f"type {stored.type_name} cannot be made from the source here",
                file=file.path,
                tensor=name,
                hint=f"files of {', '.join(sorted(VERIFIABLE))} can be verified",
            )
        yield _pair(step.tensor, file, stored, stored.type)
    for what, names in (("lacks", missing), ("holds, and its source does not,", list(unclaimed))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise VerifyError(f"the file {what} {names[0]}{more}", file=files[0].path, tensor=names[0])


def _aliases(target: str) -> Iterator[str]:
    for renames in RENAMES.values():
        for ours, theirs in renames.items():
            if target == ours:
                yield theirs
            if target == theirs:
                yield ours


def _pair(made: Encode, file: GGUFFile, stored: StoredTensor, type_: GGMLQuantizationType) -> _Pair:
    expected = Encode(made.parents[0], stored.name, type_)
    return _Pair(expected, file, stored, _slab_rows(expected))


def _slab_rows(tensor: Encode) -> int:
    widest = max(tensor.spec.row_nbytes, tensor.parents[0].spec.row_nbytes, 1)
    return max(1, min(SLAB_NBYTES // widest, tensor.spec.n_rows))


def _compare_tensors(pairs: Sequence[_Pair], threads: int, cancelled: Callable[[], Exception | None]) -> None:
    """Slabs in file order on `threads` threads; the first difference in that order is the one raised."""
    todo = iter(
        (pair, range(start, min(start + pair.slab_rows, pair.expected.spec.n_rows)))
        for pair in sorted(pairs, key=lambda pair: pair.stored.offset)
        for start in range(0, pair.expected.spec.n_rows, pair.slab_rows)
    )
    lock, failures = threading.Lock(), queue.SimpleQueue[tuple[int, int, BaseException]]()
    stop = threading.Event()
    slab = max((peak_nbytes(pair.expected, pair.slab_rows) for pair in pairs), default=0)

    def work() -> None:
        workspace = Workspace(Scratch(slab))
        while not stop.is_set():
            with lock:
                item = next(todo, None)
            if item is None:
                return
            pair, rows = item
            try:
                _compare_rows(pair, rows, workspace)
            except BaseException as error:  # carried to the calling thread
                failures.put((pair.stored.offset, rows.start, error))
                stop.set()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(max(1, threads))]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.1)
                if (reason := cancelled()) is not None:
                    raise reason
    finally:
        stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    found = []
    while not failures.empty():
        found.append(failures.get())
    if found:
        raise min(found, key=lambda failure: failure[:2])[2]


def _compare_rows(pair: _Pair, rows: range, work: Workspace) -> None:
    width = pair.expected.spec.row_nbytes
    expected = np.empty(len(rows) * width, dtype=np.uint8)
    found = np.empty(len(rows) * width, dtype=np.uint8)
    try:
        read(pair.expected, rows, expected, work)
    except codecs.EncodeError as error:
        raise VerifyError(f"its source does not fit its type: {error.reason}", tensor=pair.stored.name) from None
    pair.file.read_into(pair.stored, rows.start * width, found)
    differing = (expected != found).reshape(len(rows), width).any(axis=1)
    for row in np.flatnonzero(differing).tolist():
        _compare_values(pair, rows.start + row, *(data[row * width :][:width] for data in (expected, found)))


def _compare_values(pair: _Pair, row: int, expected: NDArray[np.uint8], found: NDArray[np.uint8]) -> None:
    """VerifyError where a row of other bytes has other values too."""
    type_ = pair.expected.spec.type
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
    )


def _values(row: NDArray[np.uint8], type_: GGMLQuantizationType) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    return dequantize(row, type_)
