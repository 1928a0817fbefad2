"""Progress of a batch on stderr: a live line for each running job and one for all, or lines for a log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from streamconv.cli.output import BAR, STDERR, Lines, bar, print_stderr

if TYPE_CHECKING:
    from streamconv.batch.child import JobResult
    from streamconv.batch.jobs_file import JobSpec

MAX_NAME_CHARS = 24  # of a job, so that its bar fits 80 columns
BEGINS = "{desc}: begins"  # until its size is known
ALL = "{l_bar}{bar}| {n_fmt} of {total_fmt} jobs [{elapsed}]"


def _short(name: str) -> str:
    """The name, or its two ends: a type at the end is what distinguishes some."""
    half = (MAX_NAME_CHARS - 3) // 2
    return name if len(name) <= MAX_NAME_CHARS else f"{name[:half]}...{name[-half:]}"


class BatchProgress(Protocol):
    """The interface for progress of jobs. `progress` is called from their threads, the others from the main thread."""

    def progress(self, job: JobSpec, done: int, total: int) -> None:
        """Called with (job, 0, 0) when a job starts."""

    def ended(self, result: JobResult) -> None: ...

    def aside(self) -> AbstractContextManager[Any]:
        """Return a context manager for printing other lines."""
        ...

    def close(self) -> None: ...


@contextmanager
def shown_batch(how: str, n_jobs: int) -> Iterator[BatchProgress | None]:
    """Return a display of the jobs' progress; None for `none`.

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
    """A line when a job starts, and one for each tenth of it."""

    def __init__(self) -> None:
        self._lines: dict[JobSpec, Lines] = {}

    def progress(self, job: JobSpec, done: int, total: int) -> None:
        if total == 0:
            print_stderr(f"{job.name}: begins")
            return
        lines = self._lines.get(job)
        if lines is None or done < lines.n:  # a job that is verified starts its second phase
            lines = self._lines[job] = Lines(job.name if lines is None else f"{job.name}: verifying", total)
        lines.update(done - lines.n)

    def ended(self, result: JobResult) -> None:
        """Nothing to do: the outcome is printed elsewhere."""

    def aside(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def close(self) -> None:
        """Nothing to do: every line was complete."""


class _Bars:
    """A bar for the batch, and below it one for each running job."""

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
                self._running[job] = self._bar(job)
            shown = self._running[job]
            if total == 0:
                return
            shown.bar_format = BAR
            if done < shown.n:  # a job that is verified starts its second phase
                shown.set_description(f"{_short(job.name)} (verifying)", refresh=False)
                shown.reset(total)
            shown.total = total
            shown.update(done - shown.n)

    def _bar(self, job: JobSpec) -> Any:
        return bar(_short(job.name), 0, position=self._places[job], dynamic_ncols=True, bar_format=BEGINS)

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
