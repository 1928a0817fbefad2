"""The judgement of the safetensors library on a header, beside our own.

Its reader maps the whole file. It is shown an anonymous file instead, with the header and a hole as large as the data:
nothing that others can truncate is mapped, and the hole takes addresses but no memory. Where a limit on addresses
(`ulimit -v`) or on the size of files leaves no room for that, or the system has no anonymous files, our own rules stand
alone, as they do where the memory bound has no room for its table; tests/property/test_checkpoint.py compares both.
"""

from __future__ import annotations

import os
import resource
from typing import Final

from safetensors import SafetensorError, safe_open

# What the library's table of a header takes for each byte of it while it looks. Measured: 5 to 11.
PARSED_NBYTES_PER_BYTE: Final = 12


def objection(head: bytes, nbytes: int) -> str | None:
    """Why the library refuses a file of `nbytes` bytes that begins with `head`, its length prefix and header.

    Returns:
        The library's words; None where it accepts the file, or cannot be asked.
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
    """Whether the process may not have any number of addresses, or files of any size."""
    limits = (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)
