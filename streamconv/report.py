"""The result of a run, and its JSON form, on which scripts rely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from streamconv.errors import RunWarning, StreamconvError

SCHEMA: Final = 2
Gives = Literal["text", "vectors", "token vectors", "scores"]


@dataclass(frozen=True, slots=True)
class Output:
    """One file that was (or, in a dry run, would be) written.

    Attributes:
        path: The file.
        nbytes: Its size.
        sha256: Its SHA-256 in hexadecimal; None unless it was requested.
        role: model, adapter, or the kind of a further output, such as mmproj.
    """

    path: Path
    nbytes: int
    sha256: str | None = None
    role: str = "model"


@dataclass(frozen=True, slots=True)
class TypeTotal:
    """The number and total size of all tensors of one type."""

    n_tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of a plan.

    Attributes:
        source: The names of the stored tensors that it is computed from.
        target: Its name in the file.
        shape: Row-major.
        type: GGML's name of its type, as Q4_K.
        nbytes: The size of its data.
        changed_by: The adapters that are merged into it.
    """

    source: tuple[str, ...]
    target: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    changed_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorRelativeError:
    """The error of a tensor in a file, relative to its source.

    Attributes:
        name: Its name in the file.
        type: GGML's name of its type, as Q4_K.
        n_elements: The number of its weights.
        nbytes: The size of its data in the file.
        relative_rms: sqrt(sum of squared errors / sum of squared weights). None if that is not a number: one of the two
            has a NaN or an infinity, or the source is all zeros and the file is not.
    """

    name: str
    type: str
    n_elements: int
    nbytes: int
    relative_rms: float | None

    @property
    def bits_per_weight(self) -> float:
        """The size of its data in bits, divided by the number of its weights."""
        return 8 * self.nbytes / self.n_elements


@dataclass(frozen=True, slots=True)
class RelativeErrors:
    """The error of a file, relative to its source: `verify(..., error=True)`.

    Attributes:
        relative_rms: sqrt(sum of squared errors / sum of squared weights) over all tensors; None as for a tensor.
        tensors: The errors of all tensors, largest first.
    """

    relative_rms: float | None
    tensors: tuple[TensorRelativeError, ...]

    @property
    def bits_per_weight(self) -> float:
        """The size of all tensors' data in bits, divided by the number of all weights."""
        return 8 * sum(one.nbytes for one in self.tensors) / max(1, sum(one.n_elements for one in self.tensors))


@dataclass(slots=True)
class Report:
    """The result of a run or, in a dry run, its plan.

    Attributes:
        command: The command.
        output: The main output; of a split one, its first part.
        architecture: llama.cpp's name of the architecture.
        dialect: The dialect of the tensors' names: llama.cpp or ollama-legacy.
        outtype: The file's type.
        n_tensors: The number of tensors in all outputs.
        n_parameters: The number of elements in all outputs.
        types: The tensors by type.
        outputs: All files.
        seconds: The duration of the run.
        peak_rss_nbytes: The peak resident set of the process.
        verified: Whether the result was compared with its source and is equal; None if it was not compared.
        resumed: Whether unfinished work of an earlier run was continued.
        resumed_nbytes: How many bytes of the outputs an earlier run had written.
        gives: What the model is run for: text, an embedding of a text or of each of its tokens, or a reranker's score.
        adapters: The adapters that are merged into a model.
        beside: Further files that were written: manifests, a Modelfile, a plot.
        warnings: Warnings about the result, which is complete.
        plan: In a dry run, every tensor.
        memory: The memory proof, see docs/json.md.
        errors: With `verify(..., error=True)`, the errors relative to the source.
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
    gives: Gives = "text"
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
    errors: RelativeErrors | None = None

    @property
    def nbytes(self) -> int:
        """The total size of all outputs."""
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
        if self.errors is not None:
            result["errors"] = _errors(self.errors)
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


def _errors(errors: RelativeErrors) -> dict[str, Any]:
    return {
        "relative_rms": errors.relative_rms,
        "bits_per_weight": round(errors.bits_per_weight, 4),
        "tensors": [
            {
                "name": one.name,
                "type": one.type,
                "n_elements": one.n_elements,
                "nbytes": one.nbytes,
                "relative_rms": one.relative_rms,
            }
            for one in errors.tensors
        ],
    }


def error_to_json(error: StreamconvError) -> dict[str, Any]:
    """The object that `--json` prints for a failure."""
    result: dict[str, Any] = {
        "kind": error.kind,
        "code": error.code,
        "exit_code": error.exit_code,
        "message": error.message,
        "file": error.file,
        "tensor": error.tensor,
        "hint": error.hint,
    }
    if error.problems:
        result["problems"] = [dict(problem) for problem in error.problems]
    return {"schema": SCHEMA, "error": result}
