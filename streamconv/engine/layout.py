"""What will be written where, and the proof that making it fits in memory. Pure: no file is touched.

Owns: the order and offsets of tensors, the size of slabs and chunks, the number of workers. Does not own: making bytes.
Invariant: the output's bytes are a function of header and steps alone; memory, chunks and threads never show in them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import product

from gguf.constants import GGMLQuantizationType

from streamconv.budget import MIB, in_words
from streamconv.errors import BudgetError, no_memory
from streamconv.files.window import window_nbytes
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
WORKER_OVERHEAD_NBYTES = MIB // 2  # a thread's stack, its Python frames, allocator slack
RUN_OVERHEAD_NBYTES = 4 * MIB  # what is imported and allocated between the plan and the end (progress bar, report)
MAX_WORKERS = 256  # more threads than any machine that this is for has cores
RUN_TO_RUN_NBYTES = 2 * MIB  # by which the same process's resident set differs from one run to the next


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
    def window_nbytes(self) -> int:
        """What a worker maps at most of a source for a slab."""
        return window_nbytes(self.slab_rows * self.tensor.parents[0].spec.row_nbytes)

    @property
    def scratch_nbytes(self) -> int:
        """What a worker needs for a slab, and for one row more that a chunk's border cuts."""
        return padded_nbytes(self.tensor.spec.row_nbytes) + peak_nbytes(self.tensor, self.slab_rows)


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole output file before memory is considered: header bytes, then steps in order of their offsets."""

    header: Header
    steps: tuple[Step, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class MemoryProof:
    """The bound and what adds up to the promised peak; all in bytes.

    `slab` is the scratch of one worker, `window` what it maps of a source at a time (0: sources are read). So many
    `workers` make chunks at a time; `writing` more chunks may be on their way to the disk meanwhile, so that neither
    waits for the other.
    """

    limit: int
    fixed: int
    slab: int
    chunk: int
    workers: int
    writing: int = 0
    window: int = 0
    io: Io = Io.POSITIONED

    @property
    def base(self) -> int:
        """What is there besides the workers: the process as it is, and the chunks that are being written."""
        return self.fixed + self.writing * worker_nbytes(self.chunk, 0)

    @property
    def peak(self) -> int:
        return self.base + self.workers * (worker_nbytes(self.chunk, self.slab) + self.window)


def worker_nbytes(chunk: int, slab: int) -> int:
    return chunk + slab + WORKER_OVERHEAD_NBYTES


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
    layouts: Sequence[Layout], *, limit: int, resident: int, threads: int, io: Io = Io.POSITIONED
) -> MemoryProof:
    """How many workers with which chunks fit under `limit`, and whether they map their sources.

    Args:
        limit: Of the process's resident set, in bytes.
        resident: What is resident now, everything parsed and the header made.
        threads: How many workers are wanted. Fewer are taken only where the smallest useful chunk does not let all of
            them fit.
        io: How sources are read. AUTO maps them where that takes nothing from the workers.

    Raises:
        BudgetError: Not even one worker fits; with what would be needed.
    """
    steps = [step for layout in layouts for step in layout.steps]
    slab = max((step.scratch_nbytes for step in steps), default=0)
    window = 0 if io is Io.POSITIONED else max((step.window_nbytes for step in steps), default=0)
    fixed = resident + RUN_OVERHEAD_NBYTES
    most = max(1, min(threads, MAX_WORKERS))
    if io is Io.AUTO:
        best = MemoryProof(limit, fixed, slab, CHUNK_NBYTES[0], most, CHUNKS_WRITING[0], window, io)
        if best.peak <= limit:
            return best
        window, io = 0, Io.POSITIONED
    for workers in range(most, 0, -1):
        for chunk, writing in product(CHUNK_NBYTES, CHUNKS_WRITING):
            proof = MemoryProof(limit, fixed, slab, chunk, workers, writing, window, io)
            if proof.peak <= limit:
                return proof
    raise too_small(limit, fixed + worker_nbytes(CHUNK_NBYTES[-1], slab) + window)


def least_worker_nbytes(tensors: Sequence[PlacedTensor]) -> int:
    """What one worker with the smallest chunk takes."""
    steps = make_layout([], tensors).steps
    return worker_nbytes(CHUNK_NBYTES[-1], max((step.scratch_nbytes for step in steps), default=0))


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


def too_small(limit: int, needed: int, file: object = None) -> BudgetError:
    needed_mib = -(-(needed + RUN_TO_RUN_NBYTES) // MIB)
    return BudgetError(
        f"a memory bound of {in_words(limit)} is too small: this conversion needs {needed_mib} MiB",
        file=file,
        hint=f"--max-memory {needed_mib}MiB",
        code="memory-bound",
    )
