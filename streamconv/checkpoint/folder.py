"""A Hugging Face checkpoint on disk: its config, its shards, and where each tensor's bytes lie.

Owns: finding the files, validating every header before anything is believed, positioned reads, and noticing that a
shard changed under the run. Does not own: what the tensors mean (recipe/language.py).
Invariants: a source is opened for reading only; no weight is read before it is asked for; no file is mapped, so a shard
that is truncated while it is read is a short read, an error of ours, and never a SIGBUS, and none of its pages count
against the memory bound. Format: https://github.com/huggingface/safetensors#format and its reader, tensor.rs.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from streamconv.budget import MIB, resident_nbytes
from streamconv.checkpoint.config import Config
from streamconv.checkpoint.weight_sets import INDEX, INDEX_ENDING, Choice, choose_weights, indexed_set, named_set
from streamconv.errors import BudgetError, Caution, SourceError
from streamconv.files import sniff as magic
from streamconv.files.hub import ADAPTER_CONFIG, CONFIG, source_failures
from streamconv.files.local import PositionedFile
from streamconv.files.strict_json import OBJECT_NBYTES_PER_BYTE, load_object, parse_object
from streamconv.lazy.node import Source, TensorSpec

MAX_HEADER_NBYTES = 100_000_000  # safetensors' own limit (tensor.rs, MAX_HEADER_SIZE)
# What a parsed header takes for each of its bytes, safetensors' own copy included. Measured: 15 on names as models have
# them, 25 on the shortest.
HEADER_OBJECT_NBYTES = 28

FLOAT_TYPES = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
}


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A stored tensor: its dtype as safetensors names it, row-major shape, and place in its shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    offset: int  # from the start of the file
    nbytes: int

    def lazy(self) -> Source:
        """The tensor as a graph's source; SourceError where its dtype is none that converts."""
        if self.dtype not in FLOAT_TYPES:
            raise SourceError(
                f"dtype {self.dtype} cannot be converted",
                file=self.shard.path,
                tensor=self.name,
                hint="streamconv reads F32, F16 and BF16: save the checkpoint in one of them",
            )
        return Source(self.name, self.shard, self.offset, TensorSpec(self.shape, FLOAT_TYPES[self.dtype]))


class Shard:
    """One safetensors file, open for positioned reads. `tensors` is its validated table."""

    def __init__(self, path: Path, max_header_nbytes: int) -> None:
        self.path = path
        self.file = PositionedFile(path)
        try:
            header = self._read_header(max_header_nbytes)
            self.header_sha256 = hashlib.sha256(header).hexdigest()
            self.parsed_nbytes = len(header) * HEADER_OBJECT_NBYTES
            self.tensors = self._parse(header)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        return self.file.nbytes

    @property
    def fingerprint(self) -> str:
        """What identifies the bytes without reading them all: size, time and the header's digest."""
        return f"{self.nbytes} {self.file.identity.mtime_ns} {self.header_sha256}"

    def close(self) -> None:
        self.file.close()

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` from `offset`. SourceError where the file ends early or the disk fails."""
        self.file.read_into(offset, out)

    def check_unchanged(self) -> None:
        """SourceError if the file under this path is no longer the one that was opened, as it was then."""
        self.file.check_unchanged()

    def _read_header(self, max_header_nbytes: int) -> bytes:
        """The header's JSON text, once safetensors' own reader has accepted it."""
        if self.nbytes < 8:
            raise self._malformed(f"{self.nbytes} bytes are no safetensors file")
        prefix = np.empty(8, dtype=np.uint8)
        self.read_into(0, prefix)
        length = int(prefix.view("<u8")[0])
        if length > min(MAX_HEADER_NBYTES, self.nbytes - 8):
            claim = f"it claims a header of {length:,} bytes in a file of {self.nbytes:,}"
            raise self._malformed(f"{claim}: truncated or no safetensors")
        _check_affordable(
            self.path, f"its header of {length:,} bytes", length * HEADER_OBJECT_NBYTES, max_header_nbytes
        )
        text = np.empty(length, dtype=np.uint8)
        self.read_into(8, text)
        header = text.tobytes()
        self._validate(prefix.tobytes() + header)
        return header

    def _validate(self, head: bytes) -> None:
        """Let safetensors judge the header and the file's size: on a copy of the head with a hole behind it where the
        system has anonymous files, so that its map cannot die of a change to the file."""
        fd = _sparse_copy(head, self.nbytes)
        try:
            with safe_open(str(self.path) if fd is None else f"/proc/self/fd/{fd}", framework="numpy"):
                return
        except (SafetensorError, OSError, ValueError) as error:
            self._refuse_truncated(head[8:])
            raise self._malformed(f"not a valid safetensors file: {error}") from None
        finally:
            if fd is not None:
                os.close(fd)

    def _refuse_truncated(self, header: bytes) -> None:
        """SourceError naming the first tensor that lies beyond the file's end, where the header can tell."""
        try:
            entries = parse_object(header, self.path, MAX_HEADER_NBYTES)
            ends = {name: 8 + len(header) + entry["data_offsets"][1] for name, entry in entries.items()
                    if name != "__metadata__"}  # fmt: skip
            beyond = {name: end for name, end in ends.items() if end > self.nbytes}
        except (SourceError, KeyError, IndexError, TypeError):
            return  # safetensors' own words say more
        if beyond:
            raise SourceError(
                f"truncated: the file has {self.nbytes:,} bytes, its header describes {max(ends.values()):,}",
                file=self.path,
                tensor=min(beyond, key=lambda name: beyond[name]),
                hint="download the file again",
            )

    def _parse(self, header: bytes) -> dict[str, SourceTensor]:
        start = 8 + len(header)
        tensors: dict[str, SourceTensor] = {}
        for name, entry in parse_object(header, self.path, MAX_HEADER_NBYTES).items():
            if name == "__metadata__":
                continue
            _check_name(name, self.path)
            first, last = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not all(type(extent) is int for extent in shape):
                raise self._malformed(f"tensor {name!r} has no whole-number shape")
            tensors[name] = SourceTensor(name, entry["dtype"], shape, self, start + first, last - first)
        return tensors

    def _malformed(self, message: str) -> SourceError:
        """`message`, unless the file is of another kind, whose name says more."""
        head = bytearray(min(magic.HEAD_NBYTES, self.nbytes))
        self.file.read_into(0, head)
        if other := magic.guess_other(bytes(head), magic.SAFETENSORS):
            return SourceError(f"no safetensors file: this is {other.what}", file=self.path, hint=other.hint)
        return SourceError(message, file=self.path, hint="download the file again, or save it anew")


@dataclass
class Checkpoint:
    """A model on disk, headers read and nothing else. Use as a context manager: it holds the shards open."""

    directory: Path
    config: Config
    shards: tuple[Shard, ...]
    tensors: Mapping[str, SourceTensor] = field(repr=False)
    cautions: Sequence[Caution] = ()

    @classmethod
    @source_failures()
    def open(cls, src: Path, *, max_header_nbytes: int = MAX_HEADER_NBYTES * HEADER_OBJECT_NBYTES) -> Checkpoint:
        """The checkpoint in the directory `src`, or that of the one file, the first shard or the index `src`.

        SourceError on anything missing or malformed, and on a later shard; BudgetError, before it is parsed,
        where config, index and headers would take more than `max_header_nbytes` of memory together.
        """
        is_index = src.name.endswith(INDEX_ENDING)
        directory = src.parent if (src.suffix == ".safetensors" or is_index) and src.is_file() else src
        if not directory.is_dir():
            if src.exists():
                raise magic.misplaced(src, "checkpoint directory and no .safetensors file", CONFIG)
            raise SourceError("no such checkpoint directory", file=src)
        if not (directory / CONFIG).is_file():
            raise _without_config(directory)
        named = Choice(named_set(src)) if directory != src and not is_index else None
        index_file = src if is_index else directory / INDEX
        left = max_header_nbytes
        for path in (directory / CONFIG, *(() if named else (index_file,))):
            size = path.stat().st_size if path.is_file() else 0
            _check_affordable(path, f"its {size:,} bytes", size * OBJECT_NBYTES_PER_BYTE, left)
            left -= size * OBJECT_NBYTES_PER_BYTE
        config = Config(load_object(directory / CONFIG), directory / CONFIG)
        choice = named or _choose(index_file, left, is_named=is_index)
        shards: list[Shard] = []
        try:
            for path in choice.chosen.paths:
                if not path.exists():
                    hint = "download it again"
                    raise SourceError("the shard is missing", file=path, hint=hint, code="shard-missing")
                shards.append(Shard(path, left))
                left -= shards[-1].parsed_nbytes
            tensors = _merge_tables(shards, choice.index, index_file)
        except BaseException:
            for shard in shards:
                shard.close()
            raise
        return cls(directory, config, tuple(shards), tensors, choice.cautions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self.shards:
            shard.close()


def _without_config(directory: Path) -> SourceError:
    """The error for a folder that is no checkpoint: what it is instead, and the command for that."""
    if (directory / ADAPTER_CONFIG).is_file():
        hint = f"streamconv lora {directory} --base BASE, or streamconv convert BASE --adapter {directory}"
        return SourceError("is an adapter, not a checkpoint", file=directory, hint=hint)
    what = "the directory is empty" if not any(directory.iterdir()) else f"no {CONFIG}"
    return SourceError(what, file=directory, hint=f"name the folder that holds {CONFIG} and *.safetensors")


def _sparse_copy(head: bytes, nbytes: int) -> int | None:
    """A descriptor of an anonymous file: `head`, and a hole up to `nbytes`; None where the system makes none."""
    if not hasattr(os, "memfd_create"):
        return None
    fd = os.memfd_create("safetensors-header")
    try:
        os.truncate(fd, nbytes)
        os.pwrite(fd, head, 0)
    except OSError:  # such as a limit on the size of files
        os.close(fd)
        return None
    return fd


def _check_affordable(path: Path, what: str, nbytes: int, left: int) -> None:
    """BudgetError where parsing takes `nbytes` of memory and `left` is left."""
    if nbytes > left:
        bound = -(-(resident_nbytes()[0] + nbytes) // MIB)
        raise BudgetError(
            f"{what} may take {-(-nbytes // MIB)} MiB to parse, {max(left, 0) // MIB} MiB are left of the bound",
            file=path,
            hint=f"--max-memory {bound}MiB, and what the conversion needs on top",
        )


def _check_name(name: str, file: Path) -> None:
    if not name or not name.isprintable() or "/" in name or "\\" in name:
        raise SourceError(f"tensor name {name!r} holds what no tensor name holds", file=file)


def _choose(index_file: Path, max_header_nbytes: int, *, is_named: bool) -> Choice:
    """The weights in the folder of `index_file`, which need not exist unless it was named as the source."""

    def names_of(path: Path) -> Collection[str]:
        try:
            shard = Shard(path, max_header_nbytes)
        except SourceError:
            return ()
        shard.close()
        return shard.tensors

    index = load_object(index_file) if index_file.exists() else None
    if is_named and index is not None:
        return indexed_set(index, index_file)
    return choose_weights(index_file.parent, index, names_of)


def _merge_tables(shards: list[Shard], weight_map: Mapping[str, str], index_file: Path) -> dict[str, SourceTensor]:
    """All shards' tensors under one roof; SourceError where shards and index disagree."""
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                other = tensors[name].shard.path.name
                raise SourceError(f"the tensor is in {other} as well", file=shard.path, tensor=name)
            tensors[name] = tensor
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].shard.path.name != file_name:
            raise SourceError(
                f"the index promises a tensor that {file_name} does not hold",
                file=index_file,
                tensor=name,
                hint="download the index and its shards again, from the same revision",
            )
    if weight_map and len(tensors) > len(weight_map):
        name = next(name for name in tensors if name not in weight_map)
        raise SourceError("the index does not name this tensor", file=tensors[name].shard.path, tensor=name)
    return tensors


def n_parameters(tensors: Mapping[str, SourceTensor]) -> int:
    """Elements of all tensors."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
