"""Read tokenizer.json: vocabulary, merges and added tokens in batches, other members as values.

Checks that the fields are consistent: ids are below the model's number of rows, no token occurs twice, merges name
known tokens. Memory is independent of the size of the file, except for the bytes of the merges; the vocabulary is
a dict of at most `n_vocab` entries.
Format: the serialisation of https://github.com/huggingface/tokenizers, version 1.0.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from streamconv.errors import SourceError
from streamconv.files.store import Place
from streamconv.gguf.format import PackedArray
from streamconv.metadata.vocab.json_stream import FLAT, SPACE, STRING, Batch, EntryKind, JsonStream
from streamconv.metadata.vocab.packing import BETWEEN, encode_joined, joined, split

MAX_NBYTES = 256 << 20  # the largest published ones have about 35 MB
MAX_ADDED_NBYTES = 1 << 20  # the texts of all added tokens; a speech model has 28,000 of 20 bytes
MAX_PART_NBYTES = 256 << 10  # memory of one of PARTS; real ones take at most about 20 KB
MAX_FIELD_NBYTES = 1 << 10
MAX_ID = (1 << 64) - 1  # of an added token, which may be far beyond the model's rows

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
FIELDS = ("type", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
# Replaces a part that is too large for llama.cpp to support it, such as a normalizer with a character map.
TOO_LARGE = {"type": f"that may take more than {MAX_PART_NBYTES:,} bytes of memory"}

_ADDED = EntryKind("an added token", b"[", rb"\{" + FLAT + rb"\}", b"]")
_ID = rb"(?:0|[1-9][0-9]{0,9}+)"
_VOCAB = EntryKind("a token and its id", b"{", STRING + SPACE + rb":" + SPACE + _ID, b"}")
_MERGE_LINES = EntryKind('a merge such as "a b"', b"[", STRING, b"]")
_MERGE_PAIRS = EntryKind(
    'a merge such as ["a", "b"]',
    b"[",
    rb"\[" + SPACE + STRING + SPACE + rb"," + SPACE + STRING + SPACE + rb"\]",
    b"]",
)
_SPACE_LETTER = "Ġ".encode()  # byte-level BPE's letter for a space

_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched in a text before the tokenizer model runs."""

    id: int
    text: bytes
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


class AddedTokens:
    """The added tokens in file order, packed into a few bytes each: speech models have tens of thousands."""

    def __init__(self) -> None:
        self._ids = array("Q")
        self._flags = bytearray()
        self._text = bytearray()
        self._ends = array("Q")

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def text_nbytes(self) -> int:
        return len(self._text)

    def __iter__(self) -> Iterator[AddedToken]:
        start = 0
        for id_, flags, end in zip(self._ids, self._flags, self._ends, strict=True):
            yield AddedToken(id_, bytes(self._text[start:end]), *(bool(flags >> i & 1) for i in range(len(_FLAGS))))
            start = end

    def append(self, token: AddedToken) -> None:
        self._ids.append(token.id)
        self._flags.append(sum(getattr(token, name) << i for i, name in enumerate(_FLAGS)))
        self._text += token.text
        self._ends.append(len(self._text))


@dataclass(frozen=True, slots=True)
class Merges:
    """The merges as stored in GGUF, and which tokens they make."""

    lines: PackedArray  # each "left right"
    ranks: NDArray[np.int32]  # [n_vocab], index of the first merge that makes a token, -1 if none does
    grouped: bool  # all merges that make the same token are adjacent


@dataclass(slots=True)
class TokenizerJson:
    """A parsed tokenizer.json. `model` has the FIELDS that are present; `vocab` maps token text (UTF-8) to id."""

    path: Place
    added: AddedTokens = field(default_factory=AddedTokens)
    parts: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(PARTS))
    model: dict[str, Any] = field(default_factory=dict)
    vocab: dict[bytes, int] = field(default_factory=dict)
    merges: Merges | None = None

    @property
    def model_type(self) -> str:
        """BPE, Unigram, WordPiece or WordLevel, guessed if the file is an old one that does not state it."""
        return str(self.model.get("type") or ("BPE" if self.merges else "of no type"))


def read_tokenizer_json(path: Place, n_vocab: int, *, tokens: bool = True, merges: bool = True) -> TokenizerJson:
    """Read the tokenizer.json at `path`.

    Args:
        path: The file.
        n_vocab: Number of rows of the model's embedding.
        tokens: Whether to read vocabulary and merges.
        merges: Whether to read merges, if `tokens` is true.

    Raises:
        SourceError: The file is malformed.
    """
    with JsonStream(path, MAX_NBYTES) as stream:
        return _Reader(stream, path, n_vocab, tokens, tokens and merges).read()


class _Reader:
    def __init__(self, stream: JsonStream, path: Place, n_vocab: int, tokens: bool, merges: bool) -> None:
        self.stream = stream
        self.n_vocab = n_vocab
        self.tokens, self.merges = tokens, merges
        self.result = TokenizerJson(path)
        self.early_merges: int | None = None  # position of merges that come before the vocabulary that they refer to

    def read(self) -> TokenizerJson:
        has_model = False
        for key in self.stream.members():
            if key == "added_tokens":
                self._read_added()
            elif key == "model":
                has_model = True
                self._read_model()
            elif key == "post_processor":
                self.result.parts[key] = self.stream.value(MAX_PART_NBYTES)
            else:
                value = self.stream.value_or(MAX_PART_NBYTES, TOO_LARGE)
                if key in PARTS:
                    self.result.parts[key] = value
        self.stream.end()
        if not has_model:
            self.stream.fail("the file has no 'model'", code="tokenizer-malformed")
        if self.early_merges is not None:
            self.stream.seek(self.early_merges)
            self._read_merges()
        return self.result

    def _read_model(self) -> None:
        for key in self.stream.members():
            if key == "vocab" and self.tokens and self.stream.peek() == ord("{"):
                self._read_vocab()
            elif key == "merges" and self.merges:
                if self.result.vocab:
                    self._read_merges()
                else:
                    self.early_merges = self.stream.position
                    self.stream.skip()
            elif key in ("vocab", "merges"):
                self.stream.skip()
            else:
                value = self.stream.value_or(MAX_FIELD_NBYTES, TOO_LARGE)
                if key in FIELDS:
                    self.result.model[key] = value

    def _read_added(self) -> None:
        path, added = self.result.path, self.result.added
        for batch in self.stream.batches(_ADDED):
            for entry in batch.values(path):
                added.append(parse_added_token(entry, path))
            if len(added) > self.n_vocab or added.text_nbytes > MAX_ADDED_NBYTES:
                self.stream.fail(
                    f"more added tokens than the model's {self.n_vocab:,} rows, or their texts are too long",
                    code="tokens-beyond-rows",
                )

    def _read_vocab(self) -> None:
        vocab = self.result.vocab
        beyond = {token.text for token in self.result.added if token.id >= self.n_vocab}
        for batch in self.stream.batches(_VOCAB):
            tokens, rests = self._strings(batch)
            ids = list(map(int, b"".join(rests).translate(None, b" \t\r\n:").rstrip(b",").split(b",")))
            highest = max(ids)
            if highest >= self.n_vocab and beyond:  # the vocabulary may contain added tokens too
                tokens, ids = _without(tokens, ids, beyond, self.n_vocab)
                highest = max(ids, default=-1)
            if highest >= self.n_vocab:
                token = shown(tokens[ids.index(highest)])
                self.stream.fail(
                    f"token {token} has id {highest:,}, but the model has only {self.n_vocab:,} rows",
                    batch.position,
                    code="tokens-beyond-rows",
                )
            n_before = len(vocab)
            if list(map(vocab.setdefault, tokens, ids)) != ids or len(vocab) != n_before + len(ids):
                self._fail_repeated(batch, tokens, ids, n_before)
            if len(vocab) > self.n_vocab:
                self.stream.fail(
                    f"more tokens than the model's {self.n_vocab:,} rows", batch.position, code="tokens-beyond-rows"
                )

    def _fail_repeated(self, batch: Batch, tokens: list[bytes], ids: list[int], n_before: int) -> NoReturn:
        vocab = self.result.vocab
        seen = set(islice(vocab, n_before))
        for token, id_ in zip(tokens, ids, strict=True):
            if token in seen:
                self.stream.fail(
                    f"token {shown(token)} occurs twice, with ids {vocab[token]} and {id_}",
                    batch.position,
                    code="token-twice",
                )
            seen.add(token)
        raise AssertionError("no token was repeated")

    def _read_merges(self) -> None:
        vocab = self.result.vocab
        payload = bytearray()
        ranks = np.full(self.n_vocab, -1, dtype=np.int32)
        n_merges = n_groups = 0
        previous = -1
        for batch, merges in self._merge_batches():
            try:
                made = np.fromiter(map(vocab.__getitem__, merges.made), np.int32, len(merges.made))
            except KeyError:
                self._fail_unknown(batch, merges)
            if set(merges.parts).difference(vocab) or (b"" in vocab and b"" in merges.parts):
                self._fail_unknown(batch, merges)
            n_groups += int(made[0] != previous) + int(np.count_nonzero(made[1:] != made[:-1]))
            previous = int(made[-1])
            _keep_first(ranks, made, n_merges)
            n_merges += len(made)
            payload += encode_joined(merges.lines)
        lines = PackedArray(GGUFValueType.STRING, n_merges, payload)
        self.result.merges = Merges(lines, ranks, grouped=n_groups == int(np.count_nonzero(ranks >= 0)))

    def _merge_batches(self) -> Iterator[tuple[Batch, _MergeBatch]]:
        if self.stream.opens_with(b"[["):
            for batch in self.stream.batches(_MERGE_PAIRS):
                yield batch, _MergeBatch.of_pairs(self._strings(batch)[0])
        else:
            for batch in self.stream.batches(_MERGE_LINES):
                lines = self._strings(batch)[0]
                merges = _MergeBatch.of_lines(lines)
                if merges is None:
                    wrong = next(line for line in lines if line.count(b" ") != 1)
                    self.stream.fail(
                        f"merge {shown(wrong)} is not two tokens separated by one space",
                        batch.position,
                        code="merge-malformed",
                    )
                yield batch, merges

    def _fail_unknown(self, batch: Batch, merges: _MergeBatch) -> NoReturn:
        for left, right, made in zip(merges.parts[::2], merges.parts[1::2], merges.made, strict=True):
            for token in (left, right, made):
                if token not in self.result.vocab or not token:
                    merge = f"merge of {shown(left)} and {shown(right)}"
                    self.stream.fail(
                        f"{merge} names {shown(token)}, which is not a token",
                        batch.position,
                        code="merge-unknown-token",
                    )
        raise AssertionError("all tokens are known")

    def _strings(self, batch: Batch) -> tuple[list[bytes], list[bytes]]:
        try:
            return batch.strings()
        except UnicodeDecodeError as error:
            self.stream.fail("not UTF-8", batch.position + error.start, code="not-utf8")
        except ValueError as error:
            self.stream.fail(f"in the entries from here on: {error}", batch.position, code="tokenizer-malformed")


@dataclass(frozen=True, slots=True)
class _MergeBatch:
    """Merges of one batch: `parts` alternates left and right; `lines` is the joined text for GGUF."""

    parts: list[bytes]
    made: list[bytes]
    lines: bytes

    @classmethod
    def of_pairs(cls, parts: list[bytes]) -> _MergeBatch:
        text = joined(parts)
        between = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == BETWEEN[0])[::2]  # left and right
        made = split(np.delete(np.frombuffer(text, dtype=np.uint8), between).tobytes())
        if b" " in text:
            return cls(parts, made, joined([b" ".join(pair) for pair in _pairs_without_spaces(parts)]))
        lines = np.frombuffer(text, dtype=np.uint8).copy()
        lines[between] = ord(" ")
        return cls(parts, made, lines.tobytes())

    @classmethod
    def of_lines(cls, strings: list[bytes]) -> _MergeBatch | None:
        """The merges, or None unless each consists of two parts separated by one space."""
        text = joined(strings)
        letters = np.frombuffer(text, dtype=np.uint8)
        marks = letters[(letters == ord(" ")) | (letters == BETWEEN[0])]
        if len(marks) != 2 * len(strings) or (marks[::2] != ord(" ")).any():
            return None
        return cls(split(text.replace(b" ", BETWEEN)), split(text.replace(b" ", b"")), text)


def _without(tokens: list[bytes], ids: list[int], texts: set[bytes], n_vocab: int) -> tuple[list[bytes], list[int]]:
    """Tokens and ids, without those tokens of `texts` whose ids are beyond the rows."""
    kept = [(token, id_) for token, id_ in zip(tokens, ids, strict=True) if id_ < n_vocab or token not in texts]
    return [token for token, _ in kept], [id_ for _, id_ in kept]


def _pairs_without_spaces(parts: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Replace a space inside a part by its byte-level BPE letter, as llama.cpp's converter does."""
    clean = [part.replace(b" ", _SPACE_LETTER) for part in parts]
    return zip(clean[::2], clean[1::2], strict=True)


def _keep_first(ranks: NDArray[np.int32], made: NDArray[np.int32], start: int) -> None:
    """Set ranks, counting from `start`, of tokens `made` that have none yet; the first merge of a token counts."""
    order = np.arange(start, start + len(made), dtype=np.int32)
    new = ranks[made] < 0
    ranks[made[new][::-1]] = order[new][::-1]  # numpy keeps the last value for a repeated index


def parse_added_token(entry: Any, file: Place) -> AddedToken:
    """Return an added token from its JSON object.

    Raises:
        SourceError: It has no text or id, or a flag is not a boolean.
    """
    problem = _added_problem(entry)
    if problem:
        raise SourceError(problem, file=file, code="tokenizer-malformed")
    return AddedToken(entry["id"], entry["content"].encode("utf-8"), *(entry.get(name, False) for name in _FLAGS))


def _added_problem(entry: Any) -> str | None:
    if not isinstance(entry, Mapping):
        return f"an added token must be an object, not {shown(entry)}"
    id_, text = entry.get("id"), entry.get("content")
    if not isinstance(text, str) or not text:
        return f"'content' of an added token must be a string, not {shown(text)}"
    token = f"added token {shown(text)}"
    if not isinstance(id_, int) or isinstance(id_, bool) or not 0 <= id_ <= MAX_ID:
        return f"{token} has the id {shown(id_)}, not a whole number from 0 to 2^64 - 1"
    for name in _FLAGS:
        if not isinstance(entry.get(name, False), bool):
            return f"{name!r} of {token} is {shown(entry[name])}; it must be true or false"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return f"{token} contains half of a surrogate pair, which is not a character"
    return None


def shown(value: Any) -> str:
    """Return `value` for display in a message: bytes as text, shortened to one line."""
    text = repr(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
