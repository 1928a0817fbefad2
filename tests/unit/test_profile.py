"""The profile of a run: phases from several threads, a timeline that stays small, and its JSON."""

from __future__ import annotations

import json
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import streamconv
from benchmarks import machine
from streamconv import timing as profile_module
from streamconv.timing import PHASES, Memory, Profile, Sample, Stopwatch, Timeline, read_memory
from tests import tiny


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock that the profile reads: its one entry, moved by the test."""
    now = [100.0]
    monkeypatch.setattr("streamconv.timing.time.perf_counter", lambda: now[0])
    return now


def test_seconds_add_up_by_phase(clock: list[float]) -> None:
    profile = Profile()
    for phase, elapsed in (("read", 0.25), ("write", 2.0), ("read", 0.5)):
        with profile.time(phase):  # type: ignore[arg-type]
            clock[0] += elapsed
    written = profile.as_json()
    assert written["seconds"] == {
        "wall": 0.0,
        "read": 0.75,
        "merge": 0.0,
        "encode": 0.0,
        "write": 2.0,
        "wait": 0.0,
        "sync": 0.0,
    }
    assert written["calls"] == {"read": 2, "merge": 0, "encode": 0, "write": 1, "wait": 0, "sync": 0}


def test_a_phase_that_fails_is_counted_and_its_error_passes(clock: list[float]) -> None:
    profile = Profile()
    with pytest.raises(KeyError), profile.time("encode"):
        clock[0] += 3.0
        raise KeyError("x")
    assert profile.as_json()["seconds"]["encode"] == 3.0


def test_no_call_is_lost_between_threads() -> None:
    profile = Profile()
    n_threads, n_calls = 7, 500
    start = threading.Barrier(n_threads)

    def work() -> None:
        start.wait()
        for _ in range(n_calls):
            with profile.time("encode"):
                pass

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert profile.as_json()["calls"]["encode"] == n_threads * n_calls


def test_off_times_nothing_and_makes_nothing() -> None:
    off = Stopwatch()
    assert off.time("read") is off.time("write")
    with off.time("read"):
        pass


def test_the_timeline_stays_small_and_keeps_its_highest_sample() -> None:
    timeline = Timeline(0.01, limit=64)
    rng = np.random.default_rng(5)
    seconds, highest, added = 0.0, 0, 0
    while seconds < 100:
        nbytes = int(rng.integers(1, 1 << 40))
        timeline.add(Sample(seconds, Memory(nbytes, nbytes, 0)))
        seconds, highest, added = seconds + timeline.interval_seconds, max(highest, nbytes), added + 1
    assert 32 <= len(timeline.samples) < 64 < added
    assert max(sample.memory.rss_nbytes for sample in timeline.samples) == highest
    assert [sample.seconds for sample in timeline.samples] == sorted(sample.seconds for sample in timeline.samples)
    assert timeline.interval_seconds == 2.56


def test_memory_tells_anonymous_from_file_mapped(tmp_path: Path) -> None:
    nbytes = 24 << 20
    before = read_memory()
    private = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # malloc may hand out old pages
    held = np.frombuffer(private, dtype=np.uint8)
    held[:] = 3
    with_anon = read_memory()
    assert with_anon.anon_nbytes - before.anon_nbytes > nbytes * 0.9
    assert abs(with_anon.file_nbytes - before.file_nbytes) < nbytes * 0.1
    shared = np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
    shared[:] = 5
    with_shared = read_memory()
    assert with_shared.anon_nbytes - with_anon.anon_nbytes > nbytes * 0.9
    held.tofile(tmp_path / "file")
    mapped = np.memmap(tmp_path / "file", mode="r")
    assert int(mapped.max()) == 3
    with_file = read_memory()
    # In memory alone, as tmpfs has them, files count as what is shared between processes.
    is_on_disk = machine.environment(tmp_path, None)["filesystem"]["type"] != "tmpfs"
    growth = (with_file.file_nbytes - with_shared.file_nbytes, with_file.anon_nbytes - with_shared.anon_nbytes)
    assert growth[not is_on_disk] > nbytes * 0.9
    assert growth[is_on_disk] < nbytes * 0.1
    assert with_file.rss_nbytes == with_file.anon_nbytes + with_file.file_nbytes


@pytest.mark.parametrize("status", [None, "Name:\tpython\nVmRSS:\t    9000 kB\n"])
def test_where_the_system_does_not_tell_all_of_it_counts_as_anonymous(
    status: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No /proc, or one of a kernel that does not separate anonymous memory from files."""
    monkeypatch.setattr(profile_module, "_STATUS", tmp_path / "status")
    if status is not None:
        (tmp_path / "status").write_text(status)
    memory = read_memory()
    assert memory.rss_nbytes == memory.anon_nbytes > 1 << 20
    assert memory.file_nbytes == 0


def test_a_run_is_told_with_its_first_and_last_sample() -> None:
    with Profile(interval_seconds=3600) as profile:
        with profile.time("write"):
            pass
    written = json.loads(json.dumps(profile.as_json()))
    assert written["schema"] == 1
    assert set(written["seconds"]) == {"wall", *PHASES}
    assert written["memory"]["columns"] == ["seconds", "rss_nbytes", "anon_nbytes", "file_nbytes"]
    first, last = written["memory"]["samples"]
    assert first[0] <= last[0] <= written["seconds"]["wall"]
    assert written["memory"]["highest_rss_nbytes"] == max(first[1], last[1])


def test_no_sample_is_later_than_the_end(clock: list[float]) -> None:
    with Profile(interval_seconds=3600) as profile:
        clock[0] += 0.00026  # which four decimals round up
    written = profile.as_json()
    assert written["memory"]["samples"][-1][0] == written["seconds"]["wall"] == 0.0003


def test_the_sampler_ends_with_a_failing_run() -> None:
    with pytest.raises(ValueError, match="boom"), Profile(interval_seconds=3600):
        raise ValueError("boom")
    assert "profile" not in {thread.name for thread in threading.enumerate()}


def test_a_conversion_tells_its_phases_and_its_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that runs in fsync alone: all of it is under `sync`."""
    now = [100.0]
    monkeypatch.setattr("streamconv.timing.time.perf_counter", lambda: now[0])
    fsync = os.fsync

    def slow(fd: int) -> None:
        now[0] += 3.0
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    src = tiny.lfm2(tmp_path / "src")
    with Profile() as profile:
        streamconv.convert(src, tmp_path / "out.gguf", profile=profile, io="positioned")  # mapped pages are not read
    written = profile.as_json()
    assert written["seconds"]["sync"] >= 3.0
    assert written["seconds"]["write"] == written["seconds"]["read"] == 0.0
    assert {phase for phase, n_calls in written["calls"].items() if n_calls} == set(PHASES) - {"merge"}
