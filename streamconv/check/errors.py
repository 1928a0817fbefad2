"""Measure the relative RMS error of each tensor of a GGUF file against its source.

The gguf package dequantises the file's rows, so every type that it decodes can be measured, in files of any tool, made
with or without an importance matrix.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.check.pairs import Pair, match, unchanged, visit_slabs
from streamconv.engine.job import Job
from streamconv.engine.layout import THREAD_NBYTES, Step, slab_rows
from streamconv.errors import VerifyError
from streamconv.ggml.dequantise import ELEMENT_NBYTES, PIECE, decoded, is_decodable
from streamconv.ggml.element_types import TYPES
from streamconv.ggml.encode import best_kernel
from streamconv.ggml.rows import Encode
from streamconv.gguf.entries import StoredTensor, refuse
from streamconv.gguf.reader import GGUFFile
from streamconv.lazy.node import Workspace, peak_nbytes, read
from streamconv.report import RelativeErrors, TensorRelativeError

F32 = GGMLQuantizationType.F32
_DIGITS = 9  # reported digits; more would depend on the order in which threads add
_SUM_NBYTES = 3 * 8 * PIECE  # float64 copies of a piece and of the expected values, and their difference


def measure_errors(
    job: Job,
    files: Sequence[GGUFFile],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], Exception | None] = lambda: None,
) -> RelativeErrors:
    """Return the errors of all tensors of the files, which together are one model, against the rows of `job`.

    Args:
        threads: the number of threads for which memory was reserved (`measurer_nbytes`).
        progress: called as progress(done, total), of the tensors' bytes as F32.

    Raises:
        VerifyError: the files have other tensors than the source, or of types that cannot be decoded.
        SourceError: a strict loader would refuse the structure of a file.
    """
    for file in files:
        refuse(file.problems)
    pairs = list(match(job, files, _pair))
    sums = _Sums()
    with unchanged(job, files):
        visit_slabs(
            pairs,
            sums.add,
            best_kernel(),
            threads=threads,
            progress=progress or (lambda done, total: None),
            cancelled=cancelled,
        )
    return sums.errors(pairs)


def measurer_nbytes(steps: Iterable[Step]) -> int:
    """Return the memory in bytes that one thread needs to measure errors."""
    return THREAD_NBYTES + max((_worker_nbytes(_as_numbers(step.tensor)) for step in steps), default=0)


def _worker_nbytes(numbers: Encode) -> int:
    """A slab of numbers, the bytes that stand for them (no more than these), what making them takes, a piece's sums."""
    n_rows = slab_rows(numbers)
    slab = 2 * n_rows * numbers.spec.row_nbytes + peak_nbytes(numbers, n_rows, best_kernel())
    return slab + ELEMENT_NBYTES * PIECE + _SUM_NBYTES


def _as_numbers(made: Encode) -> Encode:
    return Encode(made.parents[0], made.target, F32)


def _pair(made: Encode, file: GGUFFile, stored: StoredTensor) -> Pair:
    if stored.type is None or not is_decodable(stored.type):
        raise VerifyError(
            f"the gguf package does not decode type {stored.type_name}, so its error cannot be measured",
            file=file.path,
            tensor=stored.name,
            code="type-unverifiable",
        )
    return Pair(_as_numbers(made), file, stored)


class _Sums:
    """Sums of squares by tensor: of the errors, and of the source's numbers. Called from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, tuple[float, float]] = {}

    def add(self, pair: Pair, rows: range, work: Workspace) -> None:
        expected = np.empty(len(rows) * pair.expected.spec.row_nbytes, dtype=np.uint8)
        read(pair.expected, rows, expected, work)
        error, norm = _squares(pair, rows, expected.view(np.float32))
        with self._lock:
            before = self._of.get(pair.stored.name, (0.0, 0.0))
            self._of[pair.stored.name] = before[0] + error, before[1] + norm

    def errors(self, pairs: Sequence[Pair]) -> RelativeErrors:
        found = [
            TensorRelativeError(
                pair.stored.name,
                pair.stored.type_name,
                pair.expected.spec.n_elements,
                pair.stored.nbytes or 0,
                _relative(*self._of.get(pair.stored.name, (0.0, 0.0))),
            )
            for pair in pairs
        ]
        found.sort(key=lambda one: math.inf if one.relative_rms is None else one.relative_rms, reverse=True)
        total = _relative(*(sum(pair[i] for pair in self._of.values()) for i in range(2)))
        return RelativeErrors(total, tuple(found))


def _squares(pair: Pair, rows: range, expected: NDArray[np.float32]) -> tuple[float, float]:
    """(sum of squared errors, sum of squares of what is expected) of some rows, in float64."""
    type_ = pair.stored.type or F32
    dtype = TYPES[type_].dtype
    stored = np.empty(expected.size // dtype.block * dtype.block_nbytes, dtype=np.uint8)
    first = rows.start * pair.expected.spec.n_columns
    pair.file.read_into(pair.stored, first // dtype.block * dtype.block_nbytes, stored)
    error = norm = 0.0
    n_blocks = max(1, PIECE // dtype.block)
    with np.errstate(all="ignore"):
        for start in range(0, expected.size // dtype.block, n_blocks):
            part = stored[start * dtype.block_nbytes : (start + n_blocks) * dtype.block_nbytes]
            should_be = expected[start * dtype.block : (start + n_blocks) * dtype.block].astype(np.float64)
            difference = decoded(part, type_) - should_be
            error += float(np.dot(difference, difference))
            norm += float(np.dot(should_be, should_be))
    return error, norm


def _relative(error: float, norm: float) -> float | None:
    """sqrt(error / norm), rounded to the reported digits; None if it is not a number."""
    if error == 0:
        return 0.0
    if not (math.isfinite(error) and math.isfinite(norm) and norm > 0):
        return None
    return float(f"{math.sqrt(error / norm):.{_DIGITS}g}")
