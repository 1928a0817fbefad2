"""Images of a few colours for vision models, as pixels and as PNG files, which zlib makes without another library."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

BEFORE, AFTER = "A", "."  # the text around an image

# Heights and widths that the runtime neither resizes nor tiles: a square of 16 by 16 patches, and one that is not.
SIZES = ((256, 256), (320, 256))

_COLOURS = np.array([(250, 20, 40), (10, 200, 90), (30, 60, 240), (240, 230, 10), (120, 120, 130)], dtype=np.uint8)


def pixels(height: int, width: int) -> NDArray[np.uint8]:
    """[height, width, 3]: fields of several colours, none of them as wide as it is high."""
    rows, columns = np.arange(height)[:, None] // 48, np.arange(width)[None, :] // 80
    return _COLOURS[(3 * rows + columns) % len(_COLOURS)]


def png(image: NDArray[np.uint8]) -> bytes:
    """The PNG file of an image [height, width, 3]."""
    height, width, _ = image.shape
    lines = b"".join(b"\0" + row.tobytes() for row in image)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
