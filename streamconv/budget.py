"""The memory limit of a run, and its ledger of reservations.

Code that allocates in proportion to its input reserves that memory here first, by name. Four words: *allowed* is the
limit, *reserved* is held or lent memory by name, *projected* is the most memory that will be resident at any time, and
*measured* is what the system reports afterwards. A test checks measured <= projected for each command.

All sizes are in bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from streamconv.errors import BudgetError, UsageError

MIB: Final = 1 << 20
DEFAULT_LIMIT_NBYTES: Final = 256 * MIB
CGROUP_SHARE: Final = 0.8  # the rest is for the page cache and other processes in the same cgroup

RUN_TO_RUN_NBYTES: Final = 2 * MIB  # how much the resident set of the same run varies
# If the limit is smaller than the process itself, a plan may still reserve this much, so that it is completed and the
# error names the limit that is needed. Typical configs, indexes and headers take less than a tenth of it.
GRACE_NBYTES: Final = 8 * MIB

PROCESS: Final = "process"  # the term that is measured at the start
UNACCOUNTED: Final = "unaccounted"  # measured memory beyond all reservations: 0 unless a reservation is missing

_UNITS: Final = {
    "": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """The bytes of a size such as "96MiB", "1.5G", "300M" or "4096".

    K, M and G are powers of 1000; KiB, MiB and GiB are powers of 1024.

    Raises:
        UsageError: `text` is not a size.
    """
    match = _SIZE.fullmatch(text)
    unit = match and _UNITS.get(match[2].upper())
    if match is None or unit is None:
        raise UsageError(f"{text!r} is not a size", hint="write 96MiB, 300M or 1.5G", code="size-syntax")
    return int(float(match[1]) * unit)


def in_words(nbytes: int) -> str:
    """`nbytes` for messages, rounded down: "96 MiB", "39.9 MiB", "10 bytes"."""
    return f"{nbytes * 10 // MIB / 10:.15g} MiB" if nbytes >= MIB else f"{nbytes:,} bytes"


def default_limit_nbytes() -> int:
    """The default memory limit in bytes: 256 MiB, or 80% of the cgroup's limit if that is less.

    In a process that already holds much memory, such as a caller of the library, it is at least the resident set plus
    128 MiB, within the cgroup's limit.
    """
    usual = max(DEFAULT_LIMIT_NBYTES, resident_nbytes()[0] + DEFAULT_LIMIT_NBYTES // 2)
    return min(usual, int(CGROUP_SHARE * cgroup_limit_nbytes()))


def cgroup_limit_nbytes() -> int:
    """The smallest memory limit of this process's cgroup and its parents (v2 or v1), in bytes; 2**63 without one."""
    smallest = 1 << 63
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return smallest
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        folder = root / path.lstrip("/")
        for level in (folder, *folder.parents):
            try:
                text = (level / name).read_text().strip()
            except OSError:
                text = "max"
            if text.isdigit():
                smallest = min(smallest, int(text))
            if level == root:
                break
    return smallest


def resident_nbytes() -> tuple[int, int]:
    """(resident set now, its peak so far) of this process, in bytes."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return int(fields["VmRSS"].split()[0]) << 10, int(fields["VmHWM"].split()[0]) << 10
    except (OSError, KeyError):  # no /proc: the resource module's peak, in KiB on Linux and bytes on macOS
        import resource
        import sys

        import psutil

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return psutil.Process().memory_info().rss, peak if sys.platform == "darwin" else peak << 10


class Budget:
    """The memory limit of one call of the library, and its reservations.

    Args:
        allowed: The limit on the process's resident set.
        process: The memory that is already resident; measured by default.
        grace: How much a plan may reserve if the limit is smaller than the process itself.
        compares: Whether the result will be compared with its source, so that a plan must leave room for that.

    Attributes:
        terms: The reservations, by name.
        projected: The most memory reserved at any time so far, loans included.
        peak_of: The name of the loan at that time; empty if nothing was lent.
    """

    def __init__(
        self, allowed: int, process: int | None = None, grace: int = GRACE_NBYTES, *, compares: bool = False
    ) -> None:
        self.allowed, self.grace, self.compares = allowed, grace, compares
        self.terms = {PROCESS: resident_nbytes()[0] if process is None else process}
        self.projected, self.peak_of = self.held, ""

    @property
    def held(self) -> int:
        """The sum of all reservations."""
        return sum(self.terms.values())

    @property
    def left(self) -> int:
        """How much more can be reserved while a run is planned."""
        return max(self.allowed, self.terms[PROCESS] + self.grace) - self.held

    def reserve(self, name: str, nbytes: int, *, file: object = None) -> None:
        """Reserve memory until the end of the run.

        Args:
            name: The name of the reservation; repeated names are added up.
            nbytes: The size.
            file: The file that needs it, for the error.

        Raises:
            BudgetError: It does not fit.
        """
        self.check(name, nbytes, file=file)
        self.terms[name] = self.terms.get(name, 0) + nbytes
        self._note("", 0)

    @contextmanager
    def lend(self, name: str, nbytes: int, *, file: object = None) -> Iterator[None]:
        """Reserve memory inside the `with`; arguments and errors are those of `reserve`."""
        self.check(name, nbytes, file=file)
        self.terms[name] = self.terms.get(name, 0) + nbytes
        try:
            yield
        finally:
            self.terms[name] -= nbytes
            if not self.terms[name]:
                del self.terms[name]

    def check(self, name: str, nbytes: int, *, file: object = None) -> None:
        """Check that memory needed for a moment fits, and count it in `projected`.

        Arguments and errors are those of `reserve`.
        """
        if nbytes > self.left:
            raise too_small(self.allowed, self.held + nbytes, file, f"reading {name} can take {mib(nbytes)} MiB")
        self._note(name, nbytes)

    def scratchpad(self) -> Budget:
        """A copy of this ledger, for data that is read and discarded at once."""
        other = Budget(self.allowed, 0, self.grace)
        other.terms = dict(self.terms)
        return other

    def settle(self) -> None:
        """Measure the resident set, and reserve the part of it that no term accounts for."""
        self.terms[UNACCOUNTED] = max(0, resident_nbytes()[0] - self.held)
        self._note("", 0)

    @property
    def past(self) -> tuple[int, str]:
        """The peak memory of planning (projected, or measured if that is less), and the loan that caused it."""
        return min(self.projected, resident_nbytes()[1]), self.peak_of or "planning"

    def _note(self, name: str, nbytes: int) -> None:
        if self.held + nbytes > self.projected:
            self.projected, self.peak_of = self.held + nbytes, name


def mib(nbytes: int) -> int:
    """`nbytes` in MiB, rounded up."""
    return -(-nbytes // MIB)


def unbounded() -> Budget:
    """A budget without a limit."""
    return Budget(1 << 63, 0)


def too_small(allowed: int, needed: int, file: object = None, why: str | None = None) -> BudgetError:
    """The error for a memory limit that is too small, with a sufficient one as the hint.

    Args:
        allowed: The limit.
        needed: The memory needed, in bytes.
        file: The file that needs it.
        why: The reason; by default, the limit that the conversion needs.
    """
    bound = mib(needed + RUN_TO_RUN_NBYTES)
    return BudgetError(
        f"a memory limit of {in_words(allowed)} is too small: {why or f'this conversion needs {bound} MiB'}",
        file=file,
        hint=f"--max-memory {bound}MiB",
        code="memory-bound",
    )
