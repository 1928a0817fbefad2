"""Files of tiny checkpoints: tensors of seeded noise, safetensors written and read, the digest of a directory.

The same call gives the same values on every machine and with every numpy: they are uniform, from a stream that numpy
has frozen. Each tensor name has its own stream, so a swap or permutation of tensors or rows cannot go unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Config = Mapping[str, Any]

ABSENT = object()  # as a value in `config=`: the key is left out
NOTHING: Config = MappingProxyType({})

_DTYPES = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class Tensor:
    """A tensor as a safetensors file stores it. `dtype` is the file's name for it (F32, F16, BF16)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: NDArray[Any], dtype: str) -> Tensor:
        """`values` rounded to nearest even."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        if dtype == "BF16":
            bits = values.view(np.uint32)
            stored: NDArray[Any] = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
        else:
            stored = values.astype(_DTYPES[dtype])
        return cls(dtype, values.shape, stored.tobytes())

    def float32(self) -> Float:
        if self.dtype == "BF16":
            return (np.frombuffer(self.data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        values = np.frombuffer(self.data, _DTYPES[self.dtype])
        return values.astype(np.float32).reshape(self.shape)


def noise(name: str, shape: Sequence[int], std: float, seed: int = 1) -> Float:
    """Uniform values of mean 0 and standard deviation `std`, decided by `name` and `seed` alone."""
    stream = np.random.RandomState(np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest(), np.uint32))
    return ((stream.random_sample(tuple(shape)) * 2 - 1) * (std * math.sqrt(3))).astype(np.float32)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = NOTHING) -> None:
    """A safetensors file with its tensors in the order of their names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata)}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(tensor.data for _, tensor in sorted(tensors.items()))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    header.pop("__metadata__", None)
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint or adapter, whatever its shards."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= read_safetensors(path)
    return tensors


def write_shards(
    directory: Path, tensors: Mapping[str, Tensor], n_shards: int = 1, *, prefix: str = "model", index: bool = True
) -> None:
    """model.safetensors, or `n_shards` of about equal counts with their index."""
    if n_shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(n_shards):
        file = f"{prefix}-{shard + 1:05}-of-{n_shards:05}.safetensors"
        part = names[len(names) * shard // n_shards : len(names) * (shard + 1) // n_shards]
        write_safetensors(directory / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    if not index:
        return
    total = sum(len(tensor.data) for tensor in tensors.values())
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def write_config(path: Path, settings: Config, overrides: Config) -> None:
    """A JSON object of `settings` with `overrides` put over it; what is ABSENT is left out."""
    merged = {**settings, **overrides}
    write_json(path, {key: value for key, value in merged.items() if value is not ABSENT})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def digest(directory: Path) -> str:
    """sha256 of a directory's JSON files and tensors, whatever the shards and the order inside a file; folders too."""
    state = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            state.update(path.name.encode() + b"\0" + digest(path).encode())
        elif path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            state.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    for name, tensor in sorted(tensors_of(directory).items()):
        state.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + hashlib.sha256(tensor.data).digest())
    return state.hexdigest()
