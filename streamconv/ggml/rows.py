"""The encoded rows of a GGUF tensor: the last node of every chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gguf.constants import GGMLQuantizationType

from streamconv.ggml import encode as codecs
from streamconv.ggml.element_types import TYPES
from streamconv.lazy.dtype import F32, FLOATS
from streamconv.lazy.node import Bytes, LazyTensor, Piece, Step, TensorSpec, Workspace


class Encode(LazyTensor):
    """The rows of one GGUF tensor, encoded in its type.

    Non-finite values are counted. `apply` raises EncodeError for values that the type cannot hold.

    Args:
        parent: The rows as numbers, in a dtype that has an encoder.
        target: The tensor's name in the file, for the tally.
        type_: The tensor's type. Its rows are stored as `TYPES[type_].dtype`.
        weights: The importance of each column, F32 [n, columns], for types whose encoder weighs errors: one row for all
            rows of the tensor (n = 1), or one for each of n equal parts of them (experts).
    """

    def __init__(
        self, parent: LazyTensor, target: str, type_: GGMLQuantizationType, weights: LazyTensor | None = None
    ) -> None:
        self.spec = TensorSpec(parent.spec.shape, TYPES[type_].dtype)
        self.type, self.target = type_, target
        self.parents = (parent,) if weights is None else (parent, weights)
        self._part, rest = divmod(parent.spec.n_rows, 1 if weights is None else weights.spec.n_rows)
        if weights is not None and (
            rest or weights.spec != TensorSpec((*weights.spec.shape[:-1], parent.spec.n_columns), F32)
        ):
            raise ValueError(f"{weights.spec.shape} weights do not belong to {parent.spec.shape}")

    @property
    def in_place(self) -> bool:
        return self.parents[0].spec.dtype == self.spec.dtype

    def borrows(self, work: Workspace) -> bool:
        return work.kernel.borrows and self.parents[0].spec.dtype in FLOATS

    def lendable(self, rows: range, work: Workspace) -> int:
        return self.parents[0].lendable(rows, work) if self.borrows(work) else 0

    def needs(self, rows: range) -> Iterator[Step]:
        parent, *weights = self.parents
        if not weights:
            yield (Piece(parent, rows),)
            return
        for part in range(rows.start // self._part, -(-rows.stop // self._part)):
            base = part * self._part
            some = range(max(rows.start, base), min(rows.stop, base + self._part))
            yield (Piece(parent, some), Piece(weights[0], range(part, part + 1)))

    def largest(self, n_rows: int) -> Iterator[Step]:
        parent, *weights = self.parents
        yield (Piece(parent, range(min(n_rows, self._part))), *(Piece(one, range(1)) for one in weights))

    def scratch_nbytes(self, n_rows: int, kernel: codecs.Kernel = codecs.REFERENCE) -> int:
        source, n_columns = self.parents[0].spec.dtype, self.spec.n_columns
        return codecs.encode_scratch_nbytes(source, self.spec.dtype, min(n_rows, self._part), n_columns, kernel)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        slab, *weights = slabs
        source, width, some = self.parents[0].spec.dtype, self.spec.row_nbytes, step[0].rows
        if not self.in_place:
            first = (some.start - rows.start) * width
            out = out[first : first + len(some) * width]
        with work.stopwatch.time("encode"):
            stats = codecs.encode(
                source,
                self.spec.dtype,
                slab,
                out,
                work.scratch,
                self.spec.n_columns,
                work.kernel,
                weights[0].view("<f4") if weights else None,
            )
        if work.counting and (stats.n_nan or stats.n_inf):
            work.tally[self.target] = work.tally.get(self.target, codecs.Stats(0, 0)) + stats

    def describe(self) -> str:
        return f"{self.target} as {self.type.name}"
