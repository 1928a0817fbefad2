"""Untrusted adapters: any configuration and any table of tensors gives a file or one StreamconvError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamconv
from streamconv.errors import StreamconvError
from tests import loras, tiny
from tests.oracles import deltas, ggufs

HEADS = {"attn_q": 4, "attn_k": 2}
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}
KEYS = [
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "peft_type", "init_lora_weights"),
    *("use_bdlora", "layer_replication", "alora_invocation_tokens", "lora_parameters", "fine_tune_type", "kasa_config"),
    *("scale", "alpha", "rank", "nblocks", "target_modules_bd_a", "q_proj", ".*", "(", "num_key_value_heads"),
]

odd_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["LORA", "lora", "dora", "full", "pissa", "", "\x00", "8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter")


def result_or_error(adapter: Path, base: Path, **options: Any) -> ggufs.Gguf | None:
    """The file; None where the conversion ended in a StreamconvError, on one line, with nothing written."""
    dst = adapter / "out.gguf"
    dst.unlink(missing_ok=True)
    try:
        streamconv.convert_adapter(adapter, base, dst, **options)
    except StreamconvError as error:
        assert "\n" not in str(error)
        assert not dst.exists()
        return None
    assert ggufs.layout_faults(dst) == []
    return ggufs.read(dst)


@settings(max_examples=80)
@given(
    raw=st.dictionaries(st.sampled_from(KEYS), odd_values, max_size=6),
    scale=st.none() | st.floats(),
    dialect=st.sampled_from(["llama.cpp", "ollama-legacy"]),
)
def test_any_configuration(folder: Path, llama: Path, raw: dict[str, Any], scale: float | None, dialect: str) -> None:
    tensors = loras.factors(loras.Q, 64, 64) | loras.factors("model.layers.1.mlp.up_proj", 160, 64)
    loras.write(folder, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    result_or_error(folder, llama, scale=scale, dialect=dialect)


@settings(max_examples=80)
@given(st.data())
def test_any_table_of_tensors(folder: Path, llama: Path, data: st.DataObject) -> None:
    modules = st.sampled_from(
        [loras.Q, "model.layers.0.mlp.up_proj", "lm_head", "model.norm", "model.embed_tokens", "x"]
    )
    ends = st.sampled_from(
        ["lora_A.weight", "lora_B.weight", "lora_a", "lora_b", "lora_embedding_A", "m", "weight", "bias"]
    )
    shapes = st.lists(st.sampled_from([0, 1, 2, 8, 64, 160]), max_size=3).map(tuple)
    tensors = {}
    for module, end, shape in data.draw(st.lists(st.tuples(modules, ends, shapes), max_size=6)):
        n = int(np.prod(shape, dtype=np.int64))
        tensors[f"{module}.{end}"] = tiny.Tensor("F32", shape, np.full(n, 0.5, "<f4").tobytes())
    loras.write(folder, tensors)
    result_or_error(folder, llama)


@settings(max_examples=40)
@given(
    modules=st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=4, unique=True),
    r=st.integers(1, 200),
    turned=st.booleans(),
    alphas=st.lists(st.sampled_from([12.0, 12.0, 6.0, 3.0, 5.0, -7.5, 0.1]), min_size=4, max_size=4),
    rslora=st.booleans(),
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
)
def test_the_change_is_the_trained_one(
    folder: Path, llama: Path, modules: list[str], r: int, turned: bool, alphas: list[float], rslora: bool, dtype: str
) -> None:
    """Whatever ranks, orientations, scales and types: alpha / rank * B @ A in float64, or a refusal of what is open."""
    settings = loras.PEFT | {"r": r, "use_rslora": rslora, "alpha_pattern": dict(zip(modules, alphas, strict=False))}
    tensors: dict[str, tiny.Tensor] = {}
    for module in modules:
        name = f"model.layers.1.{module}"
        pair = loras.factors(name, *SHAPES[module], r=r)
        tensors |= {key: tiny.Tensor.of(tensor.float32(), dtype) for key, tensor in pair.items()}
    adapter = loras.write(folder, tensors, settings)
    scales = {f"model.layers.1.{m}": a / (r**0.5 if rslora else r) for m, a in zip(modules, alphas, strict=False)}
    expected = deltas.expected(adapter, lambda module: scales[module], HEADS)
    if turned:
        loras.write(folder, {name: loras.turned(tensor) for name, tensor in tensors.items()}, settings)
    file = result_or_error(folder, llama, outtype="f32")
    if file is None:
        assert r == 64 and modules == ["self_attn.q_proj"]
    else:
        assert max(deltas.distances(deltas.applied(file), expected).values()) <= 1e-6
