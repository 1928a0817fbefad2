"""Safetensors headers and configs of every shape: accepted where safetensors accepts them, with the same table."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from streamconv.checkpoint.config import Config
from streamconv.checkpoint.folder import Checkpoint
from streamconv.checkpoint.safetensors import Shard
from streamconv.errors import SourceError
from streamconv.files.strict_json import parse_object

DTYPES = {"F32": 4, "F16": 2, "I64": 8, "U8": 1}
EXTENTS = st.integers(-1, 5) | st.sampled_from([2**31, 2**32, 2**63, 2**64, 1.0, None, "3", True])
OFFSETS = st.integers(-1, 130) | st.sampled_from([2**63, 2**64 - 1, 0.0, None])
NAMES = st.sampled_from(["a", "b.weight", "c", "", "x/y", "n\0", "__metadata__"])
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F9", None, 7]), "shape": st.lists(EXTENTS, max_size=3)},
    optional={"data_offsets": st.lists(OFFSETS, min_size=1, max_size=3), "more": st.none()},
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@st.composite
def chained(draw: st.DrawFn) -> dict[str, Any]:
    """Tensors whose offsets hold, at times with one field spoiled."""
    table: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        nbytes = int(np.prod(shape, dtype=int)) * DTYPES[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    if table and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(table)))
        table[name] = draw(ENTRIES) if draw(st.booleans()) else draw(JSON)
    return table


def data_end(table: dict[str, Any]) -> int:
    ends = [entry.get("data_offsets") for entry in table.values() if isinstance(entry, dict)]
    return max((end[-1] for end in ends if end and isinstance(end[-1], int) and 0 <= end[-1] < 1 << 20), default=0)


@given(chained() | st.dictionaries(NAMES, ENTRIES | JSON, max_size=4), st.integers(-2, 2))
def test_headers(table: dict[str, Any], extra: int) -> None:
    text = json.dumps(table).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(range(1, 200))[: max(0, data_end(table) + (extra == 2))]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        path.write_bytes(content)
        try:
            shard = Shard(path)
        except SourceError as error:
            assert str(error).isprintable()
            assert error.code != "safetensors-library"  # our own rules refuse all that it does, and before it
            if error.code != "tensor-name":  # safetensors takes any name
                with pytest.raises(SafetensorError), safe_open(path, framework="numpy"):
                    pass
            return
        reference = load_file(path)
        assert set(shard.tensors) == set(reference)
        for name, tensor in shard.tensors.items():
            assert tensor.shape == reference[name].shape
            assert content[tensor.offset : tensor.offset + tensor.nbytes] == reference[name].tobytes()
        shard.close()


@given(JSON)
def test_json(value: Any) -> None:
    text = json.dumps(value).encode()
    try:
        found = parse_object(text, "x.json")
    except SourceError as error:
        assert not isinstance(value, dict) or "NaN" in str(error) or "Infinity" in str(error)
    else:
        assert found == value


@given(JSON, st.sampled_from(["integer", "number", "positive", "flag", "text", "section"]))
def test_config_values(value: Any, reader: str) -> None:
    config = Config({"key": value}, Path("config.json"))
    try:
        found = getattr(config, reader)("key")
    except SourceError as error:
        assert "key is " in str(error)
        assert len(str(error)) < 300
    else:
        assert found is None or isinstance(found, int | float | str | Config)


@given(JSON)
def test_an_index_of_any_shape(value: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text("{}")
        index = {"weight_map": value}
        (Path(directory) / "model.safetensors.index.json").write_text(json.dumps(index))
        try:
            Checkpoint.open(Path(directory))
        except SourceError as error:
            assert str(error).isprintable()
        else:
            raise AssertionError("there is no shard")
