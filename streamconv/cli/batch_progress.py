"""How far a batch is, on stderr: a live line for each job that runs and one for all of them, or lines for a log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from streamconv.cli.output import STDERR, Lines, bar, tell

if TYPE_CHECKING:
    from streamconv.batch.child import JobResult
    from streamconv.batch.jobs_file import JobSpec

MAX_NAME_CHARS = 24  # of a job, so that its bar fits 80 columns
ALL = "{l_bar}{bar}| {n_fmt} of {total_fmt} jobs [{elapsed}]"


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARS else f"{name[: MAX_NAME_CHARS - 3]}..."


class BatchProgress(Protocol):
    """What is told of jobs that run. `progress` is called from their threads, the others from the main thread."""

    def progress(self, job: JobSpec, done: int, total: int) -> None:
        """(job, 0, 0) as it begins."""

    def ended(self, result: JobResult) -> None: ...

    def aside(self) -> AbstractContextManager[Any]:
        """While other lines are printed."""
        ...

    def close(self) -> None: ...


@contextmanager
def shown_batch(how: str, n_jobs: int) -> Iterator[BatchProgress | None]:
    """What shows how far the jobs are; None for `none`.

    Args:
        how: one of PROGRESS.
    """
    if how == "none":
        yield None
        return
    shown: BatchProgress = _Bars(n_jobs) if how == "bar" else _Log()
    try:
        yield shown
    finally:
        shown.close()


class _Log:
    """A line as a job begins, and one for each tenth of it."""

    def __init__(self) -> None:
        self._lines: dict[JobSpec, Lines] = {}

    def progress(self, job: JobSpec, done: int, total: int) -> None:
        if total == 0:
            tell(f"{job.name}: begins")
            return
        lines = self._lines.get(job)
        if lines is None or done < lines.n:  # the second time of a job that is verified
            lines = self._lines[job] = Lines(job.name if lines is None else f"{job.name}: verifying", total)
        lines.update(done - lines.n)

    def ended(self, result: JobResult) -> None:
        """Its outcome is a line already."""

    def aside(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def close(self) -> None:
        """Every line was whole."""


class _Bars:
    """One bar for the batch, below it one for each job that runs."""

    def __init__(self, n_jobs: int) -> None:
        self._lock = threading.Lock()
        self._all = bar("jobs", n_jobs, position=0, bar_format=ALL, dynamic_ncols=True)
        self._running: dict[JobSpec, Any] = {}
        self._places: dict[JobSpec, int] = {}

    def progress(self, job: JobSpec, done: int, total: int) -> None:
        with self._lock:
            if job not in self._running:
                taken = set(self._places.values())
                self._places[job] = next(n for n in range(1, len(taken) + 2) if n not in taken)
                self._running[job] = self._bar(job, total)
            shown = self._running[job]
            if done < shown.n:  # the second time of a job that is verified
                shown.set_description(f"{_short(job.name)} (verifying)", refresh=False)
                shown.reset(total)
            shown.total = total
            shown.update(done - shown.n)

    def _bar(self, job: JobSpec, total: int) -> Any:
        return bar(_short(job.name), total, position=self._places[job], dynamic_ncols=True)

    def ended(self, result: JobResult) -> None:
        with self._lock:
            if (shown := self._running.pop(result.job, None)) is not None:
                shown.close()
                del self._places[result.job]
        self._all.update()

    def aside(self) -> AbstractContextManager[Any]:
        from tqdm import tqdm

        return tqdm.external_write_mode(file=STDERR)

    def close(self) -> None:
        for shown in (*self._running.values(), self._all):
            shown.close()
