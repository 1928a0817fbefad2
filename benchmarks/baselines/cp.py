"""`cp --reflink=never` of the shards, then `sync -f`: what moving these bytes costs when nothing is converted.

Fair: the same bytes are read, from the same files in the same state of the cache, to the same filesystem, and both
end with the data on the disk (ours with fsync). `--reflink=never` because a clone moves nothing. cp writes as many
bytes as it reads; a Q8_0 file is about half of that, F32 twice.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.converters import Converter
from benchmarks.shapes import shard_paths

_SCRIPT = 'mkdir "$0" && cp --reflink=never -- "$@" "$0" && sync -f "$0"'


def _copy(src: Path, dst: Path, _outtype: str) -> list[str]:
    return ["sh", "-c", _SCRIPT, str(dst), *map(str, shard_paths(src))]


CP = Converter("cp", _copy)
