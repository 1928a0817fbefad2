"""PEFT's target_parameters (LoRA on stacked experts) and trainable_token_indices (whole rows): merged, and alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import streamconv
from streamconv.errors import SourceError
from tests import cases, families, loras, tiny
from tests.oracles import ggufs, runtime
from tests.raising import raises
from tests.tiny import variants

GATE_UP, DOWN = "gate_up_proj", "down_proj"
N_EXPERTS, HIDDEN, WIDTH, RANK = 6, 64, 160, 3
LAYERS = (1, 3)
Matrix = NDArray[np.float64]


def factors(layer: int, name: str, shape: tuple[int, int], *, old: bool) -> dict[str, Matrix]:
    """A and B of one parameter [E, d1, d2], as PEFT 0.19 stores them, or as 0.18 did."""
    n_out, n_in = shape[::-1] if old else shape
    a = tiny.noise(f"{layer}{name}.A", (N_EXPERTS * RANK, n_in), 1 / np.sqrt(n_in))
    b = tiny.noise(f"{layer}{name}.B", (n_out, RANK * N_EXPERTS), 0.1)
    return {"A": a.astype(np.float64), "B": b.astype(np.float64)}


def delta(pair: Mapping[str, Matrix], scale: float, *, old: bool) -> Matrix:
    """What PEFT adds to the parameter [E, d1, d2]: ParamWrapper.get_delta_weight, by its own einsum."""
    a = pair["A"].reshape(N_EXPERTS, -1, pair["A"].shape[-1])
    b = pair["B"].reshape(pair["B"].shape[0], -1, N_EXPERTS)
    return scale * np.einsum("ore,eri->eio" if old else "ore,eri->eoi", b, a)


def adapter(
    folder: Path,
    *,
    old: bool = False,
    parameters: Sequence[str] = (GATE_UP, DOWN),
    width: int = WIDTH,
    prefix: str = "base_model.model.",
    dtype: str = "F32",
    **settings: Any,
) -> tuple[Path, dict[str, dict[str, Matrix]]]:
    """An adapter on the stacked experts of two layers, and its factors by the parameter's whole name.

    PEFT wraps gate_up_proj first: with both, its wrapper is the inner one.
    """
    shapes = {GATE_UP: (2 * width, HIDDEN), DOWN: (HIDDEN, width)}
    tensors, pairs = {}, {}
    for layer in LAYERS:
        module = f"model.layers.{layer}.feed_forward.experts"
        for depth, name in enumerate(parameters):
            pair = factors(layer, name, shapes[name], old=old)
            stored = {x: tiny.Tensor.of(values, dtype) for x, values in pair.items()}
            inner = ".base_layer" * (len(parameters) - 1 - depth)
            tensors |= {f"{prefix}{module}{inner}.lora_{x}.weight": tensor for x, tensor in stored.items()}
            pairs[f"{module}.{name}"] = {x: tensor.float32().astype(np.float64) for x, tensor in stored.items()}
    config = loras.PEFT | {
        "r": RANK,
        "lora_alpha": 6,
        "target_parameters": [f"feed_forward.experts.{name}" for name in parameters],
        "peft_version": "0.18.1" if old else "0.21.2",
    }
    return loras.write(folder, tensors, {k: v for k, v in (config | settings).items() if v is not tiny.ABSENT}), pairs


def expected(base: ggufs.Gguf, changes: Mapping[str, Matrix], width: int = WIDTH) -> dict[str, Matrix]:
    """Every tensor of a base with the changes of its stacked experts added."""
    result = {name: base.float64(name) for name in base.tensors}
    for parameter, change in changes.items():
        block = f"blk.{parameter.split('.')[2]}"
        if parameter.endswith(GATE_UP):
            result[f"{block}.ffn_gate_exps.weight"] = result[f"{block}.ffn_gate_exps.weight"] + change[:, :width]
            result[f"{block}.ffn_up_exps.weight"] = result[f"{block}.ffn_up_exps.weight"] + change[:, width:]
        else:
            result[f"{block}.ffn_down_exps.weight"] = result[f"{block}.ffn_down_exps.weight"] + change
    return result


def written(base: Path, dst: Path, *adapters: Path) -> tuple[ggufs.Gguf, list[str]]:
    report = streamconv.convert(base, dst, outtype="f32", adapters=adapters, force=True, verify=True)
    return ggufs.read(dst), [warning.code for warning in report.warnings]


def check(file: ggufs.Gguf, want: Mapping[str, Matrix]) -> None:
    assert list(file.tensors) == list(want)
    for name, values in want.items():
        np.testing.assert_allclose(file.float64(name), values, rtol=0, atol=1e-6, err_msg=name)


MLX: Callable[[Path], Path] = variants.as_mlx
LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[Path], Path]]] = {
    "one by one": ({}, lambda folder: folder),
    "stacked": ({"stacked": True}, lambda folder: folder),
    "mlx": ({}, MLX),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("parameters", [(GATE_UP, DOWN), (GATE_UP,), (DOWN,), (DOWN, GATE_UP)])
def test_factors_of_stacked_experts(tmp_path: Path, layout: str, old: bool, parameters: Sequence[str]) -> None:
    settings, change = LAYOUTS[layout]
    base = change(tiny.lfm2moe(tmp_path / "base", **settings))
    folder, pairs = adapter(tmp_path / "adapter", old=old, parameters=parameters)
    plain, _ = written(base, tmp_path / "plain.gguf")
    file, codes = written(base, tmp_path / "out.gguf", folder)
    want = expected(plain, {name: delta(pair, 2.0, old=old) for name, pair in pairs.items()})
    check(file, want)
    assert codes == []


@pytest.mark.parametrize("old", [False, True])
def test_the_adapter_alone_does_what_the_merge_does(tmp_path: Path, old: bool) -> None:
    """llama.cpp takes pairs of stacked tensors, one matrix for each expert."""
    base = tiny.lfm2moe(tmp_path / "base", config={"routed_scaling_factor": 2.5})
    folder, _ = adapter(tmp_path / "adapter", old=old)
    file, _ = written(base, tmp_path / "merged.gguf", folder)
    plain, _ = written(base, tmp_path / "plain.gguf")
    report = streamconv.convert_adapter(folder, base, tmp_path / "lora.gguf")
    assert report.warnings == []
    pair = ggufs.read(report.output)
    assert pair.tensors["blk.1.ffn_gate_exps.weight.lora_a"].shape == (N_EXPERTS, RANK, HIDDEN)
    assert pair.tensors["blk.1.ffn_gate_exps.weight.lora_b"].shape == (N_EXPERTS, WIDTH, RANK)
    merged_ = runtime.next_token_logprobs(file.path, cases.IDS, positions=(7,))
    applied = runtime.next_token_logprobs(plain.path, cases.IDS, [(report.output, 1.0)], positions=(7,))
    before = runtime.next_token_logprobs(plain.path, cases.IDS, positions=(7,))
    assert runtime.kl(merged_, applied) < 1e-8
    assert runtime.kl(merged_, before) > 1e-4


@pytest.mark.parametrize("version", ["0.19.0", "0.18.1", "0.17.1", "1.2.dev0", tiny.ABSENT])
def test_where_shapes_leave_it_open_the_version_tells(tmp_path: Path, version: Any) -> None:
    """down_proj alone is square: its layout is that of the PEFT that wrote it."""
    base = tiny.lfm2moe(tmp_path / "base", moe_ff=HIDDEN)
    settings = {"parameters": (DOWN,), "width": HIDDEN, "peft_version": version}
    folder, pairs = adapter(tmp_path / "adapter", **settings)
    old = version in ("0.18.1", "0.17.1", tiny.ABSENT)
    plain, _ = written(base, tmp_path / "plain.gguf")
    file, codes = written(base, tmp_path / "out.gguf", folder)
    check(file, expected(plain, {name: delta(pair, 2.0, old=old) for name, pair in pairs.items()}, HIDDEN))
    assert codes == (["peft-version"] if version is tiny.ABSENT else [])


@pytest.mark.parametrize("old", [False, True])
def test_a_square_parameter_lies_as_the_others_of_its_file(tmp_path: Path, old: bool) -> None:
    """gate_up_proj is not square and tells, whatever the configuration says."""
    base = tiny.lfm2moe(tmp_path / "base", moe_ff=HIDDEN)
    folder, pairs = adapter(tmp_path / "adapter", old=old, width=HIDDEN, peft_version="0.18.0" if not old else "0.21.0")
    plain, _ = written(base, tmp_path / "plain.gguf")
    file, _ = written(base, tmp_path / "out.gguf", folder)
    check(file, expected(plain, {name: delta(pair, 2.0, old=old) for name, pair in pairs.items()}, HIDDEN))


def test_scales_by_the_parameters_name(tmp_path: Path) -> None:
    base = tiny.lfm2moe(tmp_path / "base")
    patterns = {"experts.down_proj": 12, rf"layers\.3\..*{GATE_UP}": 1.5}
    folder, pairs = adapter(tmp_path / "adapter", alpha_pattern=patterns)
    scales = {f"1{GATE_UP}": 2.0, f"1{DOWN}": 4.0, f"3{GATE_UP}": 0.5, f"3{DOWN}": 4.0}
    plain, _ = written(base, tmp_path / "plain.gguf")
    file, _ = written(base, tmp_path / "out.gguf", folder)
    changes = {
        name: delta(pair, scales[name.split(".")[2] + name.rpartition(".")[2]], old=False)
        for name, pair in pairs.items()
    }
    check(file, expected(plain, changes))


def test_with_a_wrapper_and_with_attention(tmp_path: Path) -> None:
    base = tiny.lfm2moe(tmp_path / "base")
    folder, pairs = adapter(tmp_path / "adapter", prefix="_orig_mod.base_model.model.")
    q = loras.factors("model.layers.1.self_attn.q_proj", HIDDEN, HIDDEN, RANK)
    tiny.write_safetensors(folder / "adapter_model.safetensors", tiny.tensors_of(folder) | q)
    plain, _ = written(base, tmp_path / "plain.gguf")
    file, _ = written(base, tmp_path / "out.gguf", folder)
    want = expected(plain, {name: delta(pair, 2.0, old=False) for name, pair in pairs.items()})
    a, b = (tensor.float32().astype(np.float64) for tensor in q.values())
    want["blk.1.attn_q.weight"] = want["blk.1.attn_q.weight"] + 2.0 * b @ a
    check(file, want)


def test_factors_that_fit_no_parameter_are_refused_with_the_way_out(tmp_path: Path) -> None:
    base = tiny.lfm2moe(tmp_path / "base", moe_ff=96)
    folder, _ = adapter(tmp_path / "adapter")
    for call in (
        lambda: streamconv.convert(base, tmp_path / "out.gguf", adapters=[folder]),
        lambda: streamconv.convert_adapter(folder, base, tmp_path / "out.gguf"),
    ):
        with pytest.raises(SourceError) as caught:
            call()
        assert {problem["code"] for problem in caught.value.problems} == {"parameters"}
        assert "target_parameters" in str(caught.value)
        assert "merge_and_unload" in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


def test_a_parameter_without_factors_is_an_incomplete_adapter(tmp_path: Path) -> None:
    base = tiny.lfm2moe(tmp_path / "base")
    targets = [f"experts.{GATE_UP}", f"experts.{DOWN}"]
    folder, _ = adapter(tmp_path / "adapter", parameters=(DOWN,), target_parameters=targets)
    assert set(refused(base, tmp_path / "out.gguf", folder)) == {"parameters"}
    plain = loras.edit(tiny.peft_adapter(tmp_path / "plain", base, targets=("q_proj",)), target_parameters=targets)
    assert set(refused(base, tmp_path / "out.gguf", plain)) == {"parameters"}


# ---------------------------------------------------------------- whole rows

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ROWS = (5, 3, 17)


def test_a_base_without_such_parameters_is_another(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "adapter")
    base = tiny.llama(tmp_path / "base")
    with pytest.raises(SourceError) as caught:
        streamconv.convert_adapter(folder, base, tmp_path / "out.gguf")
    assert {problem["code"] for problem in caught.value.problems} == {"no-module"}
    assert "target_parameters" in caught.value.message
    assert "merge_and_unload" not in str(caught.value)  # PEFT cannot merge it with this base either


def rows_adapter(
    folder: Path, base: Path, indices: Any, *modules: str, n_rows: int = 3, grown: Sequence[str] = ()
) -> tuple[Path, dict[str, Matrix]]:
    """An adapter on q_proj with trained rows of `modules`, and these; of `grown` ends with their frozen rows."""
    tiny.peft_adapter(folder, base, targets=("q_proj",))
    tensors, rows = dict(tiny.tensors_of(folder)), {}
    for module in modules:
        trained = tiny.noise(f"{EMBEDDING if base.name == 'tied' else module}.rows", (n_rows, HIDDEN), 0.4)
        rows[module] = trained.astype(np.float64)
        name = f"base_model.model.{module}.token_adapter"
        tensors[f"{name}.trainable_tokens_delta"] = tiny.Tensor.of(trained, "F32")
        if module in grown:
            tensors[f"{name}.base_layer.weight"] = tiny.Tensor.of(frozen(base, module), "F32")
    tiny.write_safetensors(folder / "adapter_model.safetensors", tensors)
    loras.edit(folder, trainable_token_indices=indices)
    if grown:
        tiny.write_bpe(folder, pre="llama-bpe")
    return folder, rows


def frozen(base: Path, module: str) -> NDArray[np.float32]:
    tensors = tiny.tensors_of(base)
    rows = tensors.get(f"{module}.weight", tensors[f"{EMBEDDING}.weight"]).float32()
    return np.concatenate([rows, tiny.noise("new rows", (2, HIDDEN), 0.3)])


def replaced(weight: Matrix, numbers: Sequence[int], rows: Matrix) -> Matrix:
    result = weight.copy()
    result[list(numbers)] = rows
    return result


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("indices", [list(ROWS), {"embed_tokens": list(ROWS)}])
@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_take_the_place_of_the_bases(tmp_path: Path, tied: bool, indices: Any, dtype: str) -> None:
    """On a tied base the head is the embedding, its new rows as well."""
    base = tiny.llama(tmp_path / ("tied" if tied else "untied"), tied=tied, dtype=dtype)
    folder, rows = rows_adapter(tmp_path / "adapter", base, indices, EMBEDDING)
    plain, _ = written(base, tmp_path / "plain.gguf")
    file, codes = written(base, tmp_path / "out.gguf", folder)
    want = replaced(plain.float64("token_embd.weight"), ROWS, rows[EMBEDDING])
    assert np.array_equal(file.float64("token_embd.weight"), want)
    assert codes == []
    assert list(file.tensors) == list(plain.tensors)
    if not tied:
        assert file.tensors["output.weight"].sha256 == plain.tensors["output.weight"].sha256


def test_rows_of_embedding_and_head(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "untied", tied=False)
    indices = {"embed_tokens": [5, 3, 17], "lm_head": [7, 2, 0]}
    folder, rows = rows_adapter(tmp_path / "adapter", base, indices, EMBEDDING, HEAD)
    plain, _ = written(base, tmp_path / "plain.gguf")
    file, _ = written(base, tmp_path / "out.gguf", folder)
    for target, module in (("token_embd.weight", EMBEDDING), ("output.weight", HEAD)):
        numbers = indices[module.rpartition(".")[2]]
        assert np.array_equal(file.float64(target), replaced(plain.float64(target), numbers, rows[module]))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_grown_vocabulary(tmp_path: Path, tied: bool) -> None:
    """PEFT saves the grown frozen rows beside the trained ones; of a tied model under both names."""
    base = tiny.llama(tmp_path / ("tied" if tied else "untied"), tied=tied, vocab=tiny.N_BPE_TOKENS)
    new = [tiny.N_BPE_TOKENS, tiny.N_BPE_TOKENS + 1, 4]
    indices: Any = new if tied else {"embed_tokens": new, "lm_head": new}
    folder, rows = rows_adapter(tmp_path / "adapter", base, indices, EMBEDDING, HEAD, grown=(EMBEDDING, HEAD))
    file, _ = written(base, tmp_path / "out.gguf", folder)
    want = frozen(base, EMBEDDING).astype(np.float64)
    assert np.array_equal(file.float64("token_embd.weight"), replaced(want, new, rows[EMBEDDING]))
    if tied:
        assert "output.weight" not in file.tensors
    else:
        want = frozen(base, HEAD).astype(np.float64)
        assert np.array_equal(file.float64("output.weight"), replaced(want, new, rows[HEAD]))


def refused(base: Path, dst: Path, *adapters: Any) -> list[str]:
    with pytest.raises(SourceError) as caught:
        streamconv.convert(base, dst, adapters=list(adapters))
    assert not dst.exists()
    return [str(problem["code"]) for problem in caught.value.problems]


@pytest.mark.parametrize(
    "indices", [[5, 3], [5, 3, 4000], None, {"lm_head": [1, 2, 3]}, "5", [5, 3, 3], [5, 3, -1], [1, 2, 3, 4]]
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, indices: Any) -> None:
    base = tiny.llama(tmp_path / "untied", tied=False)
    folder, _ = rows_adapter(tmp_path / "adapter", base, indices, EMBEDDING)
    assert set(refused(base, tmp_path / "out.gguf", folder)) <= {"tokens", "config"}


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_that_lost_its_trained_rows_is_refused(tmp_path: Path, tied: bool) -> None:
    base = tiny.llama(tmp_path / "base", tied=tied)
    folder, _ = rows_adapter(tmp_path / "adapter", base, list(ROWS))
    assert refused(base, tmp_path / "out.gguf", folder) == ["tokens-missing"]
    with pytest.raises(SourceError) as caught:
        streamconv.convert_adapter(folder, base, tmp_path / "lora.gguf")
    assert [problem["code"] for problem in caught.value.problems] == ["tokens-missing"]
    half, _ = rows_adapter(tmp_path / "half", base, {"embed_tokens": list(ROWS), "lm_head": list(ROWS)}, EMBEDDING)
    if tied:  # PEFT saves one of the two
        streamconv.convert(base, tmp_path / "half.gguf", adapters=[half])
    else:
        assert refused(base, tmp_path / "half.gguf", half) == ["tokens"]


def test_a_token_beyond_the_rows_is_named(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "untied", tied=False)
    folder, _ = rows_adapter(tmp_path / "adapter", base, [5, 3, 4000], EMBEDDING)
    with pytest.raises(SourceError) as caught:
        streamconv.convert(base, tmp_path / "out.gguf", adapters=[folder])
    assert "4000" in caught.value.message


def test_what_excludes_trained_rows(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "tied")
    folder, _ = rows_adapter(tmp_path / "adapter", base, list(ROWS), EMBEDDING)
    other = tiny.peft_adapter(tmp_path / "other", base, targets=("embed_tokens",))
    assert refused(base, tmp_path / "out.gguf", (folder, 0.5)) == ["tokens"]
    assert refused(base, tmp_path / "out.gguf", other, folder) != []
    differing, _ = rows_adapter(
        tmp_path / "differing", base, {"embed_tokens": [1, 2, 3], "lm_head": [4, 5, 6]}, EMBEDDING, HEAD
    )
    assert refused(base, tmp_path / "out.gguf", differing) == ["tying"]


def test_the_adapter_alone_is_refused_with_the_merge_as_the_way_out(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "untied", tied=False)
    folder, _ = rows_adapter(tmp_path / "adapter", base, list(ROWS), EMBEDDING)
    with pytest.raises(SourceError) as caught:
        streamconv.convert_adapter(folder, base, tmp_path / "out.gguf")
    assert [problem["code"] for problem in caught.value.problems] == ["tokens"]
    assert "convert BASE --adapter" in (caught.value.hint or "")
    assert json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"] == list(ROWS)


# ---------------------------------------------------------------- experts that no checkpoint has one by one


def of_gpt_oss(gate_up: Matrix, down: Matrix) -> dict[str, Matrix]:
    gate, up, down = (values.transpose(0, 2, 1) for values in (gate_up[..., ::2], gate_up[..., 1::2], down))
    return {"gate": gate, "up": up, "down": down}


def of_granite(gate_up: Matrix, down: Matrix) -> dict[str, Matrix]:
    half = gate_up.shape[1] // 2
    return {"gate": gate_up[:, :half], "up": gate_up[:, half:], "down": down}


STACKS: dict[str, tuple[str, tuple[str, str], Callable[[Matrix, Matrix], dict[str, Matrix]]]] = {
    "gpt-oss": ("mlp.experts", ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), of_gpt_oss),
    "granitemoe": (
        "block_sparse_moe.experts",
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        of_granite,
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_that_are_stored_as_one(tmp_path: Path, name: str) -> None:
    module, stored, landed = STACKS[name]
    source, layer = families.checkpoint(name, tmp_path / "model"), 1
    tensors, deltas = {}, []
    for depth, (parameter, of_base) in enumerate(zip((GATE_UP, DOWN), stored, strict=True)):
        n_experts, n_out, n_in = tiny.tensors_of(source)[f"model.layers.{layer}.{of_base}"].shape
        a = tiny.noise(f"{parameter}.A", (n_experts * RANK, n_in), 1 / np.sqrt(n_in)).astype(np.float64)
        b = tiny.noise(f"{parameter}.B", (n_out, RANK * n_experts), 0.1).astype(np.float64)
        wrapper = f"base_model.model.model.layers.{layer}.{module}{'.base_layer' * (1 - depth)}"
        tensors |= {f"{wrapper}.lora_{x}.weight": tiny.Tensor.of(v, "F32") for x, v in (("A", a), ("B", b))}
        of_each = b.reshape(n_out, RANK, n_experts), a.reshape(n_experts, RANK, n_in)
        deltas.append(2.0 * np.einsum("ore,eri->eoi", *of_each))
    targets = [f"{module}.{parameter}" for parameter in (GATE_UP, DOWN)]
    config = loras.PEFT | {"r": RANK, "lora_alpha": 2 * RANK, "target_parameters": targets, "peft_version": "0.21.2"}
    base, _ = written(source, tmp_path / "base.gguf")
    merged, _ = written(source, tmp_path / "merged.gguf", loras.write(tmp_path / "adapter", tensors, config))
    want = {key: base.float64(key) for key in base.tensors}
    for part, change in landed(*deltas).items():
        want[f"blk.{layer}.ffn_{part}_exps.weight"] = want[f"blk.{layer}.ffn_{part}_exps.weight"] + change
    check(merged, want)


def test_a_part_of_a_stack_that_is_stored_as_one(tmp_path: Path) -> None:
    """MLX has gate and up apart, which a Granite-MoE stores together."""
    source = families.checkpoint("granitemoe", tmp_path / "model")
    n_experts, width, hidden = tiny.tensors_of(source)["model.layers.1.block_sparse_moe.input_linear.weight"].shape
    module = "model.layers.1.block_sparse_moe.switch_mlp.gate_proj"
    factors = {
        f"{module}.lora_a": tiny.noise("a", (n_experts, RANK, hidden), 0.1),
        f"{module}.lora_b": tiny.noise("b", (n_experts, width // 2, RANK), 0.1),
    }
    tensors = {name: tiny.Tensor.of(values, "F32") for name, values in factors.items()}
    adapter = loras.write(tmp_path / "adapter", tensors, {"lora_parameters": {"rank": RANK, "scale": 2.0}})
    with raises(SourceError, code="adapter-unmergeable") as refused:
        written(source, tmp_path / "out.gguf", adapter)
    assert [problem["code"] for problem in refused.value.problems] == ["experts"]
    streamconv.convert_adapter(adapter, source, tmp_path / "adapter.gguf")  # the way out that it names


def test_magnitudes_of_a_stack_are_refused(tmp_path: Path) -> None:
    source = families.checkpoint("granitemoe", tmp_path / "model")
    n_experts, hidden, width = tiny.tensors_of(source)["model.layers.1.block_sparse_moe.output_linear.weight"].shape
    module = "model.layers.1.block_sparse_moe.switch_mlp.down_proj"
    factors = {
        f"{module}.lora_a": tiny.noise("a", (n_experts, RANK, width), 0.1),
        f"{module}.lora_b": tiny.noise("b", (n_experts, hidden, RANK), 0.1),
        f"{module}.m": np.ones(hidden),
    }
    tensors = {name: tiny.Tensor.of(values, "F32") for name, values in factors.items()}
    config = {"fine_tune_type": "dora", "lora_parameters": {"rank": RANK, "scale": 2.0}}
    adapter = loras.write(tmp_path / "adapter", tensors, config)
    with raises(SourceError, code="dora"):
        written(source, tmp_path / "out.gguf", adapter)
