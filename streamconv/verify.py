"""`streamconv verify`: is this GGUF file, whoever wrote it, what its source says it should be?

Owns: finding out what a file claims to be, and planning what it should hold. Does not own: the comparison (compare.py).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Unpack

from streamconv.checkpoint import Checkpoint
from streamconv.compare import compare
from streamconv.convert import plan_model
from streamconv.gguf_reader import refuse
from streamconv.gguf_set import GGUFSet
from streamconv.job import OutputOptions, RunKeywords, RunOptions
from streamconv.memory import resident_nbytes
from streamconv.report import Output, Report


def verify(out: str | Path, source: str | Path, **keywords: Unpack[RunKeywords]) -> Report:
    """The report of a file that holds what its source says; VerifyError, with the first difference, where it does not.

    out: a GGUF file of any tool, its tensors in any order and in F32, F16, BF16 or Q8_0. source: the checkpoint.
    """
    options = RunOptions(**keywords)
    started = time.monotonic()
    with GGUFSet.open(out) as found:
        refuse(found.problems)
        outputs = [Output(file.path, file.file.nbytes) for file in found.files]
    with Checkpoint.open(Path(source), max_header_nbytes=options.limit_nbytes) as checkpoint:
        job = plan_model(checkpoint, out, OutputOptions(), options.limit_nbytes)
        compare(job, [output.path for output in outputs], options.n_threads, options.cancelled)
    report = job.report()
    report.command, report.verified = "verify", True
    report.output, report.outputs = Path(out), outputs
    report.seconds = time.monotonic() - started
    report.peak_rss_nbytes = resident_nbytes()[1]
    return report
