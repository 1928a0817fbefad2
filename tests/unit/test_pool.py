"""What the workers of a run do beside making bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.engine.layout import MemoryProof, PlacedTensor, make_layout
from streamconv.engine.pool import stream
from streamconv.errors import SourceError
from streamconv.lazy.dtype import BF16
from streamconv.lazy.leaves import Source
from streamconv.lazy.node import TensorSpec
from streamconv.timing import Stopwatch

N_FILES = 40
SHAPE = (24, 64)  # 3,072 bytes of BF16
CHUNK_NBYTES = 4096
RNG = np.random.default_rng(14)


class Counted:
    """A source in memory that counts how often it is read and checked; `changed` lets the checks fail."""

    def __init__(self, calls: Counter[str], name: str) -> None:
        self.calls, self.name, self.changed = calls, name, False
        self.content = RNG.integers(0, 0x7F, 2 * SHAPE[0] * SHAPE[1], dtype=np.uint8)

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        self.calls["read"] += 1
        out[:] = self.content[offset : offset + out.nbytes]

    def check_unchanged(self) -> None:
        self.calls["check"] += 1
        if self.changed:
            raise SourceError("changed", file=self.name, code="source-changed")


class Written:
    """An output in memory."""

    resumed_nbytes = 0
    resumed_state: Mapping[str, list[int]] = {}

    def __init__(self, nbytes: int) -> None:
        self.content = np.zeros(nbytes, dtype=np.uint8)

    def write(self, offset: int, view: NDArray[np.uint8]) -> None:
        self.content[offset : offset + view.nbytes] = view

    def record(self, prefix_nbytes: int, state: Mapping[str, list[int]]) -> None:
        raise AssertionError("too small for a record")


def made(calls: Counter[str]) -> tuple[list[Counted], Written]:
    """A file of one tensor from each of many sources, written in chunks."""
    type_ = GGMLQuantizationType.BF16
    files = [Counted(calls, f"shard-{n}") for n in range(N_FILES)]
    tensors = [
        PlacedTensor(f"blk.{n}.attn_q.weight", Source(f"{n}", file, 0, TensorSpec(SHAPE, BF16)), (f"{n}",), type_)
        for n, file in enumerate(files)
    ]
    layout = make_layout([], tensors)
    sink = Written(layout.nbytes)
    slab = max(step.scratch_nbytes for step in layout.steps)
    proof = MemoryProof(1 << 30, 0, slab, CHUNK_NBYTES, workers=2)
    try:
        stream(layout, sink, proof, advance=lambda n: None, cancelled=lambda: None, stopwatch=Stopwatch())
    finally:
        calls["chunks"] = -(-layout.nbytes // CHUNK_NBYTES)
    return files, sink


def test_a_chunk_checks_the_files_that_it_was_made_of() -> None:
    """And not all of them: with a hundred shards that would be most of the run."""
    calls: Counter[str] = Counter()
    files, sink = made(calls)
    assert all(sink.content.tobytes().count(file.content.tobytes()) == 1 for file in files)
    assert N_FILES <= calls["check"] <= calls["read"] < 3 * calls["chunks"] < N_FILES * calls["chunks"] / 10


def test_a_file_that_changed_is_noticed_by_the_chunk_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_and_change(self: Counted, offset: int, out: NDArray[np.uint8]) -> None:
        out[:] = self.content[offset : offset + out.nbytes]
        self.changed = self.name == "shard-7"

    monkeypatch.setattr(Counted, "read_into", read_and_change)
    with pytest.raises(SourceError) as caught:
        made(Counter())
    assert caught.value.file == "shard-7"
