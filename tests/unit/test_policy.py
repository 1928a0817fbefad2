"""Which type each tensor gets: outtypes, what stays F32, fallbacks, overrides, mixes."""

from __future__ import annotations

import re

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGUFValueType, LlamaFileType
from gguf.constants import GGMLQuantizationType as T

from streamconv import options
from streamconv.errors import SourceError
from streamconv.ggml.blocks import BLOCK_TYPES
from streamconv.ggml.element_types import BLOCKS, TYPE_OF, TYPES, VERIFIABLE
from streamconv.ggml.mixes import MIXES, MixOptions, ModelFacts, parse_override
from streamconv.ggml.outtypes import OUTTYPES, WORDS, Outtype
from streamconv.ggml.policy import MixPolicy, OuttypePolicy, TensorRole, facts_of, file_type_of, settled
from streamconv.gguf.format import KeyValue, PackedArray
from streamconv.recipe.language import Recipe
from streamconv.recipe.registry import all_recipes

FACTS = ModelFacts()
# What llama.cpp's converter keeps F32 by name, beside vectors, norms and what is not a ".weight": prepare_tensors in
# its conversion/base.py.
ALWAYS_F32 = re.compile(
    r"(ffn_gate_inp|ffn_gate_inp_shexp|position_embd|token_types|ssm_conv1d(_[qkv])?|shortconv\.conv"
    r"|time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)|altup_(correct|predict)_coef)\.weight$"
)


def role(name: str = "blk.0.attn_q.weight", columns: int = 256) -> TensorRole:
    return TensorRole(name, (4, columns))


# ---------------------------------------------------------------- tables


def test_the_table_has_every_type_in_its_true_size() -> None:
    assert TYPES.keys() == GGML_QUANT_SIZES.keys()
    for id_, row in TYPES.items():
        assert (row.dtype.block, row.dtype.block_nbytes) == GGML_QUANT_SIZES[id_]
        assert TYPE_OF[row.dtype] is row
    assert {row.id for row in TYPES.values() if row.encoder == BLOCKS} == BLOCK_TYPES.keys()
    assert {row.id for row in TYPES.values() if row.encoder} == VERIFIABLE
    file_types = [row.file_type for row in TYPES.values() if row.file_type is not None]
    assert len(file_types) == len(set(file_types))


def test_outtypes_name_types_that_are_made_and_fall_back_to_such() -> None:
    for row in OUTTYPES.values():
        assert T[row.type] in VERIFIABLE
        assert file_type_of(row) in LlamaFileType
    assert MIXES.keys() == {row.name for row in OUTTYPES.values() if row.is_mix} | {"q8_0"}
    assert [mix.type.name for mix in MIXES.values()] == [OUTTYPES[name].type for name in MIXES]
    assert int(MIXES["q3_k_l"].file_type) == 13 and int(MIXES["tq1_0"].file_type) == 36  # as in llama.h
    assert options.find("outtype").option.choices_for("convert") is WORDS


def test_file_types() -> None:
    found = {row.name: int(file_type_of(row)) for row in OUTTYPES.values() if not row.is_mix}
    assert found.items() >= {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}.items()
    assert file_type_of(Outtype("q4_k_m", "Q4_K", "Q4_K_M")) == 15


# ---------------------------------------------------------------- what stays F32


@pytest.mark.parametrize("recipe", all_recipes(), ids=lambda recipe: recipe.arch)
def test_an_architecture_names_what_llama_cpp_keeps_f32(recipe: Recipe) -> None:
    matrices = [row for row in recipe.tensors if sum(extent != "1" for extent in row.shape.split()) > 1]
    assert matrices
    for row in matrices:
        assert row.f32 == bool(ALWAYS_F32.search(row.target)), row.target


@pytest.mark.parametrize(
    ("name", "shape", "is_f32", "type_"),
    [
        ("blk.0.attn_q.weight", (4, 64), False, T.Q8_0),
        ("blk.0.attn_q.bias", (64,), False, T.F32),
        ("blk.0.ffn_gate_exps.bias", (4, 64), False, T.F32),
        ("blk.0.attn_norm.weight", (64,), False, T.F32),
        ("blk.0.ffn_gate_inp.weight", (4, 64), True, T.F32),
        ("blk.0.attn_q.weight.lora_a", (4, 64), False, T.Q8_0),
        ("blk.0.attn_q.weight.lora_b", (64, 4), False, T.F16),
        ("blk.0.ffn_down_exps.weight", (2, 4, 96), False, T.Q8_0),
        ("blk.0.ffn_down_exps.weight", (2, 4, 100), False, T.F16),
        ("rope_freqs.weight", (64,), True, T.F32),
    ],
)
def test_q8_0(name: str, shape: tuple[int, ...], is_f32: bool, type_: T) -> None:
    assert OuttypePolicy("q8_0").choose([TensorRole(name, shape, is_f32)], FACTS) == [type_]


# ---------------------------------------------------------------- fallbacks, overrides, mixes


@pytest.mark.parametrize(
    ("wanted", "columns", "type_"),
    [
        (T.Q4_K, 512, T.Q4_K),
        (T.Q4_K, 96, T.Q5_0),
        (T.Q5_K, 96, T.Q5_1),
        (T.Q6_K, 96, T.Q8_0),
        (T.Q2_K, 96, T.Q4_0),
        (T.Q3_K, 96, T.Q4_0),
        (T.IQ4_XS, 96, T.IQ4_NL),
        (T.IQ4_XS, 100, T.F16),
        (T.Q4_K, 100, T.F16),
        (T.BF16, 100, T.BF16),
    ],
)
def test_rows_that_do_not_divide_fall_back(wanted: T, columns: int, type_: T) -> None:
    assert settled(role(columns=columns), wanted) == type_


def test_the_first_override_that_is_found_counts() -> None:
    overrides = tuple(parse_override(text) for text in ("Attn_[QK]\\.=f16", "attn_=F32", "norm=f16"))
    roles = [role("blk.1.attn_q.weight"), role("blk.1.attn_v.weight"), role("output.weight")]
    roles.append(TensorRole("blk.1.attn_norm.weight", (64,)))
    policy = OuttypePolicy("bf16", MixOptions(overrides))
    assert policy.choose(roles, FACTS) == [T.F16, T.F32, T.BF16, T.F32]


def test_a_mix_leaves_what_it_does_not_quantise_as_in_the_lossless_file() -> None:
    names = ["token_embd.weight", "output.weight", "blk.0.attn_q.weight", "blk.0.ffn_gate_inp.weight", "blk.0.x.bias"]
    roles = [TensorRole(name, (4, 256), name.startswith("blk.0.ffn_gate_inp")) for name in names]
    found = MixPolicy("q4_k_m", "bf16", MixOptions(leave_output=True)).choose(roles, ModelFacts("llama", 1))
    assert found == [T.Q4_K, T.BF16, T.Q4_K, T.F32, T.F32]


def test_the_facts_of_a_file_are_in_its_keys() -> None:
    heads = PackedArray.of_numbers(GGUFValueType.INT32, [0, 8, 8])
    keys = [
        KeyValue.u32("lfm2moe.block_count", 3),
        KeyValue.u32("lfm2moe.expert_count", 32),
        KeyValue.u32("lfm2moe.attention.head_count", 16),
        KeyValue.array("lfm2moe.attention.head_count_kv", heads),
        KeyValue.u32("clip.vision.block_count", 27),
    ]
    assert facts_of("lfm2moe", keys) == ModelFacts("lfm2moe", 3, 32, 16, 0)
    assert facts_of("llama", keys) == ModelFacts("llama")


def test_a_type_that_would_round_what_the_model_made_is_refused() -> None:
    one = TensorRole("a.weight", (2, 64), loss=lambda type_: "scales them" if type_ in (T.BF16, T.F16) else None)
    assert OuttypePolicy("q8_0").choose([one], FACTS) == [T.Q8_0]
    with pytest.raises(SourceError) as error:
        OuttypePolicy("bf16").choose([one], FACTS)
    assert error.value.code == "inexact-type"
    assert error.value.hint == "--outtype f32 or q8_0"
