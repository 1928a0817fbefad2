"""The command lines that are measured as "streamconv", and the class for every measured command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Converter:
    """Something that makes `dst` of the checkpoint folder `src`: called with src, dst and an outtype."""

    name: str
    command: Callable[[Path, Path, str], list[str]]
    env: Mapping[str, str] = field(default_factory=dict)


def streamconv(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "streamconv", *arguments]


def _convert(src: Path, dst: Path, outtype: str) -> list[str]:
    return streamconv("convert", str(src), "-o", str(dst), "--outtype", outtype, "--quiet", "--json")


def _with_io(io: str) -> Callable[[Path, Path, str], list[str]]:
    return lambda src, dst, outtype: [*_convert(src, dst, outtype), "--io", io]


def planning(version: Converter) -> Converter:
    """A dry run of the same version, whatever type is asked for."""

    def command(src: Path, dst: Path, outtype: str) -> list[str]:
        return [*version.command(src, dst, "bf16"), "--dry-run"]

    return replace(version, command=command)


STREAMCONV = Converter("streamconv", _convert)
STREAMCONV_MAPPED = Converter("streamconv-mapped", _with_io("mapped"))
STREAMCONV_POSITIONED = Converter("streamconv-positioned", _with_io("positioned"))
STREAMCONV_NUMPY = Converter("streamconv-numpy", _convert, {"STREAMCONV_KERNELS": "0"})
