"""The bound on memory, and the one ledger of what a run holds under it.

Whatever allocates by the size of its input reserves here, by name, before it allocates. Four words: *allowed* is the
bound, *reserved* what is held or lent by name, *projected* the most that will be resident at a time, *measured* what
the system says was. A standing test holds measured <= projected, for each command.

Units are bytes throughout.
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
CGROUP_SHARE: Final = 0.8  # the rest is for the page cache and the shell around us

RUN_TO_RUN_NBYTES: Final = 2 * MIB  # by which the same process's resident set differs from one run to the next
# What a plan may take beyond a bound that is smaller than the process already: so much is counted to the end, and what
# is needed is said once and rightly. Typical configs, indexes and headers take less than a tenth of it.
GRACE_NBYTES: Final = 8 * MIB

PROCESS: Final = "process"  # the term that is measured
UNACCOUNTED: Final = "unaccounted"  # what was measured in the end beyond everything reserved: 0, or a term is missing

_UNITS: Final = {
    "": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes of "96MiB", "1.5G", "300M", "4096": K M G are powers of 1000, KiB MiB GiB of 1024. UsageError otherwise."""
    match = _SIZE.fullmatch(text)
    unit = match and _UNITS.get(match[2].upper())
    if match is None or unit is None:
        raise UsageError(f"{text!r} is not a size", hint="write 96MiB, 300M or 1.5G", code="size-syntax")
    return int(float(match[1]) * unit)


def in_words(nbytes: int) -> str:
    """`nbytes` for people, never more than it is: "96 MiB", "39.9 MiB", "10 bytes"."""
    return f"{nbytes * 10 // MIB / 10:.15g} MiB" if nbytes >= MIB else f"{nbytes:,} bytes"


def default_limit_nbytes() -> int:
    """256 MiB, or 80% of what the cgroup allows where that is less.

    In a process that holds much already, as a caller of the library may, half of the 256 MiB come on top of that.
    """
    usual = max(DEFAULT_LIMIT_NBYTES, resident_nbytes()[0] + DEFAULT_LIMIT_NBYTES // 2)
    return min(usual, int(CGROUP_SHARE * cgroup_limit_nbytes()))


def cgroup_limit_nbytes() -> int:
    """The smallest memory limit of this process's cgroup and its parents (v2 or v1); 2**63 where there is none."""
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
    """(resident set now, its peak so far) of this process."""
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
    """What one call of the library may hold in memory, and what it does hold, term by term.

    Args:
        allowed: The bound on the process's resident set.
        process: What is resident already; measured by default.
        grace: What a plan may take beyond a bound that is smaller than the process already.
        compares: Whether the result will be compared with its source, so that a plan must leave room for that.

    Attributes:
        terms: What is held until the end, by name.
        projected: The most that was held at a time so far, loans included.
        peak_of: The name of the loan at that time; empty where nothing was lent.
    """

    def __init__(
        self, allowed: int, process: int | None = None, grace: int = GRACE_NBYTES, *, compares: bool = False
    ) -> None:
        self.allowed, self.grace, self.compares = allowed, grace, compares
        self.terms = {PROCESS: resident_nbytes()[0] if process is None else process}
        self.projected, self.peak_of = self.held, ""

    @property
    def held(self) -> int:
        return sum(self.terms.values())

    @property
    def left(self) -> int:
        """What may still be reserved while a run is planned."""
        return max(self.allowed, self.terms[PROCESS] + self.grace) - self.held

    def reserve(self, name: str, nbytes: int, *, file: object = None) -> None:
        """Hold `nbytes` more until the end, under `name`. BudgetError, naming `file`, where they are not left."""
        self.check(name, nbytes, file=file)
        self.terms[name] = self.terms.get(name, 0) + nbytes
        self._note("", 0)

    @contextmanager
    def lend(self, name: str, nbytes: int, *, file: object = None) -> Iterator[None]:
        """Hold `nbytes` more inside the `with`. BudgetError, naming `file`, where they are not left."""
        self.check(name, nbytes, file=file)
        self.terms[name] = self.terms.get(name, 0) + nbytes
        try:
            yield
        finally:
            self.terms[name] -= nbytes
            if not self.terms[name]:
                del self.terms[name]

    def check(self, name: str, nbytes: int, *, file: object = None) -> None:
        """BudgetError, naming `file`, unless `nbytes` could be reserved now; they are about to be held for a moment."""
        if nbytes > self.left:
            raise too_small(self.allowed, self.held + nbytes, file, f"{name} may take {mib(nbytes)} MiB to read")
        self._note(name, nbytes)

    def scratchpad(self) -> Budget:
        """A ledger with the same terms, for what is read and forgotten at once."""
        other = Budget(self.allowed, 0, self.grace)
        other.terms = dict(self.terms)
        return other

    def settle(self) -> None:
        """Measure what is resident, and hold what no term accounts for."""
        self.terms[UNACCOUNTED] = max(0, resident_nbytes()[0] - self.held)
        self._note("", 0)

    @property
    def past(self) -> tuple[int, str]:
        """What the plan took at most, now that it is made, and what for: as projected, or as measured if less."""
        return min(self.projected, resident_nbytes()[1]), self.peak_of or "planning"

    def _note(self, name: str, nbytes: int) -> None:
        if self.held + nbytes > self.projected:
            self.projected, self.peak_of = self.held + nbytes, name


def mib(nbytes: int) -> int:
    """`nbytes` in MiB, rounded up."""
    return -(-nbytes // MIB)


def unbounded() -> Budget:
    """A ledger that refuses nothing."""
    return Budget(1 << 63, 0)


def too_small(allowed: int, needed: int, file: object = None, why: str | None = None) -> BudgetError:
    """The error for a bound under which `needed` bytes do not fit, with one under which they do."""
    bound = mib(needed + RUN_TO_RUN_NBYTES)
    return BudgetError(
        f"a memory bound of {in_words(allowed)} is too small: {why or f'this conversion needs {bound} MiB'}",
        file=file,
        hint=f"--max-memory {bound}MiB",
        code="memory-bound",
    )
