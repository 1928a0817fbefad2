"""What a base tells an adapter: by the keys and tensors of a GGUF, by a folder's config with or without weights."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.budget import unbounded
from streamconv.errors import SourceError
from streamconv.gguf.format import PackedArray
from streamconv.lora.base import BaseModel, Slot
from streamconv.lora.config import Problem
from streamconv.lora.open_base import open_base
from streamconv.recipe import Permute
from streamconv.recipe.operation import CannotAdapt, total_factor
from tests import tiny
from tests.raising import raises
from tests.tools import gguf_bytes as raw

LIMIT = unbounded()
LLAMA = {
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 160,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}
LFM2 = {
    "lfm2.block_count": 4,
    "lfm2.embedding_length": 64,
    "lfm2.attention.head_count": 4,
    "lfm2.attention.head_count_kv": [0, 0, 2, 0],
}


def key(name: str, value: Any) -> bytes:
    if isinstance(value, list):
        return raw.array(name, raw.NUMBERS["i"], struct.pack(f"<{len(value)}i", *value), len(value))
    return raw.key(name, raw.STRING, raw.text(value)) if isinstance(value, str) else raw.number(name, "I", value)


def gguf(path: Path, keys: dict[str, Any], tensors: dict[str, tuple[int, ...]] | None = None) -> BaseModel:
    """A base of these keys; the tensors' shapes are row-major, and none of their data is there."""
    arch = next(iter(keys)).partition(".")[0]
    keys = {"general.architecture": arch} | keys
    entries, offset = [], 0
    for name, shape in (tensors or {}).items():
        entries.append(raw.tensor(name, shape[::-1], raw.F32, offset))
        n_elements = 1
        for extent in shape:
            n_elements *= extent
        offset += -(-n_elements * 4 // 32) * 32
    path.write_bytes(raw.gguf([key(name, value) for name, value in keys.items() if value is not None], entries))
    return open_base(path, LIMIT)


def slot(base: BaseModel, module: str) -> Slot:
    found = base.slot(module)
    assert isinstance(found, Slot), found
    return found


def heads_of(base: BaseModel, found: Slot) -> int | None:
    """How many heads its rows are permuted in; None where the base does not say."""
    ops = found.landings[0].ops
    if not ops:
        return 0
    assert isinstance(ops[0], Permute)
    return base.dims.get(ops[0].heads)


def factor_of(base: BaseModel, found: Slot) -> float | None:
    """What the model multiplies it by; None where the base does not say."""
    with suppress(CannotAdapt):
        return total_factor(found.landings[0].ops, base.model)
    return None


def why(base: BaseModel, module: str) -> str:
    found = base.slot(module)
    assert isinstance(found, Problem), found
    return found.message


def of(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}"


# ---------------------------------------------------------------- a GGUF


@pytest.mark.parametrize(
    ("module", "target", "shape", "heads"),
    [
        (of(0, "self_attn.q_proj"), "blk.0.attn_q.weight", (64, 64), 4),
        (of(1, "self_attn.k_proj"), "blk.1.attn_k.weight", (32, 64), 2),
        (of(1, "self_attn.v_proj"), "blk.1.attn_v.weight", (32, 64), 0),
        (of(1, "self_attn.o_proj"), "blk.1.attn_output.weight", (64, 64), 0),
        (of(1, "mlp.gate_proj"), "blk.1.ffn_gate.weight", (160, 64), 0),
        (of(1, "mlp.up_proj"), "blk.1.ffn_up.weight", (160, 64), 0),
        (of(1, "mlp.down_proj"), "blk.1.ffn_down.weight", (64, 160), 0),
    ],
)
def test_shapes_follow_from_keys(tmp_path: Path, module: str, target: str, shape: tuple[int, int], heads: int) -> None:
    base = gguf(tmp_path / "base.gguf", LLAMA)
    found = slot(base, module)
    assert (found.target, found.shape, heads_of(base, found)) == (target, shape, heads)


@pytest.mark.parametrize(
    ("changed", "q", "k"),
    [
        ({"llama.attention.head_count_kv": None}, ((64, 64), 4), ((64, 64), 4)),
        ({"llama.attention.key_length": 24}, ((96, 64), 4), ((48, 64), 2)),
        ({"llama.rope.dimension_count": 24}, ((96, 64), 4), ((48, 64), 2)),
        ({"llama.embedding_length": None}, ((None, None), 4), ((None, None), 2)),
        ({"llama.attention.head_count": None}, ((None, 64), None), ((None, 64), 2)),
        ({"llama.attention.head_count": [4, 4], "llama.attention.head_count_kv": [2, 2]}, ((64, 64), 4), ((32, 64), 2)),
    ],
)
def test_defaults_of_keys_that_are_absent(tmp_path: Path, changed: dict[str, Any], q: Any, k: Any) -> None:
    base = gguf(tmp_path / "base.gguf", LLAMA | changed)
    found = [slot(base, of(0, f"self_attn.{name}_proj")) for name in "qk"]
    assert [(one.shape, heads_of(base, one)) for one in found] == [q, k]


def test_a_base_of_keys_alone_is_told(tmp_path: Path) -> None:
    base = gguf(tmp_path / "base.gguf", LLAMA)
    assert [warning.code for warning in base.warnings] == ["base-metadata-only"]
    assert base.is_tied is None


def test_the_tensor_list_says_what_there_is_and_how_large(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": (50, 64), "blk.0.attn_q.weight": (96, 64), "output.weight": (50, 64)}
    base = gguf(tmp_path / "base.gguf", LLAMA, tensors)
    assert not base.warnings
    assert base.is_tied is False
    assert slot(base, of(0, "self_attn.q_proj")).shape == (96, 64)
    assert slot(base, "lm_head").shape == (50, 64)
    assert slot(base, "model.embed_tokens").is_embedding
    assert why(base, of(1, "self_attn.q_proj")) == "the base (llama) has no such module"


def test_a_list_without_output_is_of_a_tied_model(tmp_path: Path) -> None:
    base = gguf(tmp_path / "base.gguf", LLAMA, {"token_embd.weight": (50, 64)})
    assert base.is_tied is True
    assert "tied" in why(base, "lm_head")


def test_layers_of_each_kind_by_their_head_counts(tmp_path: Path) -> None:
    base = gguf(tmp_path / "base.gguf", LFM2)
    assert slot(base, of(2, "self_attn.k_proj")).shape == (32, 64)
    assert slot(base, of(3, "conv.in_proj")).shape == (192, 64)
    assert "no such module" in why(base, of(1, "self_attn.k_proj"))
    assert "no such module" in why(base, of(2, "conv.in_proj"))


def test_one_head_count_is_every_layers(tmp_path: Path) -> None:
    base = gguf(tmp_path / "base.gguf", LFM2 | {"lfm2.attention.head_count_kv": 2})
    assert slot(base, of(3, "self_attn.k_proj")).shape == (32, 64)
    assert "no such module" in why(base, of(3, "conv.in_proj"))


def test_the_vocabulary_tells_its_size(tmp_path: Path) -> None:
    tokens = raw.array("tokenizer.ggml.tokens", raw.STRING, b"".join(map(raw.text, "abcde")), 5)
    keys = [key(name, value) for name, value in ({"general.architecture": "llama"} | LLAMA).items()]
    (tmp_path / "base.gguf").write_bytes(raw.gguf([*keys, tokens]))
    assert slot(open_base(tmp_path / "base.gguf", LIMIT), "model.embed_tokens").shape == (5, 64)


def test_a_tensor_list_beats_wrong_head_counts(tmp_path: Path) -> None:
    keys = LFM2 | {"lfm2.attention.head_count_kv": [0, 0, 0, 0]}  # as Ollama's first release wrote them
    base = gguf(tmp_path / "base.gguf", keys, {"blk.2.attn_k.weight": (32, 64)})
    assert slot(base, of(2, "self_attn.k_proj")).shape == (32, 64)


@pytest.mark.parametrize("module", [of(2, "self_attn.q_proj"), of(99, "mlp.up_proj"), of(0, "mlp.fc1"), "score", ""])
def test_modules_that_are_not_there(tmp_path: Path, module: str) -> None:
    assert "no such module" in why(gguf(tmp_path / "base.gguf", LLAMA), module)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (of(0, "ffn_norm"), "it is a norm, to which llama.cpp does not apply adapters"),
        ("model.embedding_norm", "it is a norm, to which llama.cpp does not apply adapters"),
        (of(0, "conv.conv"), "it is a convolution, for which LoRA is not supported"),
    ],
)
def test_modules_that_no_adapter_can_change(tmp_path: Path, module: str, reason: str) -> None:
    assert why(gguf(tmp_path / "base.gguf", LFM2), module) == reason


def test_head_counts_are_copied_as_they_are(tmp_path: Path) -> None:
    llama = gguf(tmp_path / "a.gguf", LLAMA | {"llama.attention.head_count_kv": None})
    assert [(entry.key, entry.type.name, entry.value) for entry in llama.keys] == [
        ("llama.attention.head_count", "UINT32", 4)
    ]
    counts = gguf(tmp_path / "b.gguf", LFM2).keys[1].value
    assert isinstance(counts, PackedArray)
    assert (counts.element.name, counts.payload) == ("INT32", struct.pack("<4i", 0, 0, 2, 0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported"),
        ({"general.architecture": 7}, "architecture 7 is not supported"),
        ({"general.architecture": None}, "architecture None is not supported"),
        ({"general.type": "adapter"}, "is an adapter, not a base"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 4_000_000_000}, "llama.block_count is not a whole number"),
        ({"llama.block_count": 2_000_000_000}, "2000000000, which is not a valid number of layers"),
        ({"llama.embedding_length": "64"}, "llama.embedding_length is not a whole number"),
        ({"llama.attention.head_count": [4, 8]}, "differs between layers"),
        ({"llama.attention.head_count_kv": [2, -1]}, "is not a whole number"),
    ],
)
def test_bases_that_are_none(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        gguf(tmp_path / "base.gguf", LLAMA | changed)


@pytest.mark.parametrize(("counts", "message"), [([0, 2, 0], "base-key"), ([0, 2, 4, 0], "base-key")])
def test_lists_that_are_wrong(tmp_path: Path, counts: list[int], message: str) -> None:
    with raises(SourceError, code=message):
        gguf(tmp_path / "base.gguf", LFM2 | {"lfm2.attention.head_count_kv": counts})


# ---------------------------------------------------------------- a folder


def facts(base: BaseModel) -> dict[str, Any]:
    """All that is known of the modules that are asked for in these tests."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.out_proj", "conv.in_proj", "feed_forward.w2")
    modules = [*(of(i, name) for i in range(4) for name in names), "model.embed_tokens", "lm_head"]
    slots = {module: base.slot(module) for module in modules}
    return {
        module: one.message if isinstance(one, Problem) else (one.target, one.shape, heads_of(base, one), one.order)
        for module, one in slots.items()
    } | {"tied": base.is_tied, "keys": tuple(base.keys)}


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_says_the_same_with_weights_without_and_as_gguf(tmp_path: Path, tied: bool) -> None:
    src = tiny.lfm2(tmp_path / "src", attention=(1, 2), tied=tied)
    streamconv.convert(src, tmp_path / "src.gguf")
    expected = facts(open_base(src, LIMIT))
    assert facts(open_base(tmp_path / "src.gguf", LIMIT)) == expected
    (src / "model.safetensors").unlink()
    assert facts(open_base(src, LIMIT)) == expected
    assert expected[of(1, "self_attn.k_proj")] == ("blk.1.attn_k.weight", (32, 64), 0, (1, 3, -1))


@pytest.mark.parametrize("keys", [("quantization_config",), ("quantization",), ("quantization", "quantization_config")])
def test_a_quantised_base_has_the_shapes_of_its_config(tmp_path: Path, keys: tuple[str, ...]) -> None:
    """As of transformers, of older mlx-lm and of newer."""
    src = tiny.llama(tmp_path, config={key: {"group_size": 64, "bits": 4} for key in keys})
    tiny.write_safetensors(src / "model.safetensors", {"packed.weight": tiny.Tensor("U8", (7, 1), bytes(7))})
    assert slot(open_base(src, LIMIT), of(1, "self_attn.k_proj")).shape == (32, 64)


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_which_tensors_a_base_has(tmp_path: Path, form: str) -> None:
    base = open_base(src := tiny.llama(tmp_path / "src"), LIMIT)
    if form == "gguf":
        streamconv.convert(src, tmp_path / "base.gguf")
        base = open_base(tmp_path / "base.gguf", LIMIT)
    present = ("model.norm.weight", of(1, "mlp.up_proj.weight"), of(0, "input_layernorm.weight"), "lm_head.weight")
    absent = ("score.weight", of(1, "mlp.up_proj.bias"), of(2, "mlp.up_proj.weight"), "norm.weight", "")
    assert [base.has(name) for name in (*present, *absent)] == [True] * 4 + [False] * 5


def test_layers_whose_kind_no_one_tells_may_have_either(tmp_path: Path) -> None:
    src = tiny.lfm2(tmp_path, layers_by=())
    (src / "model.safetensors").unlink()
    base = open_base(src, LIMIT)
    assert slot(base, of(0, "self_attn.q_proj")).shape == slot(base, of(0, "conv.out_proj")).shape == (64, 64)
    assert [entry.key for entry in base.keys] == ["lfm2.attention.head_count"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_hidden_layers": 10**6}, "layer-count"),
        ({"num_hidden_layers": None}, "layer-count"),
        ({"layer_types": ["conv"]}, "config-contradiction"),
        ({"architectures": ["architecture-unsupported"], "model_type": "gpt2"}, "architecture-unsupported"),
    ],
)
def test_configs_that_are_none(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    src = tiny.lfm2(tmp_path)
    (src / "model.safetensors").unlink()
    settings = json.loads((src / "config.json").read_text()) | changed
    tiny.write_json(src / "config.json", settings)
    with raises(SourceError, code=message):
        open_base(src, LIMIT)


def test_a_folder_of_ggufs_names_one(tmp_path: Path) -> None:
    (tmp_path / "model-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"name the file itself, as .*model-Q4\.gguf"):
        open_base(tmp_path, LIMIT)


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_by_either_name(tmp_path: Path, stacked: bool) -> None:
    base = open_base(tiny.lfm2moe(tmp_path, stacked=stacked, config={"routed_scaling_factor": 2.5}), LIMIT)
    one = slot(base, of(2, "feed_forward.experts.5.w2"))
    assert (one.target, one.shape, one.expert, one.n_experts, factor_of(base, one)) == (
        "blk.2.ffn_down_exps.weight", (64, 160), 5, 6, 2.5
    )  # fmt: skip
    together = slot(base, of(2, "feed_forward.switch_mlp.gate_proj"))
    assert (together.target, together.shape, together.expert, together.n_experts, factor_of(base, together)) == (
        "blk.2.ffn_gate_exps.weight", (160, 64), None, 6, 1.0
    )  # fmt: skip
    for absent in ("experts.6.w2", "experts.0.w4", "switch_mlp.fc1"):
        assert "no such module" in why(base, of(2, f"feed_forward.{absent}"))
    assert "no such module" in why(base, of(0, "feed_forward.experts.0.w1"))  # a dense layer


def test_a_gguf_does_not_tell_how_experts_were_scaled(tmp_path: Path) -> None:
    streamconv.convert(tiny.lfm2moe(tmp_path / "src"), tmp_path / "base.gguf")
    base = open_base(tmp_path / "base.gguf", LIMIT)
    assert factor_of(base, slot(base, of(1, "feed_forward.experts.0.w2"))) is None
    assert factor_of(base, slot(base, of(1, "feed_forward.experts.0.w1"))) == 1.0
