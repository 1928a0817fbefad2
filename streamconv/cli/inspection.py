"""Format an Inspection for people: keys, types, tensors, problems.

No line is wider than requested, and only visible characters of an untrusted file reach a terminal.
"""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from shutil import get_terminal_size
from typing import Any, Final

from streamconv.api.inspect_file import Inspection, Total
from streamconv.budget import in_words
from streamconv.errors import printable
from streamconv.files.hub import is_repo_id
from streamconv.lora.config import stated_base

WIDTH: Final = 80
PIPE_WIDTH: Final = 120
MIN_WIDTH: Final = 20
MIN_VALUE_WIDTH: Final = 24
MAX_NAME_WIDTH: Final = 44  # of a key; longer ones shift their row's value
_UNITS: Final = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def terminal_width() -> int:
    """Return the width of the terminal if stdout is one, else at most PIPE_WIDTH. COLUMNS sets it if defined."""
    width = max(get_terminal_size((PIPE_WIDTH, 24)).columns, MIN_WIDTH)
    return width if sys.stdout.isatty() else min(width, PIPE_WIDTH)


def render(found: Inspection, *, width: int = WIDTH, tensors: bool = False, head: int | None = None) -> Iterator[str]:
    """Format an inspection as lines.

    Args:
        found: the inspection.
        width: maximum width of a line in columns. A value that does not fit is cut, and its length is given.
        tensors: whether to add a line for each tensor.
        head: maximum number of keys and of tensors.

    Returns:
        Lines without newlines.
    """
    for line in _lines(found, width, tensors, head):
        yield _cut(line, width)


def _lines(found: Inspection, width: int, tensors: bool, head: int | None) -> Iterator[str]:
    yield printable(str(found.path))
    arch = f", architecture {printable(found.architecture)}" if found.architecture else ""
    yield f"{found.kind}: {found.form}{arch}"
    nbytes = sum(row.nbytes or 0 for row in found.tensors)
    yield f"{_tensors_of(len(found.tensors))}, {_short(found.n_parameters)} parameters, {in_words(nbytes)}"
    yield from _section("metadata" if found.kind == "gguf" else "config", list(_keys(found, width)), head)
    yield from _section("types", list(_totals(found.totals)))
    if tensors:
        yield from _section("tensors", list(_tensors(found, width)), head)
    if found.conversion is not None:
        made = found.conversion
        yield from _section(f"converts to {made.architecture}, outtype {made.outtype}", list(_totals(made.totals)))
    elif found.kind == "adapter" and not found.problems:
        words = ("lora", str(found.path), "--base", _base_of(found), "--dry-run")
        yield from ("", "the result of a conversion depends on its base:")
        yield from _wrapped(f"streamconv {shlex.join(words)}", width)
    if found.warnings:
        yield from ("", f"warnings ({len(found.warnings)})")
    for warning in found.warnings:
        yield from _wrapped(f"{_where(warning.tensor)}{warning.message} [{warning.code}]", width)
    if found.problems:
        yield from ("", f"problems ({len(found.problems)})")
    for problem in found.problems:
        file = f"{problem.file.name}: " if str(problem.file) != str(found.path) else ""
        yield from _wrapped(f"{file}{_where(problem.tensor)}{problem.message} [{problem.code}]", width)


def _section(title: str, rows: list[str], head: int | None = None) -> Iterator[str]:
    if not rows:
        return
    yield from ("", f"{title} ({len(rows):,})")
    yield from rows[:head]
    if head is not None and len(rows) > head:
        yield f"  ... {len(rows) - head:,} more"


def _keys(found: Inspection, width: int) -> Iterator[str]:
    names = [printable(name) for name in found.metadata]
    name_width = min(max(map(len, names), default=0), MAX_NAME_WIDTH)
    type_width = max(map(len, found.metadata_types.values()), default=0)
    for name, (key, value) in zip(names, found.metadata.items(), strict=True):
        kind = found.metadata_types[key]
        start = f"  {name:<{name_width}}  {kind:<{type_width}}  "
        yield start + _value(value, kind, max(width - _columns(start), MIN_VALUE_WIDTH))


def _value(value: Any, kind: str, width: int) -> str:
    """The value in at most `width` columns: whole, or its beginning and its length."""
    if isinstance(value, str):
        return _text(value, f"{len(value):,} characters", width)
    if isinstance(value, Mapping) and value.keys() == {"length", "first"}:
        if kind == "string":
            return _text(f"{value['first'][0]}...", f"{value['length']:,} bytes", width, is_whole=False)
        return _items([_json(item) for item in value["first"]], value["length"], "[]", width)
    whole = _json(value)
    if _columns(whole) <= width or not isinstance(value, list | Mapping):
        return _cut(whole, width)
    if isinstance(value, Mapping):
        return _items([f"{_json(name)}: {_json(item)}" for name, item in value.items()], len(value), "{}", width)
    return _items([_json(item) for item in value], len(value), "[]", width)


def _text(text: str, length: str, width: int, *, is_whole: bool = True) -> str:
    shown = printable(text)
    if is_whole and _columns(shown) <= width:
        return shown
    end = f" ({length})"
    return _cut(shown, width - len(end)) + end


def _items(items: Sequence[str], length: int, brackets: str, width: int) -> str:
    """As many of the first items as fit between the brackets, and how many there are."""
    start, end = f"{length:,}: {brackets[0]}", f"...{brackets[1]}"
    room = width - len(start) - len(end)
    shown = ""
    for item in items:
        room -= _columns(item) + 2
        if room < 0:
            break
        shown += f"{item}, "
    return start + shown + end


def _json(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False))


def _totals(totals: Mapping[str, Total]) -> Iterator[str]:
    for name, total in totals.items():
        count, parameters = _tensors_of(total.n_tensors), f"{_short(total.n_parameters)} parameters"
        yield f"  {name:<8}{count:>16}{parameters:>20}{in_words(total.nbytes):>17}"


def _tensors(found: Inspection, width: int) -> Iterator[str]:
    shapes = ["x".join(map(str, row.shape)) or "scalar" for row in found.tensors]
    shape_width = max(map(len, shapes), default=0)
    type_width = max((len(row.type) for row in found.tensors), default=0)
    sizes = ["?" if row.nbytes is None else in_words(row.nbytes) for row in found.tensors]
    size_width = max(map(len, sizes), default=0)
    for row, shape, size in zip(found.tensors, shapes, sizes, strict=True):
        start = f"  {row.type:<{type_width}}  {size:>{size_width}}  {shape:>{shape_width}}  "
        name = printable(row.name)
        yield start + _cut(name, max(width - len(start), 16), tail=True)


def _where(tensor: str | None) -> str:
    return f"{tensor}: " if tensor else ""


def _wrapped(text: str, width: int) -> Iterator[str]:
    wrapper = textwrap.TextWrapper(width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    yield from wrapper.wrap(printable(text))


def _short(n: int) -> str:
    """1,234,567 as "1.2 M"."""
    for unit, letter in _UNITS:
        if n >= unit:
            return f"{n / unit:,.1f} {letter}"
    return str(n)


def _tensors_of(n: int) -> str:
    return "1 tensor" if n == 1 else f"{n:,} tensors"


def _columns(text: str) -> int:
    """How wide a terminal shows `text`, at most."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _cut(text: str, width: int, *, tail: bool = False) -> str:
    """`text` in at most `width` columns; what is left out is at the end, or in the middle (`tail`)."""
    if len(text) <= width // 2 or _columns(text) <= width:
        return text
    n_tail = (width - 3) // 2 if tail else 0
    end = text[len(text) - n_tail :] if n_tail else ""
    while _columns(end) > n_tail:
        end = end[1:]
    start = text[:width]
    while _columns(start) > width - 3 - _columns(end):
        start = start[:-1]
    return f"{start}...{end}"


def _base_of(found: Inspection) -> str:
    """The base that an adapter names, if it is a repo id; a path would be one on the machine where it was trained."""
    name = stated_base(found.metadata)
    return name if name is not None and is_repo_id(name) else "BASE"
