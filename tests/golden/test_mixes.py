"""llama-quantize's types, tensor by tensor, and its bytes: goldens of tests/tools/make_mix_goldens.py."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.errors import SourceError, UsageError
from streamconv.ggml import encode, mix_rules, mixes
from streamconv.ggml.element_types import TYPES
from streamconv.ggml.mixes import MIXES, Choice, MixedTensor, MixOptions, ModelFacts
from streamconv.lazy.scratch import Scratch
from tests import mixed_models
from tests.mixed_models import LETTERS, MODELS, REFUSED, Case, Model
from tests.tools.make_mix_goldens import GOLDENS

BY_MODEL = {name: [case for case in mixed_models.cases() if case.model == name] for name in MODELS}


@functools.cache
def goldens() -> dict[str, Any]:
    return dict(json.loads(GOLDENS.read_text(encoding="utf-8")))


def chosen(model: Model, case: Case) -> dict[str, Choice]:
    keys = {f"{model.architecture}.{name}": value for name, value in model.keys.items()}
    facts = ModelFacts.of_keys({"general.architecture": model.architecture, **keys}.get)
    tensors = [MixedTensor(name, shape, mixed_models.type_of(shape)) for name, shape in model.tensors.items()]
    return mix_rules.choose_types(MIXES[case.mix], tensors, facts, options=case.options, has_importance=case.weighted)


def is_refused(model: Model, case: Case, choices: dict[str, Choice]) -> bool:
    return any(
        mix_rules.requires_importance(MIXES[case.mix], name, choice.type)
        and not (case.weighted and mixed_models.has_importance(name))
        for name, choice in choices.items()
    )


@pytest.mark.parametrize("name", MODELS)
def test_types(name: str) -> None:
    model, wrong = MODELS[name](), []
    for case in BY_MODEL[name]:
        choices = chosen(model, case)
        assert list(choices) == list(model.tensors)
        letters = "".join(LETTERS[choice.type] for choice in choices.values())
        expected = goldens()["types"][str(case)]
        if expected == REFUSED:
            assert is_refused(model, case, choices), case
        elif letters != expected:
            pairs = zip(model.tensors, letters, expected, strict=True)
            wrong.append((str(case), [pair for pair in pairs if pair[1] != pair[2]][:8]))
    assert not wrong


def quantized(name: str, shape: tuple[int, ...], target: GGMLQuantizationType, weighted: bool) -> NDArray[np.uint8]:
    """The bytes of a tensor in type `target`, matrix by matrix."""
    source, n_columns = mixed_models.type_of(shape), shape[-1]
    values = mixed_models.values(name, shape)
    parts = values.reshape(shape[0] if len(shape) == 3 else 1, -1)
    importance = mixed_models.importance(name, shape) if weighted and mixed_models.has_importance(name) else None
    made, from_, to = [], TYPES[source].dtype, TYPES[target].dtype
    for i, part in enumerate(parts):
        n_rows = int(np.prod(shape[:-1])) // len(parts)
        out = np.zeros(n_rows * to.row_nbytes(n_columns), dtype=np.uint8)
        scratch = Scratch(encode.encode_scratch_nbytes(from_, to, n_rows, n_columns))
        weights = None if importance is None else importance[i]
        encode.encode(from_, to, part.copy(), out, scratch, n_columns, encode.best_kernel(), weights)
        made.append(out)
    return np.concatenate(made)


@pytest.mark.parametrize("name", mixed_models.WITH_DATA)
def test_bytes(name: str) -> None:
    model, wrong = MODELS[name](), []
    compared = [case for case in BY_MODEL[name] if str(case) in goldens()["digests"]]
    assert len(compared) > 30
    for case in compared:
        digest = hashlib.sha256()
        for tensor, choice in chosen(model, case).items():
            digest.update(quantized(tensor, model.tensors[tensor], choice.type, case.weighted))
        if digest.hexdigest()[:16] != goldens()["digests"][str(case)]:
            wrong.append(str(case))
    assert not wrong


def test_a_layer_beyond_the_model_is_refused() -> None:
    facts = ModelFacts("llama", n_layers=2, n_experts=4, n_heads=8, n_kv_heads=2)
    for name in ("ffn_down.weight", "blk.2.ffn_up_exps.weight"):
        with pytest.raises(SourceError) as error:
            mix_rules.choose_types(MIXES["q4_k_m"], [MixedTensor(name, (8, 256), mixed_models.BF16)], facts)
        assert error.value.code == "mix-layer" and error.value.tensor == name
        pure = MixOptions(pure=True)
        choices = mix_rules.choose_types(
            MIXES["q4_k_m"], [MixedTensor(name, (8, 256), mixed_models.BF16)], facts, options=pure
        )
        assert choices[name].type == GGMLQuantizationType.Q4_K


def test_a_type_that_is_asked_for_must_divide_the_rows() -> None:
    """llama-quantize dies of it."""
    facts = ModelFacts("llama", n_layers=2, n_heads=8, n_kv_heads=2)
    tensors = [MixedTensor(name, (8, 96), mixed_models.BF16) for name in ("token_embd.weight", "output.weight")]
    for options in (
        MixOptions(embedding_type=GGMLQuantizationType.Q4_K),
        MixOptions(output_type=GGMLQuantizationType.Q4_K, pure=True),
    ):
        with pytest.raises(UsageError) as error:
            mix_rules.choose_types(MIXES["q8_0"], tensors, facts, options=options)
        assert error.value.code == "type-row"


def test_overrides_are_read_as_by_llama_quantize() -> None:
    pattern, type_ = mixes.parse_override("Blk.[0-9]+.ATTN_V=Q8_0")
    assert pattern.pattern == "blk.[0-9]+.attn_v" and type_ == GGMLQuantizationType.Q8_0
    for wrong, code in (
        ("attn_v", "tensor-type-syntax"),
        ("=q8_0", "tensor-type-syntax"),
        ("attn_v=", "tensor-type-syntax"),
        ("attn_(v=q8_0", "tensor-type-syntax"),
        ("attn_v=iq2_xxs", "type-unknown"),
        ("attn_v=q8", "type-unknown"),
    ):
        with pytest.raises(UsageError) as error:
            mixes.parse_override(wrong)
        assert error.value.code == code, wrong


def test_names_are_found_in_either_case() -> None:
    for name, expected in (("Q4_K", "q4_k_m"), ("q5_k", "q5_k_m"), ("Q3_K", "q3_k_m"), ("IQ4_NL", "iq4_nl")):
        mix = mixes.find_mix(name)
        assert mix is not None and mix.name == expected
    assert mixes.find_mix("q4") is None
