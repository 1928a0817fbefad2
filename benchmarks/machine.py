"""The machine under the benchmark: page cache, memory cgroups, and the contents of env.json.

All code that queries or changes the system is here. If a condition cannot be set up, Unavailable gives the reason, so
that the row is left out with a message and never measured under another condition.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil

_PAGE_NBYTES: Final = os.sysconf("SC_PAGE_SIZE")
_PROBE_NBYTES: Final = 1 << 20  # one page in each MiB is looked at
_N_CHILLS: Final = 10
_ENTER: Final = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_PACKAGES: Final = ("numpy", "gguf", "safetensors", "tqdm", "psutil", "matplotlib")
_PEER_PACKAGES: Final = ("torch", "transformers", "numpy", "gguf")


class Unavailable(Exception):
    """This machine or this user cannot do it; the message says why."""


# ---------------------------------------------------------------- page cache


def warm(paths: Iterable[Path]) -> None:
    """Bring whole files into the page cache."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def chill(paths: Sequence[Path]) -> None:
    """Drop files from the page cache (posix_fadvise; other files, Python's among them, stay). Raises Unavailable."""
    for _ in range(_N_CHILLS):
        for path in paths:
            _drop(path)
        if max(map(cached_fraction, paths)) == 0:
            return
        time.sleep(0.2)  # pages on their way into the cache's lists are dropped only when they have arrived
    raise Unavailable("files stay in the page cache whatever posix_fadvise says")


def _drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached_fraction(path: Path) -> float:
    """About which part of a file is in the page cache. Raises Unavailable where the filesystem does not tell."""
    page = bytearray(_PAGE_NBYTES)
    n_hits = 0
    offsets = range(0, path.stat().st_size, _PROBE_NBYTES)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset in offsets:
            try:
                n_hits += os.preadv(descriptor, [page], offset, os.RWF_NOWAIT) > 0
            except BlockingIOError:
                continue
            except OSError as error:
                raise Unavailable(f"the filesystem does not say what is cached: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return n_hits / max(len(offsets), 1)


def settle() -> None:
    """Let no sample pay for the one before it: all that was written goes to the disk, deletions included."""
    os.sync()
    time.sleep(0.3)


# ---------------------------------------------------------------- cgroups


@contextmanager
def memory_cgroup(limit_nbytes: int) -> Iterator[list[str]]:
    """A command line's beginning that runs its rest under `limit_nbytes`, page cache counted and nothing swapped out.

    Raises Unavailable, also where a process may not enter the group: its failure there would count as the command's.
    """
    parent, limit_name = _cgroup_parent()
    group = parent / f"streamconv-bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Unavailable(f"no memory cgroup can be made in {parent}: {error.strerror}") from error
    try:
        try:
            (group / limit_name).write_text(str(limit_nbytes))
        except OSError as error:
            raise Unavailable(f"the cgroup takes no memory limit: {error.strerror}") from error
        _forbid_swap(group, limit_nbytes)
        prefix = ["sh", "-c", _ENTER, str(group)]
        entered = subprocess.run([*prefix, "true"], capture_output=True, text=True)
        if entered.returncode:
            raise Unavailable(f"no process may enter the cgroup: {entered.stderr.strip()}")
        yield prefix
    finally:
        _remove_cgroup(group)


def _forbid_swap(group: Path, limit_nbytes: int) -> None:
    """Where the system counts swap at all; else what is beyond the limit may go there."""
    for name, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", limit_nbytes)):
        if (group / name).exists():
            with suppress(OSError):
                (group / name).write_text(str(value))


def _cgroup_parent() -> tuple[Path, str]:
    """The folder for a new cgroup, below this process's own where that is allowed, and the name of its limit's file."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if controllers == "memory":
            return Path("/sys/fs/cgroup/memory") / path.strip("/"), "memory.limit_in_bytes"
    root = Path("/sys/fs/cgroup")
    own = root / next((path for _, controllers, path in lines if not controllers), "").strip("/")
    # In version 2 a group with processes cannot hand memory down, so the nearest ancestor that already does is taken.
    for folder in (own, *own.parents):
        control = folder / "cgroup.subtree_control"
        if control.is_file() and "memory" in control.read_text().split() and os.access(folder, os.W_OK):
            return folder, "memory.max"
        if folder == root:
            break
    raise Unavailable("no cgroup that this user may write hands down the memory controller")


def _remove_cgroup(group: Path) -> None:
    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:  # its last process has ended but is not yet reaped
            time.sleep(0.1)


# ---------------------------------------------------------------- env.json


def environment(cache: Path, peer_python: Path | None) -> dict[str, Any]:
    """What a reader needs to judge the figures; no host name, user or path.

    Raises Unavailable where `peer_python` does not run.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_nbytes": psutil.virtual_memory().total,
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "page_nbytes": _PAGE_NBYTES,
        "filesystem": _filesystem(cache),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "streamconv": {"commit": _commit(), "kernels": _kernels()},
        "peers": _peer_versions(peer_python) if peer_python else {},
        "load_average": os.getloadavg(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor()


def _filesystem(path: Path) -> dict[str, str]:
    path = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    best = max(mounts, key=lambda part: len(part.mountpoint))
    return {"type": best.fstype, "options": best.opts}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that was measured, with a + where the tree differs from it."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain", "streamconv"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout else "")


def _kernels() -> str:
    from streamconv.ggml.encode import best_kernel

    return best_kernel().name


def _peer_versions(python: Path) -> dict[str, str]:
    program = (
        "import importlib.metadata as m, json, platform\n"
        f"names = {_PEER_PACKAGES!r}\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version(), **{n: have[n] for n in names if n in have}}))"
    )
    try:
        done = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=True)
        versions: dict[str, str] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"LLAMA_CPP_PYTHON={python} is no Python that runs") from error
    return versions


def default_host() -> str:
    """A label that describes the machine and does not name it."""
    return f"{os.cpu_count()}core-{platform.machine()}"
