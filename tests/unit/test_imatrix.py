"""Importance matrices of both forms: what is in them, what they are for, and files that lie."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from streamconv.budget import Budget
from streamconv.errors import BudgetError, SourceError
from streamconv.ggml.imatrix import TERM, ImportanceMatrix
from tests.raising import raises
from tests.tools import gguf_bytes

Floats = NDArray[np.float32]
COLUMNS, EXPERTS = 96, 5
DENSE, STACKED = "blk.0.attn_q.weight", "blk.1.ffn_down_exps.weight"
SHAPES = {DENSE: (7, COLUMNS), STACKED: (EXPERTS, 3, COLUMNS)}
DATASET = "wiki.train.raw"


def numbers(n: int, seed: int) -> Floats:
    return np.random.default_rng(seed).gamma(0.5, 40.0, n).astype(np.float32)


def legacy_entry(name: str | bytes, n_calls: int, values: Floats, n_values: int | None = None) -> bytes:
    raw = name.encode() if isinstance(name, str) else name
    head = (
        struct.pack("<i", len(raw)) + raw + struct.pack("<ii", n_calls, len(values) if n_values is None else n_values)
    )
    return head + values.tobytes()


def legacy(*entries: bytes, end: bytes = b"", n_entries: int | None = None) -> bytes:
    return struct.pack("<i", len(entries) if n_entries is None else n_entries) + b"".join(entries) + end


def legacy_end(n_chunks: int = 12, dataset: str = DATASET) -> bytes:
    raw = dataset.encode()
    return struct.pack("<ii", n_chunks, len(raw)) + raw


KEYS = {
    "type": gguf_bytes.key("general.type", gguf_bytes.STRING, gguf_bytes.text("imatrix")),
    "datasets": gguf_bytes.array("imatrix.datasets", gguf_bytes.STRING, gguf_bytes.text(DATASET) * 2, 2),
    "count": gguf_bytes.number("imatrix.chunk_count", "I", 12),
    "size": gguf_bytes.number("imatrix.chunk_size", "I", 512),
}


def as_gguf(tensors: dict[str, Floats], keys: dict[str, bytes] = KEYS, type_: int = gguf_bytes.F32) -> bytes:
    """A file of tensors [matrices, columns]."""
    infos, data = [], b""
    for name, values in tensors.items():
        infos.append(gguf_bytes.tensor(name, values.shape[::-1], type_, len(data)))
        raw = values.astype(np.float16 if type_ == gguf_bytes.F16 else np.float32).tobytes()
        data += raw + bytes(-len(raw) % 32)
    return gguf_bytes.gguf(list(keys.values()), infos, data)


def pair(name: str, sums: Floats, counts: list[float]) -> dict[str, Floats]:
    return {f"{name}.in_sum2": sums, f"{name}.counts": np.array(counts, np.float32)[:, None]}


def opened(tmp_path: Path, data: bytes, name: str = "model.imatrix") -> ImportanceMatrix:
    path = tmp_path / name
    path.write_bytes(data)
    return ImportanceMatrix.open(path)


def test_the_older_form(tmp_path: Path) -> None:
    dense, experts, raw = numbers(COLUMNS, 1), numbers(EXPERTS * COLUMNS, 2), numbers(COLUMNS, 3)
    entries = [
        legacy_entry(DENSE, 12, dense),
        legacy_entry(STACKED, 7, experts),
        legacy_entry("blk.3.x.weight", 0, raw),
    ]
    with opened(tmp_path, legacy(*entries, end=legacy_end())) as matrix:
        assert (len(matrix), matrix.datasets, matrix.n_chunks) == (3, (DATASET,), 12)
        assert np.array_equal(matrix.weights(DENSE, SHAPES[DENSE]), dense / np.float32(12))  # type: ignore[arg-type]
        for i, part in enumerate(experts.reshape(EXPERTS, COLUMNS)):
            found = matrix.weights(STACKED, SHAPES[STACKED], i)
            assert found is not None and np.array_equal(found, part / np.float32(7))
        assert np.array_equal(matrix.weights("blk.3.x.weight", (2, COLUMNS)), raw)  # type: ignore[arg-type]
        assert matrix.weights("blk.9.x.weight", (2, COLUMNS)) is None


@pytest.mark.parametrize("end", [b"", struct.pack("<i", 5), struct.pack("<ii", 5, 0)])
def test_the_oldest_files_end_early(tmp_path: Path, end: bytes) -> None:
    with opened(tmp_path, legacy(legacy_entry(DENSE, 3, numbers(COLUMNS, 1)), end=end)) as matrix:
        assert (matrix.datasets, matrix.n_chunks) == ((), 5 if end else 0)


def test_the_gguf_form(tmp_path: Path) -> None:
    dense, experts = numbers(COLUMNS, 1), numbers(EXPERTS * COLUMNS, 2).reshape(EXPERTS, COLUMNS)
    counts = [40.0, 0.0, 7.0, 1.0, 2000.0]
    tensors = pair(DENSE, dense[None], [512.0]) | pair(STACKED, experts, counts)
    tensors |= pair("blk.2.one_count.weight", experts, [9.0]) | pair("blk.2.unseen.weight", dense[None], [0.0])
    with opened(tmp_path, as_gguf(tensors)) as matrix:
        assert (len(matrix), matrix.datasets, matrix.n_chunks) == (4, (DATASET,), 12)
        assert np.array_equal(matrix.weights(DENSE, SHAPES[DENSE]), dense / np.float32(512))  # type: ignore[arg-type]
        for i, count in enumerate(counts):
            found = matrix.weights(STACKED, SHAPES[STACKED], i)
            expected = experts[i] / np.float32(count) if count else np.ones(COLUMNS, np.float32)
            assert found is not None and np.array_equal(found, expected)
            found = matrix.weights("blk.2.one_count.weight", SHAPES[STACKED], i)
            assert found is not None and np.array_equal(found, experts[i] / np.float32(9))
        unseen = matrix.weights("blk.2.unseen.weight", (1, COLUMNS))
        assert unseen is not None and (unseen == 1).all()


def test_keys_are_those_of_llama_quantize(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    end = legacy_end(dataset="é" * 100)
    with opened(folder, legacy(legacy_entry(DENSE, 1, numbers(COLUMNS, 1)), end=end), "ä" * 100) as matrix:
        assert [(key.key, key.type, key.value) for key in matrix.metadata()] == [
            ("quantize.imatrix.file", GGUFValueType.STRING, "ä" * 63),
            ("quantize.imatrix.dataset", GGUFValueType.STRING, "é" * 63),
            ("quantize.imatrix.entries_count", GGUFValueType.UINT32, 1),
            ("quantize.imatrix.chunks_count", GGUFValueType.UINT32, 12),
        ]
    with opened(tmp_path, legacy(legacy_entry(DENSE, 1, numbers(COLUMNS, 1)))) as matrix:
        assert [key.key.rpartition(".")[2] for key in matrix.metadata()] == ["file", "entries_count"]


def test_a_model_is_held_against_it(tmp_path: Path) -> None:
    tensors = pair(DENSE, numbers(COLUMNS, 1)[None], [3.0]) | pair("token_embd.weight", numbers(32, 1)[None], [3.0])
    tensors |= pair("blk.77.attn_q.weight", numbers(COLUMNS, 1)[None], [3.0])
    with opened(tmp_path, as_gguf(tensors)) as matrix:
        model = SHAPES | {"token_embd.weight": (11, COLUMNS)}
        warnings = matrix.check(model)
        assert [(w.code, w.tensor) for w in warnings] == [
            ("imatrix-embedding", "token_embd.weight"),
            ("imatrix-unused", None),
        ]
        assert "blk.77.attn_q.weight" in warnings[1].message
        assert matrix.weights("token_embd.weight", (11, COLUMNS)) is None
        for shape in ((7, 2 * COLUMNS), (2, 7, COLUMNS), (7, COLUMNS // 2)):
            with pytest.raises(SourceError) as error:
                matrix.check({DENSE: shape})
            assert (error.value.code, error.value.tensor) == ("imatrix-size", DENSE)
        with pytest.raises(SourceError) as error:
            matrix.check({"blk.0.attn_k.weight": (7, COLUMNS)})
        assert error.value.code == "imatrix-no-match"


def test_counts_must_be_those_of_the_matrices(tmp_path: Path) -> None:
    """As many as the tensor has, or one: parts of a row have none of their own."""
    with opened(tmp_path, as_gguf(pair(DENSE, numbers(COLUMNS, 1).reshape(2, -1), [3.0, 4.0]))) as matrix:
        with pytest.raises(SourceError) as error:
            matrix.check({DENSE: (7, COLUMNS)})
        assert error.value.code == "imatrix-size"


def bad_number(value: float, place: int) -> Floats:
    values = numbers(40_000, 1)
    values[place] = value
    return values


ENTRY = legacy_entry(DENSE, 3, numbers(COLUMNS, 1))
PAIR = pair(DENSE, numbers(COLUMNS, 1)[None], [3.0])
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "truncated"),
    "three bytes": (lambda: b"abc", "truncated"),
    "text": (lambda: b"<!DOCTYPE html><html></html>" * 9, "imatrix-malformed"),
    "no entries": (lambda: legacy(), "imatrix-malformed"),
    "fewer than none": (lambda: legacy(ENTRY, n_entries=-1), "imatrix-malformed"),
    "more entries than bytes": (lambda: legacy(ENTRY, n_entries=2**31 - 1), "imatrix-malformed"),
    "more entries than there are": (lambda: legacy(ENTRY, n_entries=3), "truncated"),
    "fewer entries than there are": (lambda: legacy(ENTRY, ENTRY, n_entries=1), "imatrix-malformed"),
    "one name twice": (lambda: legacy(ENTRY, ENTRY), "imatrix-malformed"),
    "no values": (lambda: legacy(ENTRY, legacy_entry("x", 1, numbers(0, 1)), end=legacy_end()), "imatrix-malformed"),
    "less than none": (lambda: legacy(legacy_entry(DENSE, 1, numbers(9, 1), -9)), "imatrix-malformed"),
    "more values than bytes": (lambda: legacy(legacy_entry(DENSE, 1, numbers(9, 1), 2**31 - 1)), "truncated"),
    "no name": (lambda: legacy(legacy_entry("", 1, numbers(9, 1))), "imatrix-malformed"),
    "a long name": (lambda: legacy(legacy_entry("x" * 64, 1, numbers(9, 1))), "imatrix-malformed"),
    "a NUL in a name": (lambda: legacy(legacy_entry("x\0y", 1, numbers(9, 1))), "imatrix-malformed"),
    "a name that is not text": (lambda: legacy(legacy_entry(b"\xff\xfe", 1, numbers(9, 1))), "imatrix-malformed"),
    "a cut end": (lambda: legacy(ENTRY, end=legacy_end()[:-1]), "imatrix-malformed"),
    "bytes after the end": (lambda: legacy(ENTRY, end=legacy_end() + b"x"), "imatrix-malformed"),
    "half a count": (lambda: legacy(ENTRY, end=b"xy"), "truncated"),
    "NaN": (lambda: legacy(legacy_entry(DENSE, 1, bad_number(np.nan, 20_000))), "imatrix-value"),
    "infinity": (lambda: legacy(legacy_entry(DENSE, 1, bad_number(np.inf, 39_999))), "imatrix-value"),
    "negative": (lambda: legacy(legacy_entry(DENSE, 1, bad_number(-1e-9, 0))), "imatrix-value"),
    "GGUF: NaN": (lambda: as_gguf(pair(DENSE, bad_number(np.nan, 17)[None], [1.0])), "imatrix-value"),
    "GGUF: count NaN": (lambda: as_gguf(pair(DENSE, numbers(COLUMNS, 1)[None], [np.nan])), "imatrix-value"),
    "GGUF: count negative": (lambda: as_gguf(pair(DENSE, numbers(8, 1)[None], [-1.0])), "imatrix-value"),
    "GGUF: one count of two": (
        lambda: as_gguf(pair(DENSE, numbers(8, 1).reshape(2, 4), [1.0, np.inf])),
        "imatrix-value",
    ),
    "GGUF: no keys": (lambda: as_gguf(PAIR, {}), "imatrix-keys"),
    "GGUF: a key of another type": (
        lambda: as_gguf(PAIR, KEYS | {"count": gguf_bytes.number("imatrix.chunk_count", "i", 12)}),
        "imatrix-keys",
    ),
    "GGUF: datasets of another type": (
        lambda: as_gguf(PAIR, KEYS | {"datasets": gguf_bytes.number("imatrix.datasets", "i", 12)}),
        "imatrix-keys",
    ),
    "GGUF: no tensors": (lambda: as_gguf({}), "imatrix-empty"),
    "GGUF: sums alone": (lambda: as_gguf({k: v for k, v in PAIR.items() if "sum" in k}), "imatrix-malformed"),
    "GGUF: counts alone": (lambda: as_gguf({k: v for k, v in PAIR.items() if "counts" in k}), "imatrix-malformed"),
    "GGUF: F16": (lambda: as_gguf(PAIR, type_=gguf_bytes.F16), "imatrix-type"),
    "GGUF: counts that do not divide": (
        lambda: as_gguf(pair(DENSE, numbers(COLUMNS, 1)[None], [1.0] * 5)),
        "imatrix-malformed",
    ),
    "GGUF: cut": (lambda: as_gguf(PAIR)[:-90], "truncated"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path: Path, name: str) -> None:
    made, code = BAD[name]
    data = made()
    tracemalloc.start()
    try:
        with pytest.raises(SourceError) as error:
            opened(tmp_path, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error.value.code == code
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert peak < 2 << 20


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    model = {"architecture": gguf_bytes.key("general.architecture", gguf_bytes.STRING, gguf_bytes.text("lfm2"))}
    with pytest.raises(SourceError) as error:
        opened(tmp_path, as_gguf(PAIR, model))
    assert "lfm2" in (error.value.hint or "")


def test_memory_grows_with_names_alone(tmp_path: Path) -> None:
    entries = [legacy_entry(f"blk.{i}.ffn_down.weight", 3, numbers(16_384, i)) for i in range(60)]
    path = tmp_path / "large.dat"
    path.write_bytes(legacy(*entries, end=legacy_end()))
    assert path.stat().st_size > 3 << 20
    budget = Budget(1 << 30, 0)
    tracemalloc.start()
    with ImportanceMatrix.open(path, budget):
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert kept < budget.terms[TERM] + (128 << 10) and peak < 512 << 10


@pytest.mark.parametrize("form", ["dat", "gguf"])
def test_what_is_kept_is_reserved_first(tmp_path: Path, form: str) -> None:
    """And measured to be less; a bound that is too small is said before it is taken."""
    names = [f"blk.{i}.ffn_down.weight" for i in range(3_000)]
    path = tmp_path / "many"
    if form == "dat":
        path.write_bytes(legacy(*(legacy_entry(name, 3, numbers(1, 1)) for name in names), end=legacy_end()))
    else:
        pairs = [pair(name, numbers(1, 1)[None], [1.0]) for name in names]
        path.write_bytes(as_gguf({key: value for made in pairs for key, value in made.items()}))
    budget = Budget(1 << 30, 0)
    tracemalloc.start()
    with ImportanceMatrix.open(path, budget) as matrix:
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(matrix) == len(names)
        assert len(names) * 200 < kept < budget.terms[TERM] == budget.held
    tracemalloc.start()
    with raises(BudgetError, code="memory-bound"):
        ImportanceMatrix.open(path, Budget(1 << 20, 0, 0))
    assert tracemalloc.get_traced_memory()[1] < 3 << 19
    tracemalloc.stop()
