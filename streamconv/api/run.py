"""From a job to a sealed file: memory proof -> destinations -> sinks -> stream -> verify -> publish -> report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.budget import Budget, in_words, resident_nbytes, unbounded
from streamconv.check.tensors import compare, comparer_nbytes, listed_nbytes
from streamconv.engine.job import Job
from streamconv.engine.layout import Io, MemoryProof, prove_memory
from streamconv.engine.pool import state_of, stream
from streamconv.engine.split import Part
from streamconv.errors import DestinationError, Interrupted, RunWarning, SourceError, UsageError
from streamconv.files.window import mapping_module
from streamconv.ggml import encode as codecs
from streamconv.gguf.reader import GGUFFile
from streamconv.options import RunOptions
from streamconv.output.destination import Place, check_folder, check_room, claim, failures, write_text
from streamconv.output.manifest import digest, manifest_path, manifest_text
from streamconv.output.sink import Sink, is_begun, refuse_foreign, refuse_taken
from streamconv.report import Output, PlannedTensor, Report

if TYPE_CHECKING:
    from streamconv.output.modelfile import Modelfile


@dataclass(frozen=True, slots=True)
class _Places:
    """Every file that a run writes, none of them a file that it reads. beside: the manifests, then the Modelfile."""

    outputs: Sequence[Place]
    beside: Sequence[Place]
    modelfile: Modelfile | None

    @classmethod
    def claim(cls, job: Job, options: RunOptions) -> _Places:
        modelfile = None
        if options.modelfile:
            from streamconv.output.modelfile import plan_modelfile

            projectors = [part.path for other in job.companions if other.role == "mmproj" for part in other.parts]
            modelfile = plan_modelfile(job.parts[0], job.base, projectors, job.base_template)
        outputs = [part.path for _, part in job.files]
        beside = [manifest_path(path) for path in outputs] if options.sha256 else []
        beside += [modelfile.path] if modelfile else []
        profile = [options.profile.path] if options.profile and options.profile.path else []
        places = claim([*outputs, *beside, *profile], job.sources)
        n, m = len(outputs), len(outputs) + len(beside)
        for place in places[m:]:  # it is written by the caller, of a dry run, too
            refuse_foreign(place)
            refuse_taken(place, force=options.force)
            check_folder(place)
        return cls(places[:n], places[n:m], modelfile)

    def refuse_taken(self, options: RunOptions) -> None:
        """DestinationError where a file is there that must stay, before an unfinished one is touched."""
        for place in self.outputs:
            refuse_foreign(place)
            refuse_taken(place, force=options.force)
        goes_on = any(is_begun(place) for place in self.outputs)
        for place in () if goes_on else self.beside:  # that run may have been stopped while it wrote them
            refuse_foreign(place)
            refuse_taken(place, force=options.force)

    def in_the_way(self, options: RunOptions) -> Iterator[RunWarning]:
        """What the run itself would refuse."""
        for place in (*self.outputs, *self.beside):
            with failures(place.path):
                if not options.force and os.path.lexists(place.path):
                    yield RunWarning("exists", f"{place.path} exists already: the run would stop without --force")
        for place in self.outputs:
            try:
                refuse_foreign(place)
            except DestinationError as error:
                yield RunWarning(error.code, f"the run would stop: {error}")


def run(job: Job, options: RunOptions, budget: Budget) -> Report:
    """Write the job's output and say what was done; with `dry_run`, prove that it can be and say what would be."""
    report = job.report()
    steps = [step for _, part in job.files for step in part.layout.steps] if options.verify else []
    proof = prove_memory(
        [part.layout for _, part in job.files],
        budget,
        threads=options.n_threads,
        io=_io(job, options),
        comparer=comparer_nbytes(steps) if options.verify else 0,
        listed=listed_nbytes(steps),
    )
    report.memory = proof.memory
    places = _Places.claim(job, options)
    if places.modelfile and not places.modelfile.has_prompt:
        message = f"{places.modelfile.path} has no TEMPLATE: its chat template is not one of the known ones"
        report.warnings.append(
            RunWarning("modelfile-template", f"{message}; Ollama derives one, or you can add it by hand")
        )
    if options.dry_run:
        report.plan = [row for output in job.outputs for row in _plan(output)]
        report.warnings += places.in_the_way(options)
    else:
        _write(job, places, proof, options, report)
    report.seconds = time.monotonic() - job.started
    report.peak_rss_nbytes = resident_nbytes()[1]
    return report


def _io(job: Job, options: RunOptions) -> Io:
    """How sources are read: as asked for, or mapped where their filesystems, the kernel and the system allow it.

    UsageError where mapped reads are asked for and cannot be.
    """
    if options.io == Io.POSITIONED.value:
        return Io.POSITIONED
    if not codecs.best_kernel().borrows or mapping_module() is None:
        if options.io == Io.MAPPED.value:
            what = "mapped reads need Linux 5.14 or newer, and the compiled kernels"
            raise UsageError(what, hint="omit --io mapped: the output is the same", code="io-mapped")
        return Io.POSITIONED
    if options.io == Io.MAPPED.value:
        return Io.MAPPED
    return Io.AUTO if any(shard.is_mapped for shard in job.shards) else Io.POSITIONED


def _write(job: Job, places: _Places, proof: MemoryProof, options: RunOptions, report: Report) -> None:
    """Every part is complete, and verified, before the first gets its name; what lies beside them is written last.

    The sinks are left after all of that: whenever the run is stopped, it can be resumed.
    """
    places.refuse_taken(options)
    parts = [part for _, part in job.files]
    check_room(places.outputs, [part.layout.nbytes for part in parts])
    with ExitStack() as stack:
        sinks: list[Sink] = []
        stack.enter_context(_naming_what_is_left(sinks, places.outputs, [part.layout.nbytes for part in parts]))
        sinks += (stack.enter_context(sink) for sink in _sinks(job, places, options))
        _stream(job, sinks, proof, options, report)
        if options.verify:
            _verify(job, sinks, proof, options)
            report.verified = True
        digests = [digest(sink.readable_path, part.layout) if options.sha256 else None
                   for sink, part in zip(sinks, parts, strict=True)]  # fmt: skip
        with options.stopwatch.time("sync"):
            _publish(sinks)
        texts = [manifest_text(part.path, part.layout, found)
                 for part, found in zip(parts, digests, strict=True) if found]  # fmt: skip
        texts += [places.modelfile.text] if places.modelfile else []
        for place, text in zip(places.beside, texts, strict=True):
            write_text(place, text, replaces=options.force)
    report.beside = [place.path for place in places.beside]
    report.outputs = [
        Output(part.path, part.layout.nbytes, found.whole if found else None, output.role)
        for (output, part), found in zip(job.files, digests, strict=True)
    ]


@contextmanager
def _naming_what_is_left(sinks: Sequence[Sink], places: Sequence[Place], sizes: Sequence[int]) -> Iterator[None]:
    """An interrupt passes through, with a note of what is kept for the next run."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        if len(sinks) < len(places):  # there is nothing of some outputs
            raise
        kept = [sink.recorded_nbytes for sink in sinks]
        where = next((n for n, size in enumerate(sizes) if kept[n] < size), len(sizes) - 1)
        of = in_words(sum(sizes))
        error.add_note(f"{places[where].part} ({in_words(sizes[where])}): {in_words(sum(kept))} of {of} are kept")
        raise


def _verify(job: Job, sinks: Sequence[Sink], proof: MemoryProof, options: RunOptions) -> None:
    """Each output compared with its source, before any gets its name."""
    paths = [sink.readable_path for sink in sinks]
    totals = [sum(step.nbytes for step in output.steps) for output in job.outputs]
    done = 0

    def advance(nbytes: int, of: int) -> None:
        if options.progress is not None:
            options.progress(done + nbytes, sum(totals))

    for output, total in zip(job.outputs, totals, strict=True):
        own, paths = paths[: len(output.parts)], paths[len(output.parts) :]
        with ExitStack() as stack:
            # What their headers take was reserved with the lists of what is compared (`listed_nbytes`).
            files = [stack.enter_context(GGUFFile.open(path, unbounded())) for path in own]
            compare(
                output,
                files,
                threads=proof.comparers,
                progress=advance,
                cancelled=options.cancelled,
            )
        done += total


def _sinks(job: Job, places: _Places, options: RunOptions) -> Iterator[Sink]:
    for (output, part), place in zip(job.files, places.outputs, strict=True):
        yield Sink.create(
            place, part.layout.nbytes, identity=output.identity(part), force=options.force, restart=options.restart
        )


def _stream(job: Job, sinks: Sequence[Sink], proof: MemoryProof, options: RunOptions, report: Report) -> None:
    """Every part's bytes, complete under its other name; what was found in them, in the report."""
    advance = _progress(job, options)
    for (output, part), sink in zip(job.files, sinks, strict=True):
        report.resumed |= sink.resumed_nbytes > 0
        report.resumed_nbytes += sink.resumed_nbytes
        report.warnings += sink.notes
        with _naming_option(output):
            counts = stream(
                part.layout,
                sink,
                proof,
                advance=advance,
                cancelled=options.cancelled,
                stopwatch=options.stopwatch,
            )
        with options.stopwatch.time("sync"):
            sink.complete(state_of(counts))
        report.warnings += _non_finite(output, part, counts)
    for shard in job.shards:  # chunks checked what they read; something may have been read before
        shard.check_unchanged()


@contextmanager
def _naming_option(output: Job) -> Iterator[None]:
    """What is said of the outtype as a way out is said of this output's own."""
    try:
        yield
    except SourceError as error:
        if output.role == "mmproj" and error.hint:
            error.hint = error.hint.replace("--outtype", "--mmproj-outtype")
        raise


def _publish(sinks: Sequence[Sink]) -> None:
    """Part 1 gets its name last, and an old one goes first: loaders take a set from there, so none takes a mixture."""
    first, *others = sinks
    if others:
        first.withdraw_old()
    for sink in (*others, first):
        sink.publish()


def _progress(job: Job, options: RunOptions) -> Callable[[int], None]:
    """What to tell of each chunk: the caller hears (bytes done, bytes in all)."""
    total = sum(part.layout.nbytes for _, part in job.files)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if options.progress is not None:
            options.progress(done, total)

    return advance


def _plan(job: Job) -> Iterator[PlannedTensor]:
    for step in job.steps:
        spec = step.tensor.spec
        changed_by = job.changed_by.get(step.target, ())
        yield PlannedTensor(step.sources, step.target, spec.shape, step.tensor.type.name, step.nbytes, changed_by)


def _non_finite(job: Job, part: Part, tally: Mapping[str, codecs.Stats]) -> Iterator[RunWarning]:
    for step in part.layout.steps:
        stats = tally.get(step.target)
        if stats is not None:
            where = "once the adapters are merged" if job.changed_by.get(step.target) else "in the source"
            message = f"{stats.n_nan} NaN and {stats.n_inf} infinite values {where}"
            yield RunWarning("non-finite", message, step.target)
