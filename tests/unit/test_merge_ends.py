"""Adapters that change an embedding or a head: what ties the two, and rows of a grown vocabulary that are nowhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import streamconv
from streamconv.errors import SourceError
from tests import cases, tiny
from tests.oracles import deltas, ggufs, runtime

BASES = {"llama": tiny.llama, "lfm2": tiny.lfm2, "lfm2moe": tiny.lfm2moe}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SCALE = 1.5


def merged(base: Path, dst: Path, *adapters: Path) -> tuple[ggufs.Gguf, list[str]]:
    report = streamconv.convert(base, dst, outtype="f32", adapters=adapters, force=True)
    return ggufs.read(dst), [warning.code for warning in report.warnings]


def problems(base: Path, dst: Path, *adapters: Path) -> list[str]:
    """The codes of the problems for which a merge is refused; nothing is left behind."""
    with pytest.raises(SourceError) as caught:
        streamconv.convert(base, dst, adapters=adapters)
    assert not dst.exists()
    return [str(problem["code"]) for problem in caught.value.problems]


def weights(folder: Path) -> dict[str, NDArray[np.float64]]:
    return {name: tensor.float32().astype(np.float64) for name, tensor in tiny.tensors_of(folder).items()}


def with_magnitudes(adapter: Path, base: Path) -> dict[str, NDArray[np.float64]]:
    """The adapter as mlx-lm's DoRA: a magnitude for each row of a weight, rows of an embedding too."""
    tensors, found = tiny.tensors_of(adapter), weights(base)
    modules = {name.rpartition(".")[0] for name in tensors}
    vectors = {}
    for module in sorted(modules):
        norms = np.linalg.norm(found[f"{module}.weight"], axis=1)
        vectors[module] = norms * (1 + tiny.noise(f"{module}.m", norms.shape, 0.2))
    more = {f"{module}.m": tiny.Tensor.of(vector, "F32") for module, vector in vectors.items()}
    tiny.write_safetensors(adapter / "adapters.safetensors", tensors | more)
    path = adapter / "adapter_config.json"
    tiny.write_json(path, json.loads(path.read_text()) | {"fine_tune_type": "dora"})
    return {module: tiny.Tensor.of(vector, "F32").float32().astype(np.float64) for module, vector in vectors.items()}


def fused(base: Path, adapter: Path, magnitudes: dict[str, NDArray[np.float64]], target: Path) -> Path:
    """A checkpoint of the weights that mlx-lm's fuse makes of a base, in F32."""
    tensors, factors = tiny.tensors_of(base), weights(adapter)
    for module in {name.rpartition(".")[0] for name in factors}:
        weight = tensors[f"{module}.weight"].float32().astype(np.float64)
        delta = SCALE * factors[f"{module}.lora_a"] @ factors[f"{module}.lora_b"]
        delta = delta if module == EMBEDDING else delta.T
        made = deltas.merged(weight, delta, magnitudes.get(module))
        tensors[f"{module}.weight"] = tiny.Tensor.of(made, "F32")
    target.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tiny.write_shards(target, tensors)
    return target


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_mlx_changes_the_one_matrix_of_a_tied_model(tmp_path: Path, name: str, dora: bool) -> None:
    base = BASES[name](tmp_path / "base")
    adapter = tiny.mlx_adapter(tmp_path / "adapter", base, targets=("embed_tokens", "q_proj"), r=4, scale=SCALE)
    magnitudes = with_magnitudes(adapter, base) if dora else {}
    file, codes = merged(base, tmp_path / "out.gguf", adapter)
    want, _ = merged(fused(base, adapter, magnitudes, tmp_path / "want"), tmp_path / "want.gguf")
    assert codes == []
    assert "output.weight" not in file.tensors
    assert list(file.tensors) == list(want.tensors)
    for tensor in want.tensors:
        np.testing.assert_allclose(file.float64(tensor), want.float64(tensor), rtol=0, atol=1e-6, err_msg=tensor)
    changed = file.float64("token_embd.weight") - weights(base)[f"{EMBEDDING}.weight"]
    assert np.abs(changed).max() > 0.01
    ours, theirs = (runtime.next_token_logprobs(one.path, cases.IDS, positions=(7,)) for one in (file, want))
    assert runtime.kl(theirs, ours) < 1e-8


def test_on_an_untied_base_the_head_stays(tmp_path: Path) -> None:
    base = tiny.lfm2(tmp_path / "base", tied=False)
    adapter = tiny.mlx_adapter(tmp_path / "adapter", base, targets=("embed_tokens",))
    plain, _ = merged(base, tmp_path / "plain.gguf")
    file, _ = merged(base, tmp_path / "out.gguf", adapter)
    assert file.tensors["output.weight"].sha256 == plain.tensors["output.weight"].sha256
    assert file.tensors["token_embd.weight"].sha256 != plain.tensors["token_embd.weight"].sha256


@pytest.mark.parametrize("maker", ["mlx", "peft"])
def test_a_copied_head_of_a_tied_model_goes_with_the_embedding(tmp_path: Path, maker: str) -> None:
    """A tied model may have both names in its files; a tool that ties them reads the embedding for both."""
    base = tiny.llama(tmp_path / "base")
    if maker == "mlx":
        adapter = tiny.mlx_adapter(tmp_path / "adapter", base, targets=("embed_tokens",))
    else:
        ties = {"ensure_weight_tying": True}
        adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("embed_tokens",), config=ties)
    want, _ = merged(base, tmp_path / "want.gguf", adapter)
    tensors = tiny.tensors_of(base)
    tiny.write_shards(base, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    file, _ = merged(base, tmp_path / "out.gguf", adapter)
    assert file.golden()["tensors"] == want.golden()["tensors"]


def test_mlx_and_peft_disagree_on_a_tied_embedding(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    mlx = tiny.mlx_adapter(tmp_path / "mlx", base, targets=("embed_tokens",))
    peft = tiny.peft_adapter(tmp_path / "peft", base, targets=("embed_tokens",))
    assert problems(base, tmp_path / "out.gguf", mlx, peft) == ["tying"]


def test_the_adapter_alone_is_refused_with_the_merge_as_the_way_out(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.mlx_adapter(tmp_path / "adapter", base, targets=("embed_tokens", "q_proj"))
    with pytest.raises(SourceError) as caught:
        streamconv.convert_adapter(adapter, base, tmp_path / "out.gguf")
    assert "convert BASE --adapter" in (caught.value.hint or "")


# ---------------------------------------------------------------- rows that are nowhere

NEW = 2


def grown(base: Path, module: str) -> NDArray[np.float32]:
    tensors = tiny.tensors_of(base)
    rows = tensors.get(f"{module}.weight", tensors[f"{EMBEDDING}.weight"]).float32()
    return np.concatenate([rows, tiny.noise(f"{module}.new", (NEW, rows.shape[1]), 0.3)])


def brought(base: Path, how: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Tensors of an adapter on a grown vocabulary: of embedding (e) and head (h) factors, base_layer, or all of it."""
    n_rows, hidden = grown(base, EMBEDDING).shape
    for word in how.split():
        module = EMBEDDING if word[0] == "e" else HEAD
        kind = word[2:]
        if kind == "factors" and module == EMBEDDING:
            yield f"{module}.lora_embedding_A", tiny.noise("ea", (4, n_rows), 0.1)
            yield f"{module}.lora_embedding_B", tiny.noise("eb", (hidden, 4), 0.1)
        elif kind == "factors":
            yield f"{module}.lora_A.weight", tiny.noise("ha", (4, hidden), 0.1)
            yield f"{module}.lora_B.weight", tiny.noise("hb", (n_rows, 4), 0.1)
        else:
            yield f"{module}.{'base_layer.' if kind == 'base' else ''}weight", grown(base, module)


MISSING = [
    ("e-whole", "tied untied"),
    ("h-whole", "tied untied"),
    ("e-whole h-factors", "tied untied"),
    ("h-whole e-factors", "tied untied"),
    ("e-base e-factors", "untied"),
    ("e-base e-factors h-factors", "untied"),
    ("h-base h-factors", "tied untied"),
    ("h-base h-factors e-factors", "tied untied"),
    ("e-base", "untied"),
    ("e-factors", "tied untied"),
    ("e-factors h-factors", "tied untied"),
]


@pytest.mark.parametrize(("how", "tie"), [(how, tie) for how, ties in MISSING for tie in ties.split()])
def test_new_rows_that_are_nowhere_are_an_error(tmp_path: Path, how: str, tie: str) -> None:
    base = tiny.llama(tmp_path / "base", tied=tie == "tied")
    adapter = grown_adapter(base, tmp_path / "adapter", how)
    assert set(problems(base, tmp_path / "out.gguf", adapter)) <= {"vocabulary"}


@pytest.mark.parametrize(("how", "way_out"), [("h-base h-factors", "convert BASE"), ("h-factors", "save_embedding")])
def test_a_gguf_adapter_of_grown_rows_names_a_way_out_that_works(tmp_path: Path, how: str, way_out: str) -> None:
    base = tiny.llama(tmp_path / "base", tied=False)
    adapter = grown_adapter(base, tmp_path / "adapter", how)
    with pytest.raises(SourceError) as caught:
        streamconv.convert_adapter(adapter, base, tmp_path / "out.gguf")
    assert [problem["code"] for problem in caught.value.problems] == ["vocabulary"]
    assert way_out in (caught.value.hint or "")


def grown_adapter(base: Path, target: Path, how: str) -> Path:
    adapter = tiny.peft_adapter(target, base, targets=("q_proj",), r=4)
    tensors: dict[str, Any] = {name: tiny.Tensor.of(values, "F32") for name, values in brought(base, how)}
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    tiny.write_safetensors(adapter / "adapter_model.safetensors", tiny.tensors_of(adapter) | tensors)
    tiny.write_bpe(adapter, pre="llama-bpe")
    return adapter


@pytest.mark.parametrize("how", ["e-base e-factors", "e-base e-factors h-factors", "e-base e-factors h-base"])
def test_a_tied_head_grows_with_the_frozen_embedding(tmp_path: Path, how: str) -> None:
    """Where PEFT would merge: a tied head starts as the grown embedding that was saved."""
    base = tiny.llama(tmp_path / "base")
    adapter = grown_adapter(base, tmp_path / "adapter", how)
    file, _ = merged(base, tmp_path / "out.gguf", adapter)
    new = {name: values.astype(np.float64) for name, values in brought(base, how)}
    frozen, scale = new[f"{EMBEDDING}.base_layer.weight"], 12 / 4
    product = new[f"{EMBEDDING}.lora_embedding_B"] @ new[f"{EMBEDDING}.lora_embedding_A"]
    np.testing.assert_allclose(file.float64("token_embd.weight"), frozen + scale * product.T, atol=1e-5)
    head = new.get(f"{HEAD}.base_layer.weight", frozen)
    if "h-factors" in how:
        head = head + scale * new[f"{HEAD}.lora_B.weight"] @ new[f"{HEAD}.lora_A.weight"]
    np.testing.assert_allclose(file.float64("output.weight"), head, atol=1e-5)


# ---------------------------------------------------------------- factors that change nothing


@pytest.mark.parametrize("maker", [tiny.peft_adapter, tiny.mlx_adapter])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_an_adapter_of_zeros_is_a_warning(tmp_path: Path, maker: Any, factor: str) -> None:
    base = tiny.lfm2(tmp_path / "base")
    adapter = maker(tmp_path / "adapter", base, targets=("q_proj", "w1"))
    assert "adapter-zero" not in merged(base, tmp_path / "out.gguf", adapter)[1]
    (file,) = adapter.glob("*.safetensors")
    tensors = tiny.tensors_of(adapter)
    chosen = [name for name in tensors if f"lora_{factor}" in name.lower()]
    tiny.write_safetensors(file, tensors | {name: zeros(tensors[name]) for name in chosen[1:]})
    assert "adapter-zero" not in merged(base, tmp_path / "out.gguf", adapter)[1]
    tiny.write_safetensors(file, tensors | {name: zeros(tensors[name]) for name in chosen})
    plain, _ = merged(base, tmp_path / "plain.gguf")
    changed, codes = merged(base, tmp_path / "out.gguf", adapter)
    assert codes == ["adapter-zero"]
    assert changed.golden()["tensors"] == plain.golden()["tensors"]
    report = streamconv.convert_adapter(adapter, base, tmp_path / "lora.gguf")
    assert [warning.code for warning in report.warnings] == ["adapter-zero"]


def zeros(tensor: tiny.Tensor) -> tiny.Tensor:
    return tiny.Tensor(tensor.dtype, tensor.shape, bytes(len(tensor.data)))


def test_dora_of_zero_factors_is_no_adapter_of_zeros(tmp_path: Path) -> None:
    """Its magnitudes change the weights."""
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("q_proj",), dora=True)
    tensors = tiny.tensors_of(adapter)
    nulls = {name: zeros(tensor) for name, tensor in tensors.items() if "lora_B" in name}
    tiny.write_safetensors(adapter / "adapter_model.safetensors", tensors | nulls)
    assert merged(base, tmp_path / "out.gguf", adapter)[1] == []
