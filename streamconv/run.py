"""A job becomes a sealed file: memory proof -> sink -> stream -> verify -> publish -> report.

Owns: the order of these. Does not own: what is written (job.py), how a file is made safe (sink.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

from streamconv import codecs
from streamconv.compare import compare
from streamconv.compare import prove_memory as prove_compare
from streamconv.errors import Caution
from streamconv.job import Job, RunOptions
from streamconv.manifest import digest, write_manifest
from streamconv.memory import resident_nbytes
from streamconv.plan import MemoryProof, prove_memory
from streamconv.profile import Stopwatch
from streamconv.report import Output, PlannedTensor, Report
from streamconv.sink import Sink
from streamconv.split import Part
from streamconv.stream import state_of, stream


def run(job: Job, options: RunOptions) -> Report:
    """Write the job's output and say what was done; with `dry_run`, prove that it can be and say what would be."""
    report = job.report()
    proof = prove_memory(
        [part.layout for part in job.parts],
        limit=options.limit_nbytes,
        resident=resident_nbytes()[0],
        threads=options.n_threads,
    )
    if options.verify:
        prove_compare([step.tensor for step in job.steps], limit=options.limit_nbytes, threads=1)
    if options.dry_run:
        report.plan = list(_plan(job))
        report.warnings += _in_the_way(job, options)
        report.memory = _memory(proof)
    else:
        _write(job, proof, options, report)
    report.seconds = time.monotonic() - job.started
    report.peak_rss_nbytes = resident_nbytes()[1]
    return report


def _write(job: Job, proof: MemoryProof, options: RunOptions, report: Report) -> None:
    """Every part is complete, and verified, before the first gets its name; part 1 gets its name last."""
    advance = _progress(job, options)
    tally: dict[str, codecs.Stats] = {}
    with ExitStack() as stack:
        sinks = [stack.enter_context(_sink(job, part, options)) for part in job.parts]
        for part, sink in zip(job.parts, sinks, strict=True):
            report.resumed |= sink.resumed_nbytes > 0
            report.warnings += sink.notes
            counts = stream(
                part.layout,
                sink,
                proof,
                job.shards,
                advance=advance,
                cancelled=options.cancelled,
                stopwatch=options.profile or Stopwatch(),
            )
            sink.complete(state_of(counts))
            tally |= counts
        if options.verify:
            paths = [sink.readable_path for sink in sinks]
            compare(job, paths, limit=proof.limit, threads=proof.workers, cancelled=options.cancelled)
            report.verified = True
        digests = [digest(s.readable_path, p.layout) if options.sha256 else None
                   for s, p in zip(sinks, job.parts, strict=True)]  # fmt: skip
        for sink in (*sinks[1:], sinks[0]):
            sink.publish()
    for part, digests_of_part in zip(job.parts, digests, strict=True):
        if digests_of_part is not None:
            write_manifest(part.path, part.layout, digests_of_part)
    report.outputs = [
        Output(part.path, part.layout.nbytes, found.whole if found else None)
        for part, found in zip(job.parts, digests, strict=True)
    ]
    report.warnings += _non_finite(job, tally)


def _sink(job: Job, part: Part, options: RunOptions) -> Sink:
    return Sink.create(
        part.path,
        part.layout.nbytes,
        identity=job.identity(part),
        sources=[shard.path for shard in job.shards],
        force=options.force,
        resume=options.resume,
    )


def _progress(job: Job, options: RunOptions) -> Callable[[int], None]:
    """What to tell of each chunk: the caller hears (bytes done, bytes in all)."""
    total = sum(part.layout.nbytes for part in job.parts)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if options.progress is not None:
            options.progress(done, total)

    return advance


def _in_the_way(job: Job, options: RunOptions) -> Iterator[Caution]:
    """What the run itself would refuse: outputs that exist."""
    for part in job.parts:
        if part.path.exists() and not options.force:
            yield Caution("exists", f"{part.path} exists already: the run would refuse it without --force")


def _plan(job: Job) -> Iterator[PlannedTensor]:
    for step in job.steps:
        spec = step.tensor.spec
        changed_by = job.changed_by.get(step.target, ())
        yield PlannedTensor(step.sources, step.target, spec.shape, spec.type.name, step.nbytes, changed_by)


def _memory(proof: MemoryProof) -> Mapping[str, int]:
    return {
        "limit": proof.limit,
        "fixed": proof.base,
        "slab": proof.slab + proof.chunk,
        "workers": proof.workers,
        "peak": proof.peak,
    }


def _non_finite(job: Job, tally: Mapping[str, codecs.Stats]) -> Iterator[Caution]:
    for step in job.steps:
        stats = tally.get(step.target)
        if stats is not None:
            where = "once the adapters are merged" if job.changed_by.get(step.target) else "in the source"
            message = f"{stats.n_nan} NaN and {stats.n_inf} infinite values {where}"
            yield Caution("non-finite", message, step.target)
