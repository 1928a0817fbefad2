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
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from streamconv.budget import MIB, resident_nbytes
from streamconv.checkpoint.config import Config
from streamconv.errors import BudgetError, SourceError
from streamconv.files import sniff as magic
from streamconv.files.hub import ADAPTER_CONFIG, CONFIG, source_failures
from streamconv.files.local import PositionedFile
from streamconv.files.strict_json import OBJECT_NBYTES_PER_BYTE, load_object, load_object_if_present, parse_object
from streamconv.lazy.node import Source, TensorSpec

MAX_HEADER_NBYTES = 100_000_000  # safetensors' own limit (tensor.rs, MAX_HEADER_SIZE)
# What a parsed header takes for each of its bytes, safetensors' own copy included. Measured: 15 on names as models have
# them, 25 on the shortest.
HEADER_OBJECT_NBYTES = 28
INDEX = "model.safetensors.index.json"

FLOAT_TYPES = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
}
_FILE_NAME = re.compile(rb"[^\0/\\]{1,255}")  # longer ones no filesystem takes
_NUMBERED_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


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

    @classmethod
    @source_failures()
    def open(cls, src: Path, *, max_header_nbytes: int = MAX_HEADER_NBYTES * HEADER_OBJECT_NBYTES) -> Checkpoint:
        """The checkpoint in the directory `src`, or the single file `src` with its config.json beside it.

        SourceError on anything missing or malformed, and on one shard of several; BudgetError, before it is parsed,
        where config, index and headers would take more than `max_header_nbytes` of memory together.
        """
        directory = src.parent if src.suffix == ".safetensors" and src.is_file() else src
        if not directory.is_dir():
            if src.exists():
                raise magic.misplaced(src, "checkpoint directory and no .safetensors file", CONFIG)
            raise SourceError("no such checkpoint directory", file=src)
        if not (directory / CONFIG).is_file():
            raise _without_config(directory)
        if directory != src:
            _refuse_shard(src)
        alone = directory != src or (directory / "model.safetensors").is_file()
        left = max_header_nbytes
        for path in (directory / CONFIG, *(() if alone else (directory / INDEX,))):
            size = path.stat().st_size if path.is_file() else 0
            _check_affordable(path, f"its {size:,} bytes", size * OBJECT_NBYTES_PER_BYTE, left)
            left -= size * OBJECT_NBYTES_PER_BYTE
        config = Config(load_object(directory / CONFIG), directory / CONFIG)
        index = {} if alone else load_object_if_present(directory / INDEX)
        paths = [src] if directory != src else _find_shards(directory, index)
        shards: list[Shard] = []
        try:
            for path in paths:
                if not path.exists():
                    raise SourceError("the shard is missing", file=path, hint="download it again")
                shards.append(Shard(path, left))
                left -= shards[-1].parsed_nbytes
            tensors = _merge_tables(shards, index, directory)
        except BaseException:
            for shard in shards:
                shard.close()
            raise
        return cls(directory, config, tuple(shards), tensors)

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


def _refuse_shard(file: Path) -> None:
    """SourceError where `file`, by its name, is one shard of several."""
    match = _NUMBERED_SHARD.fullmatch(file.name)
    if match and int(match[3]) > 1:
        what = f"is shard {int(match[2])} of {int(match[3])}, and no whole checkpoint"
        raise SourceError(what, file=file, hint=f"name the folder, {file.parent}")


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


def _find_shards(directory: Path, index: Mapping[str, Any]) -> list[Path]:
    """The files that hold the weights, in the order transformers looks for them: one file, an index, numbered parts."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if index:
        return [directory / name for name in _indexed_names(index, directory / INDEX)]
    candidates = sorted(directory.glob("*.safetensors"))
    numbered = [match for path in candidates if (match := _NUMBERED_SHARD.fullmatch(path.name))]
    if numbered:
        prefix, count = numbered[0][1], numbered[0][3]
        return [directory / f"{prefix}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    if len(candidates) == 1:
        return candidates
    if candidates:
        raise SourceError(
            f"{len(candidates)} .safetensors files and no {INDEX}", file=directory, hint="name the one file to convert"
        )
    if any(directory.glob("pytorch_model*.bin")) or any(directory.glob("*.pth")):
        raise SourceError(
            "only pickled weights (pytorch_model.bin), which are never loaded here",
            file=directory,
            hint="get the safetensors version, or save it with transformers: model.save_pretrained(folder)",
        )
    raise SourceError("no .safetensors file", file=directory, hint="download the weights as well")


def _indexed_names(index: Mapping[str, Any], file: Path) -> list[str]:
    """The shards' file names in an index, sorted; SourceError on one that leaves the directory."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("the index has no weight_map", file=file, hint="download it again")
    names = set()
    for tensor, name in weight_map.items():
        raw = name.encode("utf-8", "surrogatepass") if isinstance(name, str) else b""
        if not _FILE_NAME.fullmatch(raw) or name in (".", ".."):
            raise SourceError(f"the index names {name!r:.80}, which is no file beside it", file=file, tensor=tensor)
        names.add(name)
    return sorted(names)


def _merge_tables(shards: list[Shard], index: Mapping[str, Any], directory: Path) -> dict[str, SourceTensor]:
    """All shards' tensors under one roof; SourceError where shards and index disagree."""
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                other = tensors[name].shard.path.name
                raise SourceError(f"the tensor is in {other} as well", file=shard.path, tensor=name)
            tensors[name] = tensor
    weight_map: Mapping[str, str] = index.get("weight_map", {})
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].shard.path.name != file_name:
            raise SourceError(
                f"the index promises a tensor that {file_name} does not hold",
                file=directory / INDEX,
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
