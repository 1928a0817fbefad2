"""A command on a terminal of 80 columns, and what people see there when it is over."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

ROWS, COLUMNS = 40, 80
_PIECE = re.compile(
    r"\x1b\[A|\r|\n|[^\x1b\r\n]+"
)  # all that tqdm and Python write: one up, to the left, one down, text


def run(command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """(exit code, everything that was written on the terminal)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm", "LC_ALL": "C.UTF-8"} | dict(env or {})
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    written = bytearray()
    try:
        while piece := os.read(master, 1 << 16):
            written += piece
    except OSError:  # Linux, once nobody has the other end
        pass
    finally:
        os.close(master)
    return process.wait(), written.decode()


def rendered(text: str) -> list[str]:
    """The lines that are left on a terminal that is wide enough; the text of one that is not shows as a longer line."""
    lines: list[str] = [""]
    row = column = 0
    for piece in _PIECE.findall(text):
        if piece == "\x1b[A":
            row = max(0, row - 1)
        elif piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            old = lines[row].ljust(column)
            lines[row] = old[:column] + piece + old[column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in lines]
