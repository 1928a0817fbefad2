"""The bound on memory: how it is read, what is taken already, and what the machine allows.

Owns: sizes as people write them, the default bound, this process's resident set. Units are bytes throughout.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from streamconv.errors import UsageError

MIB: Final = 1 << 20
DEFAULT_LIMIT_NBYTES: Final = 256 * MIB
CGROUP_SHARE: Final = 0.8  # the rest is for the page cache and the shell around us

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


def headroom_nbytes(limit_nbytes: int) -> int:
    """What the bound leaves for parsing; a MiB at least, so that a bound too small for anything is told what is needed
    by who knows it."""
    return max(limit_nbytes - resident_nbytes()[0], MIB)


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
