"""A whole conversion in pieces so small that a tiny checkpoint passes through every state: what program tests run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import streamconv
from streamconv.engine import layout as plan
from streamconv.engine import pool as stream
from streamconv.options import SplitOptions
from streamconv.report import Report
from tests import tiny
from tests.fault.trial import OLD

CHUNK_NBYTES = 16384
RECORD_NBYTES = 3 * CHUNK_NBYTES


@contextmanager
def small_steps() -> Iterator[None]:
    """Chunks and records at sizes that suit kilobytes; with one thread, writes come in one order, and records too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "CHUNKS_WRITING", (0,))
        for module in (plan, stream):
            patch.setattr(module, "CHUNK_NBYTES", (CHUNK_NBYTES,))
        patch.setattr(stream, "RECORD_NBYTES", RECORD_NBYTES)
        yield


def make_source(directory: Path) -> Path:
    """An LFM2 checkpoint in two shards, with NaNs and infinities all over, so that a resumed run must count on."""
    tiny.lfm2(directory, n_shards=2)
    for path in directory.glob("*.safetensors"):
        tensors = tiny.read_safetensors(path)
        for number, (name, tensor) in enumerate(sorted(tensors.items())):
            data = bytearray(tensor.data)
            for at in range(0, len(data) - 1, 2 * (577 + number)):
                data[at : at + 2] = (b"\xc0\x7f", b"\x80\xff")[at // 2 % 2]
            tensors[name] = tiny.Tensor(tensor.dtype, tensor.shape, bytes(data))
        tiny.write_safetensors(path, tensors)
    return directory


@dataclass
class Program:
    """`streamconv.convert` from `source` to `dst`, alone in its folder."""

    source: Path
    dst: Path
    split: SplitOptions = field(default_factory=SplitOptions)
    threads: int = 1
    force: bool = True
    progress: Callable[[], None] = field(default=lambda: None)

    def run(self) -> Report:
        with small_steps():
            return streamconv.convert(
                self.source,
                self.dst,
                outtype="bf16",
                split=self.split,
                threads=self.threads,
                force=self.force,
                progress=lambda done, total: self.progress(),
            )

    def outputs(self) -> dict[str, bytes]:
        """Every GGUF there is, by name."""
        return {path.name: path.read_bytes() for path in self.dst.parent.glob("*.gguf")}

    def left_behind(self) -> set[str]:
        return {path.name for path in self.dst.parent.iterdir()} - self.outputs().keys()

    def put_old(self, names: set[str]) -> None:
        """Files that the run will replace."""
        for name in names:
            (self.dst.parent / name).write_bytes(OLD)


@dataclass(frozen=True)
class Finished:
    """What an undisturbed run made and said."""

    outputs: dict[str, bytes]
    warnings: list[tuple[str, str | None, str]]

    @classmethod
    def of(cls, program: Program) -> Finished:
        return cls({}, []).after(program, program.run())

    def after(self, program: Program, report: Report) -> Finished:
        warnings = [(note.code, note.tensor, note.message) for note in report.warnings if note.code != "stale-part"]
        return Finished(program.outputs(), warnings)

    def assert_old_or_new(self, program: Program) -> None:
        """Of several files: where the first is there, by which a loader takes the set, none is of another set."""
        found = program.outputs()
        for name, data in found.items():
            assert data in (OLD, self.outputs[name]), name
        if min(self.outputs, key=lambda name: (name.startswith("mmproj"), name)) in found:
            assert found in (dict.fromkeys(self.outputs, OLD), self.outputs)

    def assert_same(self, program: Program, report: Report) -> None:
        assert self.after(program, report) == self
        assert not program.left_behind()


def empty(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory
