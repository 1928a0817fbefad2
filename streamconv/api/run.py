"""Run a job: memory proof -> destinations -> sinks -> stream -> verify -> publish -> report."""

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
    """Every file that a run writes; none is one that it reads. `beside`: the manifests, then the Modelfile."""

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
        for place in places[m:]:  # the caller writes it, after a dry run too
            refuse_foreign(place)
            refuse_taken(place, force=options.force)
            check_folder(place)
        return cls(places[:n], places[n:m], modelfile)

    def refuse_taken(self, options: RunOptions) -> None:
        """Raise DestinationError if a file must not be overwritten, before an unfinished one is touched."""
        for place in self.outputs:
            refuse_foreign(place)
            refuse_taken(place, force=options.force)
        goes_on = any(is_begun(place) for place in self.outputs)
        for place in () if goes_on else self.beside:  # the earlier run may have stopped while writing them
            refuse_foreign(place)
            refuse_taken(place, force=options.force)

    def in_the_way(self, options: RunOptions) -> Iterator[RunWarning]:
        """Yield a warning for each existing file at which the run itself would stop."""
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
    """Write the job's outputs; with `dry_run`, only prove that they fit in memory.

    Args:
        job: what to write.
        options: how to run it.
        budget: the memory already reserved.

    Returns:
        A report on what was written, or would be.

    Raises:
        BudgetError: the run does not fit in memory.
        DestinationError: an output exists or cannot be written.
        VerifyError: with `verify`, an output differs from its source.
    """
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
    """The way to read sources: the requested one, else mapped if filesystems, kernel and system support it.

    UsageError if mapped reads are requested but not supported.
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
    """Write all parts, verify them, then give them their names; files beside them are written last.

    The sinks are closed after all of this, so that a run can be resumed whenever it stops.
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
    """Let an interrupt through, with a note on what is kept for the next run."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        if len(sinks) < len(places):  # some outputs have not been started
            raise
        kept = [sink.recorded_nbytes for sink in sinks]
        where = next((n for n, size in enumerate(sizes) if kept[n] < size), len(sizes) - 1)
        of = in_words(sum(sizes))
        path = sinks[where].readable_path
        error.add_note(f"{path} ({in_words(sizes[where])}): {in_words(sum(kept))} of {of} are kept")
        raise


def _verify(job: Job, sinks: Sequence[Sink], proof: MemoryProof, options: RunOptions) -> None:
    """Compare each output with its source, before any gets its name."""
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
    """Write every part under its temporary name, and record non-finite values in the report."""
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
    # Chunks checked their own reads, but not those before them.
    for shard in dict.fromkeys(shard for output in job.outputs for shard in output.shards):
        shard.check_unchanged()


@contextmanager
def _naming_option(output: Job) -> Iterator[None]:
    """Replace --outtype in hints by the option of this output."""
    try:
        yield
    except SourceError as error:
        if output.role == "mmproj" and error.hint:
            error.hint = error.hint.replace("--outtype", "--mmproj-outtype")
        raise


def _publish(sinks: Sequence[Sink]) -> None:
    """Rename part 1 last and remove an old one first: loaders start from it, so none loads a mixed set."""
    first, *others = sinks
    if others:
        first.withdraw_old()
    for sink in (*others, first):
        sink.publish()


def _progress(job: Job, options: RunOptions) -> Callable[[int], None]:
    """The callback for each chunk; it reports (bytes done, bytes in total) to the caller."""
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
