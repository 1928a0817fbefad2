"""A job: everything that decides the bytes of one output, be it one file or several; and how its run goes.

Owns: what `convert` and `convert_adapter` hand to `run` and to `verify`. Does not own: doing it (api/).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

from streamconv.budget import default_limit_nbytes, parse_size
from streamconv.checkpoint.config import Config
from streamconv.checkpoint.safetensors import Shard
from streamconv.engine.layout import MAX_DEFAULT_WORKERS, Io, Step
from streamconv.engine.split import Part, SplitOptions
from streamconv.errors import Caution, Interrupted, UsageError
from streamconv.files.local import FileId, files_read
from streamconv.files.store import Place
from streamconv.ggml.outtypes import WORDS
from streamconv.ggml.policy import outtype_hint
from streamconv.gguf.format import Buffer, KeyValue, PackedArray, Scalar
from streamconv.gguf.names import LLAMA_CPP, RENAMES
from streamconv.lazy.leaves import sources
from streamconv.lazy.node import Readable, description
from streamconv.metadata.vocab.choice import PREFERENCES
from streamconv.report import Output, Report, TypeTotal
from streamconv.timing import Profile, Stopwatch

_MAX_SHOWN_CHARS = 40  # of a key's value in a journal; longer ones are told apart by their digests
FORMAT_VERSION = "1"  # raised whenever the same input and options give other bytes than before


class WorkKeywords(TypedDict, total=False):
    """How the work on all tensors goes, be it making or comparing them.

    max_memory: bytes, or a text as "96MiB" or "1.5G", None for the default bound; threads: from 1, None for the cores,
    at most 4; progress(done, total) in bytes, called from the calling thread: `done` grows up to `total`, and in a run
    that verifies what it wrote once more, from 0 to what is compared; cancel(): asked between chunks, true stops the
    work as an interrupt does.
    """

    max_memory: int | str | None
    threads: int | None
    progress: Callable[[int, int], None] | None
    cancel: Callable[[], bool] | None


class RunKeywords(WorkKeywords, total=False):
    """How a run goes; nothing here changes a byte of the output.

    A run goes on with what an earlier one of the same conversion left unfinished; restart discards that. resume is
    the default, and accepted.
    io: "mapped" or "positioned" reads of sources; None maps local files where the system and the memory bound let it.
    """

    force: bool
    resume: bool
    restart: bool
    dry_run: bool
    sha256: bool
    modelfile: bool
    verify: bool
    profile: Profile | None
    io: str | None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """RunKeywords with their defaults. UsageError on a bound or a number of threads that is none."""

    max_memory: int | str | None = None
    threads: int | None = None
    force: bool = False
    resume: bool = False
    restart: bool = False
    dry_run: bool = False
    sha256: bool = False
    modelfile: bool = False
    verify: bool = False
    progress: Callable[[int, int], None] | None = None
    cancel: Callable[[], bool] | None = None
    profile: Profile | None = None
    io: str | None = None

    def __post_init__(self) -> None:
        if self.resume and self.restart:
            raise UsageError("resume goes on with an earlier run, restart discards it", code="option-conflict")
        limit = self.max_memory
        if limit is None:  # settled now: it follows from what is resident before the run
            limit = default_limit_nbytes()
        elif isinstance(limit, str):
            limit = parse_size(limit)
        if not isinstance(limit, int):
            raise UsageError(
                f"max_memory is {limit!r}", hint='a number of bytes, or a text as "96MiB"', code="size-syntax"
            )
        object.__setattr__(self, "max_memory", limit)
        if self.threads is not None and not (isinstance(self.threads, int) and self.threads >= 1):
            raise UsageError(
                f"threads is {self.threads!r}",
                hint="a whole number from 1, or None for the cores",
                code="threads-range",
            )

        if self.io not in (None, Io.MAPPED.value, Io.POSITIONED.value):
            what = f"io is {self.io!r}"
            raise UsageError(what, hint=f"{Io.MAPPED.value}, {Io.POSITIONED.value}, or None for either", code="io")

    @property
    def limit_nbytes(self) -> int:
        assert isinstance(self.max_memory, int)
        return self.max_memory

    @property
    def n_threads(self) -> int:
        return min(MAX_DEFAULT_WORKERS, _n_cores()) if self.threads is None else self.threads

    @property
    def stopwatch(self) -> Stopwatch:
        return self.profile or Stopwatch()

    def cancelled(self) -> Interrupted | None:
        """What to raise, where the caller wants the run to stop."""
        if self.cancel is not None and self.cancel():
            return Interrupted("cancelled", hint="run it again to go on", code="cancelled")
        return None


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What of a call decides the output's bytes. UsageError where a word is none that there is."""

    outtype: str = "auto"
    dialect: str = LLAMA_CPP
    name: str | None = None
    pre: str | None = None
    split: SplitOptions = field(default_factory=SplitOptions)
    tokenizer: str = "auto"

    def __post_init__(self) -> None:
        if self.outtype not in WORDS:
            what = f"{self.outtype!r} is none of {', '.join(WORDS)}"
            raise UsageError(what, hint=outtype_hint(str(self.outtype)), code="outtype-unknown")
        if self.dialect not in tuple(RENAMES):
            raise UsageError(f"{self.dialect!r} is none of {', '.join(RENAMES)}", code="dialect-unknown")
        if self.tokenizer not in PREFERENCES:
            raise UsageError(
                f"tokenizer {self.tokenizer!r} is none of {', '.join(PREFERENCES)}", code="tokenizer-unknown"
            )
        for text in (self.name, self.pre):
            if text is not None and text != text.encode("utf-8", "replace").decode("utf-8"):
                raise UsageError(f"{text!r} is no UTF-8, as all text in a GGUF file is", code="not-utf8")


@dataclass(slots=True)
class Job:
    """Everything that decides the bytes of one output, and what its report says. Made once all of it was read.

    A model's projector is an output of its own, with its own keys and layout: a companion of the model's job.
    """

    command: str
    keys: Sequence[KeyValue]
    parts: Sequence[Part]
    architecture: str
    dialect: str
    outtype: str
    shards: Sequence[Shard]
    configs: Sequence[Config]
    options: Mapping[str, str]
    defaults: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)  # of keys that are missing, by name
    cautions: list[Caution] = field(default_factory=list)
    changed_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    base: Place | None = None  # of an adapter: the model it is for
    role: str = "model"
    companions: Sequence[Job] = ()  # further files of the same checkpoint, sealed together with this one
    sources: Mapping[FileId, Path] = field(default_factory=files_read)  # every file that was read, none to write over
    started: float = field(default_factory=time.monotonic)

    @property
    def steps(self) -> Iterator[Step]:
        """The tensors of all parts of this output."""
        return (step for part in self.parts for step in part.layout.steps)

    @property
    def outputs(self) -> tuple[Job, ...]:
        """This output and those that are sealed with it."""
        return (self, *self.companions)

    @property
    def files(self) -> tuple[tuple[Job, Part], ...]:
        """Every file of all outputs, each with the output that it is of; the first is the one that loaders name."""
        return tuple((output, part) for output in self.outputs for part in output.parts)

    def identity(self, part: Part) -> dict[str, str]:
        """All that decides a part's bytes, item by item: a run goes on with another only where all of it is the same.

        The header's bytes, the chain of operations of every tensor and the sources' fingerprints leave nothing out,
        whatever keys and operations there will be; the other items name what a user may have changed.
        """
        from streamconv import __version__

        items = {"streamconv": __version__, "gguf": version("gguf"), "format": FORMAT_VERSION}
        items |= {f"key {entry.key}": _shown(entry) for entry in part.keys}
        items |= {f"option {name}": value for name, value in self.options.items()}
        names = _distinct(f"source {shard.path.name}" for shard in self.shards)
        items |= {name: shard.fingerprint for name, shard in zip(names, self.shards, strict=True)}
        for name, config in zip(_distinct(config.file.name for config in self.configs), self.configs, strict=True):
            items |= {
                f"{name} {key}": _shortened(json.dumps(value, sort_keys=True)) for key, value in config.raw.items()
            }
        return items | {"header": _digest(part.layout.header.pieces), "operations": self._operations(part)}

    def _operations(self, part: Part) -> str:
        """A digest of what is done to which stored bytes, for every tensor of a part."""
        numbers: dict[Readable, int] = {shard: number for number, shard in enumerate(self.shards)}

        def lines() -> Iterator[bytes]:
            for step in part.layout.steps:
                files = [numbers[source.file] for source in sources(step.tensor)]
                yield f"{step.target} {files} {description(step.tensor)}\n".encode()

        return _digest(lines())

    def report(self) -> Report:
        totals: dict[str, list[int]] = defaultdict(list)
        steps = [step for output in self.outputs for step in output.steps]
        for step in steps:
            totals[step.tensor.type.name].append(step.nbytes)
        types = {name: TypeTotal(len(sizes), sum(sizes)) for name, sizes in sorted(totals.items())}
        return Report(
            command=self.command,
            output=self.parts[0].path,
            architecture=self.architecture,
            dialect=self.dialect,
            outtype=self.outtype,
            n_tensors=sum(total.n_tensors for total in types.values()),
            n_parameters=sum(step.tensor.spec.n_elements for step in steps),
            types=types,
            outputs=[Output(part.path, part.layout.nbytes, role=output.role) for output, part in self.files],
            warnings=[caution for output in self.outputs for caution in output.cautions],
        )


def _n_cores() -> int:
    """The cores that this process may run on; all of the machine's where the system, as macOS, does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _distinct(names: Iterable[str]) -> Iterator[str]:
    """The names, each with a number where it was there before."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} {seen[name]}"


def _shown(entry: KeyValue) -> str:
    """A key's value, short enough for a journal and a message."""
    if isinstance(entry.value, PackedArray):
        return f"{int(entry.value.element)} {entry.value.length} {_digest([entry.value.payload])}"
    return _shortened(str(entry.value))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else _digest([text.encode()])


def _digest(parts: Iterable[Buffer]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
