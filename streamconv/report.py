"""The result of a run, and its JSON form, on which scripts rely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from streamconv.errors import RunWarning, StreamconvError

SCHEMA: Final = 2


@dataclass(frozen=True, slots=True)
class Output:
    """One file that was (or, in a dry run, would be) written. sha256 is None unless it was asked for."""

    path: Path
    nbytes: int
    sha256: str | None = None
    role: str = "model"


@dataclass(frozen=True, slots=True)
class TypeTotal:
    n_tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A row of the plan: what a target is made of. `changed_by`: adapters that are merged into it."""

    source: tuple[str, ...]
    target: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    changed_by: tuple[str, ...] = ()


@dataclass(slots=True)
class Report:
    """What a run did, or in a dry run would do (`plan` is set then).

    Attributes:
        resumed_nbytes: of the outputs, that an earlier run had written.
        adapters: those that are merged into a model.
        beside: manifests and a Modelfile that lie beside the outputs.
    """

    command: str
    output: Path
    architecture: str
    dialect: str
    outtype: str
    n_tensors: int
    n_parameters: int
    types: Mapping[str, TypeTotal]
    outputs: Sequence[Output] = ()
    seconds: float = 0.0
    peak_rss_nbytes: int = 0
    verified: bool | None = None
    resumed: bool = False
    resumed_nbytes: int = 0
    adapters: Sequence[str] = ()
    beside: Sequence[Path] = ()
    warnings: list[RunWarning] = field(default_factory=list)
    plan: Sequence[PlannedTensor] | None = None
    memory: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "command": self.command,
            "output": str(self.output),
            "outputs": [_output(output) for output in self.outputs],
            "architecture": self.architecture,
            "dialect": self.dialect,
            "outtype": self.outtype,
            "n_tensors": self.n_tensors,
            "n_parameters": self.n_parameters,
            "types": {name: {"n_tensors": t.n_tensors, "nbytes": t.nbytes} for name, t in self.types.items()},
            "seconds": round(self.seconds, 3),
            "peak_rss_nbytes": self.peak_rss_nbytes,
            "verified": self.verified,
            "resumed": self.resumed,
            "resumed_nbytes": self.resumed_nbytes,
            "adapters": list(self.adapters),
            "beside": [str(path) for path in self.beside],
            "warnings": [{"code": w.code, "tensor": w.tensor, "message": w.message} for w in self.warnings],
        }
        if self.plan is not None:
            result["plan"] = [_planned(row) for row in self.plan]
        if self.memory is not None:
            result["memory"] = dict(self.memory)
        return result


def _output(output: Output) -> dict[str, Any]:
    return {"path": str(output.path), "nbytes": output.nbytes, "sha256": output.sha256, "role": output.role}


def _planned(row: PlannedTensor) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "source": list(row.source),
        "target": row.target,
        "shape": list(row.shape),
        "type": row.type,
        "nbytes": row.nbytes,
    }
    if row.changed_by:
        entry["changed_by"] = list(row.changed_by)
    return entry


def error_to_json(error: StreamconvError) -> dict[str, Any]:
    """The object that `--json` prints for a failure."""
    said: dict[str, Any] = {
        "kind": error.kind,
        "code": error.code,
        "exit_code": error.exit_code,
        "message": error.message,
        "file": error.file,
        "tensor": error.tensor,
        "hint": error.hint,
    }
    if error.problems:
        said["problems"] = [dict(problem) for problem in error.problems]
    return {"schema": SCHEMA, "error": said}
