"""One output from plan to sealed file: what `convert` and `convert_adapter` have in common.

Owns: the run itself, memory proof -> sink -> stream -> seal -> report. Does not own: what is written (convert.py,
adapter.py), how a file is made safe (sink.py).
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from streamconv import codecs
from streamconv.checkpoint import Shard
from streamconv.errors import Caution, Interrupted, StreamconvError
from streamconv.memory import default_limit_nbytes, resident_nbytes
from streamconv.plan import MAX_DEFAULT_WORKERS, Layout, MemoryProof, prove_memory
from streamconv.profile import Profile, Stopwatch
from streamconv.report import Output, PlannedTensor, Report, TypeTotal
from streamconv.sink import Sink
from streamconv.stream import stream

FORMAT_VERSION = "1"  # raised whenever the same input and options give other bytes than before


class RunKeywords(TypedDict, total=False):
    """How a run goes; nothing here changes a byte of the output.

    max_memory: bytes, None for the default bound; threads: None for the cores, at most 4; progress(done, total) in
    bytes, called from the calling thread; cancel(): asked between chunks, true stops the run as an interrupt does.
    """

    max_memory: int | None
    threads: int | None
    force: bool
    resume: bool
    dry_run: bool
    sha256: bool
    verify: bool
    progress: Callable[[int, int], None] | None
    cancel: Callable[[], bool] | None
    profile: Profile | None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """RunKeywords with their defaults."""

    max_memory: int | None = None
    threads: int | None = None
    force: bool = False
    resume: bool = False
    dry_run: bool = False
    sha256: bool = False
    verify: bool = False
    progress: Callable[[int, int], None] | None = None
    cancel: Callable[[], bool] | None = None
    profile: Profile | None = None

    @property
    def limit_nbytes(self) -> int:
        return default_limit_nbytes() if self.max_memory is None else self.max_memory

    @property
    def n_threads(self) -> int:
        return min(MAX_DEFAULT_WORKERS, len(os.sched_getaffinity(0))) if self.threads is None else self.threads


@dataclass(slots=True)
class Job:
    """Everything that decides the bytes of one output, and what its report says."""

    command: str
    dst: Path
    layout: Layout
    architecture: str
    dialect: str
    outtype: str
    shards: Sequence[Shard]
    options: Mapping[str, str]
    cautions: list[Caution] = field(default_factory=list)
    changed_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def identity(self) -> dict[str, str]:
        """What changes bytes, item by item: a run resumes another only where all of it is the same."""
        items = {"format": FORMAT_VERSION, "header": _digest(self.layout.header)}
        items |= {f"option {name}": value for name, value in self.options.items()}
        items |= {f"source {shard.path.name}": shard.fingerprint for shard in self.shards}
        return items

    def report(self) -> Report:
        totals: dict[str, list[int]] = defaultdict(list)
        for step in self.layout.steps:
            totals[step.tensor.spec.type.name].append(step.nbytes)
        return Report(
            command=self.command,
            output=self.dst,
            architecture=self.architecture,
            dialect=self.dialect,
            outtype=self.outtype,
            n_tensors=len(self.layout.steps),
            n_parameters=sum(step.tensor.spec.n_elements for step in self.layout.steps),
            types={name: TypeTotal(len(sizes), sum(sizes)) for name, sizes in sorted(totals.items())},
            outputs=(Output(self.dst, self.layout.nbytes),),
            warnings=list(self.cautions),
        )


def run(job: Job, options: RunOptions) -> Report:
    """Write the job's output and say what was done; with `dry_run`, prove that it can be and say what would be."""
    report = job.report()
    proof = _prove(job.layout, options)
    if options.dry_run:
        report.plan = [
            PlannedTensor(s.sources, s.target, s.tensor.spec.shape, s.tensor.spec.type.name, s.nbytes,
                          job.changed_by.get(s.target, ()))
            for s in job.layout.steps
        ]  # fmt: skip
        report.memory = {
            "limit": proof.limit, "fixed": proof.fixed, "slab": proof.slab + proof.chunk,
            "workers": proof.workers, "peak": proof.peak,
        }  # fmt: skip
    else:
        _write(job, proof, options, report)
    report.seconds = time.monotonic() - job.started
    report.peak_rss_nbytes = resident_nbytes()[1]
    return report


def _prove(layout: Layout, options: RunOptions) -> MemoryProof:
    now, peak = resident_nbytes()
    return prove_memory(layout, limit=options.limit_nbytes, resident=now, peak_so_far=peak, threads=options.n_threads)


def _write(job: Job, proof: MemoryProof, options: RunOptions, report: Report) -> None:
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if options.progress is not None:
            options.progress(done, job.layout.nbytes)

    def cancelled() -> StreamconvError | None:
        if options.cancel is not None and options.cancel():
            return Interrupted("cancelled", file=job.dst, hint="run it again with --resume to go on")
        return None

    with Sink.create(
        job.dst,
        job.layout.nbytes,
        identity=job.identity(),
        force=options.force,
        resume=options.resume,
        sources=[shard.path for shard in job.shards],
    ) as sink:
        report.resumed = sink.resumed_nbytes > 0
        report.warnings += sink.notes
        stopwatch = options.profile or Stopwatch()
        tally = stream(job.layout, sink, proof, job.shards, advance=advance, cancelled=cancelled, stopwatch=stopwatch)
        sink.seal()
    report.warnings += _non_finite(job.layout, tally)


def _non_finite(layout: Layout, tally: Mapping[str, codecs.Stats]) -> list[Caution]:
    found = []
    for step in layout.steps:
        stats = tally.get(step.target)
        if stats is not None:
            message = f"{stats.n_nan} NaN and {stats.n_inf} infinite values in the source"
            found.append(Caution("non-finite", message, step.target))
    return found


def _digest(header: bytes | bytearray) -> str:
    import hashlib

    return hashlib.sha256(header).hexdigest()
