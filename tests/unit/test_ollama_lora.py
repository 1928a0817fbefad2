"""ollama-legacy: Ollama's first converter written down in numpy, for shapes that the goldens do not have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import streamconv
from streamconv.errors import SourceError, UsageError
from streamconv.lazy.leaves import Resident
from streamconv.lazy.node import Workspace, peak_nbytes, read
from streamconv.lazy.scratch import Scratch
from streamconv.lazy.views import Reflow
from streamconv.report import Report
from tests import loras, tiny
from tests.oracles import deltas, ggufs
from tests.raising import raises
from tests.unit.test_base_model import LLAMA, gguf

Array = NDArray[Any]

N_HEADS = 4
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"), head_dim=24)


def permuted(values: Array, n: int) -> Array:
    return values.reshape(n, 2, values.shape[0] // n // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def legacy(name: str, stored: Array, k_heads: int = N_HEADS) -> Array:
    """One factor as Ollama's converter leaves it: decided by the stored shape and the target's name alone."""
    n_rows, n_columns = stored.shape
    is_a, heads = name.endswith("lora_a"), {"attn_q": N_HEADS, "attn_k": k_heads}.get(name.split(".")[-3])
    if n_rows > n_columns if is_a else n_rows < n_columns:
        return (permuted(stored, heads) if is_a and heads else stored).T
    if is_a and heads:
        return permuted(stored.reshape(n_columns, n_rows), heads).reshape(n_rows, n_columns)
    return stored


def target(name: str) -> str:
    """The eleven replacements."""
    for old, new in (
        ("base_model.model.", ""), ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"), ("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return re.sub(r"lora_([AB])\.weight|lora_([ab])", lambda m: f"weight.lora_{(m[1] or m[2]).lower()}", name)


def convert(adapter: Path, base: Path, **options: Any) -> tuple[Report, ggufs.Gguf]:
    dst = adapter / "legacy.gguf"
    report = streamconv.convert_adapter(adapter, base, dst, dialect="ollama-legacy", force=True, **options)
    assert ggufs.layout_faults(dst) == []
    return report, ggufs.read(dst)


@pytest.mark.parametrize("r", [1, 5, 16])
@pytest.mark.parametrize("make", [tiny.peft_adapter, tiny.mlx_adapter])
@pytest.mark.parametrize(("dtype", "written"), [("F32", "F16"), ("F16", "F16"), ("BF16", "BF16")])
def test_every_byte(tmp_path: Path, llama: Path, make: Any, r: int, dtype: str, written: str) -> None:
    adapter = make(tmp_path, llama, r=r, dtype=dtype)
    _, file = convert(adapter, llama)
    expected = {target(name): legacy(target(name), t.float32()) for name, t in tiny.tensors_of(adapter).items()}
    assert list(file.tensors) == sorted(expected)
    for name, values in expected.items():
        stored = file.tensors[name]
        assert (stored.type, stored.shape) == (written, values.shape)
        assert stored.raw.tobytes() == tiny.Tensor.of(values, written).data, name


def test_heads_that_the_adapter_states_are_ks(tmp_path: Path, llama: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path, llama, targets=("q_proj", "k_proj"), config={"num_key_value_heads": 2})
    _, file = convert(adapter, llama)
    for source, stored in tiny.tensors_of(adapter).items():
        values = legacy(target(source), stored.float32(), k_heads=2)
        assert file.tensors[target(source)].raw.tobytes() == tiny.Tensor.of(values, "F16").data, source


def test_layers_are_ordered_by_number(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", n_layers=11)
    _, file = convert(tiny.peft_adapter(tmp_path / "adapter", base, targets=("v_proj",)), base)
    assert [name.split(".")[1] for name in file.tensors][::2] == [str(i) for i in range(11)]


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"r": 8, "lora_alpha": 12}, 12.0),
        ({"r": 8, "lora_alpha": 12, "use_rslora": True}, 12.0),
        ({"r": 8, "lora_alpha": 0}, 0.0),
        ({"lora_parameters": {"rank": 8, "scale": 1.5}}, 0.0),
        ({"lora_parameters": {"rank": 8, "scale": 1.5, "alpha": 16.5}}, 16.5),
        ({"lora_parameters": {"rank": 8, "scale": 1.5, "alpha": 0}, "lora_alpha": 3}, 3.0),
    ],
)
def test_keys(tmp_path: Path, llama: Path, settings: dict[str, Any], alpha: float) -> None:
    _, file = convert(loras.write(tmp_path, loras.factors(Q, 96, 64), settings), llama)
    assert [(name, entry.type[0], entry.value) for name, entry in file.keys.items()] == [
        ("adapter.lora.alpha", "FLOAT32", alpha),
        ("adapter.type", "STRING", "lora"),
        ("general.architecture", "STRING", "llama"),
        ("general.file_type", "UINT32", 1),
        ("general.type", "STRING", "adapter"),
        ("general.version", "STRING", "v0.2"),
        ("llama.attention.head_count", "UINT32", 4),
        ("llama.attention.head_count_kv", "UINT32", 2),
    ]


# ---------------------------------------------------------------- what it says of itself


def distances(report: Report) -> dict[str, float]:
    """The relative distances that the warnings give, by tensor."""
    told = {w.tensor: re.search(r"by (\S+) of its", w.message) for w in report.warnings if w.code == "legacy-distance"}
    return {str(name): float(match[1]) for name, match in told.items() if match}


@pytest.mark.parametrize("alpha", [12, 0])
@pytest.mark.parametrize("make", [tiny.peft_adapter, tiny.mlx_adapter])
def test_the_distance_of_every_q_and_k(tmp_path: Path, llama: Path, make: Any, alpha: int) -> None:
    scale, r = 1.5, 8
    settings = {"alpha": 12} if make is tiny.peft_adapter else {"scale": scale, "config": {"lora_alpha": alpha}}
    adapter = make(tmp_path, llama, r=r, dtype="F16", **settings)
    report, file = convert(adapter, llama)
    expected = deltas.expected(adapter, lambda _: scale, {"attn_q": 4, "attn_k": 2})
    computed = deltas.distances(deltas.applied(file), expected)
    told = distances(report)
    assert sorted(told) == [f"blk.{i}.attn_{x}.weight" for i in (0, 1) for x in "kq"]
    for name, distance in told.items():
        assert distance == pytest.approx(computed[name], rel=1e-5)
        assert distance > 1


def test_a_change_of_zero_has_no_distance(tmp_path: Path, llama: Path) -> None:
    tensors = loras.factors(Q, 96, 64)
    tensors[f"base_model.model.{Q}.lora_B.weight"] = tiny.Tensor.of(np.zeros((96, 8)), "F32")
    assert distances(convert(loras.write(tmp_path, tensors), llama)[0]) == {"blk.0.attn_q.weight": 0.0}


@pytest.mark.parametrize("make", [tiny.peft_adapter, tiny.mlx_adapter])
def test_every_module_that_is_written_the_wrong_way_round_is_told(tmp_path: Path, llama: Path, make: Any) -> None:
    """A rank of 72 is above in or out of every module."""
    report, file = convert(make(tmp_path, llama, r=72, layers=(0,)), llama)
    assert file.tensors["blk.0.attn_q.weight.lora_a"].shape == (64, 72)
    told = {w.tensor: w.message for w in report.warnings if w.code == "legacy-distance"}
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up"]
    assert list(told) == [f"blk.0.{name}.weight" for name in names]
    for target, message in told.items():
        shapes = [list(file.tensors[f"{target}.lora_{x}"].shape) for x in "ab"]
        assert f"transposed (lora_a {shapes[0]}, lora_b {shapes[1]}): llama.cpp refuses" in message


def test_a_square_factor_that_is_left_transposed_has_its_distance(tmp_path: Path, llama: Path) -> None:
    targets = {"q_proj": "attn_q", "o_proj": "attn_output", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    adapter = tiny.mlx_adapter(
        tmp_path, llama, targets=targets, r=64, scale=1.5, dtype="F16", config={"lora_alpha": 96}
    )
    report, file = convert(adapter, llama)
    computed = deltas.distances(
        deltas.applied(file), deltas.expected(adapter, lambda _: 1.5, {"attn_q": 4, "attn_k": 2})
    )
    told = distances(report)
    assert sorted(told) == sorted(f"blk.{i}.{name}.weight" for i in (0, 1) for name in targets.values())
    for name, distance in told.items():
        assert distance == pytest.approx(computed[name], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_rslora": True}, "its scale in the file is 1.5 here and 1 more, but 4.24264 was trained"),
        ({"alpha_pattern": {"k_proj": 4}}, "its scale in the file is 1.5, but 0.5 was trained"),
        ({"lora_alpha": 0}, "its scale in the file is 1 here and 1 more, but 0 was trained"),
    ],
)
def test_scales_that_it_ignores(tmp_path: Path, llama: Path, settings: dict[str, Any], words: str) -> None:
    tensors = loras.factors(Q, 96, 64) | loras.factors(K, 48, 64)
    report, _ = convert(loras.write(tmp_path, tensors, loras.PEFT | settings), llama)
    assert words in [warning.message for warning in report.warnings if warning.code == "legacy-scale"]


def test_every_file_is_told_to_be_wrong(tmp_path: Path, llama: Path) -> None:
    adapter = loras.write(tmp_path, loras.factors(Q, 96, 64), loras.PEFT | {"alora_invocation_tokens": [1]})
    codes = [warning.code for warning in convert(adapter, llama)[0].warnings]
    assert codes == ["legacy", "legacy-distance", "legacy-ignored"]


# ---------------------------------------------------------------- what it does not take


@pytest.mark.parametrize("options", [{"outtype": "f16"}, {"scale": 1.0}, {"name": "Mine"}])
def test_options_of_the_other_dialect(tmp_path: Path, llama: Path, options: dict[str, Any]) -> None:
    with raises(UsageError, code="option-conflict"):
        convert(loras.write(tmp_path, loras.factors(Q, 96, 64)), llama, **options)


def test_other_architectures(tmp_path: Path) -> None:
    base = tiny.lfm2(tmp_path / "base")
    adapter = loras.write(tmp_path / "adapter", loras.factors("model.layers.0.feed_forward.w1", 96, 64))
    with pytest.raises(SourceError, match="adapters only for llama, but the base is lfm2"):
        convert(adapter, base)


def test_modules_that_it_has_no_name_for(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", tied=False)
    with pytest.raises(SourceError, match="lm_head: ollama-legacy has no name for it"):
        convert(tiny.peft_adapter(tmp_path / "adapter", base, targets=("lm_head",)), base)


@pytest.mark.parametrize("alpha", [8.5, -1, 1 << 32])
def test_alphas_that_go_does_not_parse(tmp_path: Path, llama: Path, alpha: float) -> None:
    adapter = loras.write(tmp_path, loras.factors(Q, 96, 64), loras.PEFT | {"lora_alpha": alpha})
    with raises(SourceError, code="legacy-alpha"):
        convert(adapter, llama)


def test_columns_that_are_no_heads(tmp_path: Path) -> None:
    gguf(tmp_path / "base.gguf", LLAMA | {"llama.embedding_length": 60, "llama.attention.key_length": 16})
    adapter = loras.write(tmp_path / "adapter", loras.factors(Q, 64, 60))
    with pytest.raises(SourceError, match="splits lora_a into 4 heads of two halves, but 60"):
        convert(adapter, tmp_path / "base.gguf")


@pytest.mark.parametrize(
    ("shape", "other"), [((6, 10), (15, 4)), ((4, 15), (10, 6)), ((1, 60), (60, 1)), ((7, 3), (3, 7))]
)
def test_reflow_keeps_the_order_of_elements(shape: tuple[int, int], other: tuple[int, int]) -> None:
    values = tiny.noise("reflow", shape, 1.0)
    tensor = Reflow(Resident(values), other)
    for n_rows in range(1, other[0] + 1):
        work = Workspace(Scratch(peak_nbytes(tensor, n_rows)))
        for start in range(other[0] - n_rows + 1):
            out = np.empty(n_rows * tensor.spec.row_nbytes, dtype=np.uint8)
            read(tensor, range(start, start + n_rows), out, work)
            assert (out.view(np.float32) == values.reshape(other)[start : start + n_rows].reshape(-1)).all()
