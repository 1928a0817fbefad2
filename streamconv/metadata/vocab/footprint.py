"""An upper bound on the memory of a vocabulary, from byte counts of its files, before they are parsed.

read_vocabulary allocates less, whatever the files contain; tests check this for real files and for the worst cases of
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
# The indentation that the tokenizers library writes before tokens and merges, and before the two texts of a merge.
# A JSON string contains no line break, so these bytes are never part of a text.
_INDENT = b"\n" + b" " * 6
_DEEPER = _INDENT + b" " * 2
# A row of the header: the length of its text, its type, its score, and `[PADn]` if it has no text of its own.
_ROW_NBYTES = 8 + 4 + 4 + 16
# A row in memory: its text as an object (48) and its id (32). After reading, for all rows: a list (8), arrays (16), and
# a hash of the token in a second tokenizer (8).
_ENTRY_NBYTES = 80
_LISTED_NBYTES = 32
# A dict has room for two thirds of a power of two, at 20 bytes for each slot (24 per entry, 4 per index). While it
# grows, the old table, half as large, is still there.
_DICT_NBYTES = 25
# A window, a batch as text and as objects, and the scratch for packing it. Measured: 3 MiB.
_WORKING_NBYTES = 4 << 20
_LISTING_NBYTES = 1 << 20  # scratch for packing the list, a block at a time
# Added tokens made from a companion file, in bytes per byte of the file. Measured on the worst case: 15.
_ADDED_PER_BYTE = 20


def vocabulary_nbytes(directory: Place, n_vocab: int, over: Place | None = None) -> tuple[int, int]:
    """Return upper bounds in bytes: of the keys, and of the additional memory while the files are read.

    Args:
        directory: The folder with the tokenizer files.
        n_vocab: Number of rows of the embedding.
        over: A folder whose files take precedence.

    Raises:
        SourceError: A file cannot be read.
    """
    files = TokenizerFiles(directory, over)
    tokenizer_json, model = file_nbytes(files.find(TOKENIZER_JSON)), file_nbytes(files.find(SENTENCEPIECE_MODEL))
    lengths, texts, longest = _strings_nbytes(files.find(TOKENIZER_JSON))
    tekken = 0 if tokenizer_json else file_nbytes(files.find(TEKKEN))
    texts += tekken  # its reader limits tokens and merges to the size of the file
    companions = [path for folder in files.folders for name in FILE_NAMES if file_nbytes(path := folder / name)]
    n_companions = sum(map(file_nbytes, companions))
    templates = sum(file_nbytes(path) for folder in files.folders for path in template_files(folder))
    payload = max(lengths + texts, model * 11 // 6)  # a piece has at least 6 bytes, 3 of them text
    kept = (
        payload * 9 // 8 + n_vocab * _ROW_NBYTES + 4 * (n_companions + templates)
    )  # a bytearray grows by an eighth at a time
    extra = n_vocab * _ENTRY_NBYTES + _DICT_NBYTES * (1 << (n_vocab * 3 // 2).bit_length())
    extra += max(texts, model // 6) + 2 * model + 8 * templates
    extra += max(_WORKING_NBYTES, n_vocab * _LISTED_NBYTES + _LISTING_NBYTES)
    extra += sum(objects_nbytes(_pieces(path)) for path in companions) + n_companions * (1 + _ADDED_PER_BYTE)
    extra += min(tokenizer_json * OBJECT_NBYTES_PER_BYTE, len(PARTS) * MAX_PART_NBYTES + len(FIELDS) * MAX_FIELD_NBYTES)
    added = MAX_ADDED_NBYTES if tekken else min(tokenizer_json, MAX_ADDED_NBYTES)
    return kept, extra + 2 * added + 4 * min(longest, MAX_STRING_NBYTES)


def _strings_nbytes(path: Place) -> tuple[int, int, int]:
    """Upper bounds in bytes of a tokenizer.json's strings as stored in GGUF: (lengths, texts, longest text).

    Each string has two quotes and is followed by a comma, colon or bracket; a space may become a letter of two bytes.
    An escaped quote counts as half a string, which adds more to the lengths than it removes from the texts.
    """
    nbytes = n_quotes = n_spaces = longest = run = 0
    ends_escaping = False
    for piece in _pieces(path):
        # No string is longer than a run of pieces without a quote that may end it, plus the pieces on either side.
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
    """The file's bytes in pieces; none if it is missing or larger than a tokenizer.json may be."""
    if not 0 < file_nbytes(path) <= MAX_NBYTES:
        return
    with open_blob(path) as blob:
        for start in range(0, blob.nbytes, _PIECE_NBYTES):
            piece = bytearray(min(_PIECE_NBYTES, blob.nbytes - start))
            blob.read_into(start, piece)
            yield piece
