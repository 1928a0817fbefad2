"""Find a model by what users give: a folder, a single file, an entry of the Hugging Face cache, or its repo id.

Nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streamconv.errors import SourceError
from streamconv.files.local import local_path, local_place
from streamconv.files.store import Place, Store, StorePath

Source = str | Store | Path | StorePath  # as callers give it

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"  # a model's, an adapter's

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
# A URL, as Path leaves it, too; of the Hub, with the repo's id in it.
_URL = re.compile(r"(?:[a-z][a-z+]*:/+(?:(?:www\.)?(?:huggingface\.co|hf\.co)/)?|(?:huggingface\.co|hf\.co)/)(.*)")
_FILE_ENDINGS = frozenset({".gguf", ".safetensors"})  # of a mistyped file, and no repo
_CACHE_ENTRY = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_REVISION = re.compile(rb"[\w-]{1,64}")
_MAX_REF_NBYTES = 1024


@contextmanager
def source_failures() -> Iterator[None]:
    """Every OSError inside, as of a folder that may not be searched, becomes a SourceError."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=error.filename, code="cannot-read") from None


@source_failures()
def find_source(source: Source | Place) -> Place:
    """The location of `source`: in its store, or as `find_path` finds it. SourceError as there."""
    if isinstance(source, Store):
        return StorePath(source)
    return source if isinstance(source, StorePath) else local_place(find_path(str(source)))


@source_failures()
def find_path(source: str | Path) -> Path:
    """The path that `source` means: itself where it exists, or a repo id's snapshot in the local Hugging Face cache.

    SourceError where it could be a repo id and is not there; a repo id needs the `hub` extra.
    """
    path = Path(source)
    if (url := _URL.fullmatch(str(source))) and not path.exists():
        raise _remote(url[0], url[1])
    if path.exists() or not is_repo_id(str(source)) or path.suffix in _FILE_ENDINGS:
        return _snapshot(path)
    try:
        found = find_cached(str(source))
    except ImportError:
        raise SourceError(
            "no such folder; a repo id is looked up in the local cache with huggingface_hub",
            file=path,
            hint="pip install '.[hub]' in streamconv's folder",
            code="source-missing",
        ) from None
    if found is None:
        raise SourceError(
            "no such folder, and not in the local Hugging Face cache",
            file=path,
            hint=f"hf download {source}; nothing is downloaded here",
            code="source-missing",
        )
    return found


def _remote(url: str, rest: str) -> SourceError:
    repo_id = "/".join(rest.split("/")[:2])
    is_of_hub = is_repo_id(repo_id) and (url.startswith("hf:") or "huggingface.co/" in url or "hf.co/" in url)
    hint = f"hf download {repo_id}, then give {repo_id}" if is_of_hub else "download it first, then give the folder"
    return SourceError("is a URL, and nothing is downloaded here", file=url, hint=hint, code="source-remote")


def find_cached(repo_id: str) -> Path | None:
    """The folder of a repo in the local Hugging Face cache, None where it is not there. ImportError without `hub`."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # "a--b/c" is not a repo id for it
        for config in (CONFIG, ADAPTER_CONFIG):
            found = try_to_load_from_cache(repo_id, config)
            if isinstance(found, str):
                return Path(found).parent
    return None


def is_repo_id(source: str) -> bool:
    """Whether `source` could be a repo id, as LiquidAI/LFM2-1.2B; many relative paths could be one."""
    return _REPO_ID.fullmatch(source) is not None


def _snapshot(path: Path) -> Path:
    """The newest snapshot inside a cache entry (models--owner--name), any other path as it is."""
    if _CACHE_ENTRY.fullmatch(path.name) and (path / "snapshots").is_dir():
        if (main := _main_revision(path)) and (path / "snapshots" / main).is_dir():
            return path / "snapshots" / main
        snapshots = sorted((path / "snapshots").iterdir(), key=lambda entry: entry.stat().st_mtime)
        if snapshots:
            return snapshots[-1]
    return path


def _main_revision(entry: Path) -> str | None:
    """The commit that refs/main names, None where it names none."""
    main = entry / "refs" / "main"
    if not main.is_file():
        return None
    with main.open("rb") as file:
        text = file.read(_MAX_REF_NBYTES).strip()
    return text.decode("ascii") if _REVISION.fullmatch(text) else None


def model_name(place: Place) -> str:
    """The name of the model at `place`: that of its folder, or of its repo if it is in the Hugging Face cache."""
    path = local_path(place)
    if path is None:
        return place.stem if place.is_file() else place.name
    path = path.resolve() if ".." in path.parts else path.absolute()
    for folder in (path, *path.parents[:2]):
        if match := _CACHE_ENTRY.fullmatch(folder.name):
            return match["name"]
    with suppress(OSError):  # reading it will raise the error
        return path.stem if path.is_file() else path.name
    return path.name
