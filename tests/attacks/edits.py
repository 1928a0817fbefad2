"""How a valid checkpoint or adapter becomes a hostile one: edits of one file of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Edit = Callable[[Path], object]

WEIGHTS = "model.safetensors"


def config(file: str = "config.json", /, **values: Any) -> Edit:
    """Keys of a JSON object set to values; those set to ABSENT removed."""

    def edit(directory: Path) -> None:
        path = directory / file
        settings = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ABSENT}))

    return edit


ABSENT = object()


def text(file: str, old: str, new: str) -> Edit:
    """A piece of a file's text replaced."""

    def edit(directory: Path) -> None:
        path = directory / file
        content = path.read_text()
        assert old in content, f"{file} has no {old!r}"
        path.write_text(content.replace(old, new, 1))

    return edit


def write(file: str, content: bytes | str) -> Edit:
    def edit(directory: Path) -> None:
        (directory / file).write_bytes(
            content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        )

    return edit


def remove(*files: str) -> Edit:
    return lambda directory: [(directory / file).unlink() for file in files]


def cut(nbytes: int, file: str = WEIGHTS) -> Edit:
    """The file's last bytes cut off, or, negative, zeros added."""

    def edit(directory: Path) -> None:
        path = directory / file
        content = path.read_bytes()
        path.write_bytes(content[:-nbytes] if nbytes > 0 else content + bytes(-nbytes))

    return edit


def length(value: int | Callable[[int], int], file: str = WEIGHTS) -> Edit:
    """What the file says of its header's length."""

    def edit(directory: Path) -> None:
        path = directory / file
        content = path.read_bytes()
        said = value(int.from_bytes(content[:8], "little")) if callable(value) else value
        path.write_bytes(said.to_bytes(8, "little") + content[8:])

    return edit


def header(change: Callable[[dict[str, Any]], Any], file: str = WEIGHTS) -> Edit:
    """The header's table changed in place, or by what `change` returns: another table, or its text."""

    def edit(directory: Path) -> None:
        path = directory / file
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        table = json.loads(content[8:end])
        changed = change(table)
        table = table if changed is None else changed
        new = table if isinstance(table, bytes) else json.dumps(table).encode("utf-8", "surrogatepass")
        path.write_bytes(len(new).to_bytes(8, "little") + new + content[end:])

    return edit


def header_text(old: str, new: str, file: str = WEIGHTS) -> Edit:
    def change(table: dict[str, Any]) -> bytes:
        plain = json.dumps(table)
        assert old in plain, f"the header has no {old!r}"
        return plain.replace(old, new, 1).encode("utf-8", "surrogatepass")

    return header(change, file)


def entry(name: str, **values: Any) -> Edit:
    """Fields of one tensor's entry."""
    return header(lambda table: table[name].update(values))


def rename(old: str, new: str, file: str = WEIGHTS) -> Edit:
    return header(lambda table: {(new if name == old else name): value for name, value in table.items()}, file)


def index(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """model.safetensors.index.json changed in place."""
    return json_file("model.safetensors.index.json", change)


def json_file(file: str, change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / file
        value = json.loads(path.read_text())
        change(value)
        path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))

    return edit


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Edit:
    return json_file("tokenizer.json", change)


def model(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """The `model` of tokenizer.json."""
    return tokenizer(lambda value: change(value["model"]))


def link(file: str, target: str) -> Edit:
    """The file moved to `target`, a path beside the directory or absolute, and linked."""

    def edit(directory: Path) -> None:
        path = directory / file
        moved = directory.parent / target
        path.rename(moved)
        path.symlink_to(moved)

    return edit


def both(*edits: Edit) -> Edit:
    return lambda directory: [edit(directory) for edit in edits]
