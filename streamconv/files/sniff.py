"""Recognise the type of a file by its first bytes, for error messages only.

Whether a file is valid is decided by its reader; a guess made here never causes anything to be parsed.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.errors import SourceError
from streamconv.files.local import absolute, read_start
from streamconv.files.store import Place

HEAD_NBYTES = 512


@dataclass(frozen=True, slots=True)
class Guess:
    """A type of file.

    Attributes:
        what: Completes "this is ...".
        hint: What to do about it.
    """

    what: str
    hint: str


_DOWNLOAD = "download the file itself: hf download REPO FILE, or the /resolve/ address instead of /blob/"
_PICKLE = Guess("a PyTorch pickle or zip archive, which is never unpickled here", "get the .safetensors of the model")
_OLD_GGML = Guess(
    "a GGML file from before GGUF (August 2023)", "get a newer file of the model, or convert its checkpoint"
)
_PACKED = "unpack it first"
SAFETENSORS = Guess("a safetensors file", "give it where a checkpoint or adapter is expected")
JSON = Guess("JSON text", "give the model file, not its index or config")

UTF_16 = Guess("text in UTF-16, but it must be UTF-8", "convert it: iconv -f utf-16 -t utf-8 FILE")

_BINARY: tuple[tuple[bytes, Guess], ...] = (
    (b"GGUF", Guess("a GGUF file", "give it where a GGUF file is expected")),
    (b"PK\x03\x04", _PICKLE),
    (b"\x80\x02", _PICKLE),
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"\x80\x05", _PICKLE),
    (b"lmgg", _OLD_GGML),
    (b"fmgg", _OLD_GGML),
    (b"tjgg", _OLD_GGML),
    (b"algg", _OLD_GGML),
    (b"\xff\xfe", UTF_16),
    (b"\xfe\xff", UTF_16),
    (b"\x1f\x8b", Guess("a gzip archive", _PACKED)),
    (b"\xfd7zXZ\x00", Guess("an xz archive", _PACKED)),
    (b"\x28\xb5\x2f\xfd", Guess("a zstd archive", _PACKED)),
    (b"7z\xbc\xaf\x27\x1c", Guess("a 7z archive", _PACKED)),
    (b"\x89HDF", Guess("an HDF5 file (Keras)", "get the .safetensors of the model")),
)
_TEXT: tuple[tuple[bytes, Guess], ...] = (  # in lower case, after white space
    (
        b"version https://git-lfs",
        Guess("a Git LFS pointer, not the file it stands for", "fetch the content: git lfs pull"),
    ),
    (b"<!doctype html", Guess("an HTML page", _DOWNLOAD)),
    (b"<html", Guess("an HTML page", _DOWNLOAD)),
    (b"entry not found", Guess("an error page of the Hugging Face Hub", _DOWNLOAD)),
    (
        b"access to model",
        Guess("an error page of the Hugging Face Hub", "log in (hf auth login) and accept the licence"),
    ),
    (b"invalid username or password", Guess("an error page of the Hugging Face Hub", "log in: hf auth login")),
    (b"{", JSON),
)


def guess(head: bytes) -> Guess | None:
    """The type of a file by its first bytes.

    Args:
        head: The first HEAD_NBYTES of the file, or all if it has fewer.

    Returns:
        None if it is not recognised.
    """
    if not head:
        return Guess("an empty file", "download or copy it again")
    if not head.strip(b"\x00"):
        return Guess("a file that begins with zeros", "the download did not finish: get the file again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:  # safetensors' limit on a header
        return SAFETENSORS
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, table in ((head, _BINARY), (text, _TEXT)):
        for signature, found in table:
            if start.startswith(signature):
                return found
    return None


def guess_other(head: bytes, own: Guess) -> Guess | None:
    """Like `guess`, but None if the file has the expected type `own`."""
    found = guess(head)
    return None if found is own else found


def misplaced(path: Place, asked: str, config: str) -> SourceError:
    """The error for a file that was given instead of something else.

    Args:
        path: The file.
        asked: What was expected, with its article, as "a checkpoint directory".
        config: The name of a file in the expected folder: if it is next to `path`, the hint names that folder.

    Raises:
        SourceError: The file cannot be read.
    """
    found = guess(bytes(read_start(path, HEAD_NBYTES)))
    hint = found.hint if found else None
    if found is SAFETENSORS:
        hint = "give it a name that ends in .safetensors"
    elif (path.parent / config).is_file():
        hint = f"name the folder, {absolute(path.parent)}"
    return SourceError(
        f"is not {asked}" + (f": this is {found.what}" if found else ""), file=path, hint=hint, code="other-file-kind"
    )
