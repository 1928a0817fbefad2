"""LFM2-MoE against llama.cpp's converter and its runtime, with what that converter cannot do held to transformers.

A router that finds two experts equal to the last bits may choose another one here than there. The cases have no such
tie: over all layers and positions the chosen and the first left-out expert differ by 4e-4 in score or more, and float32
errs by 1e-7, so a flip would be a mistake in streamconv, and would show as a KL of 1e-3 or more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from streamconv.errors import SourceError
from tests import cases
from tests.golden.conftest import Workshop
from tests.oracles import ggufs, runtime

F32_KL = 1e-8
BUILT = [name for name in cases.MODELS if name.startswith("lfm2moe")]


@pytest.mark.parametrize("outtype", cases.OUTTYPES)
def test_tensors_and_shared_keys_are_llama_cpps(workshop: Workshop, outtype: str) -> None:
    ours, theirs = workshop.read("lfm2moe", outtype), cases.golden("lfm2moe", outtype)
    assert ggufs.tensor_faults(ours, theirs) == []
    assert ggufs.key_faults(ours, theirs) == []
    assert ggufs.layout_faults(ours.path) == []
    assert theirs["kv"].keys() - ours.keys.keys() == set()


@pytest.mark.parametrize("outtype", cases.OUTTYPES)
def test_zeros_stand_where_llama_cpp_leaves_the_bias_out(workshop: Workshop, outtype: str) -> None:
    """Its own runtime refuses the file without them."""
    ours, theirs = workshop.read("lfm2moe-unbiased", outtype), cases.golden("lfm2moe-unbiased", outtype)
    added = {f"blk.{i}.exp_probs_b.bias" for i in (1, 2, 3)}
    assert ggufs.tensor_faults(ours, theirs) == [f"{name}: only in {ours.path.name}" for name in sorted(added)]
    assert ggufs.key_faults(ours, theirs) == []
    for name in added:
        assert (ours.tensors[name].shape, ours.tensors[name].type) == ((6,), "F32")
        assert not ours.float64(name).any()


@pytest.mark.parametrize("outtype", cases.OUTTYPES)
def test_stacked_experts_give_the_file_of_single_ones(workshop: Workshop, outtype: str) -> None:
    """llama.cpp's converter does not take them stacked, as transformers holds them."""
    stacked, single = workshop.read("lfm2moe-stacked", outtype).golden(), workshop.read("lfm2moe", outtype).golden()
    assert (stacked["tensors"], stacked["order"]) == (single["tensors"], single["order"])
    assert {key for key in single["kv"] if stacked["kv"].get(key) != single["kv"][key]} == {"general.name"}
    assert stacked["kv"].keys() == single["kv"].keys()


@pytest.mark.parametrize("name", BUILT)
def test_run_time_predicts_what_transformers_does(workshop: Workshop, name: str) -> None:
    with runtime.Runtime(workshop.gguf(name)) as model:
        logprobs = np.stack([model.next_logprobs(cases.IDS[: position + 1]) for position in cases.POSITIONS])
    assert runtime.kl(cases.logits(name), logprobs) < F32_KL


def test_routers_stay_in_float32(workshop: Workshop) -> None:
    tensors = workshop.read("lfm2moe", "q8_0").tensors
    for i in (1, 2, 3):
        assert tensors[f"blk.{i}.ffn_gate_inp.weight"].type == tensors[f"blk.{i}.exp_probs_b.bias"].type == "F32"
        assert tensors[f"blk.{i}.ffn_down_exps.weight"].type == "Q8_0"


U32, F32 = ("UINT32",), ("FLOAT32",)


@pytest.mark.parametrize(
    ("key", "type_", "value"),
    [
        ("vocab_size", U32, 416),
        ("block_count", U32, 4),
        ("embedding_length", U32, 64),
        ("feed_forward_length", U32, 96),
        ("context_length", U32, 640),
        ("attention.head_count", U32, 4),
        ("attention.head_count_kv", ("ARRAY", "UINT32"), [0, 2, 0, 2]),
        ("attention.key_length", U32, 16),
        ("attention.value_length", U32, 16),
        ("attention.layer_norm_rms_epsilon", F32, pytest.approx(1e-5, rel=1e-7)),
        ("rope.freq_base", F32, 1000000.0),
        ("shortconv.l_cache", U32, 3),
        ("expert_count", U32, 6),
        ("expert_used_count", U32, 2),
        ("expert_feed_forward_length", U32, 160),
        ("leading_dense_block_count", U32, 1),
        ("expert_gating_func", U32, 2),
    ],
)
def test_key(workshop: Workshop, key: str, type_: tuple[str, ...], value: Any) -> None:
    entry = workshop.read("lfm2moe").keys[f"lfm2moe.{key}"]
    assert (entry.type, entry.value) == (type_, value)


def test_no_other_key_of_the_architecture_is_written(workshop: Workshop) -> None:
    assert sum(key.startswith("lfm2moe.") for key in workshop.read("lfm2moe").keys) == 17


def test_the_size_label_counts_experts(workshop: Workshop) -> None:
    assert (
        workshop.read("lfm2moe")["general.size_label"]
        == cases.golden("lfm2moe", "f32")["kv"]["general.size_label"]["value"]
    )
    assert workshop.read("lfm2moe")["general.size_label"].startswith("6x")


@pytest.mark.parametrize("outtype", ["bf16", "f16", "auto"])
def test_a_scale_that_16_bits_would_round_leaves_no_file(workshop: Workshop, tmp_path: Path, outtype: str) -> None:
    with pytest.raises(SourceError, match=r"ffn_down_exps\.weight: the model scales these weights by 2\.5"):
        streamconv.convert(workshop.source("lfm2moe-scaled"), tmp_path / "made.gguf", outtype=outtype)
    assert list(tmp_path.iterdir()) == []


def test_a_scale_is_as_free_in_q8_0_as_none(workshop: Workshop) -> None:
    exact, rounded = workshop.read("lfm2moe-scaled"), workshop.read("lfm2moe-scaled", "q8_0")
    for name in ("blk.1.ffn_down_exps.weight", "blk.1.ffn_up_exps.weight"):
        worst = np.abs(exact.float64(name) - rounded.float64(name)).reshape(-1, 32).max(axis=1)
        largest = np.abs(exact.float64(name)).reshape(-1, 32).max(axis=1)
        assert (worst <= largest / 127 * (0.5 + 127 * 2**-11)).all()
