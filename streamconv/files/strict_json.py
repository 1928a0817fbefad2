"""Small untrusted JSON files (configs, indexes, headers): no duplicate keys, no NaN, bounded size and depth.

Errors name the file. tokenizer.json is too large for this and is read by metadata/vocab/json_stream.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from streamconv.errors import SourceError
from streamconv.files import sniff as magic
from streamconv.files.local import file_nbytes, read_start
from streamconv.files.store import Place

MAX_NBYTES = 64 << 20
MAX_CONFIG_NBYTES = 1 << 20  # if the caller did not reserve memory; published configs have up to 60 KB
# Bound on the memory of json.loads for each byte of text. Measured: 3 to 9 for headers and configs, 44 for deeply
# nested arrays.
OBJECT_NBYTES_PER_BYTE = 45
# Bound on its memory for each mark, of which one precedes every value. Measured: 132 for a member of an object whose
# dict has just grown, while the list of its pairs still exists.
_OBJECT_NBYTES_PER_MARK = 140
_MARKS = (b",", b":", b"[", b"{")


def parse_object(text: bytes | bytearray, file: object, max_nbytes: int = MAX_NBYTES) -> dict[str, Any]:
    """The JSON object in `text`.

    Args:
        text: UTF-8, with or without a byte-order mark.
        file: The name of the file, for errors.
        max_nbytes: The most bytes that are accepted.

    Raises:
        SourceError: The text is not UTF-8, not JSON, not an object, too large or nested too deeply, or has a duplicate
            key or a number that is not finite.
    """
    value = _parse(text, file, max_nbytes)
    if not isinstance(value, dict):
        raise SourceError(f"expected a JSON object, found {type(value).__name__}", file=file, code="json-not-object")
    return value


def _parse(text: bytes | bytearray, file: object, max_nbytes: int) -> Any:
    if len(text) > max_nbytes:
        raise SourceError(
            f"JSON of {len(text):,} bytes is larger than {max_nbytes:,}", file=file, code="json-too-large"
        )
    try:
        return json.loads(
            text.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise _bad_json(text, file, f"not UTF-8 at byte {error.start}", code="not-utf8") from None
    except RecursionError:
        raise SourceError("JSON nested too deeply", file=file, code="json-nested") from None
    except ValueError as error:  # JSONDecodeError, or one of the hooks below
        raise _bad_json(
            text, file, f"malformed JSON: {error}", "download the file again", code="json-malformed"
        ) from None


def objects_nbytes(pieces: Iterable[bytes | bytearray]) -> int:
    """Upper bound in bytes on the memory of `parse_object` for a text in pieces: the result, without the text."""
    nbytes = n_marks = 0
    is_ascii = True
    for piece in pieces:
        nbytes += len(piece)
        n_marks += sum(map(piece.count, _MARKS))
        is_ascii &= piece.isascii()
    width = 1 if is_ascii else 4  # bytes of a character, in the decoded text and once more in its string
    return 2 * width * nbytes + _OBJECT_NBYTES_PER_MARK * n_marks


def load_object(
    path: Place, max_nbytes: int = MAX_NBYTES, *, afford: Callable[[int], None] = lambda nbytes: None
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: The file.
        max_nbytes: The most bytes that are accepted.
        afford: Called with the bytes of memory that reading will take, then with those of reading and parsing, each
            time before they are taken. It may raise.

    Raises:
        SourceError: As `parse_object`, or the file cannot be read.
    """
    return parse_object(_load(path, max_nbytes, afford), path, max_nbytes)


def load_list(path: Place, max_nbytes: int, *, afford: Callable[[int], None] = lambda nbytes: None) -> list[Any]:
    """Like `load_object`, for a file that holds a list."""
    value = _parse(_load(path, max_nbytes, afford), path, max_nbytes)
    if not isinstance(value, list):
        raise SourceError(f"expected a JSON list, found {type(value).__name__}", file=path, code="json-not-list")
    return value


def _load(path: Place, max_nbytes: int, afford: Callable[[int], None]) -> bytearray:
    afford(min(file_nbytes(path), max_nbytes + 1))
    text = read_start(path, max_nbytes + 1)
    afford(len(text) + objects_nbytes([text]))
    return text


def load_object_if_present(path: Place) -> dict[str, Any]:
    """Like `load_object`, but an empty object if there is no such file."""
    return load_object(path) if path.exists() else {}


def _bad_json(
    text: bytes | bytearray, file: object, problem: str, hint: str | None = None, *, code: str
) -> SourceError:
    """The error for `problem`, or a clearer one if the text is a file of another type."""
    if other := magic.guess_other(bytes(text[: magic.HEAD_NBYTES]), magic.JSON):
        if other is magic.UTF_16:  # it may well be JSON, too
            return SourceError(f"this is {other.what}", file=file, hint=other.hint, code="not-utf8")
        return SourceError(f"malformed JSON: this is {other.what}", file=file, hint=other.hint, code="other-file-kind")
    return SourceError(problem, file=file, hint=hint, code=code)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r}")
            seen.add(key)
    return result


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is outside the range of 64-bit numbers")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
