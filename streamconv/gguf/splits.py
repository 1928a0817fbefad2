"""The GGUF files of a model: a single file, or the parts of a split set in order.

The same is checked as in llama.cpp's loader: part 1 states how many parts and tensors there are, each part states its
number, and no tensor is in two parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from streamconv.budget import Budget, unbounded
from streamconv.errors import SourceError
from streamconv.files.store import Place
from streamconv.gguf.entries import FileProblem, GGUFKey, StoredTensor
from streamconv.gguf.header import HEADERS, MAX_KEPT_NBYTES
from streamconv.gguf.reader import GGUFFile

LISTED_NBYTES = 200  # memory for a tensor in the list of all parts' tensors; measured: 168
_PART_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GGUFSet:
    """The open files of a model: a context manager that closes them.

    Attributes:
        files: In the order of their parts, without those that are missing.
        tensors: The tensors of all parts by name, each with its file.
        problems: The defects of all files and of the set.
    """

    files: tuple[GGUFFile, ...]
    tensors: dict[str, tuple[GGUFFile, StoredTensor]]
    problems: tuple[FileProblem, ...]

    @classmethod
    def open(cls, path: str | Place, budget: Budget | None = None) -> Self:
        """Open a file and, if it is the first part of a split set, the other parts in the same folder.

        A part that is missing, or does not belong to the set, is listed as a problem.

        Args:
            path: A single file, or the first part.
            budget: Reserves the memory for keys and tensors; by default nothing is limited.

        Raises:
            SourceError: A file cannot be opened or parsed.
            BudgetError: The keys and tensors do not fit in memory.
        """
        budget = budget or unbounded()
        files = [GGUFFile.open(path, budget)]
        try:
            problems = list(_open_others(files, budget))
            budget.reserve(HEADERS, LISTED_NBYTES * sum(len(file.tensors) for file in files), file=files[0].path)
            tensors = dict[str, tuple[GGUFFile, StoredTensor]]()
            for file in files:
                problems += file.problems
                for tensor in file.tensors.values():
                    if tensors.setdefault(tensor.name, (file, tensor))[0] is not file:
                        other = tensors[tensor.name][0].path.name
                        problems.append(
                            FileProblem("duplicate-tensor", f"is in {other} as well", file.path, tensor.name)
                        )
            problems += _check_total(files[0], len(tensors), len(files))
        except BaseException:
            _close(files)
            raise
        return cls(tuple(files), tensors, tuple(problems))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        _close(self.files)

    @property
    def keys(self) -> dict[str, GGUFKey]:
        """The keys of the first part, which has all keys of the model."""
        return self.files[0].keys


def _close(files: list[GGUFFile] | tuple[GGUFFile, ...]) -> None:
    for file in files:
        file.file.close()


def part_name(prefix: str, number: int, count: int) -> str:
    """llama.cpp's name of part `number` (from 1), as `prefix-00001-of-00003.gguf`."""
    return f"{prefix}-{number:05d}-of-{count:05d}.gguf"


def _integer(file: GGUFFile, key: str) -> int | None:
    value = file.keys[key].value if key in file.keys else None
    return value if isinstance(value, int) else None


def _exists(path: Place) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _open_others(files: list[GGUFFile], budget: Budget) -> Iterator[FileProblem]:
    """Open the other parts of a set, append them to `files`, and yield the problems found."""
    first = files[0]
    count, number = _integer(first, "split.count"), _integer(first, "split.no")
    if count is None or count < 2:
        return
    match = _PART_NAME.fullmatch(first.path.name)
    if number is None or match is None or (int(match["number"]), int(match["count"])) != (number + 1, count):
        what = (
            f"it is part {number + 1} of {count}" if number is not None else f"it has split.count {count}, no split.no"
        )
        yield FileProblem(
            "split", f"{what}, but its name does not match, so the other parts cannot be found", first.path
        )
        return
    if number > 0:
        start = part_name(match["prefix"], 1, count)
        yield FileProblem("split", f"it is part {number + 1} of {count}: loaders open a set by {start}", first.path)
        return
    missing = []
    for i in range(1, count):
        path = first.path.parent / (part_name(match["prefix"], i + 1, count))
        if _exists(path):
            files.append(part := GGUFFile.open(path, budget))
            yield from _check_part(part, i, count)
            if sum(file.kept_nbytes for file in files) > MAX_KEPT_NBYTES:
                raise SourceError(
                    f"the parts up to {path.name} have too many names to keep in memory",
                    file=first.path,
                    code="memory-names",
                )
        else:
            missing.append(i + 1)
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        yield FileProblem("split-missing", f"missing or unreadable parts: {shown} of {count}", first.path)


def _check_part(part: GGUFFile, number: int, count: int) -> Iterator[FileProblem]:
    for key, expected in (("split.no", number), ("split.count", count)):
        if (found := _integer(part, key)) != expected:
            yield FileProblem("split", f"its {key} is {found}, expected {expected} for this part of the set", part.path)


def _check_total(first: GGUFFile, n_tensors: int, n_files: int) -> Iterator[FileProblem]:
    expected = _integer(first, "split.tensors.count")
    is_whole = n_files > 1 and n_files == _integer(first, "split.count")
    if is_whole and expected != n_tensors:
        yield FileProblem("split", f"split.tensors.count is {expected}, the parts have {n_tensors} tensors", first.path)
