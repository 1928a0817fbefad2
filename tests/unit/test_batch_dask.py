"""A batch on a real Dask cluster: a scheduler and two workers, one of which is killed while it has a job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import streamconv
from tests import tiny
from tests.extras import distributed
from tests.holding import await_end, held_output, held_processes, hold


def start(module: str, folder: Path, *options: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
    file = str(folder / "scheduler.json")
    command = [sys.executable, "-m", f"distributed.cli.{module}", "--scheduler-file", file, "--no-dashboard", *options]
    log = (folder / "dask.log").open("ab")
    return subprocess.Popen(command, cwd=folder, env=os.environ | env, stdout=log, stderr=log)


def read_address(folder: Path) -> str | None:
    """The scheduler's, once its file is whole: it is empty at first, and a Client waits no longer than 0.1 s for it."""
    try:
        return str(json.loads((folder / "scheduler.json").read_text())["address"])
    except (FileNotFoundError, ValueError):
        return None


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a scheduler with two workers; the first output that they complete is held."""
    env = hold(tmp_path, "wait")
    worker = ("--no-nanny", "--nthreads", "1", "--host", "127.0.0.1")
    processes = [
        start("dask_scheduler", tmp_path, "--port", "0", "--host", "127.0.0.1", env=env),
        *(start("dask_worker", tmp_path, *worker, "--name", name, env=env) for name in ("a", "b")),
    ]
    try:
        while (address := read_address(tmp_path)) is None:
            assert processes[0].poll() is None, (tmp_path / "dask.log").read_text()
            time.sleep(0.01)
        with distributed.Client(address) as client:
            client.wait_for_workers(2, timeout=60)
        yield address
    finally:
        for process in processes:
            process.kill()
            process.wait()


def begin(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "streamconv", "batch", "jobs.toml", "--json", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(batch: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    """(exit code, the lines by name)."""
    out, error = batch.communicate(timeout=120)
    assert "Traceback" not in error
    return batch.returncode, {line["name"]: line for line in map(json.loads, out.splitlines())}


def assert_whole(folder: Path, names: Iterable[str]) -> None:
    assert {path.name for path in (folder / "out").iterdir()} == {f"{name}.gguf" for name in names}
    for name in names:
        streamconv.convert(folder / "models" / name, folder / "expected.gguf", force=True)
        assert (folder / "out" / f"{name}.gguf").read_bytes() == (folder / "expected.gguf").read_bytes()


def test_a_worker_that_is_killed_loses_nothing(tmp_path: Path, cluster: str) -> None:
    names = ["one", "three", "two"]
    for seed, name in enumerate(names, start=1):
        tiny.llama(tmp_path / "models" / name, seed=seed)
    (tmp_path / "jobs.toml").write_text('[[job]]\nsource = "models/*"\noutput = "out/{name}.gguf"\n')
    batch = begin(tmp_path, "--dask", cluster)
    job, worker = held_processes(tmp_path)
    assert "dask_worker" in " ".join(worker.cmdline())
    held = held_output(tmp_path)
    worker.kill()
    await_end(job)
    code, lines = finish(batch)
    assert code == 0
    assert {name: (line["status"], line["attempts"]) for name, line in lines.items()} == {
        name: ("done", 2 if name == held else 1) for name in names
    }
    assert [name for name, line in lines.items() if line["report"]["resumed"]] == [held]
    assert_whole(tmp_path, names)

    # Ctrl-C reaches what the other worker has begun, and leaves that worker fit for the next batch.
    tiny.llama(tmp_path / "models" / "four", seed=4)
    (tmp_path / "held").unlink()
    batch = begin(tmp_path, "--dask", cluster)
    (job, _) = held_processes(tmp_path)
    batch.send_signal(signal.SIGINT)
    await_end(job)
    code, lines = finish(batch)
    assert (code, lines["four"]["status"]) == (130, "cancelled")
    code, lines = finish(begin(tmp_path, "--dask", cluster, "--resume"))
    assert (code, lines["four"]["report"]["resumed"]) == (0, True)
    assert_whole(tmp_path, [*names, "four"])


def test_an_address_where_nobody_answers(tmp_path: Path) -> None:
    (tmp_path / "jobs.toml").write_text('[[job]]\nsource = "models"\noutput = "x.gguf"\n')
    done = subprocess.run(
        [sys.executable, "-m", "streamconv", "batch", "jobs.toml", "--dask", "nonsense://x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("streamconv: no Dask scheduler answers at nonsense://x")
    assert len(done.stderr.splitlines()) == 1
