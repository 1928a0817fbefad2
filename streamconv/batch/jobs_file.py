"""JOBS files: many conversions described in TOML or JSON lines.

The whole file is checked before anything runs. Paths are relative to its folder. A glob as source creates one job for
each match, in the order of their names; an existing path with exactly that name is not treated as a glob.

    [defaults]
    outtype = "q8_0"
    output = "out/{name}-{outtype}.gguf"

    [[job]]
    source = "models/*"
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Any, Final, get_args

from streamconv.budget import parse_size
from streamconv.errors import UsageError
from streamconv.files.hub import find_cached, is_repo_id, model_name
from streamconv.ggml.outtypes import AUTO, canonical
from streamconv.options import Command, Kind, declared, not_a_choice

DEFAULT_OUTPUT = "{name}-{outtype}.gguf"
MAX_FILE_NBYTES = 16 << 20
_GLOB = frozenset("*?[")
_FIELD = re.compile(r"\{(\w+)\}")  # of an output template


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job, with absolute paths and with all defaults.

    The attributes are the keys of a jobs file with the same names.

    Attributes:
        only_part: The number of the only part to write, from 1, for a job of a split; None: all parts.
        options: The other values, as (key, value) in the order of `OPTIONS`.
    """

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
    options: tuple[tuple[str, Any], ...] = ()

    def given(self) -> dict[str, Any]:
        """Return all values by key, None for those not given."""
        return {key: value for key, value in asdict(self).items() if key != "options"} | dict(self.options)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"options": dict(self.options)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> JobSpec:
        """Return the job for the result of `to_json`."""
        return cls(**{**values, "options": tuple((key, _frozen(value)) for key, value in values["options"].items())})

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> JobSpec:
        """Return a job from values by key."""
        own = {one.name for one in fields(cls)}
        others = tuple((key, _frozen(values[key])) for key in OPTIONS if key in values and key not in own)
        mine = {key: value for key, value in values.items() if key in own}
        return cls(**mine | {"outtype": canonical(mine.get("outtype", AUTO))}, options=others)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


OPTIONS: Final = {one.option.key: one for one in declared() if one.option.key is not None}  # by key
_FIXED: Final = ("name", "command", "source", "output", "base")
KEYS: Final = (*_FIXED, *OPTIONS)
_TYPES: Final[Mapping[Kind, tuple[type, ...]]] = {Kind.FLAG: (bool,), Kind.COUNT: (int,), Kind.NUMBER: (int, float)}
_TYPE_NAMES: Final = {str: "a string", bool: "true or false", int: "a number"}

# Keys that a command requires, and the commands to which a key applies; in [defaults], the others ignore the key.
# outtype applies to all commands, because it may be part of the name of any output.
_NEEDED: Final = {"verify": ("output",)}
_ONLY_FOR: Final[Mapping[str, tuple[str, ...]]] = {
    "base": ("lora", "verify"),
    **{key: one.option.commands for key, one in OPTIONS.items() if key != "outtype"},
}


_OF_COMMAND_LINE: Final = {one.option.flag: one for one in OPTIONS.values()}
_FLAG: Final = re.compile(r"(?<![\w-])(--[a-z][a-z-]+)(?:[ =]([A-Z0-9][\w.]*|[a-z]+\d[\w]*))?")


def in_jobs_file(hint: str) -> str:
    """Return a hint with options in the syntax of a jobs file: `force = true` for --force, `max_memory = "96MiB"`."""

    def key(match: re.Match[str]) -> str:
        one = _OF_COMMAND_LINE.get(match[1])
        if one is None:
            return match[0]
        if one.option.kind is Kind.FLAG:
            return f"{one.option.key} = true{f' {match[2]}' if match[2] else ''}"
        if match[2] is None:
            return str(one.option.key)
        return f"{one.option.key} = {match[2]}" if one.option.kind is Kind.COUNT else f'{one.option.key} = "{match[2]}"'

    return hint if "streamconv " in hint else _FLAG.sub(key, hint)  # do not change a command


def read_jobs(path: Path) -> list[JobSpec]:
    """Return the jobs of a file, sorted by output.

    Raises:
        UsageError: The file is malformed.
    """
    try:
        with path.open("rb") as file:  # a pipe, or a device, has no size
            raw = file.read(MAX_FILE_NBYTES + 1)
        if len(raw) > MAX_FILE_NBYTES:
            raise UsageError(f"larger than {MAX_FILE_NBYTES >> 20} MiB", file=path, code="jobs-too-large")
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot be read: {getattr(error, 'strerror', error)}", file=path, code="cannot-read"
        ) from None
    entries = list(_toml_entries(text, path) if path.suffix == ".toml" else _json_entries(text, path))
    if not entries:
        raise UsageError(
            "the file contains no jobs", file=path, hint="add a [[job]] with at least a source", code="jobs-empty"
        )
    jobs = [job for where, entry in entries for job in _expand(entry, where, path)]
    seen: dict[str, JobSpec] = {}
    for job in jobs:
        if job.command != "verify" and seen.setdefault(job.output, job) is not job:
            other = seen[job.output].name
            hint = "give one of them another name or output" if other == job.name else "use {name} in output"
            raise UsageError(
                f"{other} and {job.name} would both write {job.output}", file=path, hint=hint, code="jobs-same-output"
            )
    return sorted(_told_apart(jobs), key=lambda job: (job.output, job.command))


def _told_apart(jobs: Sequence[JobSpec]) -> Iterator[JobSpec]:
    """Yield the jobs; if several outputs share a job name, each job is renamed after its output."""
    n_outputs = Counter(name for name, _ in {(job.name, job.output) for job in jobs})
    for job in jobs:
        yield job if n_outputs[job.name] == 1 else replace(job, name=Path(job.output).stem)


def _toml_entries(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"not TOML: {error}", file=path, code="jobs-syntax") from None
    defaults, entries = document.get("defaults", {}), document.get("job", [])
    if unknown := sorted(set(document) - {"defaults", "job"}):
        raise UsageError(
            f"{', '.join(unknown)}: not known",
            file=path,
            hint="a jobs file has [defaults] and [[job]]",
            code="jobs-key",
        )
    if not isinstance(defaults, dict):
        raise UsageError("defaults is not a table", file=path, hint="write [defaults]", code="jobs-syntax")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(
            "job is not a list of tables", file=path, hint="write [[job]], in double brackets", code="jobs-syntax"
        )
    _check(defaults, "defaults", path)
    for number, entry in enumerate(entries, start=1):
        command = entry.get("command", defaults.get("command", "convert"))
        fitting = {key: value for key, value in defaults.items() if command in _ONLY_FOR.get(key, (command,))}
        yield f"job {number}", {**fitting, **entry}


def _json_entries(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"line {number} is not JSON: {error}", file=path, code="jobs-syntax") from None
            if not isinstance(entry, dict):
                raise UsageError(f"line {number} is not a JSON object", file=path, code="jobs-syntax")
            yield f"line {number}", entry


def _expand(entry: Mapping[str, Any], where: str, path: Path) -> Iterator[JobSpec]:
    """Yield the jobs of one entry, one for each match of its source and each outtype."""
    if isinstance(entry.get("outtype"), list):
        for outtype in entry["outtype"]:
            yield from _expand({**entry, "outtype": outtype}, where, path)
        return
    _check(entry, where, path)
    _check_whole(entry, where, path)
    folder = path.absolute().parent
    matches = _matches(str(entry["source"]), folder, where, path)
    if "name" in entry and len(matches) > 1:
        raise UsageError(f"{where}: the same name is used for {len(matches)} sources", file=path, code="jobs-name")
    given = dict(entry)
    for key in ("base", "adapter", "imatrix"):
        if key in given:
            given[key] = _absolute(given[key], folder)
    if "recipe" in given:
        given["recipe"] = [str(folder / file) for file in _listed(given["recipe"])]
    for match in matches:
        if entry.get("command") == "lora" and "base" not in entry:
            given["base"] = _stated_base(match)
        name = given.get("name") or model_name(Path(match))
        job = JobSpec.of({"command": "convert", **given, "source": match, "name": name, "output": ""})
        output = folder / _output(str(entry.get("output", DEFAULT_OUTPUT)), job, where, path)
        yield replace(job, output=os.path.normpath(output))


def _stated_base(adapter: str) -> str | None:
    """Return the base in an adapter's configuration; None if it cannot be found, which the job will report."""
    from streamconv.errors import StreamconvError
    from streamconv.lora.open_base import stated_source_of

    with suppress(StreamconvError, OSError):
        return str(stated_source_of(adapter))
    return None


def _matches(source: str, folder: Path, where: str, path: Path) -> list[str]:
    """Return the sources of one entry.

    Raises:
        UsageError: The source is an invalid glob, or a glob without a match.
    """
    if not _GLOB & set(source) or os.path.lexists(folder / source):
        return [_absolute(source, folder)]
    root, pattern = (Path("/"), source.lstrip("/")) if source.startswith("/") else (folder, source)
    try:
        matches = sorted(match for match in root.glob(pattern) if _is_model(match, pattern))
    except (ValueError, NotImplementedError, OSError) as error:
        raise UsageError(f"{where}: {source!r} is not a glob: {error}", file=path, code="jobs-glob") from None
    if not matches:
        raise UsageError(
            f"{where}: nothing matches {source}",
            file=path,
            hint="a glob matches folders and .safetensors files",
            code="jobs-no-match",
        )
    return [str(match) for match in matches]


def _is_model(match: Path, pattern: str) -> bool:
    """Whether a match may be a source: a folder or a .safetensors file, and not an output or other file."""
    is_hidden = match.name.startswith(".") and not PurePath(pattern).name.startswith(".")
    return not is_hidden and (match.is_dir() or match.suffix == ".safetensors")


def _absolute(source: str, folder: Path) -> str:
    """Return `source` relative to `folder`; if that does not exist, the repo's folder in the Hugging Face cache."""
    if is_repo_id(source) and not os.path.lexists(folder / source):
        with suppress(ImportError):
            if found := find_cached(source):
                return str(found)
    return str(folder / source)


def _output(template: str, job: JobSpec, where: str, path: Path) -> str:
    """Return the output template with its fields replaced. A field is a plain name in braces, without a format.

    Raises:
        UsageError: The template has another field or brace (`jobs-output`).
    """
    names = _FIELD.findall(template)
    if set(names) - {"name", "outtype", "ftype"} or set("{}") & set(_FIELD.sub("", template)):
        raise UsageError(
            f"{where}: output {template!r} may contain only {{name}} and {{outtype}}", file=path, code="jobs-output"
        )
    outtype = job.outtype
    if outtype == "auto" and {"outtype", "ftype"} & set(names) and job.command != "lora":
        outtype = _resolved(Path(job.source), job.given().get("recipe") or ())
    values = {"name": job.name, "outtype": outtype, "ftype": outtype}
    return _FIELD.sub(lambda match: values[match[1]], template)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _resolved(source: Path, recipes: Sequence[str]) -> str:
    """Return the outtype that "auto" selects for a checkpoint; "auto" if it cannot be read (its job will report it)."""
    from streamconv.api.convert_model import auto_outtype
    from streamconv.budget import Budget, default_limit_nbytes
    from streamconv.checkpoint.folder import Checkpoint
    from streamconv.errors import StreamconvError
    from streamconv.files.hub import find_source
    from streamconv.recipe.recognise import recipe_of_checkpoint, recognise
    from streamconv.recipe.registry import using_recipes

    budget = Budget(default_limit_nbytes())
    try:
        with using_recipes(recipes), Checkpoint.open(find_source(source), budget=budget) as checkpoint:
            recipe = recipe_of_checkpoint(checkpoint)
            return auto_outtype(checkpoint, recognise(checkpoint, recipe))
    except (StreamconvError, OSError):
        return "auto"


def _check(entry: Mapping[str, Any], where: str, path: Path) -> None:
    listed = entry.get("outtype")
    if isinstance(listed, list):
        if not listed:
            raise UsageError(f"{where}: outtype is an empty list", file=path, code="jobs-value")
        for outtype in listed:
            _check({**entry, "outtype": outtype}, where, path)
        return
    for key, value in entry.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KEYS)}"
            raise UsageError(f"{where}: unknown key {key!r}", file=path, hint=hint, code="jobs-key")
        kind = OPTIONS[key].option.kind if key in OPTIONS else Kind.TEXT
        types = _TYPES.get(kind, (str,))
        if (
            kind in (Kind.TEXTS, Kind.FILES)
            and isinstance(value, list)
            and all(isinstance(text, str) for text in value)
        ):
            continue
        if type(value) not in types:
            raise UsageError(f"{where}: {key} must be {_TYPE_NAMES[types[0]]}", file=path, code="jobs-value")
        if value == "" or "\0" in str(value) or (kind is Kind.COUNT and value < 1):
            raise UsageError(f"{where}: {key} is {value!r}", file=path, code="jobs-value")
        if kind is Kind.SIZE and not _size(value):
            hint = "write a size as 4G or 96MiB"
            raise UsageError(f"{where}: {key} is {value!r}", file=path, hint=hint, code="jobs-value")
        if kind is Kind.WORD and canonical(value) not in OPTIONS[key].option.choices_for(None):
            error = not_a_choice(OPTIONS[key], value, f"{where}: {key} ")
            raise UsageError(error.message, file=path, hint=error.hint, code="jobs-value")
    if entry.get("command", "convert") not in get_args(Command):
        what = f"{where}: command {entry['command']!r} is not one of {', '.join(get_args(Command))}"
        raise UsageError(what, file=path, code="jobs-value")


def _size(text: str) -> int:
    """Return a size in bytes, or 0 if the text is not a size."""
    with suppress(UsageError):
        return parse_size(text)
    return 0


def _check_whole(entry: Mapping[str, Any], where: str, path: Path) -> None:
    """Raise UsageError if a required key is missing, or if a key does not apply to the command."""
    command = entry.get("command", "convert")
    missing = [key for key in ("source", *_NEEDED.get(command, ())) if key not in entry]
    if missing:
        raise UsageError(f"{where}: a {command} job needs {missing[0]}", file=path, code="jobs-key-missing")
    for key, commands in _ONLY_FOR.items():
        if key in entry and command not in commands:
            raise UsageError(f"{where}: {key} does not apply to a {command} job", file=path, code="jobs-key")
