"""`streamconv verify`: is this GGUF file, whoever wrote it, what its source says it should be?

Owns: finding out what a file claims to be, and planning what it should hold. Does not own: the comparison (compare.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

from streamconv.adapter import plan_adapter
from streamconv.checkpoint import Checkpoint
from streamconv.compare import compare
from streamconv.convert import plan_model
from streamconv.dialects import LLAMA_CPP
from streamconv.errors import UsageError
from streamconv.gguf_file.reader import refuse
from streamconv.gguf_file.set import GGUFSet
from streamconv.job import Job, OutputOptions, RunOptions, WorkKeywords
from streamconv.lora.base_model import open_base
from streamconv.lora.file import LoraFile
from streamconv.lora.merge import AdapterSpec, open_adapters
from streamconv.memory import headroom_nbytes, resident_nbytes
from streamconv.plan import memory_failures
from streamconv.report import Output, Report
from streamconv.sources import find_source


@memory_failures()
def verify(
    out: str | Path,
    source: str | Path,
    *,
    adapters: Sequence[AdapterSpec] = (),
    base: str | Path | None = None,
    dialect: str = LLAMA_CPP,
    scale: float | None = None,
    pre: str | None = None,
    **keywords: Unpack[WorkKeywords],
) -> Report:
    """The report of a file that holds what its source says; VerifyError, with the first difference, where it does not.

    out: a GGUF file of any tool, or the first of a split, its tensors in any order and in F32, F16, BF16 or Q8_0.
    source: the checkpoint, with the `adapters` that were merged into it and the `pre` that it was converted with; or
    the folder of an adapter that was written as one, with `base`, `dialect` and `scale` as `convert_adapter` had them.
    """
    options, wanted, started = RunOptions(**keywords), OutputOptions(dialect=dialect, pre=pre), time.monotonic()
    with GGUFSet.open(out) as found:
        refuse(found.problems)
        outputs = [Output(file.path, file.file.nbytes) for file in found.files]
        is_adapter = found.files[0].scalar("general.type", str) == "adapter"
    _refuse_misplaced(
        out, is_adapter, {"--base": base, "--scale": scale}, {"--adapter": adapters or None, "--pre": pre}
    )
    with (
        _model_job(source, adapters, out, wanted, options)
        if base is None
        else _adapter_job(source, base, out, wanted, scale, options)
    ) as job:
        paths = [output.path for output in outputs]
        cautions = compare(
            job,
            paths,
            limit=options.limit_nbytes,
            threads=options.n_threads,
            progress=options.progress,
            cancelled=options.cancelled,
        )
        report = job.report()
    report.warnings += cautions
    report.command, report.verified = "verify", True
    report.output, report.outputs = Path(out), outputs
    report.seconds = time.monotonic() - started
    report.peak_rss_nbytes = resident_nbytes()[1]
    return report


def _refuse_misplaced(
    out: str | Path, is_adapter: bool, of_adapters: Mapping[str, object], of_models: Mapping[str, object]
) -> None:
    """UsageError where an option is missing, or given and not for this kind of file."""
    if is_adapter and of_adapters["--base"] is None:
        raise UsageError("is an adapter, whose tensors follow from its base", file=out, hint="give --base")
    for option, value in (of_models if is_adapter else of_adapters).items():
        if value is not None:
            raise UsageError(f"is {'an adapter' if is_adapter else 'a model'}, and {option} is not for one", file=out)


@contextmanager
def _model_job(
    source: str | Path, adapters: Sequence[AdapterSpec], out: str | Path, wanted: OutputOptions, options: RunOptions
) -> Iterator[Job]:
    limit, room = options.limit_nbytes, headroom_nbytes(options.limit_nbytes)
    with (
        open_adapters(adapters, room) as opened,
        Checkpoint.open(find_source(source), max_header_nbytes=room) as base,
    ):
        yield plan_model(base, out, wanted, limit, opened)


@contextmanager
def _adapter_job(
    source: str | Path,
    base: str | Path,
    out: str | Path,
    wanted: OutputOptions,
    scale: float | None,
    options: RunOptions,
) -> Iterator[Job]:
    room = headroom_nbytes(options.limit_nbytes)
    with LoraFile.open(Path(source), room) as adapter:
        yield plan_adapter(adapter, open_base(Path(base), room), out, wanted, scale)
