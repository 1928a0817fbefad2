"""Verify that a GGUF file, whichever program wrote it, matches its source.

Reads what kind of file it is, plans with convert_model.py or convert_lora.py what it should contain, compares the two
(check/) and reports.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import TypedDict

from streamconv.api.convert_lora import open_adapter_job
from streamconv.api.convert_model import open_imatrix, open_model_job
from streamconv.api.quantize_file import plan_quantized
from streamconv.budget import Budget, in_words, resident_nbytes
from streamconv.check.errors import measure_errors, measurer_nbytes
from streamconv.check.picture import PICTURE_NBYTES, draw_errors, require_matplotlib
from streamconv.check.tensors import compare, prove_comparison
from streamconv.engine.job import Job
from streamconv.engine.layout import memory_failures
from streamconv.errors import Interrupted, UsageError
from streamconv.files.hub import Source, find_source, is_gguf
from streamconv.files.local import noting_files
from streamconv.ggml.blocks import BLOCK_TYPES
from streamconv.ggml.policy import StoredTypes, stored_outtype
from streamconv.gguf.entries import refuse
from streamconv.gguf.names import LLAMA_CPP
from streamconv.gguf.reader import GGUFFile
from streamconv.gguf.splits import GGUFSet
from streamconv.lora.open_base import stated_source_of
from streamconv.lora.specs import AdapterSpec
from streamconv.options import OutputOptions, RunOptions, public
from streamconv.output.destination import Place, check_folder, resolve, write_bytes
from streamconv.recipe.registry import RecipeSource, using_recipes
from streamconv.report import Output, RelativeErrors, Report, TypeTotal


@public("verify")
@noting_files()
@memory_failures()
def verify(
    out: str | Path,
    source: Source,
    *,
    adapters: Sequence[AdapterSpec] = (),
    base: Source | None = None,
    scale: float | None = None,
    recipes: Sequence[RecipeSource] = (),
    pre: str | None = None,
    tokenizer: str = "auto",
    imatrix: Source | None = None,
    dialect: str = LLAMA_CPP,
    error: bool = False,
    plot: str | Path | None = None,
    force: bool = False,
    max_memory: int | str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Report:
    """Compare a GGUF file, whichever program wrote it, with its source. Nothing is printed.

    Args:
        out: the file, or the first part of a split. Its tensors may be in any order, and in any type that streamconv
            can write.
        source: the checkpoint from which it was made, or a GGUF file of that; for a GGUF adapter, the adapter.
        {options}

    Returns:
        A report on the file, which matches its source. With `error` or `plot`, its `errors` are the distances from the
        source, for any types, with or without an importance matrix.

    Raises:
        VerifyError: the file differs; the message names the first difference. With `error` or `plot`, only for other
            tensors or other shapes.
        DestinationError: the picture exists and `force` is false, or it cannot be written.
        StreamconvError: the file or its source cannot be read.
        Exception: exceptions from `progress` or `cancel`, and KeyboardInterrupt, pass through unchanged.
    """
    options, wanted, started = RunOptions.of(locals()), OutputOptions.of(locals()), time.monotonic()
    budget, measures = Budget(options.limit_nbytes), error or plot is not None
    of_models = {"--adapter": adapters or None, "--pre": pre, "--imatrix": imatrix}
    with GGUFSet.open(out, budget) as files:
        outputs, stored, architecture, is_adapter = _read(
            files, {"--base": base, "--scale": scale}, of_models, measures=measures
        )
        if is_adapter and base is None:
            base = stated_source_of(source)
        picture = _picture_place(plot, budget, force=force) if plot is not None else None
        as_made = replace(stored, types={}) if measures else stored  # compared as F32 values
        with (
            using_recipes(recipes),
            _counted(options.progress) as progress,
            _open_job(source, base, out, wanted, budget, adapters, scale, as_made) as whole,
        ):
            job = _of_file(whole, architecture, stored)
            steps, parts = [*job.steps], files.files
            if picture is not None:
                picture = resolve(picture.path, job.sources)
            proof = prove_comparison(
                steps, budget, threads=options.n_threads, comparer=measurer_nbytes(steps) if measures else None
            )
            how: _How = {"threads": proof.workers, "progress": progress, "cancelled": options.cancelled}
            report = replace(job, companions=()).report()
            if measures:
                report.errors = measure_errors(job, parts, **how)
                report.types = _totals(report.errors)
            else:
                report.warnings += compare(job, parts, **how)
                report.verified = True
    report.command = "verify"
    report.output, report.outputs = Path(out), [replace(output, role=job.role) for output in outputs]
    if report.errors is not None and picture is not None:
        write_bytes(picture, draw_errors(report.errors, Path(out).name), replaces=force)
        report.beside = [picture.path]
    report.seconds = time.monotonic() - started
    report.peak_rss_nbytes, report.memory = resident_nbytes()[1], proof.memory
    return report


class _How(TypedDict):
    threads: int
    progress: Callable[[int, int], None] | None
    cancelled: Callable[[], Exception | None]


@contextmanager
def _open_job(
    source: Source,
    base: Source | None,
    out: str | Path,
    wanted: OutputOptions,
    budget: Budget,
    adapters: Sequence[AdapterSpec],
    scale: float | None,
    stored: StoredTypes,
) -> Iterator[Job]:
    """The job that would make the file from a checkpoint, an adapter, or a GGUF file."""
    if base is not None:
        with open_adapter_job(source, base, out, wanted, budget, scale, stored) as job:
            yield job
    elif is_gguf(source) and not adapters:
        with open_imatrix(wanted.imatrix, budget) as imatrix, GGUFSet.open(find_source(source), budget) as files:
            yield plan_quantized(files, out, wanted, budget, imatrix, stored)
    else:
        with open_model_job(source, out, wanted, budget, adapters, stored) as job:
            yield job


def _picture_place(plot: str | Path, budget: Budget, *, force: bool) -> Place:
    """The path of the picture; errors about drawing or writing it are raised before anything is measured."""
    require_matplotlib()
    place = resolve(Path(plot))
    if not force:
        place.refuse_existing()
    check_folder(place)
    budget.reserve("picture", PICTURE_NBYTES)
    return place


def _totals(errors: RelativeErrors) -> dict[str, TypeTotal]:
    found: dict[str, TypeTotal] = {}
    for one in errors.tensors:
        n_tensors, nbytes = astuple(found.get(one.type, TypeTotal(0, 0)))
        found[one.type] = TypeTotal(n_tensors + 1, nbytes + one.nbytes)
    return dict(sorted(found.items()))


@contextmanager
def _counted(progress: Callable[[int, int], None] | None) -> Iterator[Callable[[int, int], None]]:
    """A callback that passes progress on; an interrupt gets a note on how much was compared."""
    reached = (0, 0)

    def count(done: int, total: int) -> None:
        nonlocal reached
        reached = (done, total)
        if progress is not None:
            progress(done, total)

    try:
        yield count
    except (Interrupted, KeyboardInterrupt) as error:
        error.add_note(f"{in_words(reached[0])} of {in_words(reached[1])} were compared")
        raise


def _read(
    found: GGUFSet,
    of_adapters: Mapping[str, object],
    of_models: Mapping[str, object],
    *,
    measures: bool,
) -> tuple[list[Output], StoredTypes, str | None, bool]:
    """The files of the set, the types of its tensors, its architecture, and whether it is an adapter.

    UsageError if a required option is missing, or one does not apply to this kind of file.
    """
    refuse(found.problems)
    first = found.files[0]
    outputs = [Output(Path(str(file.path)), file.file.nbytes) for file in found.files]
    is_adapter = first.scalar("general.type", str) == "adapter"
    stored = _types(found)
    imatrix = _imatrix_of(first, stored)
    architecture = first.scalar("general.architecture", str)
    if not (is_adapter or measures) and of_models["--imatrix"] is None and imatrix is not None:
        hint = "pass the same file with --imatrix FILE"
        raise UsageError(
            f"was made with an importance matrix, {imatrix}", file=first.path, hint=hint, code="imatrix-missing"
        )
    for option, value in (of_models if is_adapter else of_adapters).items():
        if value is not None:
            raise UsageError(
                f"is {'an adapter' if is_adapter else 'a model'}, and {option} does not apply to it",
                file=first.path,
                code="option-conflict",
            )
    return outputs, stored, architecture, is_adapter


def _of_file(job: Job, architecture: str | None, stored: StoredTypes) -> Job:
    """The output of a job that has this architecture: the model, or a further one such as a projector.

    Of several that have it, the one whose tensors are most like those of the file.
    """

    def n_strange(one: Job) -> int:
        planned = {(step.target, step.tensor.spec.shape) for step in one.steps}
        return len(planned ^ {(name, shape) for name, (shape, _) in stored.types.items()})

    return min((one for one in job.outputs if one.architecture == architecture), key=n_strange, default=job)


def _imatrix_of(file: GGUFFile, stored: StoredTypes) -> str | None:
    """The name of the importance matrix with which a file was made, or None."""
    key = file.keys.get("quantize.imatrix.file")
    has_blocks = any(type_ in BLOCK_TYPES for _, type_ in stored.types.values())
    return None if key is None or not has_blocks else str(key.value)


def _types(found: GGUFSet) -> StoredTypes:
    tensors = [tensor for _, tensor in found.tensors.values()]
    nbytes = Counter[str]()
    for tensor in tensors:
        nbytes[tensor.type_name] += tensor.nbytes or 0
    entry = found.files[0].keys.get("general.file_type")
    file_type = entry.value if entry is not None and isinstance(entry.value, int) else -1
    types = {tensor.name: (tensor.shape, tensor.type) for tensor in tensors if tensor.type is not None}
    return StoredTypes(stored_outtype(file_type, nbytes), max(file_type, 0), types)
