"""Importance matrices: the importance of each column of a weight, as measured by llama-imatrix.

Both formats are supported: GGUF, and the older one without a magic number (`.dat`). A file is not trusted: counts and
lengths are checked against its size, and memory grows only with the number of names. The numbers stay in the file until
they are needed for a tensor.
Source of the formats: common/imatrix-loader.cpp and tools/quantize/quantize.cpp of llama.cpp as in llama-cpp-python
0.3.36. Entries have llama.cpp's names of the weights; experts are stacked.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from streamconv.budget import Budget, unbounded
from streamconv.errors import RunWarning, SourceError
from streamconv.files.local import Cursor, open_blob
from streamconv.files.store import Blob, Place
from streamconv.ggml.mix_rules import EMBEDDINGS
from streamconv.gguf.entries import Span, refuse
from streamconv.gguf.format import MAGIC, MAX_NAME_NBYTES, KeyValue
from streamconv.gguf.reader import GGUFFile
from streamconv.lazy.dtype import F32
from streamconv.lazy.leaves import Leaf
from streamconv.lazy.node import Bytes, Step, TensorSpec, Workspace

Floats = NDArray[np.float32]

MAX_ENTRIES: Final = 1 << 17
# Memory of the Python objects for one entry, besides its name. Measured: 235, and 150 for a node.
ENTRY_NBYTES: Final = 400
TERM: Final = "importance matrix"  # the name of its reservation in the budget
MAX_DATASET_NBYTES: Final = 1 << 16
_WINDOW: Final = 1 << 14  # numbers that are checked at a time
_KEY_NBYTES: Final = 127  # llama-quantize cuts texts off after this many bytes

# The older format: length and text of a name, number of calls, number of values, at least one value.
_LEAST_ENTRY_NBYTES: Final = 4 + 1 + 4 + 4 + 4
_SUMS, _COUNTS = ".in_sum2", ".counts"
_REQUIRED: Final = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")


@dataclass(frozen=True, slots=True)
class _Entry:
    """The sums of one weight.

    Attributes:
        offset: Of the first sum in the file.
        n_values: The number of sums: columns, times the number of matrices in a stack.
        n_counts: The number of counts by which sums are divided, each for an equal part of them.
        count: The count, if there is one; if it is 0 or less, sums are not divided.
        counts_offset: Of the counts in the file, if there are several; each is a float32.
    """

    offset: int
    n_values: int
    n_counts: int = 1
    count: float = 0
    counts_offset: int = 0


class ImportanceMatrix:
    """An open importance matrix: a context manager that closes it. Any number of threads can read it.

    Attributes:
        path: The file.
        datasets: The name of the first dataset on which it was measured, if the file has it.
        n_chunks: The number of chunks of text; 0 if the file does not have it.
    """

    def __init__(
        self, blob: Blob, entries: Mapping[str, _Entry], datasets: tuple[str, ...], n_chunks: int, fill_unseen: bool
    ) -> None:
        self.blob = blob
        self._entries = entries
        self._fill_unseen = fill_unseen  # all importances are 1 in matrices with a count of 0
        self.path = blob.path
        self.datasets = datasets
        self.n_chunks = n_chunks

    @classmethod
    def open(cls, place: Place, budget: Budget | None = None) -> Self:
        """Open a file, and check every number in it.

        Args:
            place: The file.
            budget: Reserves the memory for the entries; by default nothing is limited.

        Raises:
            BudgetError: The entries do not fit in memory.
            SourceError: The file cannot be read, is damaged, or has a number that is negative or not finite.
        """
        blob, budget = open_blob(place), budget or unbounded()
        try:
            head = bytearray(min(len(MAGIC), blob.nbytes))
            blob.read_into(0, head)
            if bytes(head) != MAGIC:
                matrix = cls(blob, *_legacy(blob, budget))
            else:
                blob.close()
                file = GGUFFile.open(place, budget, TERM)
                blob = file.file
                budget.reserve(TERM, sum(map(_entry_nbytes, file.tensors)) // 2, file=place)  # two for each entry
                matrix = cls(blob, *_gguf(file))
            matrix._check_numbers()
        except BaseException:
            blob.close()
            raise
        return matrix

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.blob.close()

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened.

        Raises:
            SourceError: It has.
        """
        self.blob.check_unchanged()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> list[RunWarning]:
        """Check the file against a model's tensors.

        Args:
            shapes: The row-major shapes of all tensors of the model, by llama.cpp's names.

        Returns:
            Warnings about entries without a tensor, and about an embedding's entry of another size, which is ignored as
            in llama-quantize.

        Raises:
            SourceError: The number of importances does not match a tensor's columns, or no entry names a tensor of the
                model.
        """
        found: list[RunWarning] = []
        for name, shape in shapes.items():
            if name not in self._entries or self._fits(name, shape):
                continue
            n_values, wanted = self._entries[name].n_values, _n_weights(shape)
            message = f"{self.path.name} has {n_values:,} importances for this tensor, which needs {wanted:,}"
            if name not in EMBEDDINGS:
                hint = "the importance matrix belongs to another model"
                raise SourceError(message, file=self.path, tensor=name, hint=hint, code="imatrix-size")
            found.append(RunWarning("imatrix-embedding", f"{message}: they are not used", name))
        unknown = [name for name in self._entries if name not in shapes]
        if len(unknown) == len(self._entries):
            message = f"none of its {len(unknown):,} entries names a tensor of the model; the first is {unknown[0]!r}"
            raise SourceError(message, file=self.path, code="imatrix-no-match")
        if unknown:
            what = f"{len(unknown):,} of {len(self._entries):,} entries"
            message = f"{self.path.name}: {what} do not name a tensor of the model, such as {unknown[0]!r}"
            found.append(RunWarning("imatrix-unused", message))
        return found

    def weights(self, name: str, shape: tuple[int, ...], matrix: int = 0) -> Floats | None:
        """The importance of each column of one matrix of a tensor.

        Args:
            name: llama.cpp's name of the tensor.
            shape: Its row-major shape.
            matrix: The number of the matrix in a stack, such as an expert's.

        Returns:
            float32 [columns], none negative; None if the file has no matching entry.
        """
        entry = self._entries.get(name)
        if entry is None or not self._fits(name, shape):
            return None
        numbers = np.empty(shape[-1], dtype="<f4")
        self.fill(name, matrix, numbers)
        return numbers

    def fill(self, name: str, matrix: int, numbers: Floats) -> None:
        """Fill `numbers` (float32 [columns]) with the importances for one matrix of a tensor that has an entry."""
        entry = self._entries[name]
        self.blob.read_into(entry.offset + numbers.nbytes * matrix, numbers.view(np.uint8))
        count = entry.count if entry.n_counts == 1 else self._count(entry, matrix)
        if count > 0:
            numbers /= np.float32(count)
        elif self._fill_unseen:
            numbers.fill(1)

    def columns(self, name: str, shape: tuple[int, ...]) -> ColumnWeights | None:
        """The importances of a tensor's columns as a node; None if the file has no matching entry."""
        return ColumnWeights(self, name, shape) if name in self._entries and self._fits(name, shape) else None

    @property
    def fingerprint(self) -> str:
        """Identifies the numbers without reading them all again."""
        return f"{self.blob.identity.lasting} {len(self._entries)}"

    def metadata(self) -> list[KeyValue]:
        """The keys that llama-quantize writes about it, with the file's name instead of its path."""
        texts = [("file", self.path.name), *(("dataset", dataset) for dataset in self.datasets[:1])]
        found = [KeyValue.string(f"quantize.imatrix.{key}", _cut(text)) for key, text in texts]
        found.append(KeyValue.u32("quantize.imatrix.entries_count", len(self._entries)))
        if self.n_chunks > 0:
            found.append(KeyValue.u32("quantize.imatrix.chunks_count", self.n_chunks))
        return found

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        entry = self._entries[name]
        return entry.n_values == _n_weights(shape) and entry.n_counts in (1, entry.n_values // shape[-1])

    def _count(self, entry: _Entry, matrix: int) -> float:
        number = np.empty(1, dtype="<f4")
        self.blob.read_into(entry.counts_offset + 4 * matrix, number.view(np.uint8))
        return _rounded(float(number[0]))

    def _check_numbers(self) -> None:
        window = np.empty(_WINDOW, dtype="<f4")
        for name, entry in self._entries.items():
            self._check_run(name, entry.offset, entry.n_values, window)
            if entry.n_counts > 1:
                self._check_run(name, entry.counts_offset, entry.n_counts, window)

    def _check_run(self, name: str, offset: int, n_values: int, window: Floats) -> None:
        for start in range(0, n_values, _WINDOW):
            part = window[: min(_WINDOW, n_values - start)]
            self.blob.read_into(offset + 4 * start, part.view(np.uint8))
            least, largest = float(part.min()), float(part.max())
            if not (least >= 0 and math.isfinite(largest)):
                wrong = part[~(np.isfinite(part) & (part >= 0))][0]
                message = f"has an importance or a count of {wrong}; each must be a finite number of at least 0"
                raise SourceError(message, file=self.path, tensor=name, code="imatrix-value")


class ColumnWeights(Leaf):
    """The importances of one tensor's columns, F32 [matrices, columns], read from the file on request."""

    def __init__(self, matrix: ImportanceMatrix, name: str, shape: tuple[int, ...]) -> None:
        self._matrix, self._name = matrix, name
        self.spec = TensorSpec((shape[-3] if len(shape) > 2 else 1, shape[-1]), F32)

    def apply(self, rows: range, step: Step, slabs: Sequence[Bytes], out: Bytes, work: Workspace) -> None:
        work.files.add(self._matrix.blob)
        for row, part in zip(rows, out.reshape(len(rows), -1), strict=True):
            self._matrix.fill(self._name, row, part.view("<f4"))

    def describe(self) -> str:
        return f"importance of {self._name!r}"


def _n_weights(shape: tuple[int, ...]) -> int:
    """The number of importances for a tensor: its columns, times the matrices in a stack."""
    return shape[-1] * (shape[-3] if len(shape) > 2 else 1) if shape else 0


def _cut(text: str) -> str:
    return text.encode("utf-8", "replace")[:_KEY_NBYTES].decode("utf-8", "ignore")


def _entry_nbytes(name: str) -> int:
    return ENTRY_NBYTES + sys.getsizeof(name)


def _gguf(file: GGUFFile) -> tuple[dict[str, _Entry], tuple[str, ...], int, bool]:
    """(entries, datasets, number of chunks, True) of a GGUF file: importances are 1 if the count is 0."""
    refuse(file.problems)
    missing = [key for key in _REQUIRED if key not in file.keys]
    if missing:
        kind = file.keys.get("general.architecture") or file.keys.get("general.type")
        hint = f"this is a {kind.value} file" if kind and kind.value != "imatrix" else "make it with llama-imatrix"
        message = f"is not an importance matrix: it has no key {missing[0]}"
        raise SourceError(message, file=file.path, hint=hint, code="imatrix-keys")
    entries = dict(_gguf_entries(file))
    if not entries:
        raise SourceError("has no entries", file=file.path, code="imatrix-empty")
    datasets = file.keys["imatrix.datasets"].value
    if not isinstance(datasets, Span) or datasets.element != GGUFValueType.STRING:
        raise SourceError("imatrix.datasets is not an array of strings", file=file.path, code="imatrix-keys")
    first = tuple(str(text) for text in datasets.first(1, MAX_DATASET_NBYTES))
    n_chunks = file.keys["imatrix.chunk_count"]
    if n_chunks.type != GGUFValueType.UINT32 or not isinstance(n_chunks.value, int):
        raise SourceError("imatrix.chunk_count is not a uint32", file=file.path, code="imatrix-keys")
    return entries, first, n_chunks.value, True


def _gguf_entries(file: GGUFFile) -> Iterator[tuple[str, _Entry]]:
    for name, sums in file.tensors.items():
        if name.endswith(_COUNTS) and name.removesuffix(_COUNTS) + _SUMS not in file.tensors:
            raise _unpaired(file, name.removesuffix(_COUNTS))
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        counts = file.tensors.get(weight + _COUNTS)
        if counts is None:
            raise _unpaired(file, weight)
        if sums.type != GGMLQuantizationType.F32 or counts.type != GGMLQuantizationType.F32:
            raise SourceError("sums and counts must be F32", file=file.path, tensor=weight, code="imatrix-type")
        n_values, n_counts = sums.n_elements, counts.n_elements
        if not 0 < n_counts <= n_values or n_values % n_counts:
            message = f"{n_values:,} sums are not a multiple of {n_counts:,} counts"
            raise SourceError(message, file=file.path, tensor=weight, code="imatrix-malformed")
        single = np.zeros(1, dtype="<f4")
        if n_counts == 1:
            file.read_into(counts, 0, single.view(np.uint8))
        count = float(single[0])
        if not (count >= 0 and math.isfinite(count)):
            message = f"has a count of {count}; it must be a finite number of at least 0"
            raise SourceError(message, file=file.path, tensor=weight, code="imatrix-value")
        yield weight, _Entry(sums.offset, n_values, n_counts, _rounded(count), counts.offset)


def _unpaired(file: GGUFFile, weight: str) -> SourceError:
    return SourceError("has only one of sums and counts", file=file.path, tensor=weight, code="imatrix-malformed")


def _rounded(count: float) -> float:
    """Rounded like C's lround, half away from zero; counts are not negative."""
    return float(math.floor(count + 0.5))


def _legacy(blob: Blob, budget: Budget) -> tuple[dict[str, _Entry], tuple[str, ...], int, bool]:
    """(entries, datasets, number of chunks, False) of the older format: sums are not divided if the count is 0."""
    cursor = Cursor(blob, 0, blob.nbytes, "")
    entries: dict[str, _Entry] = {}
    n_entries = _i32(cursor)
    if not 0 < n_entries <= MAX_ENTRIES or n_entries * _LEAST_ENTRY_NBYTES > cursor.n_left:
        message = (
            f"is not an importance matrix: it is not a GGUF file, and in the older format it has {n_entries:,} entries"
        )
        raise SourceError(message, file=blob.path, hint="make it with llama-imatrix", code="imatrix-malformed")
    budget.reserve(TERM, n_entries * _entry_nbytes("x" * MAX_NAME_NBYTES), file=blob.path)
    for i in range(n_entries):
        cursor.where, cursor.tensor = f"entry {i + 1} of {n_entries}", None
        name = _legacy_name(cursor)
        cursor.tensor = name
        if name in entries:
            cursor.fail("occurs twice", code="imatrix-malformed")
        n_calls, n_values = _i32(cursor), _i32(cursor)
        if n_values < 1:
            cursor.fail(f"has {n_values:,} values", code="imatrix-malformed")
        entries[name] = _Entry(cursor.position, n_values, count=float(n_calls))
        cursor.skip(4 * n_values)
    cursor.where, cursor.tensor = "the end, after all entries", None
    return entries, *_legacy_end(cursor), False


def _legacy_name(cursor: Cursor) -> str:
    nbytes = _i32(cursor)
    if not 0 < nbytes <= MAX_NAME_NBYTES:
        cursor.fail(f"{cursor.where} has a name of {nbytes:,} bytes", code="imatrix-malformed")
    raw = cursor.raw(nbytes)
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        cursor.fail(f"{cursor.where} has a name that is not UTF-8", code="imatrix-malformed")
    if "\0" in name:
        cursor.fail(f"{cursor.where} has a NUL in its name", code="imatrix-malformed")
    return name


def _legacy_end(cursor: Cursor) -> tuple[tuple[str, ...], int]:
    """The dataset and the number of chunks, which the oldest files do not have."""
    if not cursor.n_left:
        return (), 0
    n_chunks = _i32(cursor)
    if not cursor.n_left:
        return (), n_chunks
    nbytes = _i32(cursor)
    if nbytes != cursor.n_left:
        message = f"{cursor.n_left:,} bytes follow the entries where a text of {nbytes:,} should be"
        cursor.fail(message, "it is damaged, or was written by another program", code="imatrix-malformed")
    text = cursor.raw(min(nbytes, MAX_DATASET_NBYTES)).partition(b"\0")[0].decode("utf-8", "replace")
    return ((text,) if text else ()), n_chunks


def _i32(cursor: Cursor) -> int:
    value = cursor.u32()
    return value - (1 << 32) if value >= 1 << 31 else value
