"""Checkpoints that are not what they seem: left-over keys, quantised ones, other architectures, what is not a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from streamconv.errors import SourceError
from tests import tiny
from tests.oracles import ggufs
from tests.tiny import Tensor, variants
from tests.tiny.variants import configured, packed, renamed, rewritten

BUILDERS = {"llama": tiny.llama, "lfm2": tiny.lfm2, "lfm2moe": tiny.lfm2moe}
Q = "model.layers.1.self_attn.q_proj.weight"


def refused(source: Path, dst: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        streamconv.convert(source, dst)
    assert not dst.exists()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    return caught.value


# ---------------------------------------------------------------- quantised or not

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
LEFT_OVER: list[dict[str, Any]] = [
    {"quantization_config": BNB},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"quant_method": "compressed-tensors"}},
    {"quantization_config": {"quant_method": "fp8"}},
    {"quantization": {"group_size": 64, "bits": 4}},
    {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
]


@pytest.mark.parametrize("settings", LEFT_OVER)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_left_over_key_is_a_warning(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    source = BUILDERS[name](tmp_path / "model")
    plain = streamconv.convert(source, tmp_path / "plain.gguf")
    configured(source, **settings)
    report = streamconv.convert(source, tmp_path / "out.gguf")
    assert [warning.code for warning in report.warnings] == ["quantization-config"]
    assert all(key in report.warnings[0].message for key in settings)
    assert ("MLX, 4 bits" in report.warnings[0].message) == ("group_size" in str(settings))
    assert ggufs.read(report.output).golden() == ggufs.read(plain.output).golden()
    adapter = tiny.peft_adapter(tmp_path / "adapter", source, targets=("q_proj",))
    assert streamconv.convert_adapter(adapter, source, tmp_path / "lora.gguf").warnings == []


def one_of(dtype: str, nbytes: int) -> Tensor:
    return Tensor(dtype, (nbytes,), bytes(nbytes * {"I32": 4, "U32": 4, "F8_E4M3": 1, "U8": 1, "I8": 1}[dtype]))


PACKED: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "bitsandbytes": lambda t: t | packed(Q),
    "int8": lambda t: t | {Q: one_of("I8", 9), f"{Q.removesuffix('weight')}SCB": Tensor.of(np.ones(3), "F32")},
    "mlx": lambda t: t | {Q: one_of("U32", 8), Q.replace("weight", "scales"): Tensor.of(np.ones((3, 2)), "BF16")},
    "scales alone": lambda t: t | {Q.replace("weight", "scales"): Tensor.of(np.ones((3, 2)), "BF16")},
    "fp8": lambda t: t | {Q: one_of("F8_E4M3", 12)},
    "fp8 scales": lambda t: t | {f"{Q}_scale_inv": Tensor.of(np.ones((1, 1)), "F32")},
    "gptq": lambda t: {**t, Q.replace("weight", "qweight"): one_of("I32", 12)},
    "compressed": lambda t: {**t, f"{Q}_packed": one_of("I32", 12)},
    "uint8": lambda t: t | {Q: one_of("U8", 12)},
}


@pytest.mark.parametrize("says", [{}, {"quantization_config": BNB}])
@pytest.mark.parametrize("kind", PACKED)
def test_one_packed_matrix_is_enough(tmp_path: Path, kind: str, says: dict[str, Any]) -> None:
    source = configured(tiny.llama(tmp_path / "model", dtype="BF16"), **says)
    rewritten(source, PACKED[kind](dict(tiny.tensors_of(source))))
    assert refused(source, tmp_path / "out.gguf").code == "quantised"


def test_weights_that_are_quantised_while_the_model_runs_are_another_model(tmp_path: Path) -> None:
    method = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    source = configured(tiny.llama(tmp_path / "model", dtype="BF16"), quantization_config=method)
    assert refused(source, tmp_path / "out.gguf").code == "quantised-at-runtime"


# ---------------------------------------------------------------- what is not a model


def unmerged(source: Path) -> None:
    tensors = dict(tiny.tensors_of(source))
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    weight, stem = tensors.pop(name), name.removesuffix("weight")
    tensors |= {f"{stem}base_layer.weight": weight, f"{stem}lora_A.default.weight": Tensor.of(np.ones((3, 64)), "F32")}
    rewritten(source, tensors | {f"{stem}lora_B.default.weight": Tensor.of(np.ones((64, 3)), "F32")})


def unmerged_and_wrapped(source: Path) -> None:
    unmerged(source)
    renamed(source, variants.prefixed("base_model.model."))


def adding(*names: str) -> Callable[[Path], None]:
    def add(source: Path) -> None:
        more = {name: Tensor.of(np.ones((1, 64)), "F32") for name in names}
        rewritten(source, dict(tiny.tensors_of(source)) | more)

    return add


def emptied(source: Path) -> None:
    """As ZeRO-3 leaves them: names, and nothing in them."""
    tensors = {name: Tensor(tensor.dtype, (0,), b"") for name, tensor in tiny.tensors_of(source).items()}
    rewritten(source, tensors)


FOREIGN = [
    (unmerged, "unmerged-lora"),
    (unmerged_and_wrapped, "unmerged-lora"),
    (adding("model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"), "unmerged-lora"),
    (adding("model.embed_tokens.modules_to_save.default.weight"), "unmerged-lora"),
    (adding("model.embed_tokens.token_adapter.trainable_tokens_delta"), "unmerged-lora"),
    (adding("model.layers.0.self_attn.q_proj.vera_lambda_b.default"), "unmerged-lora"),
    (adding("model.layers.0.self_attn.q_proj.hada_w1_a.default"), "unmerged-lora"),
    (adding("v_head.summary.weight", "v_head.summary.bias"), "value-head"),
    (adding("value_head.weight"), "value-head"),
    (adding("score.weight"), "classification-head"),
    (emptied, "empty-tensors"),
    (adding("_fsdp_wrapped_module.model.layers.0._flat_param"), "flat-tensors"),
    (adding("model.layers.0._fsdp_wrapped_module._flat_param_1"), "flat-tensors"),
]


@pytest.mark.parametrize(("change", "code"), FOREIGN)
@pytest.mark.parametrize("name", BUILDERS)
def test_it_is_named_for_what_it_is(tmp_path: Path, name: str, change: Callable[[Path], None], code: str) -> None:
    source = BUILDERS[name](tmp_path / "model")
    change(source)
    error = refused(source, tmp_path / "out.gguf")
    assert error.code == code
    assert error.hint


def test_an_adapter_of_empty_tensors_is_named_for_what_it_is(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "model")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base)
    tensors = {name: Tensor(tensor.dtype, (0,), b"") for name, tensor in tiny.tensors_of(adapter).items()}
    tiny.write_safetensors(adapter / "adapter_model.safetensors", tensors)
    for convert in (
        lambda dst: streamconv.convert_adapter(adapter, base, dst),
        lambda dst: streamconv.convert(base, dst, adapters=[adapter]),
    ):
        with pytest.raises(SourceError) as caught:
            convert(tmp_path / "out.gguf")
        assert {problem["code"] for problem in caught.value.problems} == {"empty-tensors"}
        assert "another base" not in caught.value.message


# ---------------------------------------------------------------- other architectures


@pytest.mark.parametrize("name", BUILDERS)
def test_a_classifier_of_a_known_kind_is_named_for_what_it_is(tmp_path: Path, name: str) -> None:
    source = BUILDERS[name](tmp_path / "model")
    adding("score.weight")(configured(source, architectures=["OtherForSequenceClassification"]))
    assert refused(source, tmp_path / "out.gguf").code == "classification-head"
    configured(source, model_type="unheard_of")
    assert refused(source, tmp_path / "other.gguf").code == "architecture-unsupported"


def test_of_equally_near_architectures_the_one_of_the_config_is_named(tmp_path: Path) -> None:
    source = configured(tiny.llama(tmp_path / "model"), architectures=["LlamaForSomethingElse"])
    assert "the most similar one is llama:" in refused(source, tmp_path / "out.gguf").message


def test_an_unsupported_architecture_is_named_with_the_nearest(tmp_path: Path) -> None:
    source = configured(tiny.llama(tmp_path / "model"), architectures=["FancyForCausalLM"], model_type="fancy")
    tensors = dict(tiny.tensors_of(source))
    strange = "model.layers.{}.self_attn.q_surprise.weight"
    rewritten(source, tensors | {strange.format(i): Tensor.of(np.ones(16), "F32") for i in range(2)})
    error = refused(source, tmp_path / "out.gguf")
    assert error.code == "architecture-unsupported"
    assert "FancyForCausalLM" in error.message
    assert "the most similar one is gemma:" in error.message  # whose names are those of llama, but for the head
    assert strange.format("{i}") in error.message
    assert "docs/adding-an-architecture.md" in (error.hint or "")


def test_an_unsupported_architecture_is_said_before_anything_else(tmp_path: Path) -> None:
    source = configured(tiny.llama(tmp_path / "model", n_shards=2), architectures=["FancyForCausalLM"])
    (source / "model-00002-of-00002.safetensors").unlink()
    (source / "tokenizer.json").write_text("{")
    assert refused(source, tmp_path / "out.gguf").code == "architecture-unsupported"


# ---------------------------------------------------------------- RoPE


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}, "rope_theta": 1e4},
    ],
)
@pytest.mark.parametrize("name", BUILDERS)
def test_dynamic_rope_is_plain_up_to_the_trained_context(tmp_path: Path, name: str, rope: dict[str, Any]) -> None:
    source = BUILDERS[name](tmp_path / "model")
    theta = {"rope_theta": rope.get("rope_parameters", {}).get("rope_theta", 7e5), "rope_type": "default"}
    plain = streamconv.convert(configured(source, rope_parameters=theta), tmp_path / "plain.gguf")
    configured(source, **({"rope_theta": 7e5} | rope))
    report = streamconv.convert(source, tmp_path / "out.gguf")
    assert [warning.code for warning in report.warnings] == ["rope-dynamic"]
    assert ggufs.read(report.output).golden() == ggufs.read(plain.output).golden()


def test_packed_experts_under_another_name_are_named(tmp_path: Path) -> None:
    source = tiny.lfm2moe(tmp_path / "model", stacked=True)
    ends = ("experts.gate_up_proj", "experts.down_proj")
    renamed(source, lambda name: f"{name}.weight" if name.endswith(ends) else name)
    error = refused(source, tmp_path / "out.gguf")
    assert error.code == "packed-experts-name" and "experts.down_proj.weight and 5 more" in str(error)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_json_in_utf_16_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    """As Windows' PowerShell writes what is redirected into a file."""
    source = tiny.llama(tmp_path / "model")
    (source / name).write_bytes(("\ufeff" + (source / name).read_text(encoding="utf-8")).encode(encoding))
    error = refused(source, tmp_path / "out.gguf")
    assert "UTF-16" in str(error) and "iconv" in str(error.hint)
