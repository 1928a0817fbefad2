"""What a vocabulary will cost in memory, from the sizes of its files alone, before anything of them is believed.

Owns: the bound. Does not own: reading. Invariant: what read_vocabulary allocates stays under it, whatever the files
hold; tests hold that for real shapes and for the worst that the grammar admits.
"""

from __future__ import annotations

from pathlib import Path

from streamconv.strict_json import OBJECT_NBYTES_PER_BYTE
from streamconv.vocab.chat_templates import template_files
from streamconv.vocab.companions import FILE_NAMES
from streamconv.vocab.json_stream import MAX_STRING_NBYTES
from streamconv.vocab.sentencepiece_model import FILE_NAME as SENTENCEPIECE_MODEL
from streamconv.vocab.tokenizer_json import FILE_NAME as TOKENIZER_JSON
from streamconv.vocab.tokenizer_json import MAX_PART_NBYTES, PARTS

# A merge `"a b",` of 6 bytes becomes 3 bytes and a length of 8; the payload grows by an eighth more than it needs.
_PAYLOAD_PER_BYTE = 11 / 6 * 9 / 8
# A row in the header: the length of its text, its type, its score, and `[PADn]` where it has no text of its own.
_ROW_NBYTES = 8 + 4 + 4 + 16
# A row while it is read: its text as an object, its id, its place in a dict that has just grown, in a list, in arrays.
_ENTRY_NBYTES = 240
# A window, a batch as text and as objects, and a part of a tokenizer.json as objects.
_WORKING_NBYTES = 4 << 20


def vocabulary_nbytes(directory: Path, n_vocab: int) -> tuple[int, int]:
    """(bytes of the keys, which stay; bytes on top of them while the files are read), each an upper bound."""
    tokenizer_json = _size(directory / TOKENIZER_JSON)
    model = _size(directory / SENTENCEPIECE_MODEL)
    companions = sum(_size(directory / name) for name in FILE_NAMES)
    templates = sum(_size(path) for path in template_files(directory))
    kept = int(max(tokenizer_json, model) * _PAYLOAD_PER_BYTE) + n_vocab * _ROW_NBYTES + 4 * (companions + templates)
    parts = min(tokenizer_json, (len(PARTS) + 1) * MAX_PART_NBYTES) * OBJECT_NBYTES_PER_BYTE
    extra = n_vocab * _ENTRY_NBYTES + companions * OBJECT_NBYTES_PER_BYTE + 8 * templates + 2 * model
    return kept, extra + parts + min(tokenizer_json, MAX_STRING_NBYTES) + _WORKING_NBYTES


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
