"""Run many conversions, each in its own process with its own memory limit, on any Executor.

An Executor does the scheduling: threads here, or a Dask cluster through `Client.get_executor()`. When a batch ends, for
any reason, none of its jobs keeps running. A job continues the unfinished work of an earlier attempt; it is recorded as
done only after its files are sealed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from streamconv.batch.child import (
    MAX_ATTEMPTS,
    JobResult,
    Leftover,
    Order,
    allow_jobs,
    in_words,
    journals,
    perform,
    run_job,
    run_process,
    stop_jobs,
)
from streamconv.batch.jobs_file import JobSpec
from streamconv.batch.state import State
from streamconv.errors import Interrupted, StreamconvError, UsageError

EXIT_SOME_FAILED, EXIT_NONE_SUCCEEDED = 7, 8


def exit_code(results: Sequence[JobResult | Forecast]) -> int:
    """Return 0 if all are done or up to date, 7 if some failed or would fail, 8 if all did, 130 or 143 if cancelled."""
    for result in results:
        if isinstance(result, JobResult) and result.status == "cancelled":
            return result.exit_code
    failed = sum(result.is_failed for result in results)
    if not failed:
        return 0
    return EXIT_NONE_SUCCEEDED if failed == len(results) else EXIT_SOME_FAILED


def select_array(jobs: Sequence[JobSpec], array: str) -> list[JobSpec]:
    """Return every N-th job from the I-th on, for Slurm arrays and Kubernetes indexed jobs.

    Args:
        jobs: The jobs, in the same order on every machine.
        array: "I/N", with I from 1.

    Raises:
        UsageError: `array` is malformed, or I is out of range (`array-range`).
    """
    index, _, count = array.partition("/")
    if not (index.isascii() and count.isascii() and index.isdigit() and count.isdigit()):
        raise UsageError(f"--array {array!r} is not I/N", code="array-range")
    if not 1 <= int(index) <= int(count):
        raise UsageError(f"--array {array}: I counts from 1 to N", code="array-range")
    return list(jobs[int(index) - 1 :: int(count)])


def run_batch(
    jobs: Sequence[JobSpec],
    state: State,
    *,
    executor: Executor | None = None,
    stop: Callable[[], object] = stop_jobs,
    n_parallel: int = 1,
    restart: bool = False,
    finished: Callable[[JobResult], None] = lambda result: None,
    progress: Callable[[JobSpec, int, int], None] | None = None,
) -> list[JobResult]:
    """Run all jobs.

    KeyboardInterrupt and SIGTERM stop the processes; unfinished jobs are then cancelled, and the next batch continues
    them.

    Args:
        jobs: The jobs.
        state: The state file; jobs that are done according to it are skipped.
        executor: Where the jobs run; by default `n_parallel` threads, each of which watches one process.
        stop: Stops the jobs that have started. For an executor with workers elsewhere, it must call `end_jobs` there.
        n_parallel: The number of jobs that run at the same time without an executor.
        restart: Discard the unfinished work of an earlier batch. That of an earlier attempt in this batch is kept.
        finished: Called with each result when it is available, in this thread.
        progress: Called as progress(job, done, total), in bytes, from the threads that watch processes; with
            (job, 0, 0) when a job starts. Not called with an executor, whose workers may be on other machines.

    Returns:
        The result of every job, in the order of `jobs`.

    Raises:
        DestinationError: The state file cannot be written.
    """
    allow_jobs()
    pool = executor or ThreadPoolExecutor(n_parallel)
    run = _Run(pool, {job: frozenset(journals(job)) if restart else frozenset() for job in jobs}, stop,
               progress if executor is None else None)  # fmt: skip
    results: dict[JobSpec, JobResult] = {}

    def settle(result: JobResult) -> None:
        results[result.job] = result
        finished(result)
        if result.status == "done" and result.report is not None:
            state.record(result.job, result.report)

    try:
        for result in chain(run.begin(jobs, state), run.results()):
            settle(result)
    except (KeyboardInterrupt, Interrupted) as order:
        for result in run.cancelled(order, jobs, results, own=executor is None):
            settle(result)
    finally:
        run.stop()
        if executor is None:
            pool.shutdown(wait=True, cancel_futures=True)
    return [results[job] for job in jobs]


def verification(job: JobSpec) -> JobSpec:
    """Return a job that compares the existing output of `job` with its source."""
    return replace(job, command="verify")


def completion(job: JobSpec) -> JobSpec:
    """Return a job that writes all outputs of `job` again, because some no longer exist.

    The existing outputs are replaced by the same bytes. An existing Modelfile is kept, because it may have been edited.
    """
    from streamconv.output.modelfile import modelfile_path

    modelfile = modelfile_path(Path(job.output))
    options = dict(job.options) | ({"modelfile": False} if os.path.lexists(modelfile) else {})
    return replace(job, force=True, options=tuple(options.items()))


@dataclass(frozen=True, slots=True)
class _Task:
    """A job that an executor has.

    Attributes:
        job: The job.
        work: The job that is actually run: `job`, its verification or its completion.
        attempts: The number of attempts, including this one.
    """

    job: JobSpec
    work: JobSpec
    attempts: int


class _Run:
    """The jobs that an executor has. A job whose worker was lost is submitted again."""

    def __init__(
        self,
        executor: Executor,
        stale: dict[JobSpec, frozenset[Leftover]],
        stop: Callable[[], object],
        progress: Callable[[JobSpec, int, int], None] | None,
    ) -> None:
        self._executor = executor
        self._stale = stale
        self._stop = stop
        self._progress = progress
        self._is_stopped = False
        self._waiting: dict[Future[JobResult], _Task] = {}

    def begin(self, jobs: Sequence[JobSpec], state: State) -> Iterator[JobResult]:
        """Yield the result of each job that is done already, and submit the others to the executor."""
        for job in jobs:
            if (standing := state.standing(job)) == "done":
                yield JobResult(job, "skipped", 0, 0)
            elif standing == "unverified":  # its line in the state file stays valid
                self.submit(job, verification(job))
            elif standing == "incomplete":  # as above, until all outputs exist
                self.submit(job, completion(job))
            else:
                state.begin(job)
                self.submit(job, job)

    def submit(self, job: JobSpec, work: JobSpec, n_before: int = 0) -> None:
        words = {"progress": partial(self._progress, job)} if self._progress else {}
        future = self._executor.submit(run_job, work, self._stale[job], n_before, **words)
        self._waiting[future] = _Task(job, work, n_before + 1)

    def results(self) -> Iterator[JobResult]:
        """Yield each result when it is available."""
        while self._waiting:
            for future in wait(self._waiting, return_when=FIRST_COMPLETED).done:
                task = self._waiting.pop(future)
                try:
                    yield replace(future.result(), job=task.job)
                except (Exception, CancelledError) as error:  # any error by which an executor reports a lost worker
                    if isinstance(error, StreamconvError):
                        raise
                    if task.attempts < MAX_ATTEMPTS:
                        self.submit(task.job, task.work, task.attempts)
                    else:
                        what = f"its worker was lost {task.attempts} times: {type(error).__name__}: {error}"
                        yield JobResult.failed(task.job, StreamconvError(what, code="worker-lost"), task.attempts)

    def stop(self) -> None:
        """Cancel jobs that have not started, and stop those that run."""
        for future in self._waiting:
            future.cancel()
        if self._waiting and not self._is_stopped:
            self._is_stopped = True
            self._stop()

    def cancelled(
        self,
        order: KeyboardInterrupt | Interrupted,
        jobs: Sequence[JobSpec],
        ended: Mapping[JobSpec, JobResult],
        *,
        own: bool,
    ) -> Iterator[JobResult]:
        """Stop the batch, and yield a result for each job that has none.

        Args:
            order: The interrupt that ended the batch.
            jobs: All jobs of the batch.
            ended: The results so far.
            own: Whether the jobs run in this process's threads, and so are waited for. Others are not.
        """
        code = order.exit_code if isinstance(order, Interrupted) else 128 + signal.SIGINT
        self.stop()
        begun = [(future, task) for future, task in self._waiting.items() if own and not future.cancelled()]
        for future, task in begun:
            result = replace(future.result(), job=task.job)
            yield replace(result, exit_code=code) if result.status == "cancelled" else result
        for job in jobs:
            if job not in ended:
                yield JobResult.cancelled(job, code)


# ---------------------------------------------------------------- planning


@dataclass(frozen=True, slots=True)
class Forecast:
    """The plan of one job.

    Attributes:
        job: The job.
        action: "run", "skip" (up to date) or "fail".
        nbytes: The bytes that it would write; 0 if it would write nothing.
        error: Why it would fail.
    """

    job: JobSpec
    action: Literal["run", "skip", "fail"]
    nbytes: int
    error: str | None = None

    @property
    def is_failed(self) -> bool:
        return self.action == "fail"

    def to_json(self) -> dict[str, Any]:
        return {
            "job": self.job.to_json(),
            "name": self.job.name,
            "action": self.action,
            "nbytes": self.nbytes,
            "error": self.error,
        }


def forecast(jobs: Sequence[JobSpec], state: State, *, n_parallel: int = 1) -> Iterator[Forecast]:
    """Plan each job completely, in a separate process like the one in which it would run; nothing is written.

    Args:
        jobs: The jobs.
        state: The state file.
        n_parallel: The number of jobs that are planned at the same time.
    """
    allow_jobs()

    def plan(job: JobSpec) -> Forecast:
        standing = state.standing(job)
        if standing == "done":
            return Forecast(job, "skip", 0)
        if job.command == "verify" or standing == "unverified":
            return Forecast(job, "run", 0)
        work = completion(job) if standing == "incomplete" else job
        code, answer = run_process(Order(work, dry_run=True))
        if "error" in answer:
            return Forecast(job, "fail", 0, in_words(answer["error"]))
        if code != 0 or "outputs" not in answer:
            return Forecast(job, "fail", 0, f"exit code {code}")
        in_the_way = [warning["message"] for warning in answer["warnings"] if warning["code"] == "exists"]
        if in_the_way:
            return Forecast(job, "fail", 0, in_the_way[0])
        return Forecast(job, "run", sum(output["nbytes"] for output in answer["outputs"]))

    with ThreadPoolExecutor(n_parallel) as pool:
        try:
            yield from pool.map(plan, jobs)
        except BaseException:
            stop_jobs()
            pool.shutdown(cancel_futures=True)
            raise


def expand_splits(jobs: Iterable[JobSpec]) -> Iterator[JobSpec]:
    """Replace each split conversion by one job for each of its parts, which may run on different machines."""
    for job in jobs:
        n_parts = 1
        if job.command == "convert" and job.split_max_size is not None:
            with suppress(Exception):  # the job itself will report the error
                # The job's memory limit does not apply here: only the number of parts is determined.
                n_parts = sum(one.role == "model" for one in perform(job, dry_run=True, max_memory=sys.maxsize).outputs)
        if n_parts == 1:
            yield job
        else:
            yield from (replace(job, name=f"{job.name} part {k}", only_part=k) for k in range(1, n_parts + 1))
