"""Adapters from folder to file: values against float64 products, types, keys, names, options, and the command."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from streamconv.cli import main
from streamconv.errors import SourceError, UsageError
from tests import loras, tiny
from tests.oracles import deltas, ggufs
from tests.raising import raises
from tests.unit.test_base_model import LLAMA, gguf

TOLERANCE = 1e-6  # relative, in Frobenius norms
HEADS = {"attn_q": 4, "attn_k": 2}
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads and 2, head size 24, hidden 64, 160 wide."""
    return tiny.llama(tmp_path_factory.mktemp("llama"), head_dim=24)


def farthest(adapter: Path, base: Path, trained: float, **options: Any) -> float:
    """The largest relative distance of any tensor's change from what was trained."""
    applied = deltas.applied(loras.convert(adapter, base, **options))
    return max(deltas.distances(applied, deltas.expected(adapter, lambda _: trained, HEADS)).values())


@pytest.mark.parametrize("r", [1, 5, 32, 72, 97, 170])  # 97 is above every out, 170 above every in
@pytest.mark.parametrize("make", [tiny.peft_adapter, tiny.mlx_adapter])
def test_changes_are_the_trained_ones_whatever_the_rank(tmp_path: Path, llama: Path, make: Any, r: int) -> None:
    scale = {"alpha": 12} if make is tiny.peft_adapter else {"scale": 12 / r}
    assert farthest(make(tmp_path, llama, r=r, **scale), llama, 12 / r) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_factors_of_every_type(tmp_path: Path, llama: Path, dtype: str) -> None:
    adapter = tiny.peft_adapter(tmp_path, llama, dtype=dtype)
    assert farthest(adapter, llama, 1.5, outtype="f32") <= TOLERANCE
    assert {tensor.type for tensor in loras.convert(adapter, llama).tensors.values()} == {dtype}


def test_one_layer_only(tmp_path: Path, llama: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path, llama, layers=(1,))
    assert farthest(adapter, llama, 1.5) <= TOLERANCE
    assert {name.split(".")[1] for name in loras.convert(adapter, llama).tensors} == {"1"}


def test_an_mlx_file_is_its_peft_twin(tmp_path: Path, llama: Path) -> None:
    peft = loras.convert(tiny.peft_adapter(tmp_path / "peft", llama, alpha=12), llama).golden()
    mlx = loras.convert(tiny.mlx_adapter(tmp_path / "mlx", llama, scale=1.5), llama).golden()
    assert (peft["tensors"], peft["order"]) == (mlx["tensors"], mlx["order"])


def test_every_module_has_its_own_scale(tmp_path: Path, llama: Path) -> None:
    adapter = tiny.peft_adapter(
        tmp_path, llama, r=4, alpha=8, rank_pattern={"q_proj": 6}, alpha_pattern={"o_proj": 1, "k_proj": 5}
    )
    scales = {"q_proj": 8 / 6, "o_proj": 0.25, "k_proj": 1.25}
    applied = deltas.applied(file := loras.convert(adapter, llama))
    expected = deltas.expected(adapter, lambda module: scales.get(module.rpartition(".")[2], 2.0), HEADS)
    assert max(deltas.distances(applied, expected).values()) <= TOLERANCE
    assert file["adapter.lora.alpha"] == 8.0


def test_types_where_scales_are_folded(tmp_path: Path, llama: Path) -> None:
    patterns = {"alpha_pattern": {"o_proj": 1, "k_proj": 5}}
    file = loras.convert(tiny.peft_adapter(tmp_path, llama, r=4, alpha=8, dtype="BF16", **patterns), llama)
    folded = {name: tensor.type for name, tensor in file.tensors.items() if tensor.type != "BF16"}
    assert folded == {f"blk.{i}.attn_k.weight.lora_b": "F32" for i in (0, 1)}  # 5/8 of alpha; 1/8 is exact


@pytest.mark.parametrize(
    ("outtype", "a", "b"),
    [("f32", "F32", "F32"), ("f16", "F16", "F16"), ("bf16", "BF16", "BF16"), ("q8_0", "Q8_0", "F16")],
)
def test_types_that_are_asked_for(tmp_path: Path, llama: Path, outtype: str, a: str, b: str) -> None:
    file = loras.convert(tiny.peft_adapter(tmp_path, llama, r=8), llama, outtype=outtype)
    assert {name[-1]: tensor.type for name, tensor in file.tensors.items()} == {"a": a, "b": b}


def test_a_rank_that_divides_is_quantised(tmp_path: Path, llama: Path) -> None:
    file = loras.convert(tiny.peft_adapter(tmp_path, llama, r=64), llama, outtype="q8_0")
    assert {tensor.type for tensor in file.tensors.values()} == {"Q8_0"}


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("scale", [0.75, 3.0, -0.3])
def test_a_given_scale_is_absolute(tmp_path: Path, llama: Path, scale: float) -> None:
    adapter = tiny.peft_adapter(
        tmp_path, llama, r=4, rank_pattern={"q_proj": 6}, alpha_pattern={"k_proj": 3}, rslora=True
    )
    assert farthest(adapter, llama, scale, scale=scale) <= TOLERANCE


def test_alpha_zero_stays_off(tmp_path: Path, llama: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path, llama, r=6, alpha=0, dtype="F16")
    report = streamconv.convert_adapter(adapter, llama, tmp_path / "off.gguf")
    file = ggufs.read(tmp_path / "off.gguf")
    assert file["adapter.lora.alpha"] == 6.0
    assert all(file.float64(name).any() == name.endswith("a") for name in file.tensors)
    assert {tensor.type for tensor in file.tensors.values()} == {"F16"}
    assert [warning.code for warning in report.warnings] == ["scale-zero"]


def test_one_module_that_is_off(tmp_path: Path, llama: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path, llama, targets=("q_proj", "v_proj"), alpha_pattern={"q_proj": 0})
    file = loras.convert(adapter, llama)
    assert file["adapter.lora.alpha"] == 12.0
    assert not file.float64("blk.1.attn_q.weight.lora_b").any()
    assert file.float64("blk.1.attn_v.weight.lora_b").any()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_a_scale_that_is_none(tmp_path: Path, llama: Path, scale: float) -> None:
    with raises(UsageError, code="scale-range"):
        loras.convert(tiny.peft_adapter(tmp_path, llama), llama, scale=scale)


# ---------------------------------------------------------------- keys


def test_keys(tmp_path: Path, llama: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "my-1B-lora", llama, config={"alora_invocation_tokens": [7, 3]})
    file = loras.convert(adapter, llama)
    keys = {name: (entry.type, entry.value) for name, entry in file.keys.items()}
    assert keys == {
        "general.architecture": (("STRING",), "llama"),
        "general.type": (("STRING",), "adapter"),
        "general.name": (("STRING",), "My 1B Lora"),
        "general.basename": (("STRING",), "my"),
        "general.size_label": (("STRING",), "1B"),
        "general.quantization_version": (("UINT32",), 2),
        "adapter.type": (("STRING",), "lora"),
        "adapter.lora.alpha": (("FLOAT32",), 12.0),
        "adapter.alora.invocation_tokens": (("ARRAY", "UINT32"), [7, 3]),
        "llama.attention.head_count": (("UINT32",), 4),
        "llama.attention.head_count_kv": (("UINT32",), 2),
    }
    assert loras.convert(adapter, llama, name="Mine")["general.name"] == "Mine"


def test_the_default_name_says_what_it_is(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = tiny.peft_adapter(tmp_path / "story-teller", llama, dtype="BF16")
    assert streamconv.convert_adapter(adapter, llama).output == Path("Story-Teller-BF16-LoRA.gguf")
    mixed = loras.edit(adapter, alpha_pattern={"q_proj": 5})
    assert streamconv.convert_adapter(mixed, llama).output == Path("Story-Teller-MIXED-LoRA.gguf")


# ---------------------------------------------------------------- configurations as they are found

ATTENTION, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LFM2 = ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3")
BD_LORA = {
    "target_modules_bd_a": ["o_proj", "down_proj"],
    "target_modules_bd_b": ["up_proj", "gate_proj"],
    "nblocks": 2,
}
MLX_RUN = {"fine_tune_type": "lora", "num_layers": 16, "optimizer": "adam", "seed": 0}


@pytest.mark.parametrize(
    ("targets", "r", "settings", "expected"),
    [
        # PEFT: the ratio of alpha to rank as trainers choose it, quantised training, another library's additions.
        (ATTENTION, 16, {"lora_alpha": 32, "task_type": None, "auto_mapping": {"base_model_class": "x"}}, 32.0),
        (ATTENTION, 64, {"lora_alpha": 16, "lora_dropout": 0.1}, 16.0),
        (ALL, 16, {"lora_alpha": 32, "auto_mapping": {"unsloth_fixed": True}, "target_parameters": None}, 32.0),
        (ALL, 64, {"lora_alpha": 64, "use_rslora": True, "target_modules": None}, 512.0),
        (LFM2, 16, {"lora_alpha": 32, "lora_dropout": 0.05}, 32.0),
        (ALL[:4], 32, {"lora_alpha": 64, "use_dora": True}, "dora"),
        (ALL[4:], 14, {"lora_alpha": 28, "use_bdlora": BD_LORA}, "bd-lora"),
        # MLX: with and without an alpha, with and without a mark of the version that wrote it.
        (ALL, 8, MLX_RUN | {"lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}}, 160.0),
        (ALL, 8, MLX_RUN | {"lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0}}, 80.0),
        (ALL, 8, {"num_layers": 8, "lora_parameters": {"rank": 8, "scale": 10.0, "dropout": 0.0}}, 80.0),
        (
            ATTENTION,
            8,
            {"use_dora": False, "lora_layers": 2, "lora_parameters": {"rank": 8, "alpha": 16, "scale": 2.0}},
            16.0,
        ),
    ],
)
def test_configurations_as_they_are_found(
    tmp_path: Path, targets: tuple[str, ...], r: int, settings: dict[str, Any], expected: float | str
) -> None:
    base = (tiny.lfm2 if targets == LFM2 else tiny.llama)(tmp_path / "base")
    if "lora_parameters" in settings:
        adapter = tiny.mlx_adapter(tmp_path / "adapter", base, targets=targets, r=r)
        tiny.write_json(adapter / "adapter_config.json", settings)
    else:
        adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=targets, r=r, config=settings)
    if isinstance(expected, float):
        assert loras.convert(adapter, base)["adapter.lora.alpha"] == expected
        return
    with raises(SourceError, code=expected):
        loras.convert(adapter, base)


def test_an_adapter_for_another_architecture(tmp_path: Path, llama: Path) -> None:
    """As roberta's: two linear layers a block under other names, and a classifier that was trained whole."""
    tensors = {"base_model.model.classifier.dense.weight": loras.noise("c", (64, 64))}
    for i in range(12):
        for name in ("query", "value"):
            tensors |= loras.factors(f"roberta.encoder.layer.{i}.attention.self.{name}", 64, 64)
    adapter = loras.write(tmp_path, tensors, loras.PEFT | {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"})
    with pytest.raises(SourceError) as caught:
        loras.convert(adapter, llama)
    assert "classifier.dense: a whole trained weight" in str(caught.value)
    assert "query and 11 more, roberta.encoder.layer.0.attention.self.value and 11 more: the base (llama) has" in str(
        caught.value
    )


# ---------------------------------------------------------------- bases


def test_a_base_of_keys_alone(tmp_path: Path, llama: Path) -> None:
    gguf(tmp_path / "base.gguf", LLAMA | {"llama.attention.key_length": 24})
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama)
    report = streamconv.convert_adapter(adapter, tmp_path / "base.gguf", tmp_path / "a.gguf")
    streamconv.convert_adapter(adapter, llama, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert [warning.code for warning in report.warnings] == ["base-metadata-only"]


def test_a_base_whose_shapes_are_unknown(tmp_path: Path, llama: Path) -> None:
    gguf(tmp_path / "base.gguf", LLAMA | {"llama.embedding_length": None, "llama.feed_forward_length": None})
    adapter = tiny.mlx_adapter(tmp_path / "adapter", llama, r=8)
    assert farthest(adapter, tmp_path / "base.gguf", 1.5) <= TOLERANCE


def test_experts_of_a_layer_are_one_pair(tmp_path: Path) -> None:
    base = tiny.lfm2moe(tmp_path / "base", config={"routed_scaling_factor": 2.5})
    tensors: dict[str, tiny.Tensor] = {}
    for expert in (0, 1, 2, 4, 5):  # the adapter leaves one alone
        tensors |= loras.factors(f"model.layers.1.feed_forward.experts.{expert}.w2", 64, 160)
    adapter = loras.write(tmp_path / "adapter", tensors, loras.PEFT | {"alpha_pattern": {r"experts\.4\.w2": 3}})
    applied = loras.delta(loras.convert(adapter, base), "blk.1.ffn_down_exps.weight")
    for expert in range(6):
        name = f"base_model.model.model.layers.1.feed_forward.experts.{expert}.w2"
        if expert == 3:
            assert not applied[expert].any()
            continue
        b, a = (tensors[f"{name}.lora_{x}.weight"].float32().astype(np.float64) for x in "BA")
        expected = 2.5 * (3 if expert == 4 else 12) / 8 * (b @ a)
        assert np.linalg.norm(applied[expert] - expected) <= TOLERANCE * np.linalg.norm(expected)


def test_experts_of_different_ranks_have_no_pair(tmp_path: Path) -> None:
    base = tiny.lfm2moe(tmp_path / "base")
    tensors = loras.factors("model.layers.1.feed_forward.experts.0.w1", 160, 64, r=8)
    tensors |= loras.factors("model.layers.1.feed_forward.experts.1.w1", 160, 64, r=4)
    adapter = loras.write(tmp_path / "adapter", tensors, loras.PEFT | {"rank_pattern": {r"experts\.1\.w1": 4}})
    with pytest.raises(SourceError, match=r"experts of blk\.1\.ffn_gate_exps\.weight have different ranks"):
        loras.convert(adapter, base)


# ---------------------------------------------------------------- the run


def test_the_plan_names_its_sources(tmp_path: Path, llama: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path, llama, targets=("q_proj",), layers=(0,))
    report = streamconv.convert_adapter(adapter, llama, tmp_path / "x.gguf", dry_run=True)
    assert report.plan is not None
    assert [(row.source, row.target, row.shape, row.type) for row in report.plan] == [
        ((f"base_model.model.{Q}.lora_A.weight",), "blk.0.attn_q.weight.lora_a", (8, 64), "F32"),
        ((f"base_model.model.{Q}.lora_B.weight",), "blk.0.attn_q.weight.lora_b", (96, 8), "F32"),
    ]
    assert not (tmp_path / "x.gguf").exists()


def test_what_of_the_base_changes_bytes_is_in_the_identity(tmp_path: Path, llama: Path) -> None:
    from streamconv.api.convert_lora import plan_adapter
    from streamconv.budget import unbounded
    from streamconv.lora.files import LoraFile
    from streamconv.lora.open_base import open_base
    from streamconv.options import OutputOptions

    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, targets=("q_proj",))
    gguf(tmp_path / "same.gguf", LLAMA | {"llama.attention.key_length": 24, "llama.feed_forward_length": 999})
    gguf(tmp_path / "other.gguf", LLAMA | {"llama.attention.key_length": 12, "llama.attention.head_count": 8})

    def identity(base: Path, scale: float | None = None) -> dict[str, str]:
        with LoraFile.open(adapter, unbounded()) as file:
            job = plan_adapter(file, open_base(base, unbounded()), tmp_path / "x.gguf", OutputOptions(), scale)
            return job.identity(job.parts[0])

    expected = identity(llama)
    assert identity(tmp_path / "same.gguf") == expected
    key = "option base and scales"
    assert identity(tmp_path / "other.gguf")[key] != expected[key]


def test_memory_does_not_grow_with_the_adapter(tmp_path: Path, llama: Path) -> None:
    wide = tiny.llama(tmp_path / "wide", n_layers=1, hidden=1024, n_heads=8, n_kv_heads=4, ff=4096)
    small, large = (
        streamconv.convert_adapter(
            tiny.mlx_adapter(tmp_path / f"{r}", wide, r=r),
            wide,
            tmp_path / "x.gguf",
            dry_run=True,
            io="positioned",  # windows on mapped files have steps of 2 MiB
        )
        for r in (128, 512)  # the smaller one fills a piece of the encoder, too
    )
    assert small.memory is not None
    assert large.memory is not None
    of_small, of_large = (memory["terms"]["scratch"] // memory["workers"] for memory in (small.memory, large.memory))
    assert of_large - of_small < 1 << 20


def test_the_command(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = tiny.peft_adapter(tmp_path / "adapter", llama, alpha=0), tmp_path / "out.gguf"
    assert main(["lora", str(adapter), "--base", str(llama), "-o", str(out), "--json", "--scale", "0.5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["command"], report["n_tensors"], report["architecture"]) == ("lora", 28, "llama")
    assert (report["dialect"], report["outtype"], report["warnings"]) == ("llama.cpp", "f32", [])
    assert ggufs.read(out)["adapter.lora.alpha"] == 4.0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--scale", "nan"], 2, "--scale nan must be a number of at most"),
        (["--dialect", "ollama-legacy", "--outtype", "f16"], 2, "--outtype cannot be combined"),
        (["--dialect", "ollama-legacy", "--scale", "2"], 2, "--scale cannot be combined"),
        (["--max-memory", "1MiB"], 4, "--max-memory"),
    ],
)
def test_failures_are_one_line(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    adapter, out = tiny.peft_adapter(tmp_path / "adapter", llama), tmp_path / "out.gguf"
    assert main(["lora", str(adapter), "--base", str(llama), "-o", str(out), *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not out.exists()


def test_problems_of_every_stage_are_told_at_once(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the configuration, of the modules, of the one alpha; the line names one of alike ones, the JSON all."""
    tensors = loras.factors(Q, 96, 64) | loras.factors(K, 48, 64)
    for i in (7, 8, 9):
        tensors |= loras.factors(f"model.layers.{i}.mlp.up_proj", 160, 64)
    settings = {"alpha_pattern": {"q_proj": 1e-40, "k_proj": 1e-40}, "use_rslora": "yes"}
    adapter = loras.write(tmp_path / "adapter", tensors, loras.PEFT | settings)
    out = tmp_path / "x.gguf"
    assert main(["lora", str(adapter), "--base", str(llama), "-o", str(out), "--json"]) == 3
    printed = capsys.readouterr()
    found = json.loads(printed.out)["error"]["problems"]
    assert [(problem["code"], problem["modules"]) for problem in found] == [
        ("config", []),
        ("no-module", [f"model.layers.{i}.mlp.up_proj" for i in (7, 8, 9)]),
        ("alpha", [Q, K]),
    ]
    assert "model.layers.7.mlp.up_proj and 2 more: the base (llama) has no such module" in printed.err
    assert len(printed.err.splitlines()) == 1


# ---------------------------------------------------------------- strangers' files


@pytest.mark.parametrize("shape", [(), (0,), (8,), (0, 64), (8, 0), (2, 2, 2), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_shapes_that_no_factor_has(tmp_path: Path, llama: Path, shape: tuple[int, ...], factor: str) -> None:
    tensors = loras.factors(Q, 96, 64)
    data = struct.pack("<f", 0.5) * int(np.prod(shape))
    tensors[f"base_model.model.{Q}.{factor}.weight"] = tiny.Tensor("F32", shape, data)
    with pytest.raises(SourceError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        loras.convert(loras.write(tmp_path, tensors), llama)


def test_values_that_are_not_finite_are_told(tmp_path: Path, llama: Path) -> None:
    tensors = loras.factors(Q, 96, 64)
    values = tensors[f"base_model.model.{Q}.lora_B.weight"].float32().copy()
    values[3, 2] = np.nan
    tensors[f"base_model.model.{Q}.lora_B.weight"] = tiny.Tensor.of(values, "F32")
    report = streamconv.convert_adapter(loras.write(tmp_path, tensors), llama, tmp_path / "x.gguf")
    assert [(w.code, w.tensor) for w in report.warnings] == [("non-finite", "blk.0.attn_q.weight.lora_b")]


def test_names_of_any_length_and_script_are_refused_in_one_line(tmp_path: Path, llama: Path) -> None:
    tensors = {
        f"model.layers.{'9' * 400}.self_attn.q_proj.lora_a": loras.noise("a", (4, 4)),
        "é" * 90: loras.noise("b", (1,)),
    }
    with pytest.raises(SourceError) as caught:
        loras.convert(loras.write(tmp_path, tensors), llama)
    assert "\n" not in str(caught.value)
