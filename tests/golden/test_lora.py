"""LoRA adapters: the trained change in every weight, PEFT's predictions at runtime, llama.cpp's and Ollama's bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import streamconv
from tests import cases, tiny
from tests.golden.conftest import Workshop
from tests.oracles import deltas, ggufs, runtime

GIVEN_BASE = cases.GIVEN / "llama-given.base.gguf"
HEADS = {"attn_q": 4, "attn_k": 2}  # of every Llama base here
F32_KL = 1e-8
DELTA = 1e-6

Scale = Callable[[str], float]


def by_module(*rows: tuple[str, float]) -> Scale:
    """The scale of the first row whose pattern is found in the module's name."""
    return lambda module: next(scale for pattern, scale in rows if re.search(pattern, module))


# What each adapter's configuration means, worked out by hand from PEFT's documentation.
GIVEN_SCALES: dict[str, Scale] = {
    "lora-given": lambda module: 12 / 8,
    "rslora-given": lambda module: 8 / math.sqrt(4),
    "patterns-given": by_module(("q_proj", 8 / 8), ("o_proj", 2 / 4), ("", 8 / 4)),
    "mlx-given": lambda module: 1.5,
}
SCALES: dict[str, Scale] = dict.fromkeys(cases.ADAPTERS, lambda module: 12 / 8) | {
    "llama-rslora": lambda module: 9 / math.sqrt(6),
    "llama-patterns": by_module(
        (r"0\.self_attn\.q_proj", 3 / 6),
        ("q_proj", 8 / 6),
        (r"1\.self_attn\.k_proj", 8 / 2),
        ("o_proj", 1 / 4),
        ("", 8 / 4),
    ),
    "llama-wide": lambda module: 72 / 72,
    "llama-layer": lambda module: 12 / 5,
    "llama-ends": lambda module: 12 / 5,
}
N_TARGETS = {"llama-layer": 7, "llama-ends": 6, "lfm2-plain": 22, "lfm2moe-plain": 15}

# llama.cpp ignores use_rslora and the patterns, so its scales are wrong there and its factors alone comparable.
FACTORS_AS_LLAMA_CPP = [name for name in cases.ADAPTERS if name not in ("llama-rslora", "llama-patterns")]


class Adapters:
    """Adapters of the cases and what streamconv makes of them, on the bases of a workshop."""

    def __init__(self, root: Path, workshop: Workshop) -> None:
        self._root, self._workshop = root, workshop

    def source(self, name: str) -> Path:
        if name.endswith("-given"):
            return cases.GIVEN / name
        base_name = cases.ADAPTERS[name][0]
        base = self._workshop.source(base_name)
        adapter = base.parent / name
        return adapter if adapter.exists() else cases.build_adapter(name, base.parent)[0]

    def base(self, name: str) -> Path:
        return GIVEN_BASE if name.endswith("-given") else self._workshop.gguf(cases.ADAPTERS[name][0])

    def gguf(self, name: str, outtype: str = "f32") -> Path:
        dst = self._root / f"{name}-{outtype}.gguf"
        if not dst.exists():
            streamconv.convert_adapter(self.source(name), self.base(name), dst, outtype=outtype)
        return dst

    def read(self, name: str, outtype: str = "f32") -> ggufs.Gguf:
        return ggufs.read(self.gguf(name, outtype))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, workshop: Workshop) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("adapters"), workshop)


@pytest.mark.parametrize("name", [*GIVEN_SCALES, *SCALES])
def test_the_change_is_the_trained_one(adapters: Adapters, name: str) -> None:
    heads = None if name.startswith("lfm2") else HEADS
    expected = deltas.expected(adapters.source(name), (GIVEN_SCALES | SCALES)[name], heads)
    distances = deltas.distances(deltas.applied(adapters.read(name)), expected)
    assert len(distances) == N_TARGETS.get(name, 14)
    assert max(distances.values()) < DELTA


@pytest.mark.parametrize("name", GIVEN_SCALES)
def test_run_time_predicts_what_peft_does_on_given_adapters(adapters: Adapters, name: str) -> None:
    logprobs = runtime.next_token_logprobs(GIVEN_BASE, cases.given_ids(), [(adapters.gguf(name), 1.0)])
    assert runtime.kl(cases.given_logits(name), logprobs) < F32_KL


@pytest.mark.parametrize("name", cases.ADAPTERS)
def test_run_time_predicts_what_peft_does(adapters: Adapters, name: str) -> None:
    """Factors of 16 bits are given as F32: the runtime multiplies others in another precision."""
    logprobs = runtime.next_token_logprobs(
        adapters.base(name), cases.IDS, [(adapters.gguf(name), 1.0)], positions=cases.POSITIONS
    )
    assert runtime.kl(cases.logits(name), logprobs) < (1e-6 if name.startswith("lfm2moe") else F32_KL)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", FACTORS_AS_LLAMA_CPP)
def test_factors_are_llama_cpps(adapters: Adapters, name: str, outtype: str) -> None:
    ours, golden = adapters.read(name, outtype), cases.golden(name, outtype)
    assert ggufs.tensor_faults(ours, golden) == []
    assert ours["adapter.lora.alpha"] == golden["kv"]["adapter.lora.alpha"]["value"]
    assert ggufs.layout_faults(ours.path) == []


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_factors_are_llama_cpps_on_the_given_adapter(adapters: Adapters, outtype: str) -> None:
    golden = cases.given_golden("lora-given")[f"llamacpp:{outtype}"]
    assert ggufs.tensor_faults(adapters.read("lora-given", outtype), golden) == []


def test_mlx_gives_its_peft_twins_tensors(adapters: Adapters) -> None:
    assert adapters.read("mlx-given").golden()["tensors"] == adapters.read("lora-given").golden()["tensors"]
    assert adapters.read("mlx-given")["adapter.lora.alpha"] == 12.0


@pytest.mark.parametrize(("name", "dtype"), [("llama-plain", "F32"), ("llama-bf16", "BF16"), ("llama-f16", "F16")])
def test_auto_keeps_each_factors_type(adapters: Adapters, name: str, dtype: str) -> None:
    ours = adapters.read(name, "auto")
    assert {tensor.type for tensor in ours.tensors.values()} == {dtype}
    distances = deltas.distances(deltas.applied(ours), deltas.applied(adapters.read(name)))
    assert max(distances.values()) == 0


def test_a_doubled_prefix_is_the_same_adapter(adapters: Adapters, workshop: Workshop, tmp_path: Path) -> None:
    doubled = tiny.peft_adapter(
        tmp_path / "doubled", workshop.source("llama"), prefix="base_model.model.base_model.model."
    )
    streamconv.convert_adapter(doubled, workshop.gguf("llama"), tmp_path / "doubled.gguf", outtype="f32")
    assert ggufs.read(tmp_path / "doubled.gguf").golden()["tensors"] == adapters.read("llama-plain").golden()["tensors"]


@pytest.mark.parametrize("name", ["llama-plain", "llama-ends", "lfm2-plain"])
def test_a_checkpoint_is_as_good_a_base_as_its_gguf(
    adapters: Adapters, workshop: Workshop, tmp_path: Path, name: str
) -> None:
    base = workshop.source(cases.ADAPTERS[name][0])
    streamconv.convert_adapter(adapters.source(name), base, tmp_path / "from-hf.gguf", outtype="f32")
    assert ggufs.read(tmp_path / "from-hf.gguf").golden()["tensors"] == adapters.read(name).golden()["tensors"]


def test_keys_of_an_adapter(adapters: Adapters) -> None:
    ours = adapters.read("lora-given")
    written = {key: (*ours.keys[key].type, ours[key]) for key in ours.keys if not key.startswith("general.base_model")}
    expected = {
        "general.type": ("STRING", "adapter"),
        "general.architecture": ("STRING", "llama"),
        "adapter.type": ("STRING", "lora"),
        "adapter.lora.alpha": ("FLOAT32", 12.0),
        "llama.attention.head_count": ("UINT32", 4),
        "llama.attention.head_count_kv": ("UINT32", 2),
    }
    assert expected.items() <= written.items()


@pytest.mark.parametrize("name", GIVEN_SCALES)
def test_legacy_dialect_is_ollamas_file(adapters: Adapters, tmp_path: Path, name: str) -> None:
    """Ollama's own bytes, order, keys and types, wrong as they are, and how wrong is said of every Q and K."""
    dst = tmp_path / "legacy.gguf"
    report = streamconv.convert_adapter(adapters.source(name), GIVEN_BASE, dst, dialect="ollama-legacy")
    assert ggufs.read(dst).golden() == cases.given_golden(name)["ollama_seed"]
    told = {
        w.tensor: float(re.findall(r"[\d.]+", w.message)[0]) for w in report.warnings if w.code == "legacy-distance"
    }
    applied = deltas.applied(ggufs.read(dst))
    expected = deltas.expected(adapters.source(name), GIVEN_SCALES[name], HEADS)
    assert told.keys() == {f"blk.{i}.attn_{part}.weight" for i in (0, 1) for part in "qk"}
    distances = deltas.distances(applied, expected)
    assert told == pytest.approx({tensor: distances[tensor] for tensor in told if tensor}, rel=1e-3)
