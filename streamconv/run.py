"""A job becomes a sealed file: memory proof -> sink -> stream -> verify -> publish -> report.

Owns: the order of these. Does not own: what is written (job.py), how a file is made safe (sink.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from streamconv import codecs
from streamconv.compare import compare
from streamconv.errors import Caution
from streamconv.job import Job, RunOptions
from streamconv.manifest import digest, write_manifest
from streamconv.memory import resident_nbytes
from streamconv.plan import Layout, MemoryProof, prove_memory
from streamconv.profile import Stopwatch
from streamconv.report import Output, PlannedTensor, Report
from streamconv.sink import Sink
from streamconv.stream import state_of, stream


def run(job: Job, options: RunOptions) -> Report:
    """Write the job's output and say what was done; with `dry_run`, prove that it can be and say what would be."""
    report = job.report()
    now, peak = resident_nbytes()
    proof = prove_memory(
        job.layout, limit=options.limit_nbytes, resident=now, peak_so_far=peak, threads=options.n_threads
    )
    if options.dry_run:
        report.plan = list(_plan(job))
        report.memory = _memory(proof)
    else:
        _write(job, proof, options, report)
    report.seconds = time.monotonic() - job.started
    report.peak_rss_nbytes = resident_nbytes()[1]
    return report


def _write(job: Job, proof: MemoryProof, options: RunOptions, report: Report) -> None:
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if options.progress is not None:
            options.progress(done, job.layout.nbytes)

    with Sink.create(
        job.dst,
        job.layout.nbytes,
        identity=job.identity(),
        sources=[shard.path for shard in job.shards],
        force=options.force,
        resume=options.resume,
    ) as sink:
        report.resumed = sink.resumed_nbytes > 0
        report.warnings += sink.notes
        stopwatch = options.profile or Stopwatch()
        tally = stream(
            job.layout, sink, proof, job.shards, advance=advance, cancelled=options.cancelled, stopwatch=stopwatch
        )
        sink.complete(state_of(tally))
        if options.verify:
            compare(job, sink.readable_path, threads=proof.workers, cancelled=options.cancelled)
            report.verified = True
        digests = digest(sink.readable_path, job.layout) if options.sha256 else None
        sink.publish()
    if digests is not None:
        write_manifest(job.dst, job.layout, digests)
        report.outputs = (Output(job.dst, job.layout.nbytes, digests.whole),)
    report.warnings += _non_finite(job.layout, tally)


def _plan(job: Job) -> Iterator[PlannedTensor]:
    for step in job.layout.steps:
        spec = step.tensor.spec
        changed_by = job.changed_by.get(step.target, ())
        yield PlannedTensor(step.sources, step.target, spec.shape, spec.type.name, step.nbytes, changed_by)


def _memory(proof: MemoryProof) -> Mapping[str, int]:
    return {
        "limit": proof.limit,
        "fixed": proof.fixed,
        "slab": proof.slab + proof.chunk,
        "workers": proof.workers,
        "peak": proof.peak,
    }


def _non_finite(layout: Layout, tally: Mapping[str, codecs.Stats]) -> Iterator[Caution]:
    for step in layout.steps:
        stats = tally.get(step.target)
        if stats is not None:
            message = f"{stats.n_nan} NaN and {stats.n_inf} infinite values in the source"
            yield Caution("non-finite", message, step.target)
