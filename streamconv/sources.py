"""Where a model lies, as people have it: a folder, a single file, an entry of the Hugging Face cache, or its repo id.

Owns: finding the folder and the model's name. Does not own: reading it (checkpoint.py). Nothing is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from streamconv.errors import SourceError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_CACHE_ENTRY = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


def find_source(source: str | Path) -> Path:
    """The path that `source` means: itself where it exists, or a repo id's snapshot in the local Hugging Face cache.

    SourceError where it is neither; a repo id needs the `hub` extra.
    """
    path = Path(source)
    if path.exists() or not _REPO_ID.fullmatch(str(source)):
        return _snapshot(path)
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        raise SourceError(
            "no such folder; a repo id is looked up in the local cache with huggingface_hub",
            file=path,
            hint='pip install "streamconv[hub]"',
        ) from None
    found = try_to_load_from_cache(str(source), "config.json")
    if not isinstance(found, str):
        raise SourceError(
            "no such folder, and not in the local Hugging Face cache",
            file=path,
            hint=f"hf download {source}; nothing is downloaded here",
        )
    return Path(found).parent


def _snapshot(path: Path) -> Path:
    """The newest snapshot inside a cache entry (models--owner--name), any other path as it is."""
    if _CACHE_ENTRY.fullmatch(path.name) and (path / "snapshots").is_dir():
        main = path / "refs" / "main"
        if main.is_file() and (path / "snapshots" / main.read_text().strip()).is_dir():
            return path / "snapshots" / main.read_text().strip()
        snapshots = sorted((path / "snapshots").iterdir(), key=lambda entry: entry.stat().st_mtime)
        if snapshots:
            return snapshots[-1]
    return path


def model_name(path: Path) -> str:
    """What a model at `path` is called: the folder's name, or in the Hugging Face cache its repo's."""
    path = path.absolute()
    for folder in (path, *path.parents[:2]):
        if match := _CACHE_ENTRY.fullmatch(folder.name):
            return match["name"]
    return path.stem if path.is_file() else path.name
