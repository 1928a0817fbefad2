"""An adapter on disk: which file, and what each tensor's name says it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv.budget import unbounded
from streamconv.errors import SourceError
from streamconv.lora.files import LoraFile, parse_name
from tests import loras, tiny
from tests.raising import raises

Q = loras.Q
LIMIT = unbounded()


@pytest.mark.parametrize(
    ("name", "role", "module"),
    [
        (f"base_model.model.{Q}.lora_A.weight", "a", Q),
        (f"base_model.model.{Q}.lora_B.weight", "b", Q),
        (f"base_model.model.base_model.model.{Q}.lora_A.weight", "a", Q),
        (f"base_model.model.{Q}.lora_A.default.weight", "a", Q),
        (f"{Q}.lora_B.default.weight", "b", Q),
        (f"{Q}.lora_a", "a", Q),
        (f"{Q}.lora_b", "b", Q),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "a", "model.embed_tokens"),
        ("base_model.model.model.embed_tokens.lora_embedding_B", "b", "model.embed_tokens"),
        ("base_model.model.model.embed_tokens.lora_embedding_A.default", "a", "model.embed_tokens"),
        ("base_model.model.lm_head.base_layer.weight", "unused", "lm_head"),
        (f"base_model.model.{Q}.lora_velora_embed", "unused", Q),
        (f"base_model.model.{Q}.lora_monteclora_sampler.log_var", "unused", Q),
        (f"base_model.model.{Q}.lora_magnitude_vector", "dora", Q),
        (f"base_model.model.{Q}.lora_magnitude_vector.default.weight", "dora", Q),
        (f"{Q}.m", "dora", Q),
        (f"base_model.model.{Q}.lora_B.bias", "lora-bias", Q),
        (f"base_model.model.{Q}.lora_diag", "kasa", Q),
        (f"base_model.model.{Q}.base_layer.bias", "bias", Q),
        (f"base_model.model.{Q}.bias", "bias", Q),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "tokens", "model.embed_tokens"),
        ("base_model.model.model.norm.weight", "norm", "model.norm"),
        ("base_model.model.model.layers.0.input_layernorm.weight", "norm", "model.layers.0.input_layernorm"),
        ("base_model.model.lm_head.weight", "weight", "lm_head"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "weight", "lm_head"),
        (f"{Q}.weight", "weight", Q),
        (f"base_model.model.{Q}.lora_E", "unknown", f"{Q}.lora_E"),
        (f"base_model.model.{Q}.lora_A.mine.weight", "a", Q),
        (f"base_model.model.{Q}.lora_B.mine.weight", "b", Q),
        ("base_model.model.model.embed_tokens.lora_embedding_B.mine", "b", "model.embed_tokens"),
        (f"base_model.model.{Q}.lora_B.mine.bias", "lora-bias", Q),
        ("base_model.model.lm_head.modules_to_save.mine.weight", "weight", "lm_head"),
        (f"{Q}.lora_a.weight", "unknown", f"{Q}.lora_a.weight"),  # a spelling of neither
        (f"{Q}.lora_A.one.two.weight", "unknown", f"{Q}.lora_A.one.two.weight"),
    ],
)
def test_names(name: str, role: str, module: str) -> None:
    assert parse_name(name) == (role, module)


def opened(path: Path) -> tuple[str, dict[str, tuple[bool, bool]], list[str]]:
    """The file that was taken, which factors each module has, and the problems' codes."""
    with LoraFile.open(path, LIMIT) as adapter:
        found = {name: (factors.a is not None, factors.b is not None) for name, factors in adapter.factors.items()}
        return adapter.shard.path.name, found, [problem.code for problem in adapter.problems]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapters.safetensors", "0000100_adapters.safetensors"])
def test_the_weights_are_found(tmp_path: Path, name: str) -> None:
    adapter = loras.write(tmp_path, loras.factors(Q, 64, 64), name=name)
    assert opened(adapter) == (name, {Q: (True, True)}, [])


def test_the_finished_adapter_comes_before_its_checkpoints(tmp_path: Path) -> None:
    for name in ("0000100_adapters.safetensors", "adapters.safetensors", "0000200_adapters.safetensors"):
        loras.write(tmp_path, loras.factors(Q, 64, 64), name=name)
    assert opened(tmp_path)[0] == "adapters.safetensors"
    assert opened(tmp_path / "0000100_adapters.safetensors")[0] == "0000100_adapters.safetensors"


def names(*files: str) -> dict[str, bytes]:
    return dict.fromkeys(files, b"")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (names("adapter_config.json"), "no adapter_model.safetensors or adapters.safetensors"),
        (names("0000100_adapters.safetensors", "0000200_adapters.safetensors"), "name one, as .*0000200"),
        (names("adapter_model.safetensors", "adapters.safetensors"), "are both there"),
        (names("config.json", "model.safetensors"), "this is a model: .* with --base"),
        (names("adapter_model.bin"), "a pickle, which is never loaded"),
        (names("default/adapter_model.safetensors"), "there is one in .*default"),
        (names("adapter_model.safetensors"), "no adapter_config.json"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        opened(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with raises(SourceError, code="source-missing"):
        opened(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin", "adapter.gguf"])
def test_a_file_that_holds_no_weights(tmp_path: Path, name: str) -> None:
    adapter = loras.write(tmp_path, loras.factors(Q, 64, 64))
    (adapter / name).touch()
    with pytest.raises(SourceError, match=f"{name}: is not a safetensors file: this is .* .name the folder, {adapter}"):
        opened(adapter / name)


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    tensors = loras.factors(Q, 64, 64)
    tensors[f"base_model.model.{Q}.lora_A.mine.weight"] = loras.noise("mine", (8, 64))
    assert opened(loras.write(tmp_path, tensors))[2] == ["twice"]


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    tensors = loras.factors(Q, 64, 64) | {
        f"base_model.model.{Q}.lora_magnitude_vector": loras.noise("m", (64,)),
        "base_model.model.lm_head.weight": loras.noise("head", (8, 64)),
        "base_model.model.lm_head.base_layer.weight": loras.noise("copy", (8, 64)),
        "base_model.model.model.norm.weight": loras.noise("norm", (64,)),
        "surprise": loras.noise("surprise", (3,)),
    }
    _, found, codes = opened(loras.write(tmp_path, tensors))
    assert found == {Q: (True, True)}
    assert sorted(codes) == ["dora", "norm", "unknown", "weight"]


def test_two_names_of_one_factor(tmp_path: Path) -> None:
    tensors = loras.factors(Q, 64, 64)
    tensors[f"{Q}.lora_a"] = loras.noise("again", (64, 8))
    assert opened(loras.write(tmp_path, tensors))[2] == ["twice"]


def test_a_partner_may_be_missing(tmp_path: Path) -> None:
    pair: dict[str, tiny.Tensor] = loras.factors(Q, 64, 64)
    del pair[f"base_model.model.{Q}.lora_B.weight"]
    assert opened(loras.write(tmp_path, pair))[1] == {Q: (True, False)}
