"""JOBS.state.jsonl: the inputs of each job that started, and the outputs of each that finished.

A line is appended as a whole, one before a job starts and one after its files are sealed. The last line of a job
counts. A line that was torn by a crash affects only its own job.
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

# Unverified: the output is there and nobody has compared it: it was not asked for then, or the batch was killed too
# early. Incomplete: some of the outputs are as the job wrote them, and the others are gone.
Standing = Literal["due", "done", "unverified", "incomplete"]


class State:
    """The file at `path`, which need not exist. Several batches may append to it at once (--array)."""

    def __init__(self, path: Path) -> None:
        """DestinationError where there is a file that cannot be read."""
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        for line in _read(path).split(b"\n"):
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                self._entries[entry["key"]] = entry

    def standing(self, job: JobSpec) -> Standing:
        """Return "done" if inputs and output are unchanged, "unverified" if the output must be checked, else "due"."""
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
            # Parts cannot be compared alone, and who may replace a file need not look at it.
            return "due" if job.force or job.split_max_size is not None else "unverified"
        except (OSError, SourceError, LookupError, TypeError):
            return "due"

    def begin(self, job: JobSpec) -> None:
        """Remember what the job is made of, as it is before the job reads it. DestinationError."""
        entry: dict[str, Any] = {"key": _key(job), "digest": None, "before": None}
        with suppress(OSError, SourceError):  # the job will say so
            entry["digest"] = _digest(job)
        with suppress(OSError):
            entry["before"] = _stamps([job.output])
        self._append(entry)

    def record(self, job: JobSpec, report: Mapping[str, Any]) -> None:
        """Remember a job that has begun and is done, and the files that its report names. DestinationError."""
        digest = self._entries[_key(job)]["digest"]
        with suppress(OSError):  # an output that is gone already is not done
            outputs = _stamps(output["path"] for output in report["outputs"])
            verified, finished = report["verified"] is True, int(time.time())
            self._append(
                {"key": _key(job), "digest": digest, "outputs": outputs, "verified": verified, "finished": finished}
            )

    def _append(self, entry: dict[str, Any]) -> None:
        self._entries[entry["key"]] = entry
        try:
            with self.path.open("a+b") as file:
                # A line of its own even behind one that a crash tore.
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
    """Of everything that decides a job's result: its options, and size and time of every file that it reads."""
    options = {key: value for key, value in job.given().items() if key not in _WITHOUT_EFFECT}
    adapter = parse_adapter(job.adapter)[0] if job.adapter else None
    others = (job.given().get("imatrix"), *(job.given().get("recipe") or ()))
    sources = [find_path(source) for source in (job.source, job.base, adapter, *others) if source]
    stamps = _stamps(str(path) for source in sources for path in _files(source))
    return hashlib.sha256(json.dumps([FORMAT_VERSION, options, stamps], sort_keys=True).encode()).hexdigest()


def _files(source: Path) -> list[Path]:
    """What a job may read of `source`; outputs that were put beside it are none of it."""
    if source.suffix == ".safetensors" and not source.is_dir():
        source = source.parent  # its config and tokenizer lie beside it
    if not source.is_dir():
        return [source]
    found = [*source.iterdir(), *(source / _SUBFOLDER).glob("*")]
    return sorted(path for path in found if path.is_file() and ".gguf" not in path.suffixes)


def _stamps(paths: Iterable[str]) -> list[list[Any]]:
    """[path, size, time of the last change] of each."""
    return [[path, status.st_size, status.st_mtime_ns] for path in paths for status in (Path(path).stat(),)]
