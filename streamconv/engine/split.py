"""One model as several files: where it is split, and the name and `split.*` keys of each part.

The rules are llama.cpp's (GGUFWriter in gguf-py): a part is full when the next tensor would exceed either limit; part 1
has all keys, the others only `split.*`; each part states the total number of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGUFValueType

from streamconv.engine.layout import Layout, PlacedTensor, make_layout
from streamconv.errors import UsageError
from streamconv.ggml.element_types import tensor_nbytes
from streamconv.gguf.format import KeyValue
from streamconv.gguf.splits import part_name
from streamconv.options import SplitOptions

SPLIT_COUNT = "split.count"
MAX_COUNT = 65_535  # split.count is a uint16


@dataclass(frozen=True, slots=True)
class Part:
    """One file of an output. `number` starts at 1."""

    number: int
    path: Path
    keys: Sequence[KeyValue]
    layout: Layout

    @property
    def is_of_split(self) -> bool:
        return any(entry.key == SPLIT_COUNT for entry in self.keys)


def make_parts(
    dst: Path, keys: Sequence[KeyValue], tensors: Sequence[PlacedTensor], options: SplitOptions
) -> tuple[Part, ...]:
    """The files of one output: only `dst`, or parts named after it.

    Args:
        dst: The path of the output.
        keys: Its metadata.
        tensors: Its tensors, in the order in which they are written.
        options: The limits on parts; with `only_part`, only that part is returned, and no other layout is made.

    Raises:
        UsageError: There would be too many parts, or there is no part `only_part`.
    """
    groups = list(_groups(tensors, options)) if options.is_split else [tensors]
    count = len(groups)
    if count > MAX_COUNT:
        raise UsageError(f"{count} parts are more than a split can have", hint="allow larger parts", code="split-count")
    if options.only_part is not None and options.only_part > count:
        raise UsageError(f"there is no part {options.only_part}: the output has {count}", code="part-unknown")
    if count == 1:
        return (_part(1, dst, keys, groups[0]),)
    numbers = range(1, count + 1) if options.only_part is None else [options.only_part]
    stem = dst.name.removesuffix(".gguf")
    return tuple(
        _part(
            number,
            dst.with_name(part_name(stem, number, count)),
            [*(keys if number == 1 else ()), *_split_keys(number, count, len(tensors))],
            groups[number - 1],
        )
        for number in numbers
    )


def _part(number: int, path: Path, keys: Sequence[KeyValue], tensors: Sequence[PlacedTensor]) -> Part:
    return Part(number, path, keys, make_layout(keys, tensors))


def _groups(tensors: Sequence[PlacedTensor], options: SplitOptions) -> Iterator[list[PlacedTensor]]:
    group: list[PlacedTensor] = []
    group_nbytes = 0
    for tensor in tensors:
        nbytes = tensor_nbytes(tensor.rows.spec.shape, tensor.type)
        full = options.max_tensors is not None and len(group) >= options.max_tensors
        large = options.max_nbytes is not None and group_nbytes + nbytes > options.max_nbytes
        if group and (full or large):
            yield group
            group, group_nbytes = [], 0
        group.append(tensor)
        group_nbytes += nbytes
    yield group


def _split_keys(number: int, count: int, n_tensors: int) -> tuple[KeyValue, ...]:
    return (
        KeyValue("split.no", GGUFValueType.UINT16, number - 1),
        KeyValue(SPLIT_COUNT, GGUFValueType.UINT16, count),
        KeyValue.i32("split.tensors.count", n_tensors),
    )
