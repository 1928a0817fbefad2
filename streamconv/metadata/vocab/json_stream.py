"""Parse a large JSON file in one pass: large members in batches, small ones as values, without building a tree.

Memory holds a window and one batch or one value, whatever the size of the file. A malformed byte in a requested member
is a SourceError with its position; in skipped members, only matching brackets and terminated strings are checked.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from streamconv.errors import SourceError
from streamconv.files import sniff as magic
from streamconv.files.local import open_blob
from streamconv.files.store import Place
from streamconv.files.strict_json import objects_nbytes, parse_object
from streamconv.metadata.vocab.packing import joined, split

WINDOW_NBYTES = 128 << 10
MAX_ENTRY_NBYTES = 64 << 10  # limit of a batch, and so of an entry, and of a key; real tokens have a few hundred bytes
MAX_STRING_NBYTES = 512 << 10  # in skipped values: T5's normalizer has a string of 0.3 MB
MAX_KEYS = 1024
MAX_DEPTH = 64
BATCH = 4096  # entries; bounds the Python objects of a batch

# Building blocks of patterns. None backtracks, so matching takes linear time. (?>(?:X)*) is (?:X)*+, which Python
# before 3.11.5 gets wrong if X can match in several ways (gh-106052). It takes 128 bytes per X while it matches, so
# STRING, which may be long, is written without it: as escapes, each with the text after it.
SPACE = rb"[ \t\n\r]*+"
STRING = rb'"[^"\\\x00-\x1f]*+(?:\\[\x20-\xff][^"\\\x00-\x1f]*+)*+"'
FLAT = rb'(?>(?:[^"\[\]{}]++|' + STRING + rb")*)"  # the inside of brackets that contain no others

_SPACE = re.compile(SPACE)
_STRING = re.compile(STRING)
_SCALAR = re.compile(rb'[^ \t\n\r,:"\[\]{}]++')
_PLAIN = re.compile(rb'(?>(?:[^"\[\]{}]++|' + STRING + rb"|\[" + FLAT + rb"\]|\{" + FLAT + rb"\})*)")
_CLOSING = {ord("["): ord("]"), ord("{"): ord("}")}

# Escapes are replaced in a whole batch at once: an escaped quote or backslash becomes a byte that UTF-8 never has until
# the strings have been split.
_QUOTE, _BACKSLASH = b"\xfd", b"\xfe"
_UNMARK = bytes.maketrans(_QUOTE + _BACKSLASH, b'"\\')
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})(?:\\u([dD][c-fC-F][0-9a-fA-F]{2}))?|([/bfnrt]))")
_LETTERS = {b"/": b"/", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}


class EntryKind:
    """The syntax of the entries of a large object or array. `entry` is a pattern without groups."""

    def __init__(self, name: str, opening: bytes, entry: bytes, closing: bytes) -> None:
        self.name = name
        self.opening = opening
        self.closing = closing
        self.run = re.compile(rb"(?>(?:" + SPACE + entry + SPACE + rb",){1,%d})" % BATCH)
        self.one = re.compile(SPACE + entry + SPACE)


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole entries as in the file, commas included, starting at byte `position`."""

    position: int
    text: bytes

    def strings(self) -> tuple[list[bytes], list[bytes]]:
        """Return all strings of the entries, unescaped, and the text after each.

        Raises:
            ValueError: The text is not UTF-8, or an escape is invalid.
        """
        self.text.decode("utf-8")
        text = _resolve(self.text) if b"\\" in self.text else self.text
        parts = text.split(b'"')
        strings = parts[1::2]
        if text is not self.text:
            strings = split(joined(strings).translate(_UNMARK))
        return strings, parts[2::2]

    def values(self, file: Place) -> list[Any]:
        """Return the entries of an array as Python objects.

        Raises:
            SourceError: They are not JSON; the message names `file`.
        """
        values: list[Any] = parse_object(b'{"":[' + self.text.rstrip(b" \t\n\r,") + b"]}", file)[""]
        return values


def _resolve(text: bytes) -> bytes:
    text = text.replace(b"\\\\", _BACKSLASH).replace(b'\\"', _QUOTE)
    if b"\\" in text:
        text = _ESCAPE.sub(_character, text)
        if b"\\" in text:
            raise ValueError("not an escape of JSON")
    return text


def _character(escape: re.Match[bytes]) -> bytes:
    first, second, letter = escape.groups()
    if letter:
        return _LETTERS[letter]
    code = int(first, 16)
    if 0xD800 <= code < 0xDC00 and second:
        code = 0x10000 + ((code - 0xD800) << 10) + (int(second, 16) - 0xDC00)
    elif 0xD800 <= code < 0xE000 or second:
        raise ValueError("half of a surrogate pair, which is not a character")
    return {0x22: _QUOTE, 0x5C: _BACKSLASH}.get(code) or chr(code).encode("utf-8")


class JsonStream:
    """One JSON document, read from its start. Each method leaves the position after the text that it has read."""

    def __init__(self, path: Place, max_nbytes: int) -> None:
        self._file = open_blob(path)
        self._window = b""
        self._at = 0  # in the window
        self._n_read = 0  # of the file, up to the window's end
        if self._file.nbytes > max_nbytes:
            self.close()
            raise SourceError(
                f"{self._file.nbytes:,} bytes, over the limit of {max_nbytes:,}",
                file=path,
                code="json-too-large",
            )
        self._fill(len(codecs.BOM_UTF8))
        self._start = len(codecs.BOM_UTF8) if self._window.startswith(codecs.BOM_UTF8) else 0
        self._at = self._start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def position(self) -> int:
        """Offset of the next byte in the file."""
        return self._n_read - len(self._window) + self._at

    def seek(self, position: int) -> None:
        """Continue reading at `position`."""
        self._window, self._at, self._n_read = b"", 0, position

    def fail(self, problem: str, position: int | None = None, *, code: str) -> NoReturn:
        place = self.position if position is None else position
        raise SourceError(f"byte {place:,}: {problem}", file=self._file.path, code=code)

    def expected(self, what: str) -> NoReturn:
        """Raise a SourceError for a syntax error here, showing the bytes found."""
        self.peek()
        self._fill(magic.HEAD_NBYTES)
        if self.position == self._start and (other := magic.guess_other(self._window[: magic.HEAD_NBYTES], magic.JSON)):
            raise SourceError(
                f"malformed JSON: this is {other.what}", file=self._file.path, hint=other.hint, code="other-file-kind"
            )
        found = self._window[self._at : self._at + 40].decode("utf-8", "replace")
        self.fail(
            f"expected {what}, found {found!r}" if found else f"the file ends where {what} is expected",
            code="json-malformed",
        )

    def peek(self) -> int:
        """Skip white space and return the next byte without consuming it, -1 at the end of the file."""
        while self._fill(1):
            match = _SPACE.match(self._window, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._window):
                return self._window[self._at]
        return -1

    def take(self, byte: bytes) -> None:
        """Consume `byte`; SourceError if another one comes next."""
        if not self._takes(byte):
            self.expected(repr(byte.decode()))

    def end(self) -> None:
        """Raise a SourceError unless the file ends here."""
        if self.peek() >= 0:
            self.expected("the end of the file")

    def opens_with(self, brackets: bytes) -> bool:
        """Return whether the next value starts with `brackets`, ignoring white space. Consumes nothing."""
        self.peek()
        self._fill(MAX_ENTRY_NBYTES)
        ahead = self._window[self._at : self._at + MAX_ENTRY_NBYTES]
        return ahead.translate(None, b" \t\n\r").startswith(brackets)

    def members(self) -> Iterator[str]:
        """Yield the keys of an object. After each, the caller must read or skip its value."""
        seen: set[str] = set()
        self.take(b"{")
        if self._takes(b"}"):
            return
        while True:
            position = self.position
            key = self._key()
            if key in seen:
                self.fail(f"duplicate key {key!r}", position, code="json-duplicate-key")
            seen.add(key)
            if len(seen) > MAX_KEYS:
                self.fail(f"an object has more than {MAX_KEYS:,} keys", code="json-too-large")
            self.take(b":")
            yield key
            if self._takes(b"}"):
                return
            self.take(b",")

    def batches(self, kind: EntryKind) -> Iterator[Batch]:
        """Yield the entries of a large object or array, up to BATCH at a time."""
        self.take(kind.opening)
        if self._takes(kind.closing):
            return
        while True:
            self.peek()
            self._fill(MAX_ENTRY_NBYTES)
            position, limit = self.position, self._at + MAX_ENTRY_NBYTES
            run = kind.run.match(self._window, self._at, limit)
            if run:
                self._at = run.end()
                yield Batch(position, run.group())
                continue
            last = kind.one.match(self._window, self._at, limit)
            if not last:
                self.expected(kind.name)
            self._at = last.end()
            if not self._takes(kind.closing):
                if self.peek() >= 0:
                    self.seek(position)  # show it with what follows
                self.expected(f"{kind.name}, then ',' or {kind.closing.decode()!r}")
            yield Batch(position, last.group())
            return

    def value(self, max_nbytes: int) -> Any:
        """Return the next value as Python objects.

        Raises:
            SourceError: The objects may take more than `max_nbytes` of memory, or the value is malformed.
        """
        value = self.value_or(max_nbytes, _TOO_LARGE)
        if value is _TOO_LARGE:
            self.fail(
                f"the value that ends here may take more than {max_nbytes:,} bytes of memory", code="json-too-large"
            )
        return value

    def value_or(self, max_nbytes: int, oversized: Any) -> Any:
        """Like `value`, but return `oversized` if the objects may take more than `max_nbytes`."""
        self.peek()
        position = self.position
        self.skip()
        if self.position - position > max_nbytes:
            return oversized
        text = bytearray(self.position - position)
        self._file.read_into(position, text)
        if objects_nbytes([text]) > max_nbytes:
            return oversized
        try:
            return parse_object(b'{"":' + text + b"}", self._file.path)[""]
        except SourceError as error:
            self.fail(error.message, position, code=error.code)

    def skip(self) -> None:
        """Skip the next value."""
        closings: list[int] = []
        while True:
            byte = self.peek()
            if closings and byte == closings[-1]:
                closings.pop()
                self._at += 1
            elif closings and self._pass_over_plain():
                pass
            elif byte in _CLOSING:
                closings.append(_CLOSING[byte])
                self._at += 1
                if len(closings) > MAX_DEPTH:
                    self.fail(f"nested deeper than {MAX_DEPTH}", code="json-nested")
            else:
                self._literal(MAX_STRING_NBYTES)
            if not closings:
                return

    def _pass_over_plain(self) -> bool:
        """Skip strings, scalars and flat brackets that are complete in the window; False if there are none."""
        match = _PLAIN.match(self._window, self._at)
        moved = match is not None and match.end() > self._at
        self._at = match.end() if match else self._at
        return moved

    def _key(self) -> str:
        if self.peek() != ord('"'):
            self.expected("a key")
        position = self.position
        try:
            return Batch(position, self._literal(MAX_ENTRY_NBYTES)).strings()[0][0].decode("utf-8")
        except ValueError as error:
            self.fail(str(error), position, code="json-malformed")

    def _literal(self, max_nbytes: int) -> bytes:
        """A string, or a bare word such as a number or `null`, as in the file."""
        match = self._whole_literal() or (self._fill(max_nbytes) and self._whole_literal())
        if not match:
            self.expected("a value" if self.peek() != ord('"') else f"a string of at most {max_nbytes:,} bytes")
        self._at = match.end()
        return match.group()

    def _whole_literal(self) -> re.Match[bytes] | None:
        """The next literal, or None if it may continue beyond the window."""
        match = _STRING.match(self._window, self._at) or _SCALAR.match(self._window, self._at)
        is_whole = match and (match.group()[:1] == b'"' or match.end() < len(self._window) or not self._n_left)
        return match if is_whole else None

    def _takes(self, byte: bytes) -> bool:
        if self.peek() != byte[0]:
            return False
        self._at += 1
        return True

    @property
    def _n_left(self) -> int:
        """Bytes of the file after the window."""
        return self._file.nbytes - self._n_read

    def _fill(self, nbytes: int) -> bool:
        """Read until the window has `nbytes`, or all that are left; False if none are left."""
        missing = nbytes - (len(self._window) - self._at)
        if missing > 0 and self._n_left:
            chunk = bytearray(min(max(missing, WINDOW_NBYTES), self._n_left))
            self._file.read_into(self._n_read, chunk)
            self._window = self._window[self._at :] + chunk
            self._at = 0
            self._n_read += len(chunk)
        return self._at < len(self._window)


_TOO_LARGE = object()
