"""What merged adapters change, add and replace, what the file says of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import streamconv
from streamconv.cli import main
from streamconv.errors import SourceError, StreamconvError, UsageError, VerifyError
from streamconv.lora.specs import parse_adapter
from tests import tiny
from tests.oracles import ggufs
from tests.raising import raises

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GREW_TO = tiny.N_BPE_TOKENS + 6


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama") / "my-llama", tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("tied") / "tied-llama")


def merged(base: Path, dst: Path, *adapters: Path | tuple[Path, float], **options: Any) -> ggufs.Gguf:
    streamconv.convert(base, dst, outtype="f32", adapters=adapters, **options)
    return ggufs.read(dst)


def weight(folder: Path, name: str) -> NDArray[np.float32]:
    return tiny.tensors_of(folder)[name].float32()


def edited(adapter: Path, **settings: Any) -> Path:
    file = adapter / "adapter_config.json"
    tiny.write_json(file, json.loads(file.read_text()) | settings)
    return adapter


def with_tensors(adapter: Path, tensors: dict[str, NDArray[np.float32]]) -> Path:
    """The adapter with tensors added under PEFT's prefix."""
    more = {f"base_model.model.{name}": tiny.Tensor.of(values, "F32") for name, values in tensors.items()}
    tiny.write_safetensors(adapter / "adapter_model.safetensors", tiny.tensors_of(adapter) | more)
    return adapter


# ---------------------------------------------------------------- what is added, and how much of it


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("my-adapter", "my-adapter", 1.0),
        ("my-adapter=0.5", "my-adapter", 0.5),
        ("runs/lr=1e-4/last=2", "runs/lr=1e-4/last", 2.0),
        ("runs/lr=low", "runs/lr=low", 1.0),
        ("a=-1", "a", -1.0),
        ("=2", "=2", 1.0),
        ("a=", "a=", 1.0),
        ("a=.5", "a", 0.5),
        ("a=2.e-1", "a", 0.2),
        ("a=1_0", "a=1_0", 1.0),
        ("a= 2", "a= 2", 1.0),
        ("a=٢", "a=٢", 1.0),
        ("a=nan", "a=nan", 1.0),
        ("a=inf", "a=inf", 1.0),
    ],
)
def test_a_weight_is_a_number_after_the_last_sign(text: str, path: str, weight: float) -> None:
    assert parse_adapter(text) == (path, weight)


def test_adapters_add_up_by_their_weights(llama: Path, tmp_path: Path) -> None:
    first = tiny.peft_adapter(tmp_path / "first", llama, seed=1, targets=("v_proj", "up_proj"))
    second = tiny.peft_adapter(tmp_path / "second", llama, seed=2, targets=("up_proj", "o_proj"), r=3)
    both = merged(llama, tmp_path / "both.gguf", (first, 0.5), (second, -2.0))
    name = "model.layers.1.mlp.up_proj"
    expected = weight(llama, f"{name}.weight").astype(np.float64)
    for adapter, factor in ((first, 0.5 * 12 / 8), (second, -2 * 12 / 3)):
        a, b = (weight(adapter, f"base_model.model.{name}.lora_{x}.weight").astype(np.float64) for x in ("A", "B"))
        expected += factor * (b @ a)
    np.testing.assert_allclose(both.float64("blk.1.ffn_up.weight"), expected, rtol=1e-5, atol=1e-6)
    alone = merged(llama, tmp_path / "alone.gguf", (first, 0.5))
    assert both.tensors["blk.1.attn_v.weight"].sha256 == alone.tensors["blk.1.attn_v.weight"].sha256
    assert both.tensors["blk.1.attn_output.weight"].sha256 != alone.tensors["blk.1.attn_output.weight"].sha256


def test_mlx_and_peft_adapters_of_the_same_values_merge_to_the_same_bits(llama: Path, tmp_path: Path) -> None:
    peft = tiny.peft_adapter(tmp_path / "peft", llama, alpha=12, r=8)
    mlx = tiny.mlx_adapter(tmp_path / "mlx", llama, scale=1.5, r=8)
    ours, theirs = (merged(llama, tmp_path / f"{a.name}.gguf", a).golden()["tensors"] for a in (peft, mlx))
    assert ours == theirs


def test_an_adapter_that_is_off_changes_nothing(llama: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, alpha=0)
    plain = merged(llama, tmp_path / "plain.gguf").golden()["tensors"]
    assert merged(llama, tmp_path / "off.gguf", adapter).golden()["tensors"] == plain


@pytest.mark.parametrize("outtype", ["f32", "bf16", "q8_0"])
def test_threads_and_memory_never_show(llama: Path, tmp_path: Path, outtype: str) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, dora=True, targets=(*LINEAR, "embed_tokens", "lm_head"))
    files = [tmp_path / "one.gguf", tmp_path / "three.gguf"]
    for dst, threads in zip(files, (1, 3), strict=True):
        streamconv.convert(llama, dst, outtype=outtype, adapters=[adapter], threads=threads, verify=True)
    assert files[0].read_bytes() == files[1].read_bytes()


# ---------------------------------------------------------------- whole weights, heads and vocabularies


def test_whole_weights_and_biases_replace_the_bases(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", attention_bias=True)
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("v_proj",))
    bias = tiny.noise("bias", (64,), 1.0)
    norm = tiny.noise("norm", (64,), 1.0)
    with_tensors(adapter, {"model.layers.0.self_attn.o_proj.base_layer.bias": bias, "model.norm.weight": norm})
    after = merged(base, tmp_path / "merged.gguf", adapter)
    assert np.array_equal(after.float64("blk.0.attn_output.bias"), bias)
    assert np.array_equal(after.float64("output_norm.weight"), norm)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_block_of_experts_that_was_trained_whole_replaces_the_bases(tmp_path: Path, stacked: bool) -> None:
    """As PEFT saves modules_to_save=["feed_forward"] with transformers 5: stacked, whatever the base's way."""
    base = tiny.lfm2moe(tmp_path / "base", stacked=stacked, dtype="F32")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("q_proj",))
    plain = merged(base, tmp_path / "plain.gguf")
    block = "model.layers.1.feed_forward."
    shapes = {"expert_bias": (6,), "experts.gate_up_proj": (6, 320, 64), "experts.down_proj": (6, 64, 160)}
    trained = {name: tiny.noise(f"{name} trained", shape, 1.0) for name, shape in shapes.items()}
    with_tensors(adapter, {block + name: values for name, values in trained.items()})
    after = merged(base, tmp_path / "merged.gguf", adapter)
    assert np.array_equal(after.float64("blk.1.exp_probs_b.bias"), trained["expert_bias"])
    assert np.array_equal(after.float64("blk.1.ffn_down_exps.weight"), trained["experts.down_proj"])
    assert np.array_equal(after.float64("blk.1.ffn_gate_exps.weight"), trained["experts.gate_up_proj"][:, :160])
    assert np.array_equal(after.float64("blk.1.ffn_up_exps.weight"), trained["experts.gate_up_proj"][:, 160:])
    for name in ("blk.2.ffn_down_exps.weight", "blk.3.ffn_up_exps.weight"):
        assert after.tensors[name].sha256 == plain.tensors[name].sha256


@pytest.mark.parametrize("shape", [(5, 64, 160), (6, 64, 159), (64, 160)])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_block_of_other_experts_is_refused(tmp_path: Path, shape: tuple[int, ...], stacked: bool) -> None:
    base = tiny.lfm2moe(tmp_path / "base", stacked=stacked)
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("q_proj",))
    with_tensors(adapter, {"model.layers.1.feed_forward.experts.down_proj": tiny.noise("down", shape, 1.0)})
    message = refusal(base, tmp_path, adapter)
    assert "model.layers.1.feed_forward.experts.down_proj: " in message


def test_a_changed_head_of_a_tied_base_is_written_beside_the_embedding(tied: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", tied, targets=("lm_head",))
    after = merged(tied, tmp_path / "merged.gguf", adapter)
    embedding = weight(tied, "model.embed_tokens.weight")
    a, b = (weight(adapter, f"base_model.model.lm_head.lora_{x}.weight") for x in ("A", "B"))
    assert np.array_equal(after.float64("token_embd.weight"), embedding)
    np.testing.assert_allclose(after.float64("output.weight"), embedding + 1.5 * (b @ a), atol=1e-5)


def test_a_changed_embedding_of_a_tied_base_leaves_the_head(tied: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", tied, targets=("embed_tokens",))
    after = merged(tied, tmp_path / "merged.gguf", adapter)
    embedding = weight(tied, "model.embed_tokens.weight")
    assert np.array_equal(after.float64("output.weight"), embedding)
    assert not np.array_equal(after.float64("token_embd.weight"), embedding)


def test_an_adapter_that_ties_what_it_trains_leaves_the_model_tied(tied: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(
        tmp_path / "adapter", tied, targets=("q_proj",), modules_to_save=("embed_tokens",),
        config={"ensure_weight_tying": True},
    )  # fmt: skip
    after = merged(tied, tmp_path / "merged.gguf", adapter)
    assert "output.weight" not in after.tensors
    saved = weight(adapter, "base_model.model.model.embed_tokens.weight")
    assert np.array_equal(after.float64("token_embd.weight"), saved)


def test_only_an_adapter_that_changes_the_embedding_ties_it(tied: Path, tmp_path: Path) -> None:
    embedding = tiny.peft_adapter(tmp_path / "embedding", tied, targets=("embed_tokens",))
    other = tiny.peft_adapter(tmp_path / "q", tied, targets=("q_proj",), config={"ensure_weight_tying": True})
    after = merged(tied, tmp_path / "merged.gguf", embedding, other)
    assert np.array_equal(after.float64("output.weight"), weight(tied, "model.embed_tokens.weight"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_must_agree_on_what_is_tied(tied: Path, tmp_path: Path, target: str) -> None:
    ties = {"ensure_weight_tying": True}
    tying = tiny.peft_adapter(tmp_path / "tying", tied, targets=("embed_tokens",), config=ties)
    other = tiny.peft_adapter(tmp_path / "other", tied, targets=(target,))
    for adapters in ((tying, other), (other, tying)):
        with pytest.raises(SourceError) as caught:
            merged(tied, tmp_path / "refused.gguf", *adapters)
        assert [problem["code"] for problem in caught.value.problems] == ["tying"]
    again = tiny.peft_adapter(tmp_path / "again", tied, targets=("embed_tokens",), config=ties, seed=9)
    assert "output.weight" not in merged(tied, tmp_path / "merged.gguf", tying, again).tensors


def grown(base: Path, adapter: Path, *modules: str) -> Path:
    """An adapter on q_proj, saved with `modules` of GREW_TO rows."""
    tiny.peft_adapter(adapter, base, targets=("q_proj",))
    return with_tensors(adapter, {f"{m}.weight": tiny.noise(m, (GREW_TO, 64), 1.0) for m in modules})


def smaller(directory: Path, **options: Any) -> Path:
    """A model of 380 tokens, its tokenizer beside it."""
    base = tiny.llama(directory, vocab=380, **options)
    tiny.write_bpe(base, pre="llama-bpe", n_tokens=380)
    return base


def test_a_grown_vocabulary_comes_with_the_tokenizer_beside_the_adapter(tmp_path: Path) -> None:
    base = smaller(tmp_path / "base")
    adapter = grown(base, tmp_path / "adapter", "model.embed_tokens", "lm_head")
    tiny.write_bpe(adapter, pre="llama-bpe")
    after = merged(base, tmp_path / "merged.gguf", adapter)
    for target, module in (("token_embd.weight", "model.embed_tokens"), ("output.weight", "lm_head")):
        assert np.array_equal(after.float64(target), weight(adapter, f"base_model.model.{module}.weight"))
    assert len(after["tokenizer.ggml.tokens"]) == after["llama.vocab_size"] == GREW_TO
    assert after["tokenizer.ggml.tokens"][tiny.N_BPE_TOKENS - 1] == "<tool>"


def test_factors_lie_on_the_grown_embedding_that_was_saved_with_them(tmp_path: Path) -> None:
    base = smaller(tmp_path / "base", tied=False)
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("q_proj",))
    frozen = {m: tiny.noise(m, (GREW_TO, 64), 1.0) for m in ("model.embed_tokens", "lm_head")}
    a, b = tiny.noise("a", (8, GREW_TO), 0.3), tiny.noise("b", (64, 8), 0.3)
    with_tensors(
        adapter,
        {f"{module}.base_layer.weight": values for module, values in frozen.items()}
        | {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b},
    )
    tiny.write_bpe(adapter, pre="llama-bpe")
    after = merged(base, tmp_path / "merged.gguf", adapter)
    np.testing.assert_allclose(
        after.float64("token_embd.weight"), frozen["model.embed_tokens"] + 1.5 * (b @ a).T, atol=1e-5
    )
    assert np.array_equal(after.float64("output.weight"), frozen["lm_head"])


def test_trained_ends_of_a_grown_vocabulary_are_stored_under_two_names(tmp_path: Path) -> None:
    base = smaller(tmp_path / "base")
    adapter = grown(base, tmp_path / "adapter", "model.embed_tokens", "lm_head")
    saved = {m: weight(adapter, f"base_model.model.{m}.weight") for m in ("model.embed_tokens", "lm_head")}
    frozen = {f"{m}.original_module.weight": tiny.noise(f"{m} before", (GREW_TO, 64), 1.0) for m in saved}
    with_tensors(adapter, frozen | {f"{m}.modules_to_save.weight": values for m, values in saved.items()})
    tiny.write_bpe(adapter, pre="llama-bpe")
    after = merged(base, tmp_path / "merged.gguf", adapter)
    assert np.array_equal(after.float64("token_embd.weight"), saved["model.embed_tokens"])
    assert np.array_equal(after.float64("output.weight"), saved["lm_head"])


def test_a_grown_embedding_of_a_tied_base_is_its_head(tmp_path: Path) -> None:
    base = smaller(tmp_path / "base")
    frozen = tiny.noise("frozen", (GREW_TO, 64), 1.0)
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("q_proj",))
    factors = {
        "lora_embedding_A": tiny.noise("a", (8, GREW_TO), 0.3),
        "lora_embedding_B": tiny.noise("b", (64, 8), 0.3),
    }
    with_tensors(adapter, {f"model.embed_tokens.{name}": values for name, values in factors.items()})
    with_tensors(adapter, {"model.embed_tokens.base_layer.weight": frozen})
    tiny.write_bpe(adapter, pre="llama-bpe")
    after = merged(base, tmp_path / "merged.gguf", adapter)
    assert np.array_equal(after.float64("output.weight"), frozen)
    assert not np.array_equal(after.float64("token_embd.weight"), frozen)


def with_frozen(base: Path, adapter: Path, frozen: NDArray[np.float32], seed: int) -> Path:
    """An adapter on q_proj and on an embedding that has grown, saved with the frozen one that its factors lie on."""
    tiny.peft_adapter(adapter, base, targets=("q_proj",), seed=seed, config={"ensure_weight_tying": True})
    factors = {"A": tiny.noise("a", (8, GREW_TO), 0.3, seed), "B": tiny.noise("b", (64, 8), 0.3, seed)}
    with_tensors(adapter, {f"model.embed_tokens.lora_embedding_{x}": values for x, values in factors.items()})
    tiny.write_bpe(adapter, pre="llama-bpe")
    return with_tensors(adapter, {"model.embed_tokens.base_layer.weight": frozen})


def test_adapters_with_the_same_grown_embedding_add_up(tmp_path: Path) -> None:
    base, frozen = smaller(tmp_path / "base"), tiny.noise("frozen", (GREW_TO, 64), 1.0)
    first, second = (with_frozen(base, tmp_path / f"adapter-{seed}", frozen, seed) for seed in (1, 2))
    after = merged(base, tmp_path / "merged.gguf", first, second)
    expected = frozen.astype(np.float64)
    for adapter in (first, second):
        a, b = (weight(adapter, f"base_model.model.model.embed_tokens.lora_embedding_{x}") for x in "AB")
        expected += 1.5 * (b.astype(np.float64) @ a).T
    np.testing.assert_allclose(after.float64("token_embd.weight"), expected, atol=1e-5)


def test_adapters_with_different_grown_embeddings_are_refused(tmp_path: Path) -> None:
    base, frozen = smaller(tmp_path / "base"), tiny.noise("frozen", (GREW_TO, 64), 1.0)
    other = frozen.copy()
    other[-1, -1] += 1
    first = with_frozen(base, tmp_path / "first", frozen, 1)
    second = with_frozen(base, tmp_path / "second", other, 2)
    trained = grown(base, tmp_path / "trained", "model.embed_tokens", "lm_head")
    for one, two in ((first, second), (second, first), (first, trained), (trained, first)):
        assert f"model.embed_tokens.weight is also replaced by {one}" in refusal(base, tmp_path, one, two)


@pytest.mark.parametrize(
    ("modules", "tokenizer", "message"),
    [
        (("model.embed_tokens", "lm_head"), False, "tokenizer"),
        (("model.embed_tokens",), True, "vocabulary"),
        (("lm_head",), True, "vocabulary"),
    ],
)
def test_half_a_grown_vocabulary_is_refused(
    tmp_path: Path, modules: tuple[str, ...], tokenizer: bool, message: str
) -> None:
    base = smaller(tmp_path / "base")
    adapter = grown(base, tmp_path / "adapter", *modules)
    if tokenizer:
        tiny.write_bpe(adapter, pre="llama-bpe")
    with raises(SourceError, code=message):
        streamconv.convert(base, tmp_path / "merged.gguf", adapters=[adapter])


# ---------------------------------------------------------------- what cannot be merged


def failure(base: Path, tmp_path: Path, *adapters: Path | tuple[Path, float]) -> StreamconvError:
    with pytest.raises((SourceError, UsageError)) as caught:
        streamconv.convert(base, tmp_path / "merged.gguf", adapters=adapters)
    assert not (tmp_path / "merged.gguf").exists()
    return caught.value


def refusal(base: Path, tmp_path: Path, *adapters: Path | tuple[Path, float]) -> str:
    return str(failure(base, tmp_path, *adapters))


def test_all_that_matches_nothing_is_told_at_once(llama: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, targets=("q_proj",))
    factors = {"lora_A.weight": tiny.noise("A", (8, 64), 1.0), "lora_B.weight": tiny.noise("B", (64, 8), 1.0)}
    for layer in (7, 8):
        with_tensors(adapter, {f"model.layers.{layer}.self_attn.q_proj.{n}": v for n, v in factors.items()})
    with_tensors(adapter, {"model.vision.weight": tiny.noise("vision", (3, 4), 1.0)})
    error = failure(llama, tmp_path, adapter)
    message = str(error)
    assert [problem["modules"] for problem in error.problems] == [
        ["model.vision"],
        ["model.layers.7.self_attn.q_proj", "model.layers.8.self_attn.q_proj"],
    ]
    assert str(adapter) in message
    assert "model.layers.7.self_attn.q_proj and 1 more: the base (llama) has no such module" in message
    assert "model.vision: the base (llama) has no such weight" in message


@pytest.mark.parametrize("weight", [0.5, -1.0])
def test_dora_has_no_weight(llama: Path, tmp_path: Path, weight: float) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, dora=True)
    assert "DoRA can be merged only as the sole adapter and with weight 1" in refusal(
        llama, tmp_path, (adapter, weight)
    )


def test_dora_merges_alone(llama: Path, tmp_path: Path) -> None:
    dora = tiny.peft_adapter(tmp_path / "dora", llama, dora=True, targets=("q_proj",))
    other = tiny.peft_adapter(tmp_path / "other", llama, targets=("v_proj",))
    assert "DoRA can be merged only as the sole adapter and with weight 1" in refusal(llama, tmp_path, dora, other)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.lora_magnitude_vector": (64,)}, "model.norm: has magnitudes, but no factors"),
        ({"model.layers.0.self_attn.q_proj.lora_magnitude_vector": (63,)}, "has magnitudes [63], but needs [64]"),
        ({"model.layers.0.self_attn.q_proj.lora_B.bias": (64,)}, "lora_bias"),
        ({"model.embed_tokens.token_adapter.trainable_tokens_delta": (3, 64)}, "does not say which tokens"),
        ({"model.layers.0.mlp.up_proj.lora_diag": (8,)}, "KaSA"),
        ({"model.layers.0.mlp.up_proj.weight": (3, 64)}, "has shape [3, 64], but in the base it is [160, 64]"),
        ({"something": (3, 64)}, "something: the base (llama) has no such tensor"),
    ],
)
def test_what_cannot_be_added_is_named(
    llama: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, targets=("q_proj",))
    with_tensors(adapter, {name: tiny.noise(name, shape, 1.0) for name, shape in tensors.items()})
    assert message in refusal(llama, tmp_path, adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "the magnitudes of DoRA are missing"),
        ({"alora_invocation_tokens": [5, 6]}, "an activated LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 7}, "has rank 8, but adapter_config.json says 7"),
    ],
)
def test_configurations_that_mean_more_than_a_sum_are_refused(
    llama: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    adapter = edited(tiny.peft_adapter(tmp_path / "adapter", llama, targets=("q_proj",)), **settings)
    assert message in refusal(llama, tmp_path, adapter)


def test_whole_weights_merge_once_and_whole(llama: Path, tmp_path: Path) -> None:
    saved = tiny.peft_adapter(tmp_path / "saved", llama, targets=("q_proj",), modules_to_save=("lm_head",))
    again = tiny.peft_adapter(tmp_path / "again", llama, targets=("q_proj",), modules_to_save=("lm_head",))
    plain = tiny.peft_adapter(tmp_path / "plain", llama, targets=("lm_head",))
    assert "they can be merged only with weight 1" in refusal(llama, tmp_path, (saved, 0.5))
    assert f"lm_head.weight is also replaced by {saved}" in refusal(llama, tmp_path, saved, again)
    assert f"{saved} replaces lm_head.weight" in refusal(llama, tmp_path, saved, plain)
    assert f"{saved} replaces lm_head.weight" in refusal(llama, tmp_path, plain, saved)


def test_every_adapter_and_a_half_grown_vocabulary_are_told_at_once(tmp_path: Path) -> None:
    base = smaller(tmp_path / "base")
    first = edited(tiny.peft_adapter(tmp_path / "first", base, targets=("q_proj",)), r=7)
    second = edited(grown(base, tmp_path / "second", "lm_head"), r=6)
    message = refusal(base, tmp_path, first, second)
    assert message.startswith(f"{first}: cannot be merged: ")
    assert "adapter_config.json says 7; and " in message
    later = message.partition(f"; and {second}: cannot be merged: ")[2]
    assert "adapter_config.json says 6" in later
    assert "has no model.embed_tokens.weight of that size" in later
    assert "no tokenizer is beside the adapter" in later


def test_magnitudes_without_dora_are_a_contradiction(llama: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, dora=True, config={"use_dora": False})
    assert "has DoRA magnitudes, but its configuration says plain LoRA" in refusal(llama, tmp_path, adapter)


def test_infinities_of_a_merge_are_not_the_sources(llama: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, targets=("q_proj",), layers=(0,))
    huge = weight(adapter, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight") * np.float32(1e30)
    with_tensors(adapter, {"model.layers.0.self_attn.q_proj.lora_A.weight": huge})
    report = streamconv.convert(llama, tmp_path / "merged.gguf", outtype="f32", adapters=[(adapter, 1e20)])
    (warning,) = report.warnings
    assert warning.tensor == "blk.0.attn_q.weight"
    assert warning.message.endswith(" infinite values once the adapters are merged")


def test_every_kind_of_module_that_the_base_lacks_is_named(llama: Path, tmp_path: Path) -> None:
    base = tiny.lfm2(tmp_path / "base")
    message = refusal(base, tmp_path, tiny.peft_adapter(tmp_path / "adapter", llama))
    for name in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj"):
        assert f"model.layers.0.{name} and 1 more" in message
    assert "model.layers.0.self_attn.q_proj" in message  # in layers without attention


@pytest.mark.parametrize(("alpha", "factor"), [(12, 1e39), (1e20, -1e20), (12, 1e308)])
def test_a_scale_beyond_float32_is_refused(llama: Path, tmp_path: Path, alpha: float, factor: float) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, targets=("q_proj",), alpha=alpha)
    assert "exceeds float32" in refusal(llama, tmp_path, (adapter, factor))


def test_an_adapter_has_a_name(llama: Path, tmp_path: Path) -> None:
    with raises(UsageError, code="adapter-spec"):
        streamconv.convert(llama, tmp_path / "merged.gguf", adapters=[""])


@pytest.mark.parametrize("adapters", ["some-adapter", Path("some/adapter"), [0.5], [("a", 0.5, 2)], [("a", "0.5")]])
def test_adapters_are_a_list(llama: Path, tmp_path: Path, adapters: Any) -> None:
    with raises(UsageError, code="argument-type") as caught:
        streamconv.convert(llama, tmp_path / "merged.gguf", adapters=adapters)
    assert (caught.value.hint == "put it into a list") == (not isinstance(adapters, list))


def test_a_weight_is_finite_and_an_adapter_exists(llama: Path, tmp_path: Path) -> None:
    assert "nan is not a valid weight" in refusal(llama, tmp_path, (tmp_path, float("nan")))
    assert "no such adapter" in refusal(llama, tmp_path, tmp_path / "nothing")


# ---------------------------------------------------------------- what the file, the plan and verify say


def test_metadata_name_base_and_adapter(llama: Path, tmp_path: Path) -> None:
    (llama / "README.md").write_text("---\nmodel_name: My Llama\norganization: Us\nlicense: mit\n---\n")
    adapter = tiny.peft_adapter(tmp_path / "sea-shanties", llama)
    (adapter / "README.md").write_text("---\nbase_model: us/my-llama\n---\n")
    after = merged(llama, tmp_path / "merged.gguf", adapter)
    assert after["general.name"] == "My Llama + Sea Shanties"
    assert after["general.finetune"] == "Sea Shanties"
    assert after["general.license"] == "mit"
    assert after["general.base_model.count"] == 1
    assert after["general.base_model.0.name"] == "My Llama"
    assert after["general.base_model.0.organization"] == "Us"
    assert after["general.base_model.0.repo_url"] == "https://huggingface.co/us/my-llama"
    assert "general.organization" not in after.keys
    named = merged(llama, tmp_path / "named.gguf", adapter, name="Shanties 1B")
    assert named["general.name"] == "Shanties 1B"
    (llama / "README.md").unlink()


def test_the_plan_tells_what_changes_and_by_what(llama: Path, tmp_path: Path) -> None:
    first = tiny.peft_adapter(tmp_path / "first", llama, targets=("q_proj", "up_proj"), layers=(1,))
    second = tiny.peft_adapter(tmp_path / "second", llama, targets=("up_proj",), layers=(0, 1))
    report = streamconv.convert(llama, tmp_path / "merged.gguf", adapters=[first, (second, 0.5)], dry_run=True)
    assert report.plan is not None
    assert {row.target: row.changed_by for row in report.plan if row.changed_by} == {
        "blk.0.ffn_up.weight": (f"{second}=0.5",),
        "blk.1.ffn_up.weight": (str(first), f"{second}=0.5"),
        "blk.1.attn_q.weight": (str(first),),
    }


def test_verify_takes_the_adapters_and_their_weights(llama: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama)
    merged(llama, tmp_path / "merged.gguf", (adapter, 0.5))
    assert streamconv.verify(tmp_path / "merged.gguf", llama, adapters=[(adapter, 0.5)]).verified
    for wrong in ([], [adapter]):
        with raises(VerifyError, code="value-differs"):
            streamconv.verify(tmp_path / "merged.gguf", llama, adapters=wrong)


@pytest.mark.parametrize("change", ["weight", "alpha", "factor", "nothing"])
def test_a_run_resumes_another_of_the_same_adapter_alone(llama: Path, tmp_path: Path, change: str) -> None:
    adapter, factor = tiny.peft_adapter(tmp_path / "adapter", llama), 0.5
    dst = tmp_path / "merged.gguf"
    with pytest.raises(streamconv.Interrupted):
        streamconv.convert(llama, dst, outtype="f32", adapters=[(adapter, factor)], cancel=lambda: True)
    if change == "weight":
        factor = 0.25
    elif change == "alpha":
        edited(adapter, lora_alpha=13)
    elif change == "factor":
        tiny.peft_adapter(adapter, llama, seed=9)
    resume = {"outtype": "f32", "adapters": [(adapter, factor)], "resume": True}
    if change == "nothing":
        streamconv.convert(llama, dst, **resume)
    else:
        with raises(SourceError, code="resume-mismatch") as caught:
            streamconv.convert(llama, dst, **resume)
        assert "adapter" in caught.value.message


def test_an_adapter_that_changes_under_the_run_is_noticed(llama: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama)
    file = adapter / "adapter_model.safetensors"

    def touch(done: int, _total: int) -> None:
        if done == 0:
            data = file.read_bytes()
            file.unlink()
            file.write_bytes(data)

    with raises(SourceError, code="source-changed"):
        streamconv.convert(llama, tmp_path / "merged.gguf", adapters=[adapter], progress=touch, verify=True)


def test_the_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tiny.peft_adapter(tmp_path / "adapter", llama, targets=("up_proj",), layers=(0,))
    dst = tmp_path / "merged.gguf"
    arguments = ["convert", str(llama), "-o", str(dst), "--outtype", "f32", "--adapter", f"{adapter}=0.5"]
    assert main([*arguments, "--dry-run", "--tensors"]) == 0
    shown = capsys.readouterr().out.splitlines()
    changed = [line for line in shown if str(adapter) in line]
    assert len(changed) == 1 and changed[0].startswith("blk.0.ffn_up.weight") and changed[0].endswith("=0.5")
    assert main([*arguments, "--quiet"]) == 0
    assert main(["verify", str(dst), "--source", str(llama), "--adapter", f"{adapter}=0.5"]) == 0
    assert main(["verify", str(dst), "--source", str(llama)]) == 6


def test_an_adapter_that_lost_a_saved_module_is_refused(tmp_path: Path) -> None:
    """modules_to_save names it, PEFT always saves it, and it is not there: what is left is another model."""
    base, out = tiny.llama(tmp_path / "base", tied=False), tmp_path / "out.gguf"
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("q_proj",), config={"modules_to_save": ["norm"]})
    for call in (
        lambda: streamconv.convert(base, out, adapters=[adapter]),
        lambda: streamconv.convert_adapter(adapter, base, out),
    ):
        with raises(SourceError, code="module-unsaved") as caught:
            call()
        assert "norm" in str(caught.value)
    unknown = tiny.peft_adapter(tmp_path / "a", base, targets=("q_proj",), config={"modules_to_save": ["score"]})
    streamconv.convert(base, out, adapters=[unknown])  # which PEFT ignores as well
    tied = tiny.llama(tmp_path / "tied")
    ends = {"modules_to_save": ["lm_head", "embed_tokens"]}
    one = tiny.peft_adapter(tmp_path / "one", tied, targets=("q_proj",), modules_to_save=("embed_tokens",), config=ends)
    streamconv.convert(tied, out, adapters=[one], force=True)
