"""An upper bound on the memory of a vocabulary, from byte counts of its files, before anything in them is trusted.

read_vocabulary allocates less, whatever the files contain; tests check that for real shapes and for the worst cases of
the grammar.
"""

from __future__ import annotations

from collections.abc import Iterator

from streamconv.files.local import file_nbytes, open_blob
from streamconv.files.store import Place
from streamconv.files.strict_json import OBJECT_NBYTES_PER_BYTE, objects_nbytes
from streamconv.metadata.vocab.companions import FILE_NAMES
from streamconv.metadata.vocab.files import SENTENCEPIECE_MODEL, TEKKEN, TOKENIZER_JSON, TokenizerFiles, template_files
from streamconv.metadata.vocab.json_stream import MAX_STRING_NBYTES
from streamconv.metadata.vocab.tokenizer_json import (
    FIELDS,
    MAX_ADDED_NBYTES,
    MAX_FIELD_NBYTES,
    MAX_NBYTES,
    MAX_PART_NBYTES,
    PARTS,
)

_PIECE_NBYTES = 64 << 10
_LENGTH_NBYTES = 8  # of a string in GGUF
# How the tokenizers library indents tokens and merges, and the two texts of a merge. A string of JSON has no line break
# in it, so nothing of this is text.
_INDENT = b"\n" + b" " * 6
_DEEPER = _INDENT + b" " * 2
# A row of the header: the length of its text, its type, its score, and `[PADn]` where it has no text of its own.
_ROW_NBYTES = 8 + 4 + 4 + 16
# A row once it is read: its text as an object (48), its id as one (32). Then what is made of all rows, when nothing is
# read any more: a list (8), arrays (16), and what it means in a second tokenizer (8).
_ENTRY_NBYTES = 80
_LISTED_NBYTES = 32
# A dict has room for two thirds of a power of two, and 20 bytes for each of that (24 an entry, 4 an index). While it
# grows there is half of it once more, for fewer rows.
_DICT_NBYTES = 25
# A window, a batch as text and as objects, and what it is packed by. Measured: 3 MiB.
_WORKING_NBYTES = 4 << 20
_LISTING_NBYTES = 1 << 20  # what the list is packed by, a piece at a time
# The added tokens that are made of a companion's objects, for each of its bytes. Measured on the worst: 15.
_ADDED_PER_BYTE = 20


def vocabulary_nbytes(directory: Place, n_vocab: int, over: Place | None = None) -> tuple[int, int]:
    """(bytes of the keys, which stay; bytes on top of them while the files are read), each an upper bound.

    `over`: the folder whose files count first. SourceError where a file cannot be read.
    """
    files = TokenizerFiles(directory, over)
    tokenizer_json, model = file_nbytes(files.find(TOKENIZER_JSON)), file_nbytes(files.find(SENTENCEPIECE_MODEL))
    lengths, texts, longest = _strings_nbytes(files.find(TOKENIZER_JSON))
    tekken = 0 if tokenizer_json else file_nbytes(files.find(TEKKEN))
    texts += tekken  # which its reader holds tokens and merges to
    companions = [path for folder in files.folders for name in FILE_NAMES if file_nbytes(path := folder / name)]
    n_companions = sum(map(file_nbytes, companions))
    templates = sum(file_nbytes(path) for folder in files.folders for path in template_files(folder))
    payload = max(lengths + texts, model * 11 // 6)  # a piece has at least 6 bytes, 3 of them text
    kept = payload * 9 // 8 + n_vocab * _ROW_NBYTES + 4 * (n_companions + templates)  # it grows by an eighth at a time
    extra = n_vocab * _ENTRY_NBYTES + _DICT_NBYTES * (1 << (n_vocab * 3 // 2).bit_length())
    extra += max(texts, model // 6) + 2 * model + 8 * templates
    extra += max(_WORKING_NBYTES, n_vocab * _LISTED_NBYTES + _LISTING_NBYTES)
    extra += sum(objects_nbytes(_pieces(path)) for path in companions) + n_companions * (1 + _ADDED_PER_BYTE)
    extra += min(tokenizer_json * OBJECT_NBYTES_PER_BYTE, len(PARTS) * MAX_PART_NBYTES + len(FIELDS) * MAX_FIELD_NBYTES)
    added = MAX_ADDED_NBYTES if tekken else min(tokenizer_json, MAX_ADDED_NBYTES)
    return kept, extra + 2 * added + 4 * min(longest, MAX_STRING_NBYTES)


def _strings_nbytes(path: Place) -> tuple[int, int, int]:
    """(bytes of the lengths, of the texts, of the longest) of a tokenizer.json's strings as GGUF has them, at most.

    Each string is in quotes, and a mark follows it; a space may become a letter of two bytes. An escaped quote counts
    as half a string: its length is more than what it takes off the texts.
    """
    nbytes = n_quotes = n_spaces = longest = run = 0
    ends_escaping = False
    for piece in _pieces(path):
        # No string is longer than the pieces in a row without a quote that may end it, and the two around them.
        n_escaped = piece.count(b'\\"') + (ends_escaping and piece.startswith(b'"'))
        run = (run if piece.count(b'"') <= n_escaped else _PIECE_NBYTES) + len(piece)
        longest, ends_escaping = max(longest, run), piece.endswith(b"\\")
        n_indents, n_deeper = piece.count(_INDENT), piece.count(_DEEPER)
        nbytes += len(piece) - len(_INDENT) * n_indents - 2 * n_deeper
        n_spaces += piece.count(b" ") - _INDENT.count(b" ") * n_indents - 2 * n_deeper
        n_quotes += piece.count(b'"')
    n_strings = n_quotes // 2
    return _LENGTH_NBYTES * n_strings, max(0, nbytes + n_spaces - 3 * n_strings), longest


def _pieces(path: Place) -> Iterator[bytearray]:
    """The file's bytes, some at a time; nothing of one that is larger than a tokenizer.json may be, or not there."""
    if not 0 < file_nbytes(path) <= MAX_NBYTES:
        return
    with open_blob(path) as blob:
        for start in range(0, blob.nbytes, _PIECE_NBYTES):
            piece = bytearray(min(_PIECE_NBYTES, blob.nbytes - start))
            blob.read_into(start, piece)
            yield piece
