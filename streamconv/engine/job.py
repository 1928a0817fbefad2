"""A job: everything that determines the bytes of one output, in one file or several.

`convert` and `convert_adapter` make jobs; `run` and `verify` use them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from streamconv.checkpoint.config import Config
from streamconv.checkpoint.modules import RANK
from streamconv.engine.layout import Step
from streamconv.engine.split import Part
from streamconv.errors import RunWarning
from streamconv.files.local import FileId, files_read
from streamconv.files.store import Place
from streamconv.gguf.format import Buffer, KeyValue, PackedArray, Scalar
from streamconv.lazy.leaves import sources
from streamconv.lazy.node import Readable, description
from streamconv.report import Gives, Output, Report, TypeTotal

_MAX_SHOWN_CHARS = 40  # of a key's value in a journal; longer values are replaced by their digests
FORMAT_VERSION = "1"  # raised whenever the same input and options give different bytes than before


class SourceFile(Readable, Protocol):
    """An open file that holds source tensors."""

    @property
    def path(self) -> Place: ...
    @property
    def fingerprint(self) -> str:
        """Identifies its bytes without reading them all."""
        ...


@dataclass(slots=True)
class Job:
    """Everything that determines the bytes of one output, and the content of its report.

    A model's projector is an output of its own, with its own keys and layout: a companion of the model's job.

    Attributes:
        command: The command, for the report.
        keys: The metadata of the output.
        parts: The files of the output.
        architecture: llama.cpp's name of the architecture.
        dialect: The dialect of the tensors' names, see gguf/names.py.
        outtype: The file's type.
        shards: The open files of tensors.
        configs: The parsed config files.
        options: The options that affect the bytes, by name.
        defaults: The values that loaders use for keys that are not written, by the key's name.
        warnings: For the report.
        changed_by: The adapters that are merged into a tensor, by its name.
        base: The base model of an adapter.
        base_template: The chat template of that base, if it is a GGUF file.
        role: model, adapter, or the kind of a companion, such as mmproj.
        companions: Further outputs of the same checkpoint, published together with this one.
        sources: Every file that was read; none of them may be overwritten.
        started: The time at which the job began, as `time.monotonic`.
    """

    command: str
    keys: Sequence[KeyValue]
    parts: Sequence[Part]
    architecture: str
    dialect: str
    outtype: str
    shards: Sequence[SourceFile]
    configs: Sequence[Config]
    options: Mapping[str, str]
    defaults: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)
    warnings: list[RunWarning] = field(default_factory=list)
    changed_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    base: Place | None = None
    base_template: str = ""
    role: str = "model"
    companions: Sequence[Job] = ()
    sources: Mapping[FileId, Path] = field(default_factory=files_read)
    started: float = field(default_factory=time.monotonic)

    @property
    def steps(self) -> Iterator[Step]:
        """The tensors of all parts of this output."""
        return (step for part in self.parts for step in part.layout.steps)

    @property
    def outputs(self) -> tuple[Job, ...]:
        """This output and its companions."""
        return (self, *self.companions)

    @property
    def files(self) -> tuple[tuple[Job, Part], ...]:
        """Every file of all outputs, each with its output; the first is the one that users give to a loader."""
        return tuple((output, part) for output in self.outputs for part in output.parts)

    def identity(self, part: Part) -> dict[str, str]:
        """Everything that determines a part's bytes, by name: a run continues another only if all of it is equal.

        The header's bytes, the chain of operations of every tensor and the sources' fingerprints are complete by
        construction. The other items exist so that a message can name what a user has changed.
        """
        from importlib.metadata import version

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
        """A digest of the operations on stored bytes, for every tensor of a part."""
        numbers: dict[Readable, int] = {shard: number for number, shard in enumerate(self.shards)}

        def lines() -> Iterator[bytes]:
            for step in part.layout.steps:
                files = [numbers[source.file] for source in sources(step.tensor)]
                yield f"{step.target} {files} {description(step.tensor)}\n".encode()

        return _digest(lines())

    def report(self) -> Report:
        """The report of this job, without the results of a run."""
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
            gives=_gives(self.keys) if self.role == "model" else "text",
            outputs=[Output(part.path, part.layout.nbytes, role=output.role) for output, part in self.files],
            adapters=tuple(dict.fromkeys(name for names in self.changed_by.values() for name in names)),
            warnings=[warning for output in self.outputs for warning in output.warnings],
        )


def _gives(keys: Iterable[KeyValue]) -> Gives:
    """What a model is run for, by the keys that a text model does not have."""
    values = {entry.key.partition(".")[2]: entry.value for entry in keys}
    if pooling := values.get("pooling_type"):
        return "scores" if pooling == RANK else "vectors"
    is_body = "embedding_length_out" in values or not values.get("attention.causal", True)
    return "token vectors" if is_body else "text"


def _distinct(names: Iterable[str]) -> Iterator[str]:
    """The names, with a number appended to repeated ones."""
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
