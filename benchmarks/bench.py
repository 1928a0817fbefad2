"""One run of the benchmarks: its settings, its samples, and the only way to take a sample.

Prepares checkpoints and the page cache, decides the order, and removes what a sample made; which samples a case takes
is in cases/. Before every conversion all earlier writes are on the disk, and the source is warm or cold as its name
says. A failure of streamconv or of cp ends the case; a failure of the peer leaves out only the peer.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from benchmarks import machine
from benchmarks.converters import Converter
from benchmarks.sample import Point, measure
from benchmarks.shapes import SHAPES, checkpoint, shard_paths

WARM_FRACTION: Final = 0.99
N_WARMINGS: Final = 3
CACHES: Final = ("warm", "cold")
Cache = Literal["warm", "cold", "any"]  # any: left as it is, for holes, which have no pages to warm


@dataclass(frozen=True, slots=True)
class Settings:
    models: tuple[str, ...]
    outtypes: tuple[str, ...]
    n_pairs: int
    sparse: frozenset[str]  # models made with holes: measured for memory, not against cp, which skips holes
    cache: Path
    peer: Converter | None
    earlier: Converter | None = None  # another version of streamconv
    caches: tuple[str, ...] = CACHES  # states of the page cache in which sources are converted
    startup_model: str = "8b-a1b"  # 2,302 tensors
    vocabulary_model: str = "350m-128k"

    @property
    def n_few_pairs(self) -> int:
        """For the cold cache, and for a peer ten times slower than the rest."""
        return min(self.n_pairs, 3)

    @property
    def dense(self) -> tuple[str, ...]:
        return tuple(model for model in self.models if model not in self.sparse)


@dataclass(slots=True)
class Sample:
    """One line of raw.csv."""

    case: str
    model: str
    outtype: str
    cache: str
    converter: str
    pair: int
    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_rss_nbytes: int
    peak_anon_nbytes: int
    peak_file_nbytes: int
    output_nbytes: int
    exit_code: int
    timeline: list[Point] = field(default_factory=list, repr=False)


class BenchError(Exception):
    """A measured command failed: its figures would mean nothing."""


class Bench:
    """`folder` is this run's alone: what a sample makes, and what it says, go there."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.samples: list[Sample] = []
        self.notes: list[str] = []  # what this machine cannot give, and why
        self._rng = random.Random(0)
        self._log = folder / "last.log"
        self._out = folder / "out"
        self._out.mkdir()

    def source(self, model: str, sparse: bool = False) -> Path:
        return checkpoint(SHAPES[model], self.settings.cache, sparse)

    def skip(self, case: str, why: object) -> None:
        """Say that a row is missing, here and in the summary."""
        self._say(f"{case}: left out: {why}")

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            print(f"!!! {note}", file=sys.stderr, flush=True)

    def in_turn(self, converters: Iterable[Converter]) -> list[Converter]:
        """The converters of one pair in random order, so that none always runs in another's wake."""
        order = list(converters)
        self._rng.shuffle(order)
        return order

    def convert(
        self,
        case: str,
        converter: Converter,
        model: str,
        src: Path,
        outtype: str,
        cache: Cache = "warm",
        pair: int = 0,
        prefix: Sequence[str] = (),
        may_fail: bool = False,
        timeout_seconds: float = 1800,
    ) -> Sample:
        """Convert `src` once.

        Raises BenchError where that fails and may not (the peer always may, but is said to be left out), Unavailable
        where cold cannot be had.
        """
        dst = self._out / f"{converter.name}-{model}-{outtype}.gguf"
        command = [*prefix, *converter.command(src, dst, outtype)]
        machine.settle()
        if cache == "warm":
            self._warm(src)
        elif cache == "cold":
            machine.chill(shard_paths(src))
        try:
            sample = self._measure(command, converter, timeout_seconds)
            sample.output_nbytes = _size_nbytes(dst)
        finally:
            _remove(self._out)
        sample.case, sample.model, sample.outtype, sample.cache, sample.pair = case, model, outtype, cache, pair
        self._record(sample, may_fail)
        return sample

    def command(self, case: str, name: str, command: Sequence[str], pair: int) -> Sample:
        """Run a command that makes no file. Raises BenchError where it fails."""
        sample = self._measure(command, Converter(name, lambda _src, _dst, _outtype: []), 600)
        sample.case, sample.pair = case, pair
        self._record(sample, may_fail=False)
        return sample

    def _warm(self, src: Path) -> None:
        """What is called warm shall be: read again while a system gives pages away, and where memory is too small for
        all of them the summary says so."""
        paths = shard_paths(src)
        for _ in range(N_WARMINGS):
            machine.warm(paths)
            try:
                kept = min(map(machine.cached_fraction, paths))
            except machine.Unavailable:
                return  # nobody can tell
            if kept >= WARM_FRACTION:
                return
        self._say(f"{src.name}: warm in name alone: the page cache keeps {kept:.0%} of a shard")

    def _measure(self, command: Sequence[str], converter: Converter, timeout_seconds: float) -> Sample:
        got = measure(command, self._log, converter.env, timeout_seconds)
        return Sample(
            *("", "", "", "", converter.name, 0),
            *(got.wall_seconds, got.user_seconds, got.system_seconds, got.peak_rss_nbytes),
            max((point.anon_nbytes for point in got.timeline), default=0),
            max((point.file_nbytes for point in got.timeline), default=0),
            *(0, got.exit_code, got.timeline),
        )

    def add(self, sample: Sample) -> None:
        """A sample that a case took by itself."""
        self._record(sample, may_fail=False)

    def _record(self, sample: Sample, may_fail: bool) -> None:
        self.samples.append(sample)
        print(
            f"{sample.case:14} {sample.model:12} {sample.outtype:5} {sample.cache:4} {sample.converter:18}"
            f" #{sample.pair} {sample.wall_seconds:8.3f} s {sample.peak_rss_nbytes / 2**20:8.1f} MiB"
            + (f" exit {sample.exit_code}" if sample.exit_code else ""),
            file=sys.stderr,
            flush=True,
        )
        if sample.exit_code and not may_fail:
            self._refuse(sample)

    def _refuse(self, failed: Sample) -> None:
        """Show the end of the log; its last line goes into the note."""
        log = self._log.read_text(errors="replace").rstrip()
        print(log[-2000:], file=sys.stderr, flush=True)
        last_line = log.rpartition("\n")[2].strip()
        error = BenchError(f"{failed.converter} ended with {failed.exit_code}: {last_line}")
        if self.settings.peer is None or failed.converter != self.settings.peer.name:
            raise error
        self.skip(f"{failed.case} {failed.model} {failed.outtype}", error)


def _size_nbytes(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir())
    return path.stat().st_size if path.exists() else 0


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
