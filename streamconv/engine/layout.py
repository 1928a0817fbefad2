"""The position of each byte of an output, and the proof that making it fits in memory. No file is touched.

The layout fixes the order and offsets of tensors, the size of slabs and chunks, and the number of workers. The bytes of
the output depend only on header and steps, never on memory, chunks or threads.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any

from gguf.constants import GGMLQuantizationType

from streamconv.budget import MIB, Budget, too_small
from streamconv.errors import no_memory
from streamconv.files.window import WINDOW_NBYTES
from streamconv.ggml.encode import best_kernel
from streamconv.ggml.rows import Encode
from streamconv.gguf.format import Header, KeyValue, TensorInfo, align, encode_header
from streamconv.lazy.node import LazyTensor, peak_nbytes
from streamconv.lazy.scratch import Overdraft, padded_nbytes

# The rows of a slab are read and encoded while they are in the cache. Measured in benchmarks/LOG.md.
SLAB_NBYTES = 1 << 19
# The sizes of a chunk, which one worker makes and writes at a time, preferred first; all are multiples of any page and
# disk block.
CHUNK_NBYTES = (4 * MIB, 2 * MIB, 1 * MIB, MIB // 4)
# The number of chunks being written in addition to those being made, preferred first. A disk with a queue is faster
# with several writes at once: benchmarks/LOG.md.
CHUNKS_WRITING = (4, 2, 0)
THREAD_NBYTES = MIB // 2  # a thread's stack, its Python frames, allocator slack
MODULES_NBYTES = 4 * MIB  # modules and objects loaded during a run (model card, progress bar, report)
MAX_WORKERS = 256  # more than the cores of any machine that this is meant for


class Io(Enum):
    """How sources are read: mapped in windows, read at offsets (POSITIONED), or AUTO, the better way for each file."""

    AUTO = "auto"
    MAPPED = "mapped"
    POSITIONED = "positioned"


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor that will be written.

    Attributes:
        target: Its name in the file.
        rows: Its rows before encoding.
        sources: The names of the stored tensors that it is computed from.
        type: Its type in the file.
        weights: The importance of each column, see `Encode`.
    """

    target: str
    rows: LazyTensor
    sources: tuple[str, ...]
    type: GGMLQuantizationType
    weights: LazyTensor | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the output.

    Attributes:
        target: Its name in the file.
        tensor: Its encoded rows.
        sources: The names of the stored tensors that it is computed from.
        offset: Of its first byte, from the start of the file.
        slab_rows: The number of rows in a slab.
    """

    target: str
    tensor: Encode
    sources: tuple[str, ...]
    offset: int
    slab_rows: int

    @property
    def nbytes(self) -> int:
        return self.tensor.spec.nbytes

    @property
    def scratch_nbytes(self) -> int:
        """The scratch memory that a worker needs: for a slab, and for a row that the border of a chunk cuts."""
        return padded_nbytes(self.tensor.spec.row_nbytes) + peak_nbytes(self.tensor, self.slab_rows, best_kernel())


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole output file before memory is considered: header bytes, then steps in order of their offsets."""

    header: Header
    steps: tuple[Step, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class MemoryProof:
    """The resources of a run, and the terms whose sum is the most memory that is resident at any time.

    Sizes are in bytes.

    Attributes:
        allowed: The limit.
        held: Memory held throughout, by name: the process, and everything read for the plan.
        slab: The scratch memory of one worker.
        chunk: The size of a chunk, which a worker makes and writes at a time.
        workers: How many chunks are made at the same time.
        writing: How many more chunks can be written at the same time, so that workers and disk do not wait for each
            other.
        window: The size of a worker's mapped window on a source; 0 if sources are not mapped.
        io: How sources are read.
        largest: The size of the largest file that is written; no more memory of chunks than this is used.
        comparing: The memory for comparing the result with its source, after writing; 0 if it is not compared.
        comparers: The number of threads that compare.
        planning: The most memory that was held while planning, and the name of its largest part.
    """

    allowed: int
    held: Mapping[str, int]
    slab: int
    chunk: int
    workers: int
    writing: int = 0
    window: int = 0
    io: Io = Io.POSITIONED
    largest: int = 1 << 63
    comparing: int = 0
    comparers: int = 0
    planning: tuple[int, str] = (0, "")

    @property
    def terms(self) -> dict[str, int]:
        """The memory at the moment of highest use, by name. The sum is `projected`."""
        n_threads = self.workers + self.writing
        phases = {
            "chunks": min(n_threads * self.chunk, self.largest),
            "scratch": self.workers * self.slab,
            "windows": self.workers * self.window,
            "threads": n_threads * THREAD_NBYTES,
        }
        held, most, of = sum(self.held.values()), *self.planning
        if max(self.comparing, most - held) > sum(phases.values()):
            phases = {"verification": self.comparing} if self.comparing > most - held else {of: most - held}
        return {name: nbytes for name, nbytes in {**self.held, **phases}.items() if nbytes}

    @property
    def projected(self) -> int:
        """The most memory that will be resident at any time."""
        return sum(self.terms.values())

    @property
    def memory(self) -> dict[str, Any]:
        """The proof as it is shown in reports."""
        return {
            "allowed": self.allowed,
            "projected": self.projected,
            "terms": self.terms,
            "workers": self.workers,
            "io": (Io.MAPPED if self.window else Io.POSITIONED).value,
        }


def make_layout(keys: Sequence[KeyValue], tensors: Sequence[PlacedTensor]) -> Layout:
    """The layout of a file.

    Args:
        keys: The metadata, in the order in which it is written.
        tensors: The tensors, likewise.

    Raises:
        ValueError: A name is duplicate or too long (`encode_header`).
    """
    infos, offset = [], 0
    encoded = [Encode(tensor.rows, tensor.target, tensor.type, tensor.weights) for tensor in tensors]
    for tensor in encoded:
        infos.append(TensorInfo(tensor.target, tensor.spec.shape, tensor.type, offset))
        offset = align(offset + tensor.spec.nbytes)
    header = encode_header(keys, infos)
    steps = tuple(
        Step(info.name, made, placed.sources, header.nbytes + info.offset, slab_rows(made))
        for placed, made, info in zip(tensors, encoded, infos, strict=True)
    )
    return Layout(header, steps, header.nbytes + offset)


def slab_rows(tensor: Encode) -> int:
    """The number of rows in a slab: as many as fit in SLAB_NBYTES before and after encoding, at least `least_rows`."""
    widest = max(tensor.spec.row_nbytes, tensor.parents[0].spec.row_nbytes)
    wanted = max(SLAB_NBYTES // max(widest, 1), tensor.least_rows)
    return max(1, min(wanted, tensor.spec.n_rows))


def prove_memory(
    layouts: Sequence[Layout],
    budget: Budget,
    *,
    threads: int,
    io: Io = Io.POSITIONED,
    comparer: int = 0,
    listed: int = 0,
) -> MemoryProof:
    """Choose the number of workers, the size of chunks and the way of reading that fit in memory.

    Args:
        layouts: The files to write, one after another.
        budget: The memory that is already held, with everything parsed and the headers made.
        threads: The number of workers wanted. There are fewer only if they do not fit even with the smallest chunk.
        io: How sources are read. AUTO maps them if that leaves room for all workers.
        comparer: The memory of one thread that compares the result with its source; 0 if it is not compared.
        listed: The memory for the list of all comparisons, shared by the threads.

    Raises:
        BudgetError: Not even one worker, or one comparing thread, fits; the message has the limit that is needed.
    """
    budget.reserve("modules", MODULES_NBYTES)
    budget.settle()
    steps = [step for layout in layouts for step in layout.steps]
    slab = max((step.scratch_nbytes for step in steps), default=0)
    window = 0 if io is Io.POSITIONED else WINDOW_NBYTES
    largest = max((layout.nbytes for layout in layouts), default=0)

    past = budget.past

    def proof(workers: int, chunk: int, writing: int) -> MemoryProof:
        # Each thread makes at least two chunks: with only one, it would end before others have started.
        n_threads = max(1, min(workers + writing, -(-largest // (2 * chunk))))
        workers = min(workers, n_threads)
        writing = n_threads - workers
        comparers = max(1, min(workers, (budget.allowed - budget.held - listed) // comparer)) if comparer else 0
        return MemoryProof(
            budget.allowed,
            dict(budget.terms),
            slab,
            chunk,
            workers,
            writing,
            window,
            io,
            largest,
            comparers * comparer + listed,
            comparers,
            past,
        )

    most = max(1, min(threads, MAX_WORKERS))
    if io is Io.AUTO:
        best = proof(most, CHUNK_NBYTES[0], CHUNKS_WRITING[0])
        if best.projected <= budget.allowed:
            return best
        window, io = 0, Io.POSITIONED
    for workers in range(most, 0, -1):
        for chunk, writing in product(CHUNK_NBYTES, CHUNKS_WRITING):
            made = proof(workers, chunk, writing)
            if made.projected <= budget.allowed:
                return made
    raise too_small(budget.allowed, proof(1, CHUNK_NBYTES[-1], 0).projected)


def least_run_nbytes(steps: Sequence[Step]) -> int:
    """The least memory of a run in addition to what is held: one worker with the smallest chunk, and loaded modules."""
    slab = max((step.scratch_nbytes for step in steps), default=0)
    return CHUNK_NBYTES[-1] + slab + THREAD_NBYTES + MODULES_NBYTES


@contextmanager
def memory_failures() -> Iterator[None]:
    """Turn the system's refusal of memory or threads inside the `with` into a BudgetError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise no_memory() from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return str(error) == "can't start new thread"  # CPython has no exception type for this
    return not isinstance(error, Overdraft)
