"""JOBS files: many conversions described in TOML or JSON lines.

Owns: keys, defaults, globs, output templates, and refusing a file as a whole before anything runs. Does not own:
running (batch.py). Paths are relative to the file. A glob as source makes one job of each match.

    [defaults]
    outtype = "q8_0"
    output = "out/{name}-{outtype}.gguf"

    [[job]]
    source = "models/*"
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from streamconv.dialects import RENAMES
from streamconv.errors import UsageError
from streamconv.memory import parse_size
from streamconv.outtypes import OUTTYPES
from streamconv.sources import model_name

Command = Literal["convert", "lora", "verify"]
DEFAULT_OUTPUT = "{name}-{outtype}.gguf"
MAX_FILE_NBYTES = 16 << 20
_GLOB = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job, complete: absolute paths, every default filled in."""

    name: str
    command: Command
    source: str
    output: str
    base: str | None = None
    adapter: str | None = None
    outtype: str = "auto"
    dialect: str = "llama.cpp"
    max_memory: str | None = None
    split_max_size: str | None = None
    only_part: int | None = None
    verify: bool = False
    force: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_KEYS: dict[str, type] = {
    "name": str, "command": str, "source": str, "output": str, "base": str, "adapter": str, "outtype": str,
    "dialect": str, "max_memory": str, "split_max_size": str, "verify": bool, "force": bool,
}  # fmt: skip
_CHOICES = {"command": get_args(Command), "outtype": ("auto", *OUTTYPES), "dialect": tuple(RENAMES)}
_PATHS = ("source", "base", "adapter")


def read_jobs(path: Path) -> list[JobSpec]:
    """The jobs of a file, sorted by output; UsageError on whatever is wrong with it, before anything runs."""
    try:
        if path.stat().st_size > MAX_FILE_NBYTES:
            raise UsageError(f"larger than {MAX_FILE_NBYTES >> 20} MiB", file=path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read: {getattr(error, 'strerror', error)}", file=path) from None
    entries = list(_toml_entries(text, path) if path.suffix == ".toml" else _json_entries(text, path))
    if not entries:
        raise UsageError("no job in it", file=path, hint="a [[job]] needs a source at least")
    jobs = [job for where, entry in entries for job in _expand(entry, where, path)]
    seen: dict[str, JobSpec] = {}
    for job in jobs:
        if job.command != "verify" and seen.setdefault(job.output, job) is not job:
            names = f"{seen[job.output].name} and {job.name}"
            raise UsageError(f"{names} would both write {job.output}", file=path, hint="use {name} in output")
    return sorted(jobs, key=lambda job: (job.output, job.command))


def _toml_entries(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"not TOML: {error}", file=path) from None
    unknown = sorted(set(document) - {"defaults", "job"})
    defaults, entries = document.get("defaults", {}), document.get("job", [])
    if unknown or not isinstance(defaults, dict) or not isinstance(entries, list):
        raise UsageError(f"only [defaults] and [[job]] are known, not {unknown or 'this'}", file=path)
    for number, entry in enumerate(entries, start=1):
        yield f"job {number}", {**defaults, **entry}


def _json_entries(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"line {number} is not JSON: {error}", file=path) from None
            if not isinstance(entry, dict):
                raise UsageError(f"line {number} is no JSON object", file=path)
            yield f"line {number}", entry


def _expand(entry: Mapping[str, Any], where: str, path: Path) -> Iterator[JobSpec]:
    """The jobs of one entry: one for each match of its source."""
    _check(entry, where, path)
    folder = path.absolute().parent
    source = str(entry["source"])
    if _GLOB & set(source):
        matches = sorted(folder.glob(source)) if not Path(source).is_absolute() else sorted(Path("/").glob(source[1:]))
        if not matches:
            raise UsageError(f"{where}: nothing matches {source}", file=path)
        if "name" in entry and len(matches) > 1:
            raise UsageError(f"{where}: one name for {len(matches)} sources", file=path)
    else:
        matches = [folder / source]
    given = {key: value for key, value in entry.items() if key in {field.name for field in fields(JobSpec)}}
    for key in _PATHS:
        if key in given:
            given[key] = str(folder / given[key])
    for match in matches:
        name = given.get("name") or model_name(match)
        job = JobSpec(**{"command": "convert", "output": "", **given, "source": str(match), "name": name})
        yield replace(job, output=str(folder / _output(str(entry.get("output", DEFAULT_OUTPUT)), job, where, path)))


def _output(template: str, job: JobSpec, where: str, path: Path) -> str:
    outtype = job.outtype
    if outtype == "auto" and "{outtype}" in template and job.command == "convert":
        outtype = _resolved(Path(job.source))
    try:
        return template.format(name=job.name, outtype=outtype)
    except (KeyError, IndexError, ValueError):
        raise UsageError(f"{where}: output {template!r} may hold {{name}} and {{outtype}}", file=path) from None


def _resolved(source: Path) -> str:
    """What auto means for a checkpoint; "auto" where it cannot be read, which its job will report."""
    from streamconv.checkpoint import Checkpoint
    from streamconv.errors import StreamconvError
    from streamconv.outtypes import resolve_auto

    try:
        with Checkpoint.open(source) as checkpoint:
            return resolve_auto(tensor.spec for tensor in checkpoint.lazy_tensors())
    except StreamconvError:
        return "auto"


def _check(entry: Mapping[str, Any], where: str, path: Path) -> None:
    for key, value in entry.items():
        if key not in _KEYS:
            raise UsageError(f"{where}: unknown key {key!r}", file=path, hint=f"known: {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]):
            raise UsageError(f"{where}: {key} must be a {_KEYS[key].__name__}", file=path)
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UsageError(f"{where}: {key} {value!r} is none of {', '.join(_CHOICES[key])}", file=path)
    if "source" not in entry:
        raise UsageError(f"{where}: no source", file=path)
    for key in ("max_memory", "split_max_size"):
        if key in entry:
            parse_size(entry[key])
    command = entry.get("command", "convert")
    if command == "lora" and "base" not in entry:
        raise UsageError(f"{where}: a lora job needs a base", file=path)
    if command == "verify" and "output" not in entry:
        raise UsageError(f"{where}: a verify job needs the output to verify", file=path)
