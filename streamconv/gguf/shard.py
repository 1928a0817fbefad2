"""A GGUF file as a source of lazy tensors."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from streamconv.files.store import Place
from streamconv.files.window import Mapped
from streamconv.gguf.reader import GGUFFile


class GGUFShard:
    """One open file, for `lazy.leaves.Source`. The caller that opened the file closes it."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file.file
        listed = [(name, tensor.shape, tensor.type_id, tensor.offset) for name, tensor in file.tensors.items()]
        self._digest = hashlib.sha256(repr((sorted(file.keys), listed)).encode()).hexdigest()

    @property
    def path(self) -> Place:
        return self._file.path

    @property
    def nbytes(self) -> int:
        return self._file.nbytes

    @property
    def fingerprint(self) -> str:
        """Identifies the bytes without reading them all: the identity of the file, and its list of tensors."""
        return f"{self._file.identity.lasting} {self._digest}"

    @property
    def is_mapped(self) -> bool:
        return self._file.is_mapped

    def map(self, offset: int, nbytes: int) -> Mapped | None:
        return self._file.map(offset, nbytes)

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        self._file.read_into(offset, out)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()
