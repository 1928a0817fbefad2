"""Compare the keys of a GGUF file with those expected from its source.

A file passes only if llama.cpp runs it like the file that the job would write: a missing key counts as llama.cpp's
default for it, and keys that no loader can do without are required. Descriptive keys are not compared.
Source: load_hparams in src/llama-model.cpp and llama_vocab::impl::load in src/llama-vocab.cpp of the llama.cpp inside
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import repeat, zip_longest
from typing import Final

import numpy as np
from gguf.constants import GGUFValueType, Keys, TokenType

from streamconv.engine.job import Job
from streamconv.errors import RunWarning, VerifyError
from streamconv.gguf.entries import GGUFKey, Span
from streamconv.gguf.format import SCALAR_FORMATS, KeyValue, PackedArray, Scalar
from streamconv.gguf.reader import GGUFFile

RELATIVE_TOLERANCE: Final = 1e-6  # of a float key: other tools round a double once more
TEMPLATE: Final = "tokenizer.chat_template"
VOCABULARY: Final = "tokenizer.ggml."
# Names of one pre-tokenizer.
SYNONYMS: Final = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
)
_INT32S: Final = frozenset((GGUFValueType.INT32, GGUFValueType.UINT32))

Values = dict[str, Scalar | PackedArray]


def compare_keys(job: Job, file: GGUFFile) -> list[RunWarning]:
    """Return warnings for harmless differences from the source.

    Raises:
        VerifyError: a key differs in a way that changes results; the message names the first one.
    """
    ours = {entry.key: entry for entry in job.keys}
    absent = {Keys.General.TYPE: ("model",), **job.defaults}
    absent |= _absent_in_vocabulary({entry.key: entry.value for entry in job.keys})
    warnings = []
    for name in (*ours, *(name for name in file.keys if name not in ours)):
        if not _counts(name, job, is_in_both=name in ours and name in file.keys):
            continue
        difference = _difference(name, ours.get(name), file.keys.get(name), absent.get(name, ()), ours)
        if difference is None:
            continue
        if _decides(name, ours, file, is_known=name in absent):
            raise VerifyError(difference, file=file.path, code="key-differs")
        warnings.append(RunWarning("key", difference))
    return warnings


def _counts(name: str, job: Job, *, is_in_both: bool) -> bool:
    """Whether a loader reads the key `name`; in an adapter, it ignores the keys of the base."""
    if job.command == "lora" and name.startswith(f"{job.architecture}."):
        return is_in_both
    return name.startswith((f"{job.architecture}.", "adapter.", VOCABULARY, TEMPLATE)) or name in (
        Keys.General.ARCHITECTURE,
        Keys.General.TYPE,
    )


def _decides(name: str, ours: dict[str, KeyValue], file: GGUFFile, *, is_known: bool) -> bool:
    """Whether another value of the key would change results."""
    if name.startswith(TEMPLATE):
        return False
    model = ours.get(Keys.Tokenizer.MODEL)
    if name == Keys.Tokenizer.PRE and (model is None or model.value != "gpt2"):
        return False  # only byte-level BPE has pre-tokenizers
    if is_known or (name in ours and name in file.keys):
        return True
    return name in ours and not name.endswith("_token_id")  # llama.cpp finds most of those by their texts


# ---------------------------------------------------------------- llama.cpp's defaults for missing keys


def _absent_in_vocabulary(ours: Values) -> dict[str, tuple[Scalar, ...]]:
    is_bpe = ours.get(Keys.Tokenizer.MODEL) == "gpt2"
    found: dict[str, tuple[Scalar, ...]] = {
        Keys.Tokenizer.PRE: ("default",),
        Keys.Tokenizer.TOKEN_TYPE: (int(TokenType.NORMAL),),
        Keys.Tokenizer.BOS_ID: (11 if is_bpe else 1,),
        Keys.Tokenizer.EOS_ID: (11 if is_bpe else 2,),
        Keys.Tokenizer.ADD_BOS: (not is_bpe or ours.get(Keys.Tokenizer.PRE) in SYNONYMS,),
        Keys.Tokenizer.ADD_EOS: (False,),
        Keys.Tokenizer.ADD_SEP: (False,),
        Keys.Tokenizer.ADD_PREFIX: (not is_bpe,),
    }
    if not is_bpe:
        found |= {Keys.Tokenizer.UNK_ID: (0,), Keys.Tokenizer.SCORES: (0.0,)}
    return found if Keys.Tokenizer.MODEL in ours else {}


# ---------------------------------------------------------------- two values


def _difference(
    name: str, ours: KeyValue | None, theirs: GGUFKey | None, absent: tuple[Scalar, ...], all_ours: dict[str, KeyValue]
) -> str | None:
    """A description of how the file's key differs from the source's, or None. Either may be missing."""
    if ours is None:
        found = theirs.value if theirs is not None else None
        if not isinstance(found, Span) and found in absent:
            return None
        known = "" if not absent else f"; without the key, loaders use {_shown(absent[0])}"
        return f"key {name} is {_shown(found)}, but the source does not define it{known}"
    if theirs is None:
        if any(_first_difference(ours.value, value, None) is None for value in absent):
            return None
        return f"key {name} is missing; according to the source it should be {_shown(ours.value)}"
    if not _is_loadable(name, ours, theirs):
        return f"key {name} has type {theirs.type_name}, but according to the source it should be {_type_name(ours)}"
    if name == Keys.Tokenizer.PRE and {ours.value, theirs.value} <= SYNONYMS:
        return None
    layers = all_ours.get(f"{name.partition('.')[0]}.block_count")
    unlike = _first_difference(ours.value, theirs.value, layers.value if layers is not None else None)
    if unlike is None:
        return None
    index, left, right = unlike
    place = "" if index is None else f"[{index}]"
    return f"key {name}{place} is {_shown(right)}, but according to the source it should be {_shown(left)}"


def _first_difference(
    ours: Scalar | PackedArray, theirs: Scalar | Span, n_layers: object
) -> tuple[int | None, Scalar | None, Scalar | None] | None:
    """(index, one value, the other) of the first that differ. A number beside an array stands for every layer."""
    n = n_layers if isinstance(n_layers, int) else None
    left, right = _values(ours), _values(theirs)
    if left is None and right is None:
        assert not isinstance(ours, PackedArray) and not isinstance(theirs, Span)
        return None if _equal(ours, theirs) else (None, ours, theirs)
    if left is None and not isinstance(ours, PackedArray):
        left = repeat(ours, n) if n is not None else iter([ours])
    if right is None and not isinstance(theirs, Span):
        right = repeat(theirs, ours.length if isinstance(ours, PackedArray) else 1)
    assert left is not None and right is not None
    for index, (one, other) in enumerate(zip_longest(left, right)):
        if not _equal(one, other):
            return index, one, other
    return None


def _values(value: Scalar | PackedArray | Span) -> Iterator[Scalar] | None:
    """The values of an array, one by one; None for a scalar."""
    if isinstance(value, PackedArray):
        return unpack(value)
    return value.values() if isinstance(value, Span) else None


def unpack(array: PackedArray) -> Iterator[Scalar]:
    """The values of a packed array, one by one."""
    view = memoryview(array.payload)
    if array.element != GGUFValueType.STRING:
        for value in np.frombuffer(view, dtype=np.dtype(SCALAR_FORMATS[array.element])):
            yield value.item()
        return
    at = 0
    for _ in range(array.length):
        (nbytes,) = struct.unpack_from("<Q", view, at)
        yield bytes(view[at + 8 : at + 8 + nbytes]).decode("utf-8", "backslashreplace")
        at += 8 + nbytes


def _is_loadable(name: str, ours: KeyValue, theirs: GGUFKey) -> bool:
    """Whether a loader that takes the one type takes the other: a scalar's is exact, layers may have either int32."""
    is_text = isinstance(theirs.value, Span) and theirs.type == GGUFValueType.STRING
    mine, found = _element(ours), theirs.value.element if isinstance(theirs.value, Span) else theirs.type
    if is_text or name.startswith("tokenizer."):
        return (mine, ours.type) == (found, theirs.type)
    if theirs.type == GGUFValueType.ARRAY and {mine, found} <= _INT32S:
        return True
    return mine == found


def _element(entry: KeyValue) -> GGUFValueType:
    return entry.value.element if isinstance(entry.value, PackedArray) else entry.type


def _type_name(entry: KeyValue) -> str:
    name = _element(entry).name.lower()
    return f"array[{name}]" if isinstance(entry.value, PackedArray) else name


def _equal(ours: Scalar | None, theirs: Scalar | None) -> bool:
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return abs(ours - theirs) <= RELATIVE_TOLERANCE * abs(ours)
    return ours == theirs


def _shown(value: Scalar | PackedArray | Span | None) -> str:
    if isinstance(value, PackedArray | Span):
        return f"an array of {value.length:,}"
    return "missing" if value is None else repr(value)[:80]
