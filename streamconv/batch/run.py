"""Run many conversions, each in its own process with its own memory limit, on any Executor.

An Executor does the scheduling: threads here, or a Dask cluster through `Client.get_executor()`. However a batch ends,
none of its jobs keeps running; a job may continue what an earlier attempt of the same batch left; a job is recorded as
done only after its file is sealed.
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
    """0: all done or up to date; 7: some failed, or would; 8: none succeeded; 130 or 143: cancelled."""
    for result in results:
        if isinstance(result, JobResult) and result.status == "cancelled":
            return result.exit_code
    failed = sum(result.is_failed for result in results)
    if not failed:
        return 0
    return EXIT_NONE_SUCCEEDED if failed == len(results) else EXIT_SOME_FAILED


def select_array(jobs: Sequence[JobSpec], array: str) -> list[JobSpec]:
    """The share I of N of the sorted jobs, of "I/N" with I from 1: for Slurm arrays and Kubernetes indexed jobs."""
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
    """The result of every job, in the jobs' order.

    KeyboardInterrupt and SIGTERM stop the processes; jobs that are not done are then cancelled, and the next batch
    continues with them.

    Args:
        executor: by default `n_parallel` threads, each of which watches one process.
        stop: what ends the jobs that have begun, wherever the executor's workers are (`end_jobs`, called there).
        restart: discard what an earlier batch left unfinished; what a try of this batch left is always taken up.
        finished: called with each result as it comes, in this thread.
        progress: called as progress(job, done, total), in bytes, from the threads that watch: (job, 0, 0) as one
            begins. Not of an executor's own, whose workers may be on other machines.
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
    """What compares the output of `job`, which is there, with its source."""
    return replace(job, command="verify")


def completion(job: JobSpec) -> JobSpec:
    """What makes all outputs of `job` again, of which some are gone: those that are there get the same bytes.

    Its Modelfile stays, which may have been edited.
    """
    from streamconv.output.modelfile import modelfile_path

    modelfile = modelfile_path(Path(job.output))
    options = dict(job.options) | ({"modelfile": False} if os.path.lexists(modelfile) else {})
    return replace(job, force=True, options=tuple(options.items()))


@dataclass(frozen=True, slots=True)
class _Task:
    """A job, what is run in order that it is done, and how often that was begun."""

    job: JobSpec
    work: JobSpec
    attempts: int


class _Run:
    """The jobs that an executor has. A job whose worker was lost is given to it again."""

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
        """Each job that is done already; the others are given to the executor."""
        for job in jobs:
            if (standing := state.standing(job)) == "done":
                yield JobResult(job, "skipped", 0, 0)
            elif standing == "unverified":  # what is remembered of it stays true
                self.submit(job, verification(job))
            elif standing == "incomplete":  # as is this, until all are there
                self.submit(job, completion(job))
            else:
                state.begin(job)
                self.submit(job, job)

    def submit(self, job: JobSpec, work: JobSpec, n_before: int = 0) -> None:
        words = {"progress": partial(self._progress, job)} if self._progress else {}
        future = self._executor.submit(run_job, work, self._stale[job], n_before, **words)
        self._waiting[future] = _Task(job, work, n_before + 1)

    def results(self) -> Iterator[JobResult]:
        """Each as it comes."""
        while self._waiting:
            for future in wait(self._waiting, return_when=FIRST_COMPLETED).done:
                task = self._waiting.pop(future)
                try:
                    yield replace(future.result(), job=task.job)
                except (Exception, CancelledError) as error:  # whatever an executor raises for a worker that is gone
                    if isinstance(error, StreamconvError):
                        raise
                    if task.attempts < MAX_ATTEMPTS:
                        self.submit(task.job, task.work, task.attempts)
                    else:
                        what = f"its worker was lost {task.attempts} times: {type(error).__name__}: {error}"
                        yield JobResult.failed(task.job, StreamconvError(what, code="worker-lost"), task.attempts)

    def stop(self) -> None:
        """No job begins any more, and those that run are told to end."""
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
        """What becomes of the jobs that have not ended, after `stop`. Of those begun elsewhere (`own`) nobody waits."""
        code = order.exit_code if isinstance(order, Interrupted) else 128 + signal.SIGINT
        self.stop()
        begun = [(future, task) for future, task in self._waiting.items() if own and not future.cancelled()]
        for future, task in begun:
            result = replace(future.result(), job=task.job)
            yield replace(result, exit_code=code) if result.status == "cancelled" else result
        for job in jobs:
            if job not in ended:
                yield JobResult.cancelled(job, code)


# ---------------------------------------------------------------- before anything runs


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a job would do: "run", "skip" (up to date) or "fail"; the bytes it would write, 0 where it would not."""

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
    """Each job planned in full, in a process of its own as it would run in, and nothing written."""
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
    """Every split conversion as one job for each of its parts, which may then run on different machines."""
    for job in jobs:
        n_parts = 1
        if job.command == "convert" and job.split_max_size is not None:
            with suppress(Exception):  # its own run will say what is wrong
                # The job's bound is not this process's: only the number of parts is asked for.
                n_parts = sum(one.role == "model" for one in perform(job, dry_run=True, max_memory=sys.maxsize).outputs)
        if n_parts == 1:
            yield job
        else:
            yield from (replace(job, name=f"{job.name} part {k}", only_part=k) for k in range(1, n_parts + 1))
