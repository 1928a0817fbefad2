"""What a model's files contain: keys, tensors, problems, and what a conversion would write.

No weights are read, and memory is bounded whatever an untrusted file declares. A file that cannot be parsed raises a
SourceError; one that can be parsed but has defects is shown with its problems. Scripts rely on the JSON form
(schema 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from gguf.constants import GGUFValueType

from streamconv.api.convert_model import SOURCE_NBYTES, TARGET_NBYTES, auto_outtype
from streamconv.budget import Budget, default_limit_nbytes
from streamconv.checkpoint.config import Config
from streamconv.checkpoint.folder import Checkpoint
from streamconv.checkpoint.safetensors import Shard, SourceTensor
from streamconv.checkpoint.weight_sets import INDEX_ENDING
from streamconv.engine.layout import MODULES_NBYTES
from streamconv.errors import BudgetError, RunWarning, SourceError
from streamconv.files.hub import ADAPTER_CONFIG, CONFIG, Source, find_source
from streamconv.files.store import Place
from streamconv.files.strict_json import load_object
from streamconv.ggml.element_types import tensor_nbytes
from streamconv.ggml.policy import OuttypePolicy, facts_of
from streamconv.gguf.entries import FileProblem, GGUFKey, Span
from streamconv.gguf.format import Scalar
from streamconv.gguf.splits import GGUFSet
from streamconv.lora.config import PeftConfig, Problem, read_lora_config
from streamconv.lora.files import WEIGHTS as ADAPTER_WEIGHTS
from streamconv.lora.files import LoraFile
from streamconv.metadata.vocab import read_vocabulary, vocabulary_nbytes
from streamconv.options import public
from streamconv.recipe.recognise import recipe_of_checkpoint, recognise, recognise_architecture
from streamconv.recipe.registry import RecipeSource, using_recipes

SCHEMA: Final = 1
MAX_LISTED: Final = 1024  # a longer array is shown as its length and first values
N_FIRST: Final = 8
ROW_NBYTES: Final = 640  # memory of a tensor in the listing and its JSON. Measured: 512
TEXT_NBYTES: Final = 1024  # of each text among the first values
ARRAYS_NBYTES: Final = 8 << 20  # of all arrays together; real ones of 1024 values take about 10 KB each

_JSON_TYPES: Final = {
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", list: "array", dict: "object",
}  # fmt: skip

Kind = Literal["gguf", "checkpoint", "adapter"]


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A stored tensor. `shape` is row-major, `offset` counts from the start of `file`, `nbytes` is None if unknown."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int | None
    offset: int
    file: str

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(slots=True)
class Total:
    """The sums over all tensors of a type."""

    n_tensors: int = 0
    n_parameters: int = 0
    nbytes: int = 0

    def add(self, n_parameters: int, nbytes: int) -> None:
        self.n_tensors += 1
        self.n_parameters += n_parameters
        self.nbytes += nbytes


@dataclass(frozen=True, slots=True)
class Conversion:
    """The file that `streamconv convert` writes with default options if there are no problems."""

    architecture: str
    outtype: str
    totals: Mapping[str, Total]


@dataclass(slots=True)
class Inspection:
    """The facts about one model, split set, checkpoint or adapter. `form` is a line about the files themselves."""

    kind: Kind
    path: Place
    form: str
    architecture: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    metadata_types: dict[str, str] = field(default_factory=dict)
    tensors: list[TensorRow] = field(default_factory=list)
    problems: list[FileProblem] = field(default_factory=list)
    warnings: list[RunWarning] = field(default_factory=list)
    conversion: Conversion | None = None

    @property
    def n_parameters(self) -> int:
        return sum(row.n_elements for row in self.tensors)

    @property
    def totals(self) -> dict[str, Total]:
        """Return the sums by type, in order of appearance."""
        totals: dict[str, Total] = {}
        for row in self.tensors:
            totals.setdefault(row.type, Total()).add(row.n_elements, row.nbytes or 0)
        return totals

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "path": str(self.path),
            "architecture": self.architecture,
            "n_tensors": len(self.tensors),
            "n_parameters": self.n_parameters,
            "metadata": self.metadata,
            "metadata_types": self.metadata_types,
            "tensors": [
                {
                    "name": row.name,
                    "shape": list(row.shape),
                    "type": row.type,
                    "nbytes": row.nbytes,
                    "offset": row.offset,
                    "file": row.file,
                }
                for row in self.tensors
            ],
            "problems": [
                {"code": problem.code, "message": problem.message, "file": str(problem.file), "tensor": problem.tensor}
                for problem in self.problems
            ],
        }


@public()
def inspect(source: Source, *, recipes: Sequence[RecipeSource] = ()) -> Inspection:
    """Return the contents of a model's files. Nothing is printed.

    Args:
        source: a GGUF file (the first part of a split stands for all), the folder of a checkpoint or adapter, or a
            .safetensors file.
        recipes: recipes, or Python files that define them (their code is run).

    Returns:
        The metadata, the tensors (shape row-major, size in bytes) and the problems that were found.

    Raises:
        SourceError: nothing can be read.
    """
    path = find_source(source)
    try:
        with using_recipes(recipes):
            return _reader_of(path)(path, Budget(default_limit_nbytes()))
    except OSError as error:
        raise SourceError(
            f"cannot be read: {error.strerror}", file=error.filename or path, code="cannot-read"
        ) from None


def _reader_of(path: Place) -> Callable[[Place, Budget], Inspection]:
    if not path.is_dir() and path.suffix != ".safetensors" and not path.name.endswith(INDEX_ENDING):
        return _gguf
    folder = path if path.is_dir() else path.parent
    if not any(folder.glob("*.safetensors")) and (ggufs := sorted(file.name for file in folder.glob("*.gguf"))):
        hint = f"name one of them, as {folder / ggufs[0]}"
        raise SourceError(f"a folder with {len(ggufs)} GGUF files", file=path, hint=hint, code="folder-of-ggufs")
    signs = [ADAPTER_CONFIG, *ADAPTER_WEIGHTS] if path.is_dir() else [ADAPTER_CONFIG]
    is_adapter = any((folder / name).is_file() for name in signs) and (path.is_dir() or "adapter" in path.stem)
    return _adapter if is_adapter else _checkpoint


# ---------------------------------------------------------------- GGUF


def _gguf(path: Place, budget: Budget) -> Inspection:
    with GGUFSet.open(path, budget) as files:
        budget.reserve("listing", ROW_NBYTES * len(files.tensors), file=path)
        budget.reserve("modules", MODULES_NBYTES // 2)  # fewer modules are loaded than for a conversion
        first = files.files[0]
        arch = first.keys.get("general.architecture")
        room = ARRAYS_NBYTES
        metadata = {}
        for key in first.keys.values():
            metadata[key.name], used = _value(key, room)
            room -= used
        return Inspection(
            "gguf",
            path,
            f"GGUF version {first.version}" + (f", {len(files.files)} parts" if len(files.files) > 1 else ""),
            architecture=arch.value if arch is not None and isinstance(arch.value, str) else None,
            metadata=metadata,
            metadata_types={key.name: key.type_name for key in first.keys.values()},
            tensors=[
                TensorRow(tensor.name, tensor.shape, tensor.type_name, tensor.nbytes, tensor.offset, file.path.name)
                for file, tensor in files.tensors.values()
            ],
            problems=list(files.problems),
        )


def _value(key: GGUFKey, room: int) -> tuple[Any, int]:
    """The key's value for JSON, and the bytes of arrays that it uses up of `room`."""
    if not isinstance(key.value, Span):
        return _number(key.value, key.type), 0
    span = key.value
    if key.type == GGUFValueType.STRING:
        length, is_whole = span.nbytes - 8, False
    else:
        length, is_whole = len(span), len(span) <= MAX_LISTED and span.nbytes <= room
    values = list(span) if is_whole else span.first(N_FIRST if room > 0 else 0, TEXT_NBYTES)
    listed = [_number(value, span.element) for value in values]
    used = min(span.nbytes, len(listed) * (TEXT_NBYTES if not is_whole else span.nbytes))
    return (listed if is_whole else {"length": length, "first": listed}), used


def _number(value: Scalar, kind: GGUFValueType) -> Scalar:
    """The number for JSON: the shortest decimal that gives the same float32; infinities and NaN by name."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return str(value)
    return float(str(np.float32(value))) if kind == GGUFValueType.FLOAT32 else value


# ---------------------------------------------------------------- safetensors


def _checkpoint(path: Place, budget: Budget) -> Inspection:
    found = Inspection("checkpoint", path, "incomplete")
    try:
        checkpoint = Checkpoint.open(path, budget=budget)
    except SourceError as error:
        found.problems.append(_problem(error, path))
        config = _read_apart(found, CONFIG, budget)
        if config.raw:  # else the config is already listed as a problem
            with _listing(found):
                found.architecture = recognise_architecture(config).arch
        return found
    with checkpoint:
        found.form = f"safetensors, {len(checkpoint.shards)} file{'s' if len(checkpoint.shards) > 1 else ''}"
        _add_config(found, checkpoint.config.raw)
        _add_tensors(found, checkpoint.tensors.values(), budget)
        found.warnings += checkpoint.warnings
        with _listing(found):
            _add_conversion(found, checkpoint, budget)
    return found


def _add_conversion(found: Inspection, checkpoint: Checkpoint, budget: Budget) -> None:
    """Add the result of a conversion. SourceError if it would be refused."""
    config = checkpoint.config
    recipe = recipe_of_checkpoint(checkpoint)
    found.architecture = recipe.arch
    budget.reserve("plan", SOURCE_NBYTES * len(checkpoint.tensors), file=checkpoint.directory)
    model = recognise(checkpoint, recipe)
    budget.reserve("plan", TARGET_NBYTES * len(model.targets), file=checkpoint.directory)
    outtype = auto_outtype(checkpoint, model)
    totals: dict[str, Total] = {}
    kinds = OuttypePolicy(outtype).choose(
        [model.role(target) for target in model.targets], facts_of(recipe.arch, model.keys())
    )
    for target, kind in zip(model.targets, kinds, strict=True):
        shape = target.tensor.spec.shape
        totals.setdefault(kind.name, Total()).add(math.prod(shape), tensor_nbytes(shape, kind))
    found.conversion = Conversion(recipe.arch, outtype, totals)
    found.warnings += model.warnings
    folder, n_vocab = checkpoint.directory, model.dims["V"]
    try:
        with budget.lend("reading the vocabulary", sum(vocabulary_nbytes(folder, n_vocab)), file=folder):
            vocabulary = read_vocabulary(
                folder,
                config=config.raw,
                n_vocab=n_vocab,
                default_pre=recipe.default_pre,
                pre=None,
                special=recipe.special_tokens,
                templates=recipe.templates,
            )
    except BudgetError:
        found.warnings.append(RunWarning("tokenizer-size", "the tokenizer files are too large to be read by inspect"))
        return
    found.warnings += vocabulary.warnings


def _adapter(path: Place, budget: Budget) -> Inspection:
    found = Inspection("adapter", path, "incomplete")
    try:
        adapter = LoraFile.open(path, budget)
    except SourceError as error:
        found.problems.append(_problem(error, path))
        _read_apart(found, ADAPTER_CONFIG, budget)
        return found
    with adapter:
        _add_config(found, adapter.config.raw)
        _add_tensors(found, adapter.shard.tensors.values(), budget)
        problems = list(adapter.problems)
        for name, factors in adapter.factors.items():
            if factors.a is None or factors.b is None:
                problems.append(Problem("partner", f"has no lora_{'A' if factors.a is None else 'B'}", (name,)))
        with _listing(found):
            config = read_lora_config(adapter.config)
            maker = "PEFT" if isinstance(config, PeftConfig) else "MLX"
            found.form = f"LoRA, {maker}, {len(adapter.factors)} modules"
            found.warnings += config.warnings
            problems += config.problems
        found.problems += [FileProblem(problem.code, str(problem), adapter.shard.path) for problem in problems]
    return found


def _read_apart(found: Inspection, config_name: str, budget: Budget) -> Config:
    """Read the config and each file separately: everything readable is shown, the rest becomes problems."""
    folder = found.path if found.path.is_dir() else found.path.parent
    config: dict[str, Any] = {}
    if (folder / config_name).is_file():  # else that is already a problem
        with _listing(found):
            config = load_object(folder / config_name)
    _add_config(found, config)
    is_alone = found.path.suffix == ".safetensors"
    for file in [found.path] if is_alone else sorted(folder.glob("*.safetensors"), key=lambda path: path.name):
        with _listing(found):
            shard = Shard(file, budget)
            shard.close()
            _add_tensors(found, shard.tensors.values(), budget)
    if not found.tensors and not config:
        first = found.problems[0]
        raise SourceError(first.message, file=first.file, tensor=first.tensor, code=first.code)
    return Config(config, folder / config_name)


@contextmanager
def _listing(found: Inspection) -> Iterator[None]:
    """Turn a SourceError raised in the block into a problem, listed once."""
    try:
        yield
    except SourceError as error:
        problem = _problem(error, found.path)
        if problem not in found.problems:
            found.problems.append(problem)


def _add_config(found: Inspection, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        is_long = isinstance(value, list) and len(value) > MAX_LISTED
        found.metadata[key] = {"length": len(value), "first": value[:N_FIRST]} if is_long else value
        found.metadata_types[key] = _JSON_TYPES[type(value)]


def _add_tensors(found: Inspection, tensors: Collection[SourceTensor], budget: Budget) -> None:
    budget.reserve("listing", ROW_NBYTES * len(tensors), file=found.path)
    found.tensors += [
        TensorRow(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, tensor.offset, tensor.shard.path.name)
        for tensor in tensors
    ]


def _problem(error: SourceError, path: Place) -> FileProblem:
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return FileProblem(error.code, message, Path(error.file) if error.file else path, error.tensor)
