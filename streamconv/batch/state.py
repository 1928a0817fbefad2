"""JOBS.state.jsonl: the inputs of each job that started, and the outputs of each that finished.

Two lines are appended for a job, one before it starts and one after its files are sealed. The last line of a job is
the valid one. A line that is incomplete after a crash affects only its own job.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from streamconv.batch.jobs_file import OPTIONS, JobSpec
from streamconv.engine.job import FORMAT_VERSION
from streamconv.errors import DestinationError, SourceError
from streamconv.files.hub import find_path
from streamconv.lora.specs import parse_adapter

MAX_FILE_NBYTES: Final = 256 << 20  # some 500,000 lines
_WITHOUT_EFFECT = {"name", *(key for key, one in OPTIONS.items() if not one.option.changes_bytes)}  # on an output
_SUBFOLDER = "additional_chat_templates"

# due: to be run. done: inputs and outputs are unchanged. unverified: the output exists but has not been compared with
# its source, because the earlier batch did not request it or was killed before it. incomplete: some outputs are
# unchanged and the others no longer exist.
Standing = Literal["due", "done", "unverified", "incomplete"]


class State:
    """The state file of a batch. Several batches may append to it at the same time (--array).

    Args:
        path: The file, which need not exist.

    Raises:
        DestinationError: The file exists and cannot be read, or is not a state file (`state-file`).
    """

    def __init__(self, path: Path) -> None:
        """Read the file; see the class."""
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        for line in _read(path).split(b"\n"):
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                self._entries[entry["key"]] = entry

    def standing(self, job: JobSpec) -> Standing:
        """Return the state of a job from the last line of it and its files as they are now."""
        entry = self._entries.get(_key(job), {})
        try:
            if entry.get("digest") != _digest(job):
                return "due"
            if "outputs" in entry:
                there = [output for output in entry["outputs"] if os.path.lexists(output[0])]
                if there != _stamps(output[0] for output in there):
                    return "due"
                if len(there) < len(entry["outputs"]):
                    return "incomplete" if there else "due"
                if not job.verify or entry.get("verified"):
                    return "done"
            elif _stamps([job.output]) == entry["before"]:
                return "due"
            # A single part cannot be compared; a job with force = true can simply replace its output.
            return "due" if job.force or job.split_max_size is not None else "unverified"
        except (OSError, SourceError, LookupError, TypeError):
            return "due"

    def begin(self, job: JobSpec) -> None:
        """Record the inputs of a job before the job reads them.

        Raises:
            DestinationError: The state file cannot be written.
        """
        entry: dict[str, Any] = {"key": _key(job), "digest": None, "before": None}
        with suppress(OSError, SourceError):  # the job will report it
            entry["digest"] = _digest(job)
        with suppress(OSError):
            entry["before"] = _stamps([job.output])
        self._append(entry)

    def record(self, job: JobSpec, report: Mapping[str, Any]) -> None:
        """Record that a job is done, and the files in its report.

        Args:
            job: A job for which `begin` was called.
            report: Its report, as with `--json`.

        Raises:
            DestinationError: The state file cannot be written.
        """
        digest = self._entries[_key(job)]["digest"]
        with suppress(OSError):  # an output no longer exists: the job is not done
            outputs = _stamps(output["path"] for output in report["outputs"])
            verified, finished = report["verified"] is True, int(time.time())
            self._append(
                {"key": _key(job), "digest": digest, "outputs": outputs, "verified": verified, "finished": finished}
            )

    def _append(self, entry: dict[str, Any]) -> None:
        self._entries[entry["key"]] = entry
        try:
            with self.path.open("a+b") as file:
                # Start a new line if a crash left an incomplete one.
                is_torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
                file.write(b"\n" * is_torn + json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            hint = "choose another file with --state"
            what = f"the state file cannot be written: {error.strerror}"
            raise DestinationError(what, file=self.path, hint=hint, code="state-file") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_NBYTES + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise DestinationError(
            f"the state file cannot be read: {error.strerror}", file=path, code="state-file"
        ) from None
    if len(raw) > MAX_FILE_NBYTES:
        raise DestinationError(
            f"the state file is larger than {MAX_FILE_NBYTES >> 20} MiB", file=path, code="state-file"
        )
    if raw and not raw.startswith(b"{"):
        raise DestinationError(
            "is not a state file",
            file=path,
            hint="choose another file with --state: lines would be appended to this one",
            code="state-file",
        )
    return raw


def _key(job: JobSpec) -> str:
    part = f" part {job.only_part}" if job.only_part else ""
    return f"{job.command} {job.output}{part}"


def _digest(job: JobSpec) -> str:
    """Return a digest of a job's inputs: its options, and size and modification time of every file that it reads."""
    options = {key: value for key, value in job.given().items() if key not in _WITHOUT_EFFECT}
    adapter = parse_adapter(job.adapter)[0] if job.adapter else None
    others = (job.given().get("imatrix"), *(job.given().get("recipe") or ()))
    sources = [find_path(source) for source in (job.source, job.base, adapter, *others) if source]
    stamps = _stamps(str(path) for source in sources for path in _files(source))
    return hashlib.sha256(json.dumps([FORMAT_VERSION, options, stamps], sort_keys=True).encode()).hexdigest()


def _files(source: Path) -> list[Path]:
    """Return the files of `source` that a job may read, without GGUF outputs in the same folder."""
    if source.suffix == ".safetensors" and not source.is_dir():
        source = source.parent  # the config and the tokenizer are in the same folder
    if not source.is_dir():
        return [source]
    found = [*source.iterdir(), *(source / _SUBFOLDER).glob("*")]
    return sorted(path for path in found if path.is_file() and ".gguf" not in path.suffixes)


def _stamps(paths: Iterable[str]) -> list[list[Any]]:
    """Return [path, size in bytes, modification time in ns] of each path."""
    return [[path, status.st_size, status.st_mtime_ns] for path in paths for status in (Path(path).stat(),)]
