"""Compare a GGUF file with its source: every tensor is computed again and compared row by row, in bounded memory.

Files of any tool are accepted: tensors are matched by name, in any order, each in the type that it has. The reference
is computed along the general path, with kernels that share nothing with the compiled ones that write (numpy, and plain
C for block types if it was built), in slabs of rows, and without the writer's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.budget import Budget, too_small
from streamconv.check.keys import compare_keys
from streamconv.check.pairs import Pair, match, unchanged, visit_slabs
from streamconv.engine.job import Job
from streamconv.engine.layout import MAX_WORKERS, MODULES_NBYTES, THREAD_NBYTES, MemoryProof, Step, slab_rows
from streamconv.errors import RunWarning, VerifyError
from streamconv.ggml import encode as codecs
from streamconv.ggml.dequantise import decoded, is_decodable
from streamconv.ggml.element_types import TYPES, VERIFIABLE
from streamconv.ggml.rows import Encode
from streamconv.gguf.entries import StoredTensor, refuse
from streamconv.gguf.reader import GGUFFile
from streamconv.lazy.node import Workspace, peak_nbytes, read

LISTED_NBYTES = 2 << 10  # memory of a tensor in the lists for the comparison
_VALUE_ARRAYS = 6  # float32 arrays: two rows, gguf's intermediate results for each, and their comparison


def compare(
    job: Job,
    files: Sequence[GGUFFile],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], Exception | None] = lambda: None,
) -> list[RunWarning]:
    """Compare files with what `job` would write, up to order and types. Return warnings for harmless differences.

    Args:
        job: what the files should contain.
        files: the parts, open.
        threads: the number of threads for which memory was reserved (`comparer_nbytes`).
        progress: called from this thread with (bytes done, bytes in total): at the start, regularly, and at the end.
        cancelled: returns the exception with which to stop, or None.

    Raises:
        VerifyError: a difference; the message names the first key, or the tensor, row and values.
        SourceError: a strict loader would refuse the structure of a file.
    """
    for file in files:
        refuse(file.problems)
    warnings = compare_keys(job, files[0])
    with unchanged(job, files):
        visit_slabs(
            list(match(job, files, _pair)),
            _compare_rows,
            codecs.independent_kernel(),
            threads=threads,
            progress=progress or (lambda done, total: None),
            cancelled=cancelled,
        )
    return warnings


def comparer_nbytes(steps: Iterable[Step]) -> int:
    """Return the memory in bytes that one thread needs to compare tensors with their sources."""
    return THREAD_NBYTES + max((_worker_nbytes(step.tensor) for step in steps), default=0)


def listed_nbytes(steps: Iterable[Step]) -> int:
    """Return the memory in bytes of the lists of compared tensors."""
    return sum(1 for _ in steps) * LISTED_NBYTES


def prove_comparison(
    steps: Sequence[Step], budget: Budget, *, threads: int, comparer: int | None = None
) -> MemoryProof:
    """Return a proof of how many threads can compare these tensors within the memory bound.

    Args:
        steps: the tensors.
        budget: the memory bound.
        threads: the maximum number of threads.
        comparer: the memory in bytes that one thread needs; by default, to compare bytes.

    Raises:
        BudgetError: not even one thread fits.
    """
    budget.reserve("modules", MODULES_NBYTES)
    budget.settle()
    comparer, listed = comparer or comparer_nbytes(steps), listed_nbytes(steps)
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


def _pair(made: Encode, file: GGUFFile, stored: StoredTensor) -> Pair:
    rows, *weights = made.parents
    is_kept = stored.type is not None and TYPES[stored.type].dtype == rows.spec.dtype  # whatever it is
    if stored.type is None or not (is_kept or stored.type in VERIFIABLE):
        raise VerifyError(
            f"type {stored.type_name} cannot be verified",
            file=file.path,
            tensor=stored.name,
            hint=f"these types can be verified: {', '.join(type_.name for type_ in sorted(VERIFIABLE))}",
            code="type-unverifiable",
        )
    return Pair(Encode(rows, stored.name, stored.type, *weights), file, stored)


def _compare_rows(pair: Pair, rows: range, work: Workspace) -> None:
    width = pair.expected.spec.row_nbytes
    expected = np.empty(len(rows) * width, dtype=np.uint8)
    found = np.empty(len(rows) * width, dtype=np.uint8)
    try:
        read(pair.expected, rows, expected, work)
    except codecs.EncodeError as error:
        raise VerifyError(
            f"the source's values do not fit its type: {error.reason}", tensor=pair.stored.name, code="value-range"
        ) from None
    pair.file.read_into(pair.stored, rows.start * width, found)
    differing = (expected != found).reshape(len(rows), width).any(axis=1)
    for row in np.flatnonzero(differing).tolist():
        _compare_values(pair, rows.start + row, *(data[row * width :][:width] for data in (expected, found)))


def _compare_values(pair: Pair, row: int, expected: NDArray[np.uint8], found: NDArray[np.uint8]) -> None:
    """Raise VerifyError if a row with different bytes also has different values."""
    type_ = pair.expected.type
    ours, theirs = _values(expected, type_), _values(found, type_)
    # Two NaNs count as equal, whatever their payloads: other tools make them quiet.
    differ = (ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs))
    if not differ.any():
        return
    column = int(np.argmax(differ))
    spec = pair.expected.spec
    where = f"element {row}" if len(spec.shape) == 1 else f"row {row}, column {column}"
    raise VerifyError(
        f"{where} is {theirs[column]:.9g}, but according to the source it should be {ours[column]:.9g} "
        f"({type_.name}; {np.count_nonzero(differ)} of {differ.size} values of the row differ)",
        file=pair.file.path,
        tensor=pair.stored.name,
        code="value-differs",
    )


def _values(row: NDArray[np.uint8], type_: GGMLQuantizationType) -> NDArray[np.generic]:
    """The numbers of a row; what gguf has no numbers of, integers as they are."""
    return decoded(row, type_) if is_decodable(type_) else row.view(TYPES[type_].dtype.view)
