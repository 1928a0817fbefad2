"""GGUF files as gguf-py reads them, for comparison: keys with exact types, tensors with shape, type, digest and values.

Nothing here imports streamconv, so that the reader cannot share a mistake of the writer.

A golden is {"kv": {key: {"type": [...], "value": ...}}, "tensors": {name: {"ne": [...], "type": ..., "sha256": ...}},
"order": [names]}; an array of more than MAX_LISTED values is {"n": ..., "sha256": ...} of its JSON text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

MAX_LISTED = 64


@dataclass(frozen=True)
class Value:
    """A key's value with its type: ("UINT32",), or ("ARRAY", "STRING")."""

    type: tuple[str, ...]
    value: Any


@dataclass(frozen=True)
class Tensor:
    """A tensor as stored: `shape` is row-major, `raw` its bytes, `offset` counts from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    raw: NDArray[np.uint8] = field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.raw.tobytes()).hexdigest()

    def float64(self) -> NDArray[np.float64]:
        """The values, dequantised by gguf-py."""
        kind = gguf.GGMLQuantizationType[self.type]
        n_elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        rows = self.raw.reshape(*self.shape[:-1], self.shape[-1] // n_elements * nbytes)
        native = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(self.type)
        values = rows.view(native) if native else gguf.dequantize(rows, kind)
        return values.astype(np.float64).reshape(self.shape)


@dataclass(frozen=True)
class Gguf:
    """A whole file: keys and tensors in file order."""

    path: Path
    keys: dict[str, Value]
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Any:
        """A key's bare value."""
        return self.keys[key].value

    def float64(self, name: str) -> NDArray[np.float64]:
        return self.tensors[name].float64()

    def golden(self) -> dict[str, Any]:
        """This file in the form of the committed goldens."""
        return {
            "kv": {
                key: {"type": list(entry.type), "value": _listed(entry.value)}
                for key, entry in sorted(self.keys.items())
            },
            "tensors": {
                name: {"ne": list(reversed(tensor.shape)), "sha256": tensor.sha256, "type": tensor.type}
                for name, tensor in sorted(self.tensors.items())
            },
            "order": list(self.tensors),
        }


def read(path: Path | str) -> Gguf:
    """All of a GGUF file that gguf-py sees."""
    reader = gguf.GGUFReader(path)
    keys = {
        name: Value(tuple(kind.name for kind in entry.types[:2]), entry.contents())
        for name, entry in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        entry.name: Tensor(
            name=entry.name,
            shape=tuple(int(extent) for extent in reversed(entry.shape)),
            type=entry.tensor_type.name,
            offset=int(entry.data_offset) - int(reader.data_offset),
            raw=np.frombuffer(np.ascontiguousarray(entry.data).tobytes(), dtype=np.uint8),
        )
        for entry in reader.tensors
    }
    return Gguf(Path(path), keys, tensors)


def packed(goldens: dict[str, Any]) -> dict[str, Any]:
    """The goldens of all outtypes in one: types and digests side by side, `auto` as the name of the type it chose.

    {"error": ...} in place of a golden goes to "errors".
    """
    errors = {outtype: golden["error"] for outtype, golden in goldens.items() if "error" in golden}
    whole = {outtype: golden for outtype, golden in goldens.items() if "error" not in golden}
    if not whole:
        return {"errors": errors}
    auto = whole.pop("auto", None)
    first = whole["f32"]
    shared = {k: entry for k, entry in first["kv"].items() if all(g["kv"].get(k) == entry for g in whole.values())}
    return {
        "auto": next((outtype for outtype, golden in whole.items() if golden == auto), None),
        "errors": errors,
        "kv": shared,
        "kv_of": {o: {k: e for k, e in golden["kv"].items() if k not in shared} for o, golden in whole.items()},
        "order": first["order"],
        "tensors": {name: _by_outtype(name, whole) for name in first["tensors"]},
    }


def unpacked(made: dict[str, Any], outtype: str) -> dict[str, Any]:
    """The golden of one outtype out of `packed`; KeyError where there is none."""
    outtype = made["auto"] if outtype == "auto" else outtype
    tensors = {}
    for tensor, entry in made["tensors"].items():
        type_, sha256 = entry.get(outtype, entry["f32"])
        tensors[tensor] = {"ne": entry["ne"], "sha256": sha256, "type": type_}
    return {"kv": made["kv"] | made["kv_of"][outtype], "tensors": tensors, "order": made["order"]}


def compact(value: Any) -> str:
    """JSON with one line for a tensor or key, so that a change shows in a diff."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return text.replace('},"', '},\n"') + "\n"


def _by_outtype(name: str, goldens: dict[str, Any]) -> dict[str, Any]:
    """{"ne", OUTTYPE: [type, sha256]}, without the outtypes that leave the tensor as f32 does."""
    entries = {outtype: golden["tensors"][name] for outtype, golden in goldens.items()}
    plain = entries["f32"]
    different = {o: [entry["type"], entry["sha256"]] for o, entry in entries.items() if o == "f32" or entry != plain}
    return {"ne": plain["ne"]} | different


def tensor_faults(ours: Gguf, golden: dict[str, Any]) -> list[str]:
    """Where the tensors differ from a golden's in name, shape, type or bytes; empty where they are the same."""
    theirs, mine = golden["tensors"], ours.golden()["tensors"]
    faults = [f"{name}: only in the golden" for name in theirs if name not in mine]
    faults += [f"{name}: only in {ours.path.name}" for name in mine if name not in theirs]
    faults += [
        f"{name}: {mine[name]} is not {theirs[name]}" for name in theirs if name in mine and mine[name] != theirs[name]
    ]
    return faults


def key_faults(ours: Gguf, golden: dict[str, Any]) -> list[str]:
    """Where a key that both files have differs in value (types aside: llama.cpp writes a uint32 array as int32)."""
    theirs, mine = golden["kv"], ours.golden()["kv"]
    return [
        f"{key}: {mine[key]['value']!r} is not {theirs[key]['value']!r}"
        for key in theirs
        if key in mine and mine[key]["value"] != theirs[key]["value"]
    ]


def layout_faults(path: Path | str) -> list[str]:
    """Where a file breaks gguf.cpp's rules: offsets contiguous and padded, padding zero, short names, the exact end."""
    return list(_layout_faults(Path(path)))


def _layout_faults(path: Path) -> Iterator[str]:
    reader = gguf.GGUFReader(path)
    content = np.fromfile(path, dtype=np.uint8)
    alignment, start = int(reader.alignment), int(reader.data_offset)
    if start % alignment:
        yield f"tensor data starts at {start}, off the alignment of {alignment}"
    end = start
    for entry in reader.tensors:
        if int(entry.data_offset) != end:
            yield f"{entry.name}: starts at {entry.data_offset}, expected {end}"
        if len(entry.name.encode()) > 63:
            yield f"{entry.name}: name of more than 63 bytes"
        if len(entry.shape) > 4:
            yield f"{entry.name}: more than 4 dimensions"
        stop = int(entry.data_offset) + int(entry.n_bytes)
        end = -(-stop // alignment) * alignment
        if content[stop:end].any():
            yield f"{entry.name}: padding is not zero"
    if len(content) != end:
        yield f"{len(content)} bytes in the file, expected {end}"


def _listed(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_LISTED:
        return {"n": len(value), "sha256": hashlib.sha256(json.dumps(value).encode()).hexdigest()}
    return value
