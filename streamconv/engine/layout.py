"""Where each byte of an output goes, and the proof that making it fits in memory. No file is touched.

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

# A slab's rows are read, encoded and forgotten while they lie in the cache. Measured in benchmarks/LOG.md.
SLAB_NBYTES = 1 << 19
# Chunks are what one worker makes and writes at a time, largest first; all are multiples of any page and disk block.
CHUNK_NBYTES = (4 * MIB, 2 * MIB, 1 * MIB, MIB // 4)
# Chunks on their way to the disk beside those being made, most first. A disk with a queue wants several writes at once:
# benchmarks/LOG.md.
CHUNKS_WRITING = (4, 2, 0)
THREAD_NBYTES = MIB // 2  # a thread's stack, its Python frames, allocator slack
MODULES_NBYTES = (
    4 * MIB
)  # what is imported and allocated between the start and the end (model card, progress bar, report)
MAX_WORKERS = 256  # more threads than any machine that this is for has cores


class Io(Enum):
    """How sources are read: through windows on mapped files, at positions, or mapped where that is the better way."""

    AUTO = "auto"
    MAPPED = "mapped"
    POSITIONED = "positioned"


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor that will be written: its name in the file, its rows before encoding, its sources' names, its type.

    Attributes:
        weights: how much each column matters, see `Encode`.
    """

    target: str
    rows: LazyTensor
    sources: tuple[str, ...]
    type: GGMLQuantizationType
    weights: LazyTensor | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the output: where its bytes lie and how many of its rows make a slab."""

    target: str
    tensor: Encode
    sources: tuple[str, ...]
    offset: int  # from the start of the file
    slab_rows: int

    @property
    def nbytes(self) -> int:
        return self.tensor.spec.nbytes

    @property
    def scratch_nbytes(self) -> int:
        """What a worker needs for a slab, and for one row more that a chunk's border cuts."""
        return padded_nbytes(self.tensor.spec.row_nbytes) + peak_nbytes(self.tensor, self.slab_rows, best_kernel())


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole output file before memory is considered: header bytes, then steps in order of their offsets."""

    header: Header
    steps: tuple[Step, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class MemoryProof:
    """How a run works, and the terms that add up to the most that is resident at a time; all in bytes.

    Attributes:
        allowed: The bound.
        held: What is there besides the work, by name: the process, and what was read to plan.
        slab: The scratch of one worker.
        chunk: What a worker makes and writes at a time.
        workers: How many make chunks at a time.
        writing: How many more chunks may be on their way to the disk meanwhile, so that neither waits for the other.
        window: What a worker maps of a source at a time; 0: sources are read.
        io: How sources are read.
        largest: The size of the largest file that is written: no more of the chunks is touched.
        comparing: What comparing the result with its source takes, once it is written; 0 where that was not asked for.
        comparers: The threads that then compare.
        planning: The most that was held before, and what for.
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
        """By name, what is held at the moment when that is most. Their sum is what is projected."""
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
        return sum(self.terms.values())

    @property
    def memory(self) -> dict[str, Any]:
        """The proof as reports give it."""
        return {
            "allowed": self.allowed,
            "projected": self.projected,
            "terms": self.terms,
            "workers": self.workers,
            "io": (Io.MAPPED if self.window else Io.POSITIONED).value,
        }


def make_layout(keys: Sequence[KeyValue], tensors: Sequence[PlacedTensor]) -> Layout:
    """The file that holds `keys` and `tensors`, in this order."""
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
    """How many of its rows are made at a time: SLAB_NBYTES of them, before or after encoding, or `least_rows`."""
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
    """How many workers with which chunks fit under the bound, and whether they map their sources.

    Args:
        layouts: Of the files that are written one after the other.
        budget: What is held already, everything parsed and the headers made.
        threads: How many workers are wanted. Fewer are taken only where the smallest useful chunk does not let all of
            them fit.
        io: How sources are read. AUTO maps them where that takes nothing from the workers.
        comparer: What one thread takes to compare the result with its source; 0 where that was not asked for.
        listed: What all of them together take for the lists of what is compared.

    Raises:
        BudgetError: Not even one worker fits, or one comparing thread; with what would be needed.
    """
    budget.reserve("modules", MODULES_NBYTES)
    budget.settle()
    steps = [step for layout in layouts for step in layout.steps]
    slab = max((step.scratch_nbytes for step in steps), default=0)
    window = 0 if io is Io.POSITIONED else WINDOW_NBYTES
    largest = max((layout.nbytes for layout in layouts), default=0)

    past = budget.past

    def proof(workers: int, chunk: int, writing: int) -> MemoryProof:
        # A thread makes two chunks at least: one that makes one alone would end when another begins.
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
    """What a run takes beside what is held: one worker with the smallest chunk, and what is loaded on the way."""
    slab = max((step.scratch_nbytes for step in steps), default=0)
    return CHUNK_NBYTES[-1] + slab + THREAD_NBYTES + MODULES_NBYTES


@contextmanager
def memory_failures() -> Iterator[None]:
    """What the system says when it has no more memory, or no thread, for this process becomes a BudgetError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not _is_for_want_of_memory(error):
            raise
        raise no_memory() from error


def _is_for_want_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return str(error) == "can't start new thread"  # CPython has no type for it
    return not isinstance(error, Overdraft)
