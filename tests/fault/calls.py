"""The border between the program and the operating system, watched: every call that changes a file, in order.

The package makes these calls through `os`, `fcntl` and the C library; they are replaced there, so no code of the
package is mocked. A handler sees a call before it is made, and may let it through, change it, make it fail, or end the
process.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streamconv.output import directio

OS_CALLS = ("open", "pwrite", "ftruncate", "fsync", "fdatasync", "posix_fadvise", "unlink", "rename", "replace")
LIBC_CALLS = ("fallocate", "sync_file_range", "renameat2")


@dataclass(frozen=True)
class Call:
    """One system call. `do` makes it and gives its result."""

    name: str
    arguments: tuple[Any, ...]
    do: Callable[[], Any]

    @property
    def path(self) -> str:
        """The file it works on, as the system names it."""
        first = self.arguments[0]
        if self.name == "renameat2":
            return os.fsdecode(self.arguments[1])
        return str(Path(f"/proc/self/fd/{first}").readlink()) if isinstance(first, int) else os.fspath(first)

    @property
    def changes_something(self) -> bool:
        if self.name == "open":
            return bool(self.arguments[1] & os.O_CREAT)
        return self.name != "posix_fadvise"

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


Handler = Callable[[Call], Any]


class _Libc:
    """The C library with the handler before it. A handler's OSError becomes -1 and errno, as C does it."""

    def __init__(self, real: ctypes.CDLL, handler: Handler) -> None:
        self._real, self._handler = real, handler

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(self._real, name)
        if name not in LIBC_CALLS:
            return function  # type: ignore[no-any-return]

        def call(*arguments: Any) -> int:
            try:
                return self._handler(Call(name, arguments, lambda: function(*arguments)))  # type: ignore[no-any-return]
            except OSError as exc:
                ctypes.set_errno(exc.errno or 0)
                return -1

        return call


@contextmanager
def watched(handler: Handler) -> Iterator[None]:
    """Every call inside goes to `handler`, whose result is the call's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OS_CALLS:
            patch.setattr(os, name, _through(handler, name, getattr(os, name)))
        patch.setattr(fcntl, "flock", _through(handler, "flock", fcntl.flock))
        libc = _Libc(directio._libc(), handler)
        patch.setattr(directio, "_libc", lambda: libc)
        yield


def _through(handler: Handler, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        return handler(Call(name, arguments, lambda: real(*arguments, **keywords)))

    return call


@contextmanager
def syncs_skipped() -> Iterator[None]:
    """fsync and its kin do nothing: for runs whose survival of a power cut is not the question."""

    def handle(call: Call) -> Any:
        return None if call.name in ("fsync", "fdatasync") else call.do()

    with watched(handle):
        yield
