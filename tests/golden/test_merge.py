"""Adapters merged while converting: each weight within rounding of its definition, PEFT's predictions at runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import streamconv
from tests import cases, loras, tiny
from tests.golden.conftest import Workshop
from tests.golden.test_lora import GIVEN_SCALES, HEADS, SCALES
from tests.golden.test_lora_experts import RANK, SCALE, changes
from tests.oracles import deltas, ggufs, runtime

EPS32 = 2.0**-23
ULP = {"f32": 0.0, "bf16": 2.0**-8}  # beyond float32: one unit in the last place, relative

MERGE_SCALES: dict[str, Callable[[str], float]] = {
    "llama-dora": lambda module: 12 / 8,
    "llama-dora-ends": lambda module: 12 / math.sqrt(4),
    "llama-linear-head": lambda module: 12 / 8,
    "lfm2-dora": lambda module: 12 / 8,
}
ALL_SCALES = SCALES | MERGE_SCALES
HEADS_OF = {"llama": HEADS, "llama-linear": {"attn_q": 4, "attn_k": 1}, "lfm2": None, "lfm2moe": None}


def merge(workshop: Workshop, name: str, dst: Path, outtype: str = "f32") -> tuple[ggufs.Gguf, Path, Path]:
    """The merged file, its adapter and its base."""
    base_name = (cases.ADAPTERS | cases.MERGES)[name][0]
    base = workshop.source(base_name)
    adapter = base.parent / name if (base.parent / name).exists() else cases.build_adapter(name, base.parent)[0]
    streamconv.convert(base, dst, outtype=outtype, adapters=[adapter])
    return ggufs.read(dst), adapter, base


@pytest.mark.parametrize("outtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", ALL_SCALES)
def test_weights_are_the_definition_within_rounding(
    workshop: Workshop, tmp_path: Path, name: str, outtype: str
) -> None:
    """|ours - W'| <= (r + 4) eps (|W| + |s| |B| |A|), row by row scaled as DoRA scales, and a rounding to the type."""
    ours, adapter, base = merge(workshop, name, tmp_path / "merged.gguf", outtype)
    scale, heads = ALL_SCALES[name], HEADS_OF[(cases.ADAPTERS | cases.MERGES)[name][0]]
    weights = {n: t.float32().astype(np.float64) for n, t in tiny.tensors_of(base).items()}
    changes, sizes, magnitudes = (
        deltas.trained(adapter, scale),
        deltas.sizes(adapter, scale),
        deltas.magnitudes(adapter),
    )
    for module, delta in changes.items():
        weight = weights.get(f"{module}.weight", weights["model.embed_tokens.weight"])
        axis = 0 if module == "model.embed_tokens" else 1
        wanted = deltas.merged(weight, delta, magnitudes.get(module), axis)
        size, rank = sizes[module]
        bound = (rank + 4) * EPS32 * (np.abs(weight) + size)
        if module in magnitudes:
            total = np.linalg.norm(weight + delta, axis=axis, keepdims=True)
            bound = bound * np.expand_dims(magnitudes[module], axis) / total + 4 * EPS32 * np.abs(wanted)
        bound += ULP[outtype] * np.abs(wanted)
        ((target, placed),) = deltas.placed({module: wanted}, heads).items()
        ((_, allowed),) = deltas.placed({module: bound}, heads).items()
        assert (np.abs(ours.float64(target) - placed) <= allowed).all(), target


@pytest.mark.parametrize("name", ALL_SCALES)
def test_run_time_predicts_what_peft_does(workshop: Workshop, tmp_path: Path, name: str) -> None:
    merged, _, _ = merge(workshop, name, tmp_path / "merged.gguf")
    logprobs = runtime.next_token_logprobs(merged.path, cases.IDS, positions=cases.POSITIONS)
    assert runtime.kl(cases.logits(name), logprobs) < (1e-6 if name.startswith("lfm2moe") else 1e-8)


@pytest.mark.parametrize("name", GIVEN_SCALES)
def test_run_time_predicts_what_peft_does_on_given_adapters(tmp_path: Path, name: str) -> None:
    dst = tmp_path / "merged.gguf"
    streamconv.convert(cases.GIVEN / "llama-given", dst, outtype="f32", adapters=[cases.GIVEN / name])
    logprobs = runtime.next_token_logprobs(dst, cases.given_ids())
    assert runtime.kl(cases.given_logits(name), logprobs) < 1e-8


def test_untouched_tensors_are_the_bases(workshop: Workshop, tmp_path: Path) -> None:
    merged, adapter, _ = merge(workshop, "llama-layer", tmp_path / "merged.gguf", "q8_0")
    changed = {deltas.target(module) for module in deltas.trained(adapter, lambda module: 1.0)}
    ours, plain = merged.golden()["tensors"], workshop.read("llama", "q8_0").golden()["tensors"]
    assert {name for name in plain if ours[name] != plain[name]} == changed


def test_weights_of_adapters_multiply_and_add(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.source("llama")
    pair = [cases.build_adapter(name, tmp_path)[0] for name in ("llama-plain", "llama-rslora")]
    streamconv.convert(base, tmp_path / "merged.gguf", outtype="f32", adapters=[(pair[0], 0.5), (pair[1], -2.0)])
    ours = ggufs.read(tmp_path / "merged.gguf")
    first, second = (deltas.expected(path, SCALES[path.name], HEADS) for path in pair)
    plain = workshop.read("llama")
    for name in first:
        wanted = plain.float64(name) + 0.5 * first[name] - 2 * second[name]
        assert np.abs(ours.float64(name) - wanted).max() < 1e-5 * np.abs(wanted).max(), name


def test_applied_at_run_time_or_merged_is_the_same_model(workshop: Workshop, tmp_path: Path) -> None:
    merged, adapter, _ = merge(workshop, "lfm2-plain", tmp_path / "merged.gguf")
    base = workshop.gguf("lfm2")
    streamconv.convert_adapter(adapter, base, tmp_path / "adapter.gguf", outtype="f32")
    applied = runtime.next_token_logprobs(base, cases.IDS, [(tmp_path / "adapter.gguf", 1.0)])
    assert runtime.kl(runtime.next_token_logprobs(merged.path, cases.IDS), applied) < 1e-8


def test_a_new_head_on_a_tied_base_is_an_output_of_its_own(workshop: Workshop, tmp_path: Path) -> None:
    merged, adapter, _ = merge(workshop, "llama-linear-head", tmp_path / "merged.gguf")
    saved = tiny.tensors_of(adapter)["base_model.model.lm_head.weight"].float32()
    assert (merged.float64("output.weight") == saved).all()
    assert (merged.float64("token_embd.weight") == workshop.read("llama-linear").float64("token_embd.weight")).all()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_experts_and_routers(tmp_path: Path, factor: float, stacked: bool) -> None:
    settings = {"routed_scaling_factor": factor}
    mlx, peft, merged = changes(tiny.tensors_of(tiny.lfm2moe(tmp_path / "alone", dtype="F32", config=settings)))
    tiny.write_safetensors(tiny.lfm2moe(tmp_path / "merged", config=settings) / "model.safetensors", merged)
    streamconv.convert(tmp_path / "merged", tmp_path / "merged.gguf", outtype="f32")
    expected = ggufs.read(tmp_path / "merged.gguf")
    base = tiny.lfm2moe(tmp_path / "base", dtype="F32", stacked=stacked, config=settings)
    as_mlx = {"lora_parameters": {"rank": RANK, "scale": SCALE}}
    as_peft = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK}
    for name, tensors, config in (("mlx", mlx, as_mlx), ("peft", peft, as_peft)):
        adapter = loras.write(tmp_path / name, tensors, config)
        streamconv.convert(base, tmp_path / f"{name}.gguf", outtype="f32", adapters=[adapter])
        ours = ggufs.read(tmp_path / f"{name}.gguf")
        assert list(ours.tensors) == list(expected.tensors)
        for target in expected.tensors:
            np.testing.assert_allclose(ours.float64(target), expected.float64(target), rtol=1e-5, atol=1e-6)


def test_one_expert_of_many_changes_alone(tmp_path: Path) -> None:
    base = tiny.lfm2moe(tmp_path / "base", stacked=True)
    module = "model.layers.2.feed_forward.experts.4.w3"
    adapter = loras.write(tmp_path / "adapter", loras.factors(module, 160, 64))
    streamconv.convert(base, tmp_path / "plain.gguf", outtype="f32")
    streamconv.convert(base, tmp_path / "merged.gguf", outtype="f32", adapters=[adapter])
    before, after = ggufs.read(tmp_path / "plain.gguf"), ggufs.read(tmp_path / "merged.gguf")
    changed = [name for name in before.tensors if before.tensors[name].sha256 != after.tensors[name].sha256]
    assert changed == ["blk.2.ffn_up_exps.weight"]
    differences = np.abs(after.float64(changed[0]) - before.float64(changed[0])).max(axis=(1, 2))
    assert list(differences > 0) == [e == 4 for e in range(6)]
