"""Many conversions, unattended: each in its own process with its own memory bound, on any Executor.

Owns: order, retries, what is up to date, the state file, the result of each job. Does not own: describing jobs
(jobs_file.py), converting (a job's process runs the library), scheduling across machines (an Executor's: threads here,
or a Dask cluster's through `Client.get_executor()`).

Invariants: a job's process ends when the one that started it does, so that a lost machine leaves a part file and a
journal and no writer; every job may resume what an earlier try of this batch left; a job is recorded as done only
after its file is sealed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from streamconv.errors import DestinationError, StreamconvError, UsageError
from streamconv.jobs_file import JobSpec

if TYPE_CHECKING:
    from streamconv.job import RunKeywords
    from streamconv.report import Report

SCHEMA = 1
MAX_ATTEMPTS = 3  # of a job whose process, or machine, died; an error of ours is final at once
Status = Literal["done", "skipped", "failed", "cancelled"]
EXIT_SOME_FAILED, EXIT_NONE_SUCCEEDED = 7, 8


@dataclass(frozen=True, slots=True)
class JobResult:
    """How one job ended. `report` or `error` is what `--json` of its conversion prints."""

    job: JobSpec
    status: Status
    exit_code: int
    attempts: int
    report: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {
            "schema": SCHEMA,
            "job": self.job.to_json(),
            "name": self.job.name,
            "status": self.status,
            "exit_code": self.exit_code,
            "attempts": self.attempts,
        }
        if self.report is not None:
            line["report"] = dict(self.report)
        if self.error is not None:
            line["error"] = dict(self.error)
        return line


def exit_code(results: Sequence[JobResult]) -> int:
    """0: all done or up to date; 7: some failed; 8: none succeeded; 130: cancelled."""
    if any(result.status == "cancelled" for result in results):
        return 128 + signal.SIGINT
    failed = sum(result.status == "failed" for result in results)
    if not failed:
        return 0
    return EXIT_NONE_SUCCEEDED if failed == len(results) else EXIT_SOME_FAILED


def select_array(jobs: Sequence[JobSpec], array: str) -> list[JobSpec]:
    """The share I of N of the sorted jobs, of "I/N" with I from 1: for Slurm arrays and Kubernetes indexed jobs."""
    index, _, count = array.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UsageError(f"--array {array!r} is not I/N with I from 1 to N")
    return list(jobs[int(index) - 1 :: int(count)])


def run_batch(
    jobs: Sequence[JobSpec],
    state: State,
    *,
    executor: Executor | None = None,
    n_parallel: int = 1,
    resume: bool = False,
    finished: Callable[[JobResult], None] = lambda result: None,
) -> list[JobResult]:
    """The result of every job, in the jobs' order; `finished` hears of each as it ends, in this thread.

    executor: by default `n_parallel` threads, each of which watches one process. resume: take up what an earlier batch
    left, too; what a try of this batch left is always taken up. KeyboardInterrupt stops the processes and marks what
    was not done as cancelled.
    """
    results: dict[JobSpec, JobResult] = {}

    def settle(result: JobResult) -> None:
        results[result.job] = result
        if result.status == "done":
            state.record(result)
        finished(result)

    todo = []
    for job in jobs:
        if state.is_up_to_date(job):
            settle(JobResult(job, "skipped", 0, 0))
        else:
            todo.append(job)
    own = ThreadPoolExecutor(max(1, n_parallel)) if executor is None else None
    try:
        for result in _run_all(own or executor, todo, 0 if resume else state.begin()):  # type: ignore[arg-type]
            settle(result)
    except KeyboardInterrupt:
        _stop_children()
        for job in todo:
            if job not in results:
                settle(JobResult(job, "cancelled", 128 + signal.SIGINT, 0))
    finally:
        if own is not None:
            own.shutdown(wait=True, cancel_futures=True)
    return [results[job] for job in jobs]


def _run_all(executor: Executor, jobs: Iterable[JobSpec], began_ns: int) -> Iterator[JobResult]:
    """Results as they come. A job whose worker was lost is given to the executor again."""
    waiting: dict[Future[JobResult], tuple[JobSpec, int]] = {
        executor.submit(run_job, job, began_ns): (job, 1) for job in jobs
    }
    while waiting:
        for future in as_completed(list(waiting)):
            job, attempt = waiting.pop(future)
            try:
                result = future.result()
            except (Exception, CancelledError) as error:  # whatever an executor raises for a worker that is gone
                if attempt < MAX_ATTEMPTS:
                    waiting[executor.submit(run_job, job, began_ns)] = (job, attempt + 1)
                    continue
                lost = StreamconvError(f"its worker was lost {attempt} times: {error}")
                result = _failed(job, lost.exit_code, attempt, _error_json(lost))
            yield replace(result, attempts=result.attempts + attempt - 1)


# ---------------------------------------------------------------- one job, in its own process

_children: set[subprocess.Popen[str]] = set()
_children_lock = threading.Lock()


def run_job(job: JobSpec, began_ns: int) -> JobResult:
    """The result of `job`, run in a process of its own; tried again where that process was killed.

    began_ns: when the batch began, by the clock of the job's filesystem; what was left since then is taken up.
    """
    attempt, code, line = int(_has_journal(job, began_ns) and began_ns > 0), -1, ""
    while attempt < MAX_ATTEMPTS and code < 0 and code not in (-signal.SIGINT, -signal.SIGTERM):
        code, line = _run_process(job, resume=_has_journal(job, began_ns))
        attempt += 1
    try:
        answer = json.loads(line) if line else {}
    except ValueError:
        answer = {}
    if code == 0 and answer:
        return JobResult(job, "done", 0, attempt, report=answer)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM):
        return JobResult(job, "cancelled", abs(code) if code > 0 else 128 - code, attempt, error=answer.get("error"))
    if "error" not in answer:
        answer = _error_json(StreamconvError(_death(code), hint="was it out of memory? see the system's log"))
    return _failed(job, code if code > 0 else 1, attempt, answer["error"])


def _has_journal(job: JobSpec, began_ns: int) -> bool:
    """Whether an unfinished output of the job is there, not older than `began_ns`."""
    output = Path(job.output)
    names = (f"{output.name}.part.journal", f"{output.name.removesuffix('.gguf')}-*-of-*.gguf.part.journal")
    journals = [path for name in names for path in output.parent.glob(name.replace("[", "[[]"))]
    with suppress(FileNotFoundError):
        return any(path.stat().st_mtime_ns >= began_ns for path in journals)
    return False


def _run_process(job: JobSpec, resume: bool) -> tuple[int, str]:
    """(exit code, or minus the signal; the JSON line) of one try."""
    child = subprocess.Popen(
        [sys.executable, "-m", "streamconv", "batch-job"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the batch alone, which stops its jobs
    )
    with _children_lock:
        _children.add(child)
    try:
        assert child.stdin is not None and child.stdout is not None
        # stdin stays open: its end tells the job that nobody waits for it any more.
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps([job.to_json(), resume]) + "\n")
            child.stdin.flush()
        line = child.stdout.read()
        return child.wait(), line.strip()
    finally:
        with _children_lock:
            _children.discard(child)
        if child.poll() is None:
            child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _stop_children() -> None:
    with _children_lock:
        for child in _children:
            child.send_signal(signal.SIGINT)


def read_own_job() -> tuple[JobSpec, bool]:
    """In a job's process: the job from stdin and whether to resume; from then on the end of stdin ends this process."""
    entry, resume = json.loads(sys.stdin.readline())

    def watch() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return JobSpec(**entry), resume


def _failed(job: JobSpec, code: int, attempts: int, error: Mapping[str, Any]) -> JobResult:
    return JobResult(job, "failed", code, attempts, error=error)


def _error_json(error: StreamconvError) -> dict[str, Any]:
    from streamconv.report import error_to_json

    return dict(error_to_json(error))


def _death(code: int) -> str:
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code} and no report"


# ---------------------------------------------------------------- what is up to date


@dataclass(frozen=True, slots=True)
class _Stamp:
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> _Stamp:
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)


class State:
    """JOBS.state.jsonl: of each finished job, what it was made of and what came out. The last line of a job wins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._finished: dict[str, dict[str, Any]] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            lines = []
        except (OSError, UnicodeDecodeError) as error:
            raise DestinationError(f"the state file cannot be read: {error}", file=path) from None
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # a torn last line is one job less
                entry = json.loads(line)
                self._finished[entry["key"]] = entry

    def is_up_to_date(self, job: JobSpec) -> bool:
        """Whether the job is recorded as done, its inputs are what they were, and its output is what came out."""
        entry = self._finished.get(_key(job))
        if entry is None:
            return False
        try:
            outputs = _stamped(path for path, *_ in entry["outputs"])
            return [entry["digest"], entry["outputs"]] == [_digest(job), outputs]
        except OSError:
            return False

    def begin(self) -> int:
        """The time now, in nanoseconds, by the clock of the state file's filesystem."""
        try:
            self.path.touch()
            return self.path.stat().st_mtime_ns
        except OSError as error:
            raise DestinationError(f"the state file cannot be written: {error.strerror}", file=self.path) from None

    def record(self, result: JobResult) -> None:
        """Remember a job that is done, and the files that its report names."""
        key, job = _key(result.job), result.job
        outputs = _stamped(output["path"] for output in (result.report or {}).get("outputs", ()))
        entry = {"key": key, "digest": _digest(job), "outputs": outputs, "finished": int(time.time())}
        self._finished[key] = entry
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DestinationError(f"the state file cannot be written: {error.strerror}", file=self.path) from None


def _key(job: JobSpec) -> str:
    part = f" part {job.only_part}" if job.only_part else ""
    return f"{job.command} {job.output}{part}"


def _digest(job: JobSpec) -> str:
    """Of everything that decides a job's result: its options, and size and time of every file that it reads."""
    options = {key: value for key, value in job.to_json().items() if key not in ("max_memory", "force", "verify")}
    files = [path for source in (job.source, job.base, job.adapter) if source for path in _files(Path(source))]
    stamps = [(str(path), asdict(_Stamp.of(path))) for path in files]
    return hashlib.sha256(json.dumps([options, stamps], sort_keys=True).encode()).hexdigest()


def _files(source: Path) -> list[Path]:
    return sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]


def _stamped(paths: Iterable[str]) -> list[list[Any]]:
    stamps = [(path, _Stamp.of(Path(path))) for path in paths]
    return [[path, stamp.nbytes, stamp.mtime_ns] for path, stamp in stamps]


# ---------------------------------------------------------------- before anything runs


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a job would do: "run", "skip" (up to date) or "fail"; the bytes it would write, 0 where it would not."""

    job: JobSpec
    action: Literal["run", "skip", "fail"]
    nbytes: int
    error: str | None = None


def forecast(jobs: Sequence[JobSpec], state: State) -> Iterator[Forecast]:
    """Each job planned in full, in this process, and nothing written."""
    for job in jobs:
        if state.is_up_to_date(job):
            yield Forecast(job, "skip", 0)
            continue
        try:
            yield Forecast(job, "run", 0 if job.command == "verify" else perform(job, dry_run=True).nbytes)
        except StreamconvError as error:
            yield Forecast(job, "fail", 0, str(error))


def expand_splits(jobs: Iterable[JobSpec]) -> Iterator[JobSpec]:
    """Every split conversion as one job for each of its parts, which may then run on different machines."""
    for job in jobs:
        if job.command != "convert" or job.split_max_size is None:
            yield job
            continue
        try:
            n_parts = len(perform(job, dry_run=True).outputs)
        except StreamconvError:
            yield job  # its own run will say what is wrong
            continue
        if n_parts == 1:
            yield job
        else:
            yield from (replace(job, name=f"{job.name} part {k}", only_part=k) for k in range(1, n_parts + 1))


def perform(
    job: JobSpec, *, dry_run: bool = False, resume: bool = False, cancel: Callable[[], bool] | None = None
) -> Report:
    """The report of the job, done in this process. StreamconvError where it fails."""
    from streamconv.adapter import convert_adapter
    from streamconv.convert import convert
    from streamconv.memory import parse_size
    from streamconv.split import SplitOptions
    from streamconv.verify import verify

    limit = parse_size(job.max_memory) if job.max_memory else None
    if job.command == "verify":
        return verify(job.output, job.source, base=job.base, dialect=job.dialect, max_memory=limit)
    keywords: RunKeywords = {
        "max_memory": limit,
        "force": job.force,
        "resume": resume,
        "dry_run": dry_run,
        "verify": job.verify,
        "cancel": cancel,
    }
    if not dry_run:
        Path(job.output).parent.mkdir(parents=True, exist_ok=True)
    if job.command == "lora":
        assert job.base is not None  # jobs_file.py sees to it
        return convert_adapter(job.source, job.base, job.output, outtype=job.outtype, dialect=job.dialect, **keywords)
    split = SplitOptions(parse_size(job.split_max_size) if job.split_max_size else None, None, job.only_part)
    return convert(job.source, job.output, outtype=job.outtype, dialect=job.dialect, split=split, **keywords)
