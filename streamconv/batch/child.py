"""Run one job of a batch in a separate process on the current machine: start, watch, retry and stop it.

The process exits when its parent exits or closes the process's stdin. A killed batch leaves a part file and a journal
but no process that writes to them. An attempt starts only after earlier attempts of the same job have exited.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from streamconv.batch.jobs_file import JobSpec
from streamconv.errors import Interrupted, InterruptedByTerm, SourceError, StreamconvError, with_notes
from streamconv.files.hub import is_repo_id
from streamconv.options import arguments, taken_by
from streamconv.output.destination import Place, failures

if TYPE_CHECKING:
    from streamconv.report import Report

SCHEMA = 1
MAX_ATTEMPTS = 3  # if the process or its machine dies; an error that streamconv reports is not retried
PATIENCE_SECONDS = 60
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)

Progress = Callable[[int, int], None]  # bytes done, bytes in total
Status = Literal["done", "skipped", "failed", "cancelled"]
Leftover = tuple[str, int, int]  # a journal's path, inode and modification time in ns


@dataclass(frozen=True, slots=True)
class JobResult:
    """The result of one job.

    Attributes:
        job: The job.
        status: How it ended; "skipped" if it was done already.
        exit_code: The exit code of its process, or the one that its command would have.
        attempts: The number of attempts, 0 if it was not started.
        report: The report as with `--json`, if the job is done.
        error: The error as with `--json`, if there is one.
    """

    job: JobSpec
    status: Status
    exit_code: int
    attempts: int
    report: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None

    @property
    def is_failed(self) -> bool:
        return self.status == "failed"

    def to_json(self) -> dict[str, Any]:
        """Return the object that is printed for the job."""
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

    @classmethod
    def failed(cls, job: JobSpec, error: StreamconvError, attempts: int) -> JobResult:
        from streamconv.report import error_to_json

        return cls(job, "failed", error.exit_code, attempts, error=error_to_json(error)["error"])

    @classmethod
    def cancelled(cls, job: JobSpec, exit_code: int = 128 + signal.SIGINT) -> JobResult:
        """Return the result of a job that was never started."""
        return cls(job, "cancelled", exit_code, 0)


def in_words(error: Mapping[str, Any]) -> str:
    """Return a readable line for an error's JSON."""
    file, tensor, hint = (error.get(key) for key in ("file", "tensor", "hint"))
    return str(StreamconvError(error["message"], file=file, tensor=tensor, hint=hint, code=error["code"]))


@dataclass(frozen=True, slots=True)
class Order:
    """The instructions for a job's process, sent to its stdin.

    Attributes:
        job: The job.
        restart: Whether to discard the unfinished work of an earlier run.
        dry_run: Whether only to plan.
        progress: Whether to print progress, as `{"progress": [done, total]}` in bytes, before the report.
    """

    job: JobSpec
    restart: bool = False
    dry_run: bool = False
    progress: bool = False


# ---------------------------------------------------------------- the parent process

# -P and -c instead of -m, which would import modules from the current folder, perhaps one with an untrusted model. The
# package is imported from the same place as in this process.
_JOB = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import streamconv; del sys.path[0];"
    " from streamconv.cli import main; sys.exit(main())"
)
_children: set[subprocess.Popen[str]] = set()
_lock = threading.Lock()
_is_stopping = threading.Event()


def run_job(
    job: JobSpec, stale: frozenset[Leftover] = frozenset(), n_before: int = 0, progress: Progress | None = None
) -> JobResult:
    """Run `job` in a separate process and return its result. If the process is killed, it is started again.

    Args:
        job: The job.
        stale: The journals of an earlier batch, which are discarded.
        n_before: The number of earlier attempts.
        progress: Called from this thread: (0, 0) at the start, then (bytes done, bytes in total).
    """
    if progress is not None:
        progress(0, 0)
    attempt, answer, code = max(n_before, int(_has_journal(job, stale))), dict[str, Any](), -1
    while True:
        if attempt:
            _await_earlier_try(job)
        attempt += 1
        code, answer = run_process(
            Order(job, restart=not stale.isdisjoint(journals(job)), progress=progress is not None), progress
        )
        if code >= 0 or code in _STOPPED or attempt >= MAX_ATTEMPTS:
            break
    if code == 0 and "outputs" in answer:
        return JobResult(job, "done", 0, attempt, report=answer)
    if code in _STOPPED:
        return JobResult(job, "cancelled", 128 + abs(code) if code < 0 else code, attempt, error=answer.get("error"))
    if "error" in answer:
        return JobResult(job, "failed", code, attempt, error=answer["error"])
    return JobResult.failed(
        job,
        StreamconvError(_death(code), hint="it may have run out of memory; check the system log", code="job-died"),
        attempt,
    )


def run_process(order: Order, progress: Progress | None = None) -> tuple[int, dict[str, Any]]:
    """Run one attempt of a job in a separate process.

    Args:
        order: The instructions.
        progress: Called from this thread with (bytes done, bytes in total).

    Returns:
        The exit code, or minus the number of the signal that killed the process; and the last JSON object that it
        printed, or {}.
    """
    with _lock:
        if _is_stopping.is_set():
            return 128 + signal.SIGINT, {}
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _JOB, str(Path(__file__).parents[2]), "batch-job"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C then reaches only the batch, which stops its jobs
        )
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps(asdict(order) | {"job": order.job.to_json()}) + "\n")
            child.stdin.flush()
        _children.add(child)  # stdin stays open: when it is closed, the job knows that the batch has exited
    answer: dict[str, Any] = {}
    try:
        for line in child.stdout:
            answer = _object(line)
            if progress is not None and isinstance(answer.get("progress"), list):
                progress(*answer["progress"])
        code = child.wait()
    finally:
        with _lock:
            _children.discard(child)
            if child.poll() is None:
                child.kill()
            child.wait()
            with suppress(OSError):
                child.stdin.close()
            child.stdout.close()
    return code, answer


def _object(line: str) -> dict[str, Any]:
    """Return the JSON object on a line, or {} if there is none."""
    with suppress(ValueError):
        value = json.loads(line)
        return value if isinstance(value, dict) else {}
    return {}


def stop_jobs() -> None:
    """Stop the jobs of this process, and start no others until `allow_jobs` is called."""
    with _lock:
        _is_stopping.set()
    end_jobs()


def end_jobs() -> None:
    """Stop the jobs of this process. Their part files can be resumed."""
    with _lock:
        for child in _children:
            if child.stdin is not None:
                with suppress(OSError):
                    child.stdin.close()


def allow_jobs() -> None:
    """Allow jobs to start in this process, also after `stop_jobs`."""
    _is_stopping.clear()


def journals(job: JobSpec) -> Iterator[Leftover]:
    """Yield the journals of the job's unfinished outputs."""
    for place in _unfinished(job):
        with suppress(OSError):
            status = place.journal.stat()
            yield str(place.journal), status.st_ino, status.st_mtime_ns


def _has_journal(job: JobSpec, stale: frozenset[Leftover]) -> bool:
    return any(journal not in stale for journal in journals(job))


def _await_earlier_try(job: JobSpec) -> None:
    """Wait until no process has locked the job's journals: a job whose parent was killed needs a moment to exit.

    If a journal is still locked after PATIENCE_SECONDS, another program is writing the output, and the job will fail.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    for place in _unfinished(job):
        while _is_locked(place.journal) and time.monotonic() < deadline and not _is_stopping.wait(0.02):
            pass


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the journal no longer exists, or its filesystem has no locks
        return False
    return False


def _unfinished(job: JobSpec) -> list[Place]:
    """Return the outputs of the job that may be unfinished: its output, and each part of a split with a part file."""
    output = Path(job.output)
    places = [Place(output)]
    if job.split_max_size is not None:
        name = glob.escape(output.name.removesuffix(".gguf"))
        number = f"{job.only_part:05d}" if job.only_part else "?????"
        with suppress(OSError):
            found = output.parent.glob(f"{name}-{number}-of-?????.gguf.part*")
            places += [Place(path.with_name(path.name.partition(".gguf.part")[0] + ".gguf")) for path in found]
    return list(dict.fromkeys(places))


def _death(code: int) -> str:
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code} without a report"


# ---------------------------------------------------------------- the process of a job


def read_order(stdin: IO[str]) -> Order:
    """Read the order from `stdin`. When `stdin` is closed later, this process sends itself SIGTERM.

    Raises:
        InterruptedByTerm: `stdin` was closed before the order arrived.
    """
    line = stdin.readline()
    if not line:
        raise InterruptedByTerm("the batch that started this job has ended", code="interrupted")
    order = json.loads(line)

    def watch() -> None:
        with suppress(ValueError, OSError):
            stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return Order(**order | {"job": JobSpec.from_json(order["job"])})


def obey(order: Order, progress: Progress | None = None) -> Report:
    """Run the job of an order in this process, and return its report.

    Raises:
        StreamconvError: The job failed. If its source does not exist and looks like a repo id, the error has a hint.
    """
    try:
        return perform(order.job, restart=order.restart, dry_run=order.dry_run, progress=progress)
    except (Interrupted, KeyboardInterrupt) as error:  # keep the notes on the part files
        raise with_notes(InterruptedByTerm("stopped", code="interrupted"), error) from None
    except SourceError as error:
        name = "/".join(Path(error.file or "").parts[-2:])  # a repo id becomes the end of an absolute path
        is_missing = error.file in (order.job.source, order.job.base) and not os.path.lexists(error.file or "")
        # The parent folder of a mistyped path exists; a folder with the name of a repo's owner does not.
        if is_missing and is_repo_id(name) and not Path(error.file or "").parent.exists():
            error.hint = f"if you mean the repo {name}, run: hf download {name} (streamconv does not download)"
        raise


def perform(
    job: JobSpec,
    *,
    dry_run: bool = False,
    restart: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run a job in this process, and return its report.

    Args:
        job: The job.
        dry_run: Only plan; write nothing.
        restart: Discard the unfinished work of an earlier run.
        max_memory: A limit in bytes that replaces that of the job.
        progress: Called with (bytes done, bytes in total).

    Raises:
        StreamconvError: The job failed.
    """
    from streamconv.api.convert_lora import convert_adapter
    from streamconv.api.convert_model import convert
    from streamconv.api.verify_file import verify

    given = {one.name: job.given().get(one.option.key) for one in taken_by(job.command) if one.option.key is not None}
    given |= {"only_part": job.only_part, "restart": restart, "dry_run": dry_run, "progress": progress}
    if max_memory is not None:
        given["max_memory"] = max_memory
    values = arguments(job.command, given)
    if job.command == "verify":
        return verify(job.output, job.source, base=job.base, **values)
    if not dry_run:
        _make_folder(Path(job.output).parent)
    if job.command == "lora":
        return convert_adapter(job.source, job.base, job.output, **values)
    return convert(job.source, job.output, **values)


def _make_folder(folder: Path) -> None:
    with failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
