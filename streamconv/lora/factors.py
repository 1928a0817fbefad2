"""Read factors while a run is planned, to fold a scale into them and to check that they are not zero."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from streamconv.lazy.arithmetic import widened
from streamconv.lazy.node import LazyTensor, Workspace, peak_nbytes, read
from streamconv.lazy.scratch import Scratch

READ_NBYTES = 1 << 20


def slabs(tensor: LazyTensor) -> Iterator[NDArray[np.float32]]:
    """Yield all rows of a tensor in order as float32 slabs. Each slab is valid until the next one."""
    wide = widened(tensor)
    n_rows = max(1, READ_NBYTES // wide.spec.row_nbytes)
    work = Workspace(Scratch(peak_nbytes(wide, n_rows)))
    out = np.empty(n_rows * wide.spec.row_nbytes, dtype=np.uint8)
    for start in range(0, wide.spec.n_rows, n_rows):
        rows = range(start, min(start + n_rows, wide.spec.n_rows))
        part = out[: len(rows) * wide.spec.row_nbytes]
        read(wide, rows, part, work)
        yield part.view("<f4").reshape(len(rows), wide.spec.n_columns)


def is_zero(tensor: LazyTensor) -> bool:
    """Return whether every element is 0, reading only up to the first slab with another value."""
    return not any(values.any() for values in slabs(tensor))
