"""Several calls of the library at once, in one process: each has kernels of its own choice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.ggml import _kernels
from streamconv.ggml import encode as codecs
from tests import tiny

N_CALLS = 3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.lfm2(tmp_path / "lfm2")


class Overlap:
    """A progress callback that holds each of several calls until all are at work, and lets one end before the rest."""

    def __init__(self) -> None:
        self.all_began = threading.Barrier(N_CALLS)
        self.one_ended = threading.Event()

    def of(self, number: int) -> Callable[[int, int], None]:
        began = False

        def progress(done: int, total: int) -> None:
            nonlocal began
            if not began:
                began = True
                self.all_began.wait(30)
                if number:
                    assert self.one_ended.wait(30)

        return progress


def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that encode with the compiled kernel, from now on."""
    calls: list[str] = []
    encode = _kernels.encode

    def watched(*arguments: Any) -> Any:
        calls.append(threading.current_thread().name)
        return encode(*arguments)

    monkeypatch.setattr(_kernels, "encode", watched)
    return calls


def test_overlapping_verifications_all_use_the_reference(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first to end gives the others no other kernel, and the last leaves the process the one that it had."""
    assert codecs.best_kernel().name == "c"
    streamconv.convert(source, tmp_path / "x.gguf", outtype="q8_0")
    calls = compiled_calls(monkeypatch)
    overlap = Overlap()

    def call(number: int) -> bool | None:
        report = streamconv.verify(tmp_path / "x.gguf", source, progress=overlap.of(number), threads=2)
        overlap.one_ended.set()
        return report.verified

    with ThreadPoolExecutor(N_CALLS) as pool:
        assert list(pool.map(call, range(N_CALLS))) == [True] * N_CALLS
    assert calls == []
    assert codecs.best_kernel().name == "c"
    streamconv.convert(source, tmp_path / "y.gguf", outtype="q8_0")
    assert calls


def test_a_conversion_beside_a_verification_keeps_the_compiled_kernel(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamconv.convert(source, tmp_path / "x.gguf", outtype="q8_0")
    calls = compiled_calls(monkeypatch)
    began, written = threading.Event(), threading.Event()

    def progress(done: int, total: int) -> None:
        began.set()
        assert written.wait(30)

    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(streamconv.verify, tmp_path / "x.gguf", source, progress=progress)
        assert began.wait(30)
        streamconv.convert(source, tmp_path / "y.gguf", outtype="q8_0")
        n_calls = len(calls)
        assert n_calls
        written.set()
        assert verified.result().verified
    assert len(calls) == n_calls
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
