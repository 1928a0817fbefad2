"""Find the model that a user names: a folder, a single file, an entry of the Hugging Face cache, or a repo id.

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

Source = str | Store | Path | StorePath  # the ways in which callers can name a source

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"  # of a model, of an adapter

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
# A URL, also with its slashes merged by Path; the group is the rest after the Hub's host, or after the scheme.
_URL = re.compile(r"(?:[a-z][a-z+]*:/+(?:(?:www\.)?(?:huggingface\.co|hf\.co)/)?|(?:huggingface\.co|hf\.co)/)(.*)")
_FILE_ENDINGS = frozenset({".gguf", ".safetensors"})  # a missing file, rather than a repo id
_CACHE_ENTRY = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_REVISION = re.compile(rb"[\w-]{1,64}")
_MAX_REF_NBYTES = 1024


def is_gguf(source: Source) -> bool:
    """Whether the name is a GGUF file's."""
    name = source.key if isinstance(source, StorePath) else "" if isinstance(source, Store) else str(source)
    return Path(name).suffix == ".gguf"


@contextmanager
def source_failures() -> Iterator[None]:
    """Turn every OSError inside the `with` into a SourceError, such as for a folder without read permission."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=error.filename, code="cannot-read") from None


@source_failures()
def find_source(source: Source | Place) -> Place:
    """The location of a source: in its store, or the path that `find_path` returns.

    Raises:
        SourceError: As `find_path`.
    """
    if isinstance(source, Store):
        return StorePath(source)
    return source if isinstance(source, StorePath) else local_place(find_path(str(source)))


@source_failures()
def find_path(source: str | Path) -> Path:
    """The path of a source: `source` itself if it exists, or a repo id's snapshot in the local Hugging Face cache.

    Repo ids need the `hub` extra.

    Raises:
        SourceError: `source` is a URL, or could be a repo id and is not in the cache.
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
            "no such folder; looking up a repo id in the local cache needs huggingface_hub",
            file=path,
            hint=f"pip install huggingface_hub, then hf download {source}; nothing is downloaded here",
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
    return SourceError(
        "is a URL, and streamconv downloads nothing",
        file=re.sub(":/+", "://", url, count=1),
        hint=hint,
        code="source-remote",
    )


def find_cached(repo_id: str) -> Path | None:
    """The folder of a repo in the local Hugging Face cache; None if it is not there.

    Raises:
        ImportError: huggingface_hub is not installed (the `hub` extra).
    """
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # huggingface_hub rejects some ids, such as "a--b/c"
        for config in (CONFIG, ADAPTER_CONFIG):
            found = try_to_load_from_cache(repo_id, config)
            if isinstance(found, str):
                return Path(found).parent
    return None


def is_repo_id(source: str) -> bool:
    """Whether `source` has the form of a repo id, such as LiquidAI/LFM2-1.2B; many relative paths do, too."""
    return _REPO_ID.fullmatch(source) is not None


def _snapshot(path: Path) -> Path:
    """The snapshot to use in a cache entry (models--owner--name): refs/main, or the newest; other paths unchanged."""
    if _CACHE_ENTRY.fullmatch(path.name) and (path / "snapshots").is_dir():
        if (main := _main_revision(path)) and (path / "snapshots" / main).is_dir():
            return path / "snapshots" / main
        snapshots = sorted((path / "snapshots").iterdir(), key=lambda entry: entry.stat().st_mtime)
        if snapshots:
            return snapshots[-1]
    return path


def _main_revision(entry: Path) -> str | None:
    """The commit in refs/main; None if there is no valid one."""
    main = entry / "refs" / "main"
    if not main.is_file():
        return None
    with main.open("rb") as file:
        text = file.read(_MAX_REF_NBYTES).strip()
    return text.decode("ascii") if _REVISION.fullmatch(text) else None


def model_name(place: Place) -> str:
    """The name of the model at `place`: its folder's name, or its repo's if it is in the Hugging Face cache."""
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
