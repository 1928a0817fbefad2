"""A second check of a header, by the safetensors library.

The library's reader maps the whole file. It gets an anonymous file instead, with the header and a hole of the size of
the data: other programs cannot truncate that, and the hole takes address space but no memory. This check is skipped if
there is a limit on address space (`ulimit -v`) or file size, if the system has no anonymous files, or if the library's
table does not fit in the memory budget. The first check (safetensors.py) has the same rules;
tests/property/test_checkpoint.py compares the two.
"""

from __future__ import annotations

import os
import resource
from typing import Final

from safetensors import SafetensorError, safe_open

# Memory that the library takes for each byte of a header while it checks it. Measured: 5 to 11.
PARSED_NBYTES_PER_BYTE: Final = 12


def objection(head: bytes, nbytes: int) -> str | None:
    """Why the library refuses a file.

    Args:
        head: The file's first bytes: its length prefix and header.
        nbytes: The size of the file.

    Returns:
        The library's message; None if it accepts the file, or the check was skipped.
    """
    if not hasattr(os, "memfd_create") or _is_limited():
        return None
    fd = os.memfd_create("safetensors-header")
    try:
        os.truncate(fd, nbytes)
        os.pwrite(fd, head, 0)
        with safe_open(f"/proc/self/fd/{fd}", framework="numpy"):
            return None
    except SafetensorError as error:
        return str(error)
    except (OSError, MemoryError):
        return None
    finally:
        os.close(fd)


def _is_limited() -> bool:
    """Whether the process has a limit on its address space or on the size of files."""
    limits = (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)
