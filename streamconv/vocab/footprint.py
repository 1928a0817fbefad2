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
from streamconv.vocab.tokenizer_json import MAX_ADDED_NBYTES, MAX_PART_NBYTES, PARTS

# A merge `"a b",` of 6 bytes becomes 3 bytes and a length of 8; the payload grows by an eighth more than it needs.
_PAYLOAD_PER_BYTE = 11 / 6 * 9 / 8
# All texts may be held twice, as objects and as payload, or be merges: 2 bytes for one then, not the above.
_OBJECT_PER_BYTE = 1 / 6
# A row of the header: the length of its text, its type, its score, and `[PADn]` where it has no text of its own.
_ROW_NBYTES = 8 + 4 + 4 + 16
# A row while it is read: its text as an object (48), its id as one (32), its place in a dict that is just growing (90),
# in a list (8) and in arrays (16).
_ENTRY_NBYTES = 194
# A window, a batch as text and as objects, and what it is packed by. Measured: 3 MiB.
_WORKING_NBYTES = 4 << 20
# A companion's tree of objects, and the added tokens that are made of it. Measured on the worst: 28 and 15.
_COMPANION_PER_BYTE = OBJECT_NBYTES_PER_BYTE + 20


def vocabulary_nbytes(directory: Path, n_vocab: int) -> tuple[int, int]:
    """(bytes of the keys, which stay; bytes on top of them while the files are read), each an upper bound."""
    tokenizer_json = _size(directory / TOKENIZER_JSON)
    model = _size(directory / SENTENCEPIECE_MODEL)
    companions = sum(_size(directory / name) for name in FILE_NAMES)
    templates = sum(_size(path) for path in template_files(directory))
    tokens = max(tokenizer_json, model)
    kept = int(tokens * _PAYLOAD_PER_BYTE) + n_vocab * _ROW_NBYTES + 4 * (companions + templates)
    parts = min(tokenizer_json, (len(PARTS) + 1) * MAX_PART_NBYTES) * OBJECT_NBYTES_PER_BYTE
    extra = n_vocab * _ENTRY_NBYTES + int(tokens * _OBJECT_PER_BYTE) + 2 * model
    extra += companions * _COMPANION_PER_BYTE + 8 * templates + parts + _WORKING_NBYTES
    return kept, extra + 2 * min(tokenizer_json, MAX_ADDED_NBYTES) + 4 * min(tokenizer_json, MAX_STRING_NBYTES)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
