"""The judges themselves: what is right passes, and a swapped row, a wrong scale or a missing tensor does not get by."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tests import cases, tiny
from tests.extras import sentencepiece, tokenizers
from tests.oracles import deltas, ggufs, runtime

BASE = cases.GIVEN / "llama-given.base.gguf"
LLAMA_HEADS = {"attn_q": 4, "attn_k": 2}


def rewrite(dst: Path, change: dict[str, NDArray[np.float32]], drop: str | None = None) -> Path:
    """BASE with some tensors replaced, and one left out, by gguf-py's writer."""
    original = ggufs.read(BASE)
    writer = gguf.GGUFWriter(dst, "llama")
    for key, entry in original.keys.items():
        if key != "general.architecture":
            sub_type = gguf.GGUFValueType[entry.type[1]] if len(entry.type) > 1 else None
            writer.add_key_value(key, entry.value, gguf.GGUFValueType[entry.type[0]], sub_type)
    for name in original.tensors:
        if name != drop:
            writer.add_tensor(name, change.get(name, original.float64(name).astype(np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dst


def write_adapter(dst: Path, deltas_: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]], alpha: float) -> Path:
    """A GGUF adapter of (A [r, in], B [out, r]) by base tensor, by gguf-py's writer."""
    writer = gguf.GGUFWriter(dst, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (a, b) in deltas_.items():
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dst


def given_adapter(dst: Path, *, permuted: bool = True, alpha: float = 12.0) -> Path:
    """lora-given for BASE by hand: B of Q and K in llama.cpp's order of rows."""
    factors: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    tensors = tiny.tensors_of(cases.GIVEN / "lora-given")
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")].float32().astype(np.float64)
            target = deltas.target(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            heads = LLAMA_HEADS.get(target.split(".")[-2])
            b = deltas.interleaved(b, heads) if heads and permuted else b
            factors[target] = (tensor.float32(), b.astype(np.float32))
    return write_adapter(dst, factors, alpha)


def test_a_right_file_is_within_the_bound() -> None:
    logprobs = runtime.next_token_logprobs(BASE, cases.given_ids())
    assert runtime.kl(cases.given_logits("llama-given"), logprobs) < 1e-8


def test_positions_select_rows() -> None:
    ids = cases.given_ids()
    whole = runtime.next_token_logprobs(BASE, ids)
    assert np.array_equal(runtime.next_token_logprobs(BASE, ids, positions=(0, 5)), whole[[0, 5]])


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.1.attn_k.weight"])
def test_rows_in_the_wrong_order_show(tmp_path: Path, name: str) -> None:
    heads = LLAMA_HEADS[name.split(".")[2]]
    weight = deltas.interleaved(ggufs.read(BASE).float64(name), heads).astype(np.float32)
    wrong = rewrite(tmp_path / "wrong.gguf", {name: weight})
    logprobs = runtime.next_token_logprobs(wrong, cases.given_ids())
    assert runtime.kl(cases.given_logits("llama-given"), logprobs) > 1e-5


def test_one_changed_value_shows(tmp_path: Path) -> None:
    weight = ggufs.read(BASE).float64("blk.1.ffn_up.weight").astype(np.float32)
    weight[3, 5] += 0.5
    wrong = rewrite(tmp_path / "wrong.gguf", {"blk.1.ffn_up.weight": weight})
    logprobs = runtime.next_token_logprobs(wrong, cases.given_ids())
    assert runtime.kl(cases.given_logits("llama-given"), logprobs) > 1e-8
    golden = cases.given_golden("llama-given")["llamacpp:f32"]
    assert [fault.split(":")[0] for fault in ggufs.tensor_faults(ggufs.read(wrong), golden)] == ["blk.1.ffn_up.weight"]


def test_an_adapter_by_hand_is_within_the_bound(tmp_path: Path) -> None:
    adapter = given_adapter(tmp_path / "right.gguf")
    logprobs = runtime.next_token_logprobs(BASE, cases.given_ids(), [(adapter, 1.0)])
    assert runtime.kl(cases.given_logits("lora-given"), logprobs) < 1e-8


@pytest.mark.parametrize("fault", [{"permuted": False}, {"alpha": 0.0}, {"alpha": 13.0}])
def test_a_wrong_adapter_shows(tmp_path: Path, fault: dict[str, float]) -> None:
    adapter = given_adapter(tmp_path / "wrong.gguf", **fault)  # type: ignore[arg-type]
    logprobs = runtime.next_token_logprobs(BASE, cases.given_ids(), [(adapter, 1.0)])
    assert runtime.kl(cases.given_logits("lora-given"), logprobs) > 1e-6


def test_adapter_scale_of_the_run_time_multiplies(tmp_path: Path) -> None:
    halved = given_adapter(tmp_path / "halved.gguf", alpha=6.0)
    logprobs = runtime.next_token_logprobs(BASE, cases.given_ids(), [(halved, 2.0)])
    assert runtime.kl(cases.given_logits("lora-given"), logprobs) < 1e-8


def test_applied_delta_is_the_trained_one_in_llama_cpps_order(tmp_path: Path) -> None:
    applied = deltas.applied(ggufs.read(given_adapter(tmp_path / "right.gguf")))
    expected = deltas.expected(cases.GIVEN / "lora-given", lambda module: 12 / 8, LLAMA_HEADS)
    distances = deltas.distances(applied, expected)
    assert len(distances) == 14
    assert max(distances.values()) < 1e-12
    unpermuted = deltas.distances(applied, deltas.expected(cases.GIVEN / "lora-given", lambda module: 12 / 8))
    assert {name for name, distance in unpermuted.items() if distance > 0.1} == {
        f"blk.{i}.attn_{part}.weight" for i in (0, 1) for part in "qk"
    }


def test_mlx_factors_are_the_peft_ones_transposed() -> None:
    peft = deltas.trained(cases.GIVEN / "lora-given", lambda module: 12 / 8)
    mlx = deltas.trained(cases.GIVEN / "mlx-given", lambda module: 1.5)
    assert max(deltas.distances(mlx, peft).values()) == 0


def test_interleaving_is_that_of_llama_cpp() -> None:
    hf = tiny.tensors_of(cases.GIVEN / "llama-given")
    base = ggufs.read(BASE)
    for part, heads in LLAMA_HEADS.items():
        ours = deltas.interleaved(hf[f"model.layers.0.self_attn.{part[-1]}_proj.weight"].float32().astype(float), heads)
        assert np.array_equal(ours, base.float64(f"blk.0.{part}.weight"))


def test_merged_rows_have_their_magnitudes() -> None:
    weight, delta = tiny.noise("w", (5, 7), 1.0).astype(float), tiny.noise("d", (5, 7), 0.1).astype(float)
    magnitude = np.arange(1.0, 6.0)
    total = deltas.merged(weight, delta, magnitude)
    assert np.allclose(np.linalg.norm(total, axis=1), magnitude)
    assert np.allclose(total / magnitude[:, None], (weight + delta) / np.linalg.norm(weight + delta, axis=1)[:, None])


def test_a_golden_is_what_llama_cpp_wrote() -> None:
    assert ggufs.read(BASE).golden() == cases.given_golden("llama-given")["llamacpp:f32"]
    assert ggufs.layout_faults(BASE) == []


@pytest.mark.parametrize("change", [{"ne": [64, 31]}, {"type": "F16"}, {"sha256": "0" * 64}])
def test_a_different_tensor_is_a_fault(change: dict[str, object]) -> None:
    golden = ggufs.read(BASE).golden()
    golden["tensors"]["blk.0.attn_k.weight"] |= change
    assert len(ggufs.tensor_faults(ggufs.read(BASE), golden)) == 1


def test_missing_and_additional_tensors_are_faults() -> None:
    golden = ggufs.read(BASE).golden()
    golden["tensors"]["blk.9.attn_k.weight"] = golden["tensors"].pop("blk.0.attn_k.weight")
    assert len(ggufs.tensor_faults(ggufs.read(BASE), golden)) == 2


def test_a_different_key_is_a_fault_and_its_type_is_not() -> None:
    golden = ggufs.read(BASE).golden()
    golden["kv"]["llama.block_count"] = {"type": ["INT32"], "value": 2}
    assert ggufs.key_faults(ggufs.read(BASE), golden) == []
    golden["kv"]["llama.block_count"] = {"type": ["UINT32"], "value": 3}
    assert len(ggufs.key_faults(ggufs.read(BASE), golden)) == 1


def test_layout_faults_are_seen(tmp_path: Path) -> None:
    content = bytearray(BASE.read_bytes())
    (tmp_path / "long.gguf").write_bytes(content + bytes(32))
    assert len(ggufs.layout_faults(tmp_path / "long.gguf")) == 1
    # lora_b of an r of 5 leaves padding behind it; a byte in it is what a careless writer leaves.
    adapter = tmp_path / "padded.gguf"
    write_adapter(adapter, {"blk.0.attn_v.weight": (tiny.noise("a", (5, 64), 1), tiny.noise("b", (31, 5), 1))}, 1.0)
    assert ggufs.layout_faults(adapter) == []
    content = bytearray(adapter.read_bytes())
    content[-1] = 1
    adapter.write_bytes(content)
    assert [fault.split(":")[0] for fault in ggufs.layout_faults(adapter)] == ["blk.0.attn_v.weight.lora_b"]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_values_are_dequantised(tmp_path: Path, kind: str) -> None:
    values = tiny.noise("x", (3, 64), 1.0)
    type_ = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    stored = gguf.quantize(values, type_)
    writer.add_tensor("x", stored, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = ggufs.read(tmp_path / "x.gguf").tensors["x"]
    assert (tensor.shape, tensor.type) == ((3, 64), kind)
    bound = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127}[kind]
    assert np.abs(tensor.float64() - values).max() <= bound * np.abs(values).max()


def test_what_llama_cpp_refuses_and_what_kills_it(tmp_path: Path) -> None:
    assert runtime.load(BASE).status == "loaded"
    missing = runtime.load(rewrite(tmp_path / "missing.gguf", {}, drop="blk.1.ffn_up.weight"))
    assert missing.status == "refused"
    assert "blk.1.ffn_up.weight" in missing.log
    # Its A comes transposed for an embedding, and the tied output layer finds it the other way round.
    pair = (tiny.noise("a", (301, 4), 1.0), tiny.noise("b", (64, 4), 1.0))
    flipped = write_adapter(tmp_path / "flipped.gguf", {"token_embd.weight": pair}, 4.0)
    assert runtime.load(BASE, [(flipped, 1.0)]).status == "died"


def test_memory_is_released() -> None:
    ids = cases.given_ids()
    runtime.next_token_logprobs(BASE, ids)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        runtime.next_token_logprobs(BASE, ids, positions=(0,))
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
    )  # KiB; a leak would be 40 MiB and more


def test_greedy_is_the_argmax() -> None:
    ids = cases.given_ids()
    first, second = runtime.greedy(BASE, ids, 2)
    assert first == int(cases.given_logits("llama-given")[-1].argmax())
    with runtime.Runtime(BASE) as loaded:
        assert second == int(loaded.next_logprobs([*ids, first]).argmax())


def test_tokenize_is_the_tokenizers_library() -> None:
    library = tokenizers.Tokenizer.from_file(str(cases.GIVEN / "llama-given" / "tokenizer.json"))
    for text in cases.TEXTS:
        assert runtime.tokenize(BASE, text) == library.encode(text, add_special_tokens=False).ids
    assert runtime.tokenize(BASE, "x", add_special=True)[0] == 1


def test_kl_is_zero_on_itself_and_known_elsewhere() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25]]))
    assert runtime.kl(logits + 3, runtime.normalized(logits)) == pytest.approx(0, abs=1e-15)
    uniform = runtime.normalized(np.zeros((1, 3)))
    assert runtime.kl(logits, uniform) == pytest.approx(math.log(3) - 1.5 * math.log(2))


@pytest.mark.parametrize("name", [*cases.MODELS, *cases.ADAPTERS, *cases.MERGES])
def test_built_cases_are_those_of_their_references(tmp_path: Path, name: str) -> None:
    built = cases.build(name, tmp_path) if name in cases.MODELS else cases.build_adapter(name, tmp_path)[0]
    assert built.name == name


@pytest.mark.parametrize("builder", [tiny.lfm2, tiny.lfm2moe, tiny.llama])
def test_tiny_shapes_are_pairwise_distinct(tmp_path: Path, builder: cases.Builder) -> None:
    """No matrix is square but those that the architecture makes so, and no two kinds of extent agree."""
    shapes = {name: tensor.shape for name, tensor in tiny.tensors_of(builder(tmp_path)).items()}
    square = {name.split(".")[-2] for name, shape in shapes.items() if len(shape) > 1 and len(set(shape)) < len(shape)}
    assert square == ({"q_proj", "o_proj"} if builder is tiny.llama else {"q_proj", "out_proj"})
    config = json.loads((tmp_path / "config.json").read_text())
    extents = [config[key] for key in ("vocab_size", "hidden_size", "intermediate_size") if key in config]
    extents += [shape[0] for name, shape in shapes.items() if name.endswith("k_proj.weight")][:1]
    extents += [config[key] for key in ("moe_intermediate_size", "num_experts", "conv_L_cache") if key in config]
    assert len(set(extents)) == len(extents)


@pytest.mark.parametrize("pre", tiny.PRE_TOKENIZERS)
def test_tiny_tokenizers_load_and_their_regexes_matter(tmp_path: Path, pre: str) -> None:
    tiny.write_bpe(tmp_path, pre=pre)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.get_vocab_size() == tiny.N_BPE_TOKENS
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    unsplit = [library.encode(text).ids for text in cases.TEXTS]
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [library.encode(text).ids for text in cases.TEXTS] != unsplit


def test_tiny_sentencepiece_and_its_json_agree(tmp_path: Path) -> None:
    tiny.write_spm(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert processor.vocab_size() == library.get_vocab_size() == tiny.N_SPM_TOKENS
    for text in cases.SPM_TEXTS:
        assert processor.encode(text) == library.encode(text).ids


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_tiny_tensors_round_to_nearest_even(tmp_path: Path, dtype: str) -> None:
    values = np.concatenate(
        [tiny.noise("v", (7, 9), 1.0).ravel(), np.array([1 + 2**-8, 1 + 3 * 2**-8, 0.0], np.float32)]
    )
    tensor = tiny.Tensor.of(values, dtype)
    tiny.write_safetensors(tmp_path / "x.safetensors", {"b": tensor, "a": tiny.Tensor.of(values[:1], "F32")})
    assert tiny.read_safetensors(tmp_path / "x.safetensors")["b"] == tensor
    bound = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8}[dtype]
    assert np.all(np.abs(tensor.float32() - values) <= bound * np.abs(values))
    if dtype == "BF16":
        assert tensor.float32()[-3:].tolist() == [1.0, 1 + 4 * 2**-8, 0.0]
