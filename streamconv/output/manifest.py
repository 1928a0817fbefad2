"""Digests of a finished file: of the whole file and of each tensor's data (OUT.manifest.json, schema 1).

The bytes are read back from the file, so the digests describe the file on the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamconv.engine.layout import Layout
from streamconv.files.local import LocalBlob

BUFFER_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Digests:
    """SHA-256 in hexadecimal: of the whole file, and of each tensor's data by name, in file order."""

    whole: str
    tensors: dict[str, str]


def digest(path: Path, layout: Layout) -> Digests:
    """The digests of a finished file.

    Args:
        path: The file.
        layout: Its layout.

    Raises:
        SourceError: It cannot be read.
    """
    file = LocalBlob(path)
    try:
        whole = hashlib.sha256()
        tensors = {}
        at = 0
        for step in layout.steps:
            for block in _blocks(file, at, step.offset):
                whole.update(block)
            one = hashlib.sha256()
            for block in _blocks(file, step.offset, step.offset + step.nbytes):
                one.update(block)
                whole.update(block)
            tensors[step.target] = one.hexdigest()
            at = step.offset + step.nbytes
        for block in _blocks(file, at, layout.nbytes):
            whole.update(block)
        return Digests(whole.hexdigest(), tensors)
    finally:
        file.close()


def _blocks(file: LocalBlob, start: int, end: int) -> Iterator[memoryview]:
    buffer = np.empty(min(BUFFER_NBYTES, end - start), dtype=np.uint8)
    for offset in range(start, end, BUFFER_NBYTES):
        part = buffer[: min(BUFFER_NBYTES, end - offset)]
        file.read_into(offset, part)
        yield part.data


def manifest_path(dst: Path) -> Path:
    """The path of the manifest of the file at `dst`, in the same folder."""
    return dst.with_name(f"{dst.name}.manifest.json")


def manifest_text(dst: Path, layout: Layout, digests: Digests) -> str:
    """The manifest of the file at `dst` as JSON: shapes are row-major, offsets count from the start of the file."""
    tensors: list[dict[str, Any]] = [
        {
            "name": step.target,
            "shape": list(step.tensor.spec.shape),
            "type": step.tensor.type.name,
            "offset": step.offset,
            "nbytes": step.nbytes,
            "sha256": digests.tensors[step.target],
        }
        for step in layout.steps
    ]
    record = {"schema": 1, "file": dst.name, "nbytes": layout.nbytes, "sha256": digests.whole, "tensors": tensors}
    return json.dumps(record, indent=1) + "\n"
