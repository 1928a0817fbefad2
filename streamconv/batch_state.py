"""JOBS.state.jsonl: of each finished job, what it was made of and what came out.

Owns: whether a job is up to date. Does not own: running it (batch.py).
Invariant: a line is appended whole, after the job's files are sealed; the last line of a job counts; a line that a
crash tore costs that one job alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamconv.errors import DestinationError, SourceError
from streamconv.job import FORMAT_VERSION
from streamconv.jobs_file import JobSpec
from streamconv.merge import parse_adapter
from streamconv.sources import find_source

_WITHOUT_EFFECT = frozenset(("name", "max_memory", "force", "verify"))  # on the bytes of an output
_SUBFOLDER = "additional_chat_templates"


class State:
    """The file at `path`, which need not exist. Several batches may append to it at once (--array)."""

    def __init__(self, path: Path) -> None:
        """DestinationError where there is a file that cannot be read."""
        self.path = path
        self._finished: dict[str, dict[str, Any]] = {}
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            raise DestinationError(f"the state file cannot be read: {error}", file=path) from None
        for line in text.split("\n"):
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._finished[entry["key"]] = entry

    def is_up_to_date(self, job: JobSpec) -> bool:
        """Whether the job is recorded as done, its inputs are what they were, and its output is what came out."""
        entry = self._finished.get(_key(job))
        if entry is None:
            return False
        try:
            return bool([entry["digest"], entry["outputs"]] == [_digest(job), _stamps(o[0] for o in entry["outputs"])])
        except (OSError, SourceError, KeyError, TypeError, LookupError):
            return False

    def record(self, job: JobSpec, report: Mapping[str, Any]) -> None:
        """Remember a job that is done, and the files that its report names. DestinationError."""
        try:
            outputs = _stamps(output["path"] for output in report["outputs"])
            key = _key(job)
            entry = {"key": key, "digest": _digest(job), "outputs": outputs, "finished": int(time.time())}
            self._finished[key] = entry
            with self.path.open("a+b") as file:
                # A line of its own even behind one that a crash tore.
                is_torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
                file.write(b"\n" * is_torn + json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DestinationError(f"the state file cannot be written: {error.strerror}", file=self.path) from None


def _key(job: JobSpec) -> str:
    part = f" part {job.only_part}" if job.only_part else ""
    return f"{job.command} {job.output}{part}"


def _digest(job: JobSpec) -> str:
    """Of everything that decides a job's result: its options, and size and time of every file that it reads."""
    options = {key: value for key, value in job.to_json().items() if key not in _WITHOUT_EFFECT}
    adapter = parse_adapter(job.adapter)[0] if job.adapter else None
    sources = [find_source(source) for source in (job.source, job.base, adapter) if source]
    stamps = _stamps(str(path) for source in sources for path in _files(source))
    return hashlib.sha256(json.dumps([FORMAT_VERSION, options, stamps], sort_keys=True).encode()).hexdigest()


def _files(source: Path) -> list[Path]:
    """What a job may read of `source`; outputs that were put beside it are none of it."""
    if not source.is_dir():
        return [source]
    found = [*source.iterdir(), *(source / _SUBFOLDER).glob("*")]
    return sorted(path for path in found if path.is_file() and ".gguf" not in path.suffixes)


def _stamps(paths: Iterable[str]) -> list[list[Any]]:
    """[path, size, time of the last change] of each."""
    return [[path, status.st_size, status.st_mtime_ns] for path in paths for status in (Path(path).stat(),)]
