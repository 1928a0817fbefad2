"""Time and memory of a conversion by phase, as written by `--profile FILE.json`.

A profile of any length takes bounded memory: samples are thinned out, keeping the highest of each interval. Without
profiling, a timed phase is one method call that reads no clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

from streamconv.threads import start_threads

SCHEMA: Final = 1
DECIMALS: Final = 4  # of the wall time and of the samples alike, so that no sample is later than the end
Phase = Literal["read", "merge", "encode", "write", "wait", "sync"]
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)

_STATUS = Path("/proc/self/status")
_NOTHING: Final = nullcontext()


class Memory(NamedTuple):
    """Resident memory of this process in bytes: anonymous (including shared buffers), and of mapped files."""

    rss_nbytes: int
    anon_nbytes: int
    file_nbytes: int


class Sample(NamedTuple):
    """Resident memory at a time, in seconds since the profile began."""

    seconds: float
    memory: Memory


class Stopwatch:
    """Times the phases of a conversion. This base class, used without `--profile`, does nothing."""

    def time(self, phase: Phase, /) -> AbstractContextManager[None]:
        """A context manager that adds its duration to `phase`."""
        return _NOTHING


class Timeline:
    """Fewer than `limit` samples: when full, the larger of each two neighbours is kept and the interval doubles."""

    def __init__(self, interval_seconds: float, limit: int = 4096) -> None:
        self.interval_seconds = interval_seconds
        self.samples: list[Sample] = []
        self._limit = limit

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        if len(self.samples) >= self._limit:
            pairs = zip(self.samples[::2], self.samples[1::2], strict=False)
            self.samples = [max(pair, key=lambda one: one.memory.rss_nbytes) for pair in pairs]
            self.interval_seconds *= 2


class Profile(Stopwatch):
    """Memory over time inside the `with`, and seconds by phase from any thread.

    Phases are summed over threads, so their total can exceed the wall time.

    Args:
        path: The file to which the caller will write the profile; a run refuses a path that must not be overwritten.
        interval_seconds: The time between samples of memory, at first.
    """

    def __init__(self, path: Path | None = None, *, interval_seconds: float = 0.02) -> None:
        self.path = path
        self.timeline = Timeline(interval_seconds)
        self.wall_seconds = 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._calls = dict.fromkeys(PHASES, 0)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample_until_done, name="profile", daemon=True)
        self._started = 0.0

    @contextmanager
    def time(self, phase: Phase, /) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            with self._lock:
                self._seconds[phase] += elapsed
                self._calls[phase] += 1

    def __enter__(self) -> Profile:
        self._started = time.perf_counter()
        self._add_sample()
        try:
            start_threads([self._sampler])
        except BaseException:  # `__exit__` is not called if `__enter__` fails
            self._done.set()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()
        self._add_sample()
        self.wall_seconds = time.perf_counter() - self._started

    def as_json(self) -> dict[str, Any]:
        """The profile as `--profile` writes it; samples have the columns of `memory.columns`."""
        samples = self.timeline.samples
        return {
            "schema": SCHEMA,
            "seconds": {"wall": round(self.wall_seconds, DECIMALS), **self._seconds},
            "calls": self._calls,
            "memory": {
                "interval_seconds": self.timeline.interval_seconds,
                "highest_rss_nbytes": max((sample.memory.rss_nbytes for sample in samples), default=0),
                "columns": ["seconds", *Memory._fields],
                "samples": [[round(seconds, DECIMALS), *memory] for seconds, memory in samples],
            },
        }

    def _add_sample(self) -> None:
        self.timeline.add(Sample(time.perf_counter() - self._started, read_memory()))

    def _sample_until_done(self) -> None:
        while not self._done.wait(self.timeline.interval_seconds):
            self._add_sample()


def read_memory() -> Memory:
    """Resident memory of this process now. If the system does not distinguish, all of it counts as anonymous."""
    try:
        # psutil's `shared` includes anonymous shared buffers, so on Linux the kernel's own numbers are read.
        fields = {
            name: int(value.split()[0]) * 1024
            for name, _, value in (line.partition(b":") for line in _STATUS.read_bytes().splitlines())
            if name.startswith(b"Rss")
        }
        anon_nbytes, file_nbytes = fields[b"RssAnon"] + fields[b"RssShmem"], fields[b"RssFile"]
    except (OSError, KeyError):  # no /proc, or one without the split: Linux before 4.5, gVisor
        import psutil

        rss_nbytes = psutil.Process().memory_info().rss
        return Memory(rss_nbytes, rss_nbytes, 0)
    return Memory(anon_nbytes + file_nbytes, anon_nbytes, file_nbytes)
