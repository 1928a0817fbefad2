"""A Hugging Face checkpoint on disk: its config, its shards, and which tensor is in which shard.

Files are opened read-only, and weights are read only on request.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from streamconv.budget import Budget, mib, unbounded
from streamconv.checkpoint.config import Config
from streamconv.checkpoint.modules import NO_MODULES, Modules, read_modules
from streamconv.checkpoint.safetensors import Shard, SourceTensor, header_nbytes
from streamconv.checkpoint.weight_sets import INDEX, INDEX_ENDING, Choice, choose_weights, indexed_set, named_set
from streamconv.errors import BudgetError, RunWarning, SourceError
from streamconv.files import sniff as magic
from streamconv.files.hub import ADAPTER_CONFIG, CONFIG, source_failures
from streamconv.files.local import file_nbytes
from streamconv.files.store import Place
from streamconv.files.strict_json import load_object

MISTRAL_PARAMS = "params.json"  # the config of mistral-inference, whose checkpoints have other names for tensors

# Estimates for the limit that an error suggests, in bytes of memory for each byte of a file, with names as in published
# models. Measured: 7, 12 and 5.
TABLE_PER_BYTE = 9  # of a header: its table of tensors and their plan
PARSING_PER_BYTE = 16  # of a header, while it is parsed
JSON_PER_BYTE = 7  # of an index or a tokenizer
LEAST_RUN_NBYTES = 24 << 20  # one worker, and comparing its result


@dataclass
class Checkpoint:
    """A model on disk of which only config, index and headers were read.

    A context manager that holds the shards open.

    Attributes:
        directory: The folder.
        config: Its config.json.
        shards: The open shards, those of dense layers included.
        tensors: All tensors by name.
        warnings: What the user should know about the choice of files.
        modules: The modules of sentence-transformers in the folder.
    """

    directory: Place
    config: Config
    shards: tuple[Shard, ...]
    tensors: Mapping[str, SourceTensor] = field(repr=False)
    warnings: Sequence[RunWarning] = ()
    modules: Modules = NO_MODULES

    @classmethod
    @source_failures()
    def open(cls, src: Place, *, budget: Budget | None = None) -> Checkpoint:
        """Open a checkpoint and read its config, index and headers.

        Args:
            src: A folder, a single .safetensors file, the first of several shards, or an index.
            budget: Reserves the memory for what is parsed; by default nothing is limited.

        Raises:
            SourceError: A file is missing or malformed, or `src` is a later shard.
            BudgetError: Config, index and headers do not fit. It is raised before they are parsed, and suggests a limit
                that suffices for a run.
        """
        is_index = src.name.endswith(INDEX_ENDING)
        directory = src.parent if (src.suffix == ".safetensors" or is_index) and src.is_file() else src
        if not directory.is_dir():
            if src.exists():
                raise magic.misplaced(src, "a checkpoint directory or a .safetensors file", CONFIG)
            hint = None if "/" in str(src) else f"a repo id names the owner, too: OWNER/{src.name}"
            raise SourceError("no such checkpoint directory", file=src, hint=hint, code="source-missing")
        if not (directory / CONFIG).is_file():
            raise _without_config(directory)
        named = Choice(named_set(src)) if directory != src and not is_index else None
        budget = budget or unbounded()
        held = budget.held
        try:
            return cls._read(directory, named, src if is_index else directory / INDEX, budget, is_named=is_index)
        except BudgetError as error:
            error.hint = f"--max-memory {mib(held + _forecast_nbytes(directory))}MiB"
            raise

    @classmethod
    def _read(
        cls, directory: Place, named: Choice | None, index_file: Place, budget: Budget, *, is_named: bool
    ) -> Checkpoint:
        raw, nbytes = _load_object(directory / CONFIG, budget)
        budget.reserve("config", nbytes, file=directory / CONFIG)
        config = Config(raw, directory / CONFIG)
        index, nbytes = (None, 0) if named or not index_file.exists() else _load_object(index_file, budget)
        with budget.lend("index", nbytes, file=index_file):
            choice = named or _choose(index_file, index, budget, is_named=is_named)
            shards = _open_shards(choice.chosen.paths, budget)
            try:
                tensors = _merge_tables(shards, choice.index, index_file)
                modules = read_modules(directory, budget)
            except BaseException:
                _close(shards)
                raise
        warnings = [*choice.warnings, *modules.warnings]
        return cls(directory, config, (*shards, *modules.shards), tensors | modules.tensors, warnings, modules)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _close(self.shards)


def _forecast_nbytes(directory: Place) -> int:
    """Memory that suffices to convert the model in a folder, estimated from the sizes of its files and headers only."""
    headers = [header_nbytes(path) for path in directory.glob("*.safetensors")]
    texts = sum(file_nbytes(path) for path in directory.glob("*.json")) * JSON_PER_BYTE
    return sum(headers) * TABLE_PER_BYTE + max(headers, default=0) * PARSING_PER_BYTE + texts + LEAST_RUN_NBYTES


def _close(shards: Iterable[Shard]) -> None:
    for shard in shards:
        shard.close()


def _open_shards(paths: Sequence[Place], budget: Budget) -> list[Shard]:
    """The opened files, with validated headers."""
    shards: list[Shard] = []
    try:
        for path in paths:
            if not path.exists():
                hint = "download it again"
                raise SourceError("the shard is missing", file=path, hint=hint, code="shard-missing")
            shards.append(Shard(path, budget))
    except BaseException:
        _close(shards)
        raise
    return shards


def _load_object(path: Place, budget: Budget) -> tuple[dict[str, Any], int]:
    """The JSON object in a file, and an upper bound of the memory to read it; BudgetError if that does not fit."""
    taken = 0

    def afford(nbytes: int) -> None:
        nonlocal taken
        budget.check(f"the JSON in {path.name}", nbytes, file=path)
        taken = nbytes

    return load_object(path, afford=afford), taken


def _without_config(directory: Place) -> SourceError:
    """The error for a folder without config.json, which says what it is instead and which command takes it."""
    if (directory / ADAPTER_CONFIG).is_file():
        hint = f"streamconv lora {directory} --base BASE, or streamconv convert BASE --adapter {directory}"
        return SourceError("is an adapter, not a checkpoint", file=directory, hint=hint, code="is-adapter")
    if (directory / MISTRAL_PARAMS).is_file():
        what = f"a checkpoint in Mistral's own format ({MISTRAL_PARAMS}, consolidated.safetensors)"
        hint = f"use {CONFIG} and model-*.safetensors instead; most Mistral repositories have them too"
        return SourceError(what, file=directory, hint=hint, code="mistral-format")
    what = "the directory is empty" if not any(True for _ in directory.glob("*")) else f"no {CONFIG}"
    return SourceError(
        what, file=directory, hint=f"name the folder that holds {CONFIG} and *.safetensors", code="config-missing"
    )


def _choose(index_file: Place, index: Mapping[str, Any] | None, budget: Budget, *, is_named: bool) -> Choice:
    """The weights in the folder of `index_file`; the index itself must exist only if it was named as the source."""

    def names_of(path: Place) -> Collection[str]:
        try:
            shard = Shard(path, budget.scratchpad())
        except SourceError:
            return ()
        shard.close()
        return shard.tensors

    if is_named and index is not None:
        return indexed_set(index, index_file)
    return choose_weights(index_file.parent, index, names_of)


def _merge_tables(shards: list[Shard], weight_map: Mapping[str, str], index_file: Place) -> dict[str, SourceTensor]:
    """The tensors of all shards by name; SourceError if the shards and the index disagree."""
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                other = tensors[name].shard.path.name
                raise SourceError(
                    f"the tensor is in {other} as well", file=shard.path, tensor=name, code="tensor-twice"
                )
            tensors[name] = tensor
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].shard.path.name != file_name:
            raise SourceError(
                f"the index lists a tensor that {file_name} does not contain",
                file=index_file,
                tensor=name,
                hint="download the index and its shards again, from the same revision",
                code="index-mismatch",
            )
    if weight_map and len(tensors) > len(weight_map):
        name = next(name for name in tensors if name not in weight_map)
        raise SourceError(
            "the index does not name this tensor", file=tensors[name].shard.path, tensor=name, code="index-mismatch"
        )
    return tensors


def n_parameters(tensors: Mapping[str, SourceTensor]) -> int:
    """The number of elements of all tensors."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
