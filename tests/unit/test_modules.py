"""sentence-transformers' modules beside a model: what becomes a key or a tensor, what is said, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from streamconv.checkpoint.folder import Checkpoint
from streamconv.errors import SourceError, VerifyError
from tests import families, tiny
from tests.oracles import ggufs
from tests.raising import codes_of, raises
from tests.tiny.variants import as_retrieval, bare, configured, renamed

HIDDEN, WIDTH = 64, 24
IDENTITY = "torch.nn.modules.linear.Identity"
POOLING_TYPES = {"mean": 1, "cls": 2, "lasttoken": 3}

Module = tuple[str, Mapping[str, Any]]


def pooling(mode: Any, **more: Any) -> Module:
    return "Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": mode, **more}


def dense(n_in: int = HIDDEN, n_out: int = WIDTH, **more: Any) -> Module:
    settings = {"in_features": n_in, "out_features": n_out, "bias": False, "activation_function": IDENTITY}
    return "Dense", settings | more


NORMALIZE: Module = ("Normalize", {})
BOTH_SIDES = {"architectures": ["Lfm2BidirectionalModel"]}


def model(folder: Path, *modules: Module, **settings: Any) -> Path:
    """An LFM2 as AutoModel saves it, with modules after it."""
    return as_retrieval(
        renamed(tiny.lfm2(folder / "model"), bare), *modules, **{"architectures": ["Lfm2Model"]} | settings
    )


def converted(source: Path, dst: Path) -> tuple[ggufs.Gguf, list[str]]:
    report = streamconv.convert(source, dst, outtype="f32", force=True, verify=True)
    return ggufs.read(dst), [warning.code for warning in report.warnings]


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("mode", POOLING_TYPES)
def test_pooling_is_a_key(tmp_path: Path, mode: str) -> None:
    file, codes = converted(model(tmp_path, pooling(mode), NORMALIZE), tmp_path / "out.gguf")
    assert (file.keys["lfm2.pooling_type"].value, codes) == (POOLING_TYPES[mode], [])
    assert not {"lfm2.attention.causal", "lfm2.embedding_length_out"} & file.keys.keys()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_max_tokens": False}, "lasttoken"),
        ({"pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": "lasttoken", "pooling_mode_cls_token": True}, "lasttoken"),
    ],
)
def test_pooling_as_older_versions_say_it(tmp_path: Path, flags: dict[str, Any], expected: str) -> None:
    source = model(tmp_path, ("Pooling", {"word_embedding_dimension": HIDDEN, **flags}))
    file, _ = converted(source, tmp_path / "out.gguf")
    assert file.keys["lfm2.pooling_type"].value == POOLING_TYPES[expected]


def test_a_dense_layer_is_a_tensor_and_a_width(tmp_path: Path) -> None:
    file, codes = converted(model(tmp_path, dense()), tmp_path / "out.gguf")
    assert file.keys["lfm2.embedding_length_out"].value == WIDTH
    assert "lfm2.pooling_type" not in file.keys
    stored = tiny.read_safetensors(tmp_path / "model" / "1_Dense" / "model.safetensors")["linear.weight"]
    assert file.tensors["dense_2.weight"].shape == (WIDTH, HIDDEN)
    assert file.tensors["dense_2.weight"].sha256 == hashlib.sha256(stored.data).hexdigest()
    assert codes == []


def test_the_bias_of_a_dense_layer(tmp_path: Path) -> None:
    file, _ = converted(model(tmp_path, pooling("mean"), dense(bias=True)), tmp_path / "out.gguf")
    assert file.tensors["dense_2.bias"].shape == (WIDTH,)


@pytest.mark.parametrize("order", [(dense(), pooling("cls")), (pooling("cls"), dense())])
def test_a_dense_layer_before_or_behind_the_pooling(tmp_path: Path, order: tuple[Module, ...]) -> None:
    file, _ = converted(model(tmp_path, *order), tmp_path / "out.gguf")
    assert file.keys["lfm2.pooling_type"].value == POOLING_TYPES["cls"]
    assert "dense_2.weight" in file.tensors


def test_modules_that_the_caller_stands_for(tmp_path: Path) -> None:
    source = model(tmp_path, dense(), NORMALIZE, ("Dropout", {"dropout": 0.1}), ("MultiVectorMask", {}))
    assert converted(source, tmp_path / "out.gguf")[1] == []


def test_both_sides(tmp_path: Path) -> None:
    file, _ = converted(model(tmp_path, pooling("cls"), **BOTH_SIDES), tmp_path / "out.gguf")
    assert file.keys["lfm2.attention.causal"].value is False


def test_an_untied_model_needs_no_head_for_vectors(tmp_path: Path) -> None:
    source = model(tmp_path, pooling("cls"), tie_embedding=False, tie_word_embeddings=False)
    assert converted(source, tmp_path / "out.gguf")[1] == []
    shutil.rmtree(source / "1_Pooling")
    (source / "modules.json").unlink()
    with raises(SourceError, code="head-missing"):
        streamconv.convert(source, tmp_path / "other.gguf")


def test_the_class_for_text_with_modules(tmp_path: Path) -> None:
    source = as_retrieval(tiny.lfm2(tmp_path / "model"), pooling("lasttoken"))
    assert converted(source, tmp_path / "out.gguf")[0].keys["lfm2.pooling_type"].value == POOLING_TYPES["lasttoken"]


def test_another_architecture_has_the_pooling_too(tmp_path: Path) -> None:
    source = as_retrieval(tiny.llama(tmp_path / "model"), pooling("lasttoken"))
    assert converted(source, tmp_path / "out.gguf")[0].keys["llama.pooling_type"].value == POOLING_TYPES["lasttoken"]


def test_what_the_result_is_run_for(tmp_path: Path) -> None:
    def gives(source: Path) -> str:
        return streamconv.convert(source, tmp_path / "out.gguf", force=True).gives

    assert gives(tiny.llama(tmp_path / "text")) == "text"
    assert gives(model(tmp_path / "pooled", pooling("mean"), **BOTH_SIDES)) == "vectors"
    assert gives(model(tmp_path / "of tokens", dense())) == "token vectors"
    assert gives(model(tmp_path / "both sides", **BOTH_SIDES)) == "token vectors"
    assert gives(families.checkpoint("qwen3-reranker", tmp_path / "reranker")) == "scores"
    assert streamconv.quantize(tmp_path / "out.gguf", tmp_path / "q8_0.gguf", outtype="q8_0").gives == "scores"


# ---------------------------------------------------------------- the other commands


def test_verify_sees_each_of_them(tmp_path: Path) -> None:
    source = model(tmp_path, pooling("cls"), dense())
    streamconv.convert(source, tmp_path / "out.gguf", outtype="f32")
    assert streamconv.verify(tmp_path / "out.gguf", source).verified
    with raises(VerifyError, code="key-differs"):
        streamconv.verify(tmp_path / "out.gguf", configured(source, "1_Pooling/config.json", pooling_mode="mean"))
    configured(source, "1_Pooling/config.json", pooling_mode="cls")
    with raises(VerifyError, code="key-differs"):
        streamconv.verify(tmp_path / "out.gguf", configured(source, architectures=["Lfm2BidirectionalModel"]))
    configured(source, architectures=["Lfm2Model"])
    weight = {"linear.weight": tiny.Tensor.of(tiny.noise("other", (WIDTH, HIDDEN), 0.1), "F32")}
    tiny.write_safetensors(source / "2_Dense" / "model.safetensors", weight)
    with pytest.raises(VerifyError) as caught:
        streamconv.verify(tmp_path / "out.gguf", source)
    assert caught.value.tensor == "dense_2.weight"


def test_quantize_keeps_keys_and_the_dense_layer(tmp_path: Path) -> None:
    source = model(tmp_path, dense(), **BOTH_SIDES)
    streamconv.convert(source, tmp_path / "out.gguf", outtype="f16")
    streamconv.quantize(tmp_path / "out.gguf", tmp_path / "q8.gguf", outtype="q8_0")
    file = ggufs.read(tmp_path / "q8.gguf")
    assert (file.keys["lfm2.attention.causal"].value, file.keys["lfm2.embedding_length_out"].value) == (False, WIDTH)
    assert file.tensors["dense_2.weight"].type == "Q8_0"


def test_inspect_says_what_convert_would(tmp_path: Path) -> None:
    source = model(tmp_path, pooling("max"))
    found = streamconv.inspect(source)
    assert "module-unsupported" in {problem.code for problem in found.problems}
    assert streamconv.inspect(configured(source, "1_Pooling/config.json", pooling_mode="cls")).problems == []


def test_a_dense_layer_is_a_source_as_others_are(tmp_path: Path) -> None:
    """Its file is in what identifies a run that is resumed, and is looked at again when all is written."""
    source = model(tmp_path, dense())
    with Checkpoint.open(source) as checkpoint:
        assert source / "1_Dense" / "model.safetensors" in {shard.path for shard in checkpoint.shards}


# ---------------------------------------------------------------- what a caller has to do


def test_prompts_are_named(tmp_path: Path) -> None:
    source = model(tmp_path, pooling("cls"))
    tiny.write_json(source / "config_sentence_transformers.json", {"prompts": {"query": "query: ", "document": ""}})
    assert converted(source, tmp_path / "out.gguf")[1] == ["prompts-left-out"]
    tiny.write_json(source / "config_sentence_transformers.json", {"prompts": {"document": ""}})
    assert converted(source, tmp_path / "out.gguf")[1] == []
    tiny.write_json(source / "config_sentence_transformers.json", {"query_prefix": "[Q] "})
    assert converted(source, tmp_path / "out.gguf")[1] == ["prompts-left-out"]


def test_what_is_done_otherwise_is_said(tmp_path: Path) -> None:
    source = model(tmp_path, pooling("mean", include_prompt=False))
    tiny.write_json(source / "sentence_bert_config.json", {"do_lower_case": True})
    assert converted(source, tmp_path / "out.gguf")[1] == ["prompt-pooled", "lower-case"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "modules",
    [
        (pooling("max"),),
        (pooling("weightedmean"),),
        (pooling(["cls", "mean"]),),
        (pooling(3),),
        (("Pooling", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}),),
        (pooling("cls"), pooling("cls")),
        (dense(activation_function="torch.nn.modules.activation.Tanh"),),
        (dense(activation_function=None),),  # the class's own is Tanh
        (dense(use_residual=True),),
        (dense(), dense(WIDTH, 16)),  # of two, llama.cpp has a place for one after LFM2
        (NORMALIZE, dense()),
        (("LayerNorm", {}),),
        (pooling("cls"), ("CNN", {})),
    ],
)
def test_modules_beyond_the_runtime(tmp_path: Path, modules: tuple[Module, ...]) -> None:
    source, out = model(tmp_path, *modules), tmp_path / "out.gguf"
    with raises(SourceError, code="module-unsupported"):
        streamconv.convert(source, out)
    assert not out.exists()


def test_a_dense_layer_where_the_architecture_has_none(tmp_path: Path) -> None:
    source = as_retrieval(tiny.llama(tmp_path / "model"), pooling("lasttoken"), dense())
    with raises(SourceError, code="module-unsupported"):
        streamconv.convert(source, tmp_path / "out.gguf")


def _is_list(value: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "modules.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (_is_list([]), "modules-malformed"),
        (_is_list([{"path": "1_Dense", "type": "a.Dense"}]), "modules-malformed"),
        (
            _is_list([{"path": "", "type": "a.Transformer"}, {"path": "../other", "type": "a.Dense"}]),
            "modules-malformed",
        ),
        (_is_list([{"path": "", "type": "a.Transformer"}, {"path": "/etc", "type": "a.Dense"}]), "modules-malformed"),
        (_is_list([{"path": "", "type": "a.Transformer"}, {"path": "1_Dense"}]), "modules-malformed"),
        (_is_list([{"path": "", "type": "a.Transformer"}, 3]), "modules-malformed"),
        (_is_list({}), "json-not-list"),
        (lambda folder: (folder / "modules.json").write_text("[{"), "json-malformed"),
        (lambda folder: (folder / "modules.json").unlink(), "modules-missing"),
        (lambda folder: (folder / "1_Dense" / "config.json").unlink(), "module-config"),
        (lambda folder: (folder / "1_Dense" / "model.safetensors").unlink(), "no-weights"),
        (
            lambda folder: (folder / "1_Dense" / "model.safetensors").rename(folder / "1_Dense/pytorch_model.bin"),
            "pickled",
        ),
        (lambda folder: configured(folder, "1_Dense/config.json", out_features=WIDTH + 1), "shape-mismatch"),
        (lambda folder: configured(folder, "1_Dense/config.json", in_features=HIDDEN + 1), "shape-mismatch"),
    ],
)
def test_modules_that_are_not_whole(tmp_path: Path, spoil: Callable[[Path], Any], code: str) -> None:
    source, out = model(tmp_path, dense()), tmp_path / "out.gguf"
    spoil(source)
    with raises(SourceError, code=code):
        streamconv.convert(source, out)
    assert not out.exists()


def test_a_pooling_that_nothing_names_is_not_left_out(tmp_path: Path) -> None:
    source = model(tmp_path, pooling("cls"))
    (source / "modules.json").unlink()
    with raises(SourceError, code="modules-missing"):
        streamconv.convert(source, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "settings",
    [
        {"conv_L_cache": 4, **BOTH_SIDES},  # the window has no middle
        {"is_causal": False},  # the runtime would turn the convolutions as well
    ],
)
def test_sides_that_the_runtime_sees_otherwise(tmp_path: Path, settings: dict[str, Any]) -> None:
    n_kernel = settings.get("conv_L_cache", 3)
    source = tiny.lfm2(tmp_path / "model", conv_l=n_kernel)
    as_retrieval(renamed(source, bare), pooling("cls"), **{"architectures": ["Lfm2Model"]} | settings)
    with raises(SourceError, code="unrunnable"):
        streamconv.convert(source, tmp_path / "out.gguf")


# ---------------------------------------------------------------- rerankers, and both sides of other decoders


def reranker(folder: Path, **config: Any) -> Path:
    source = families.checkpoint("qwen3-reranker", folder / "model")
    configured(source, "1_LogitScore/config.json", **config)
    return source


def test_a_reranker_has_the_rows_of_its_answers(tmp_path: Path) -> None:
    source = reranker(tmp_path, true_token_id=7, false_token_id=3)
    file, codes = converted(source, tmp_path / "out.gguf")
    head = tiny.tensors_of(source)["lm_head.weight"].float32()
    assert np.array_equal(file.float64("cls.output.weight"), head[[7, 3]])
    assert (file["qwen3.pooling_type"], file["qwen3.classifier.output_labels"], codes) == (4, ["yes", "no"], [])
    assert "output.weight" not in file.tensors
    assert file["tokenizer.chat_templates"] == ["rerank"]
    assert streamconv.verify(tmp_path / "out.gguf", source).verified
    with raises(VerifyError, code="value-differs"):
        streamconv.verify(tmp_path / "out.gguf", configured(source, "1_LogitScore/config.json", true_token_id=8))


def test_a_template_of_the_files_comes_first(tmp_path: Path) -> None:
    source = reranker(tmp_path)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rerank.jinja").write_text("{query} {document}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    configured(source, "tokenizer_config.json", chat_template=None)
    file, _ = converted(source, tmp_path / "out.gguf")
    assert file["tokenizer.chat_template.rerank"] == "{query} {document}"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"false_token_id": None}, "module-unsupported"),
        ({"true_token_id": None}, "config-value"),
        ({"true_token_id": "yes"}, "config-value"),
        ({"true_token_id": -1}, "config-value"),
        ({"true_token_id": 416}, "unrunnable"),
    ],
)
def test_answers_that_are_not_tokens(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    with raises(SourceError, code=code):
        streamconv.convert(reranker(tmp_path, **config), tmp_path / "out.gguf")


def test_an_untied_reranker_without_its_head(tmp_path: Path) -> None:
    source = renamed(reranker(tmp_path), lambda name: "" if name == "lm_head.weight" else name)
    with raises(SourceError, code="head-missing"):
        streamconv.convert(source, tmp_path / "out.gguf")


def test_other_architectures_do_not_rank(tmp_path: Path) -> None:
    answers: Module = ("LogitScore", {"true_token_id": 1, "false_token_id": 2})
    for builder in (tiny.lfm2, tiny.llama):
        source = as_retrieval(builder(tmp_path / builder.__name__), answers)
        with raises(SourceError, code="module-unsupported"):
            streamconv.convert(source, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("name", "target", "changed"),
    [
        ("qwen3-reranker", "lm_head", {"cls.output.weight"}),
        ("qwen3-reranker-tied", "embed_tokens", {"token_embd.weight"}),  # PEFT changes the embedding, and not the head
    ],
)
def test_a_merge_into_the_ends(tmp_path: Path, name: str, target: str, changed: set[str]) -> None:
    source = families.checkpoint(name, tmp_path / "model")
    adapter = tiny.peft_adapter(tmp_path / "adapter", source, targets=(target,))
    assert streamconv.convert(source, tmp_path / "out.gguf", outtype="f32", adapters=[adapter], verify=True).verified
    plain, merged = converted(source, tmp_path / "plain.gguf")[0], ggufs.read(tmp_path / "out.gguf")
    assert {one for one in plain.tensors if merged.tensors[one].sha256 != plain.tensors[one].sha256} == changed
    with pytest.raises(SourceError) as caught:
        streamconv.convert_adapter(adapter, source, tmp_path / "adapter.gguf")
    assert {"no-matrix", "tied"} & codes_of(caught.value)


def test_a_decoder_without_a_mask(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "model", config={"is_causal": False})
    assert converted(source, tmp_path / "out.gguf")[0]["llama.attention.causal"] is False
    assert "llama.attention.causal" not in converted(configured(source, is_causal=True), tmp_path / "b.gguf")[0].keys


@pytest.mark.parametrize("name", ["olmo3", "cohere2", "gemma2", "exaone4-window", "gpt-oss", "phi3-long"])
def test_a_window_on_one_side(tmp_path: Path, name: str) -> None:
    source = configured(families.checkpoint(name, tmp_path / "model"), is_causal=False)
    with raises(SourceError, code="unrunnable"):
        streamconv.convert(source, tmp_path / "out.gguf")
    assert streamconv.convert(configured(source, max_position_embeddings=5), tmp_path / "out.gguf", force=True)


def test_what_files_leave_open_is_said(tmp_path: Path) -> None:
    own = {"AutoModel": "modeling_qwen.Qwen2Model"}
    source = as_retrieval(tiny.llama(tmp_path / "model"), pooling("lasttoken"), auto_map=own)
    assert converted(source, tmp_path / "out.gguf")[1] == ["own-code"]
    assert converted(configured(source, is_causal=False), tmp_path / "out.gguf")[1] == []
    assert converted(model(tmp_path / "lfm2", pooling("cls"), auto_map=own, **BOTH_SIDES), tmp_path / "b.gguf")[1] == []
    text = families.checkpoint("qwen3-reranker", tmp_path / "Qwen3-Reranker-0.6B")
    (text / "modules.json").unlink()
    assert converted(text, tmp_path / "out.gguf")[1] == ["reranker-text"]
    tuned = text.rename(tmp_path / "checkpoint-500")
    assert converted(tuned, tmp_path / "out.gguf")[1] == []
    for card in ("---\nbase_model:\n- Qwen/Qwen3-Reranker-0.6B\n---\n# Mine", "# Qwen3-Reranker-0.6B\n"):
        (tuned / "README.md").write_text(card, encoding="utf-8")
        assert converted(tuned, tmp_path / "out.gguf")[1] == ["reranker-text"]
    (tuned / "README.md").write_text("See [Qwen3-Reranker](https://example.org) for ranking.", encoding="utf-8")
    assert converted(tuned, tmp_path / "out.gguf")[1] == []


# ---------------------------------------------------------------- EmbeddingGemma


def gemma(folder: Path, *modules: Module, **config: Any) -> Path:
    """A made EmbeddingGemma, with other modules where some are given."""
    source = families.checkpoint("gemma-embedding", folder / "model")
    if modules:
        for path in source.glob("*/config.json"):
            shutil.rmtree(path.parent)
        as_retrieval(source, *modules)
    return configured(source, **config)


@pytest.mark.parametrize(
    ("modules", "tensors"),
    [
        ((pooling("mean"),), set()),
        ((pooling("cls"), dense(256, 256)), {"dense_2.weight"}),
        ((pooling("mean"), dense(256, 96), dense(96, 256), NORMALIZE), {"dense_2.weight", "dense_3.weight"}),
    ],
)
def test_dense_layers_of_gemma(tmp_path: Path, modules: tuple[Module, ...], tensors: set[str]) -> None:
    file, _ = converted(gemma(tmp_path, *modules), tmp_path / "out.gguf")
    assert {name for name in file.tensors if name.startswith("dense")} == tensors
    sizes = {key.rpartition(".")[2]: file[key] for key in file.keys if "_feat_" in key}
    shapes = {name.removesuffix(".weight"): file.tensors[name].shape for name in tensors}
    assert sizes == {
        f"{name}_feat_{side}": extent
        for name, shape in shapes.items()
        for side, extent in zip(("out", "in"), shape, strict=True)
    }


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"use_bidirectional_attention": False}, "unrunnable"),
        ({"use_bidirectional_attention": None}, "unrunnable"),
        ({"query_pre_attn_scalar": 32}, "unrunnable"),
        ({"layer_types": ["full_attention"] * 7}, "unrunnable"),
        ({"sliding_window": None}, "unrunnable"),
    ],
)
def test_gemmas_beyond_the_runtime(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    with raises(SourceError, code=code):
        streamconv.convert(gemma(tmp_path, **config), tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("modules", "code"),
    [
        ((dense(256, 96),), "unrunnable"),
        ((dense(256, 96), dense(96, 64)), "unrunnable"),
        ((dense(256, 256, bias=True),), "module-unsupported"),
        ((dense(256, 256), dense(256, 256), dense(256, 256)), "module-unsupported"),
    ],
)
def test_dense_layers_beyond_gemmas_runtime(tmp_path: Path, modules: tuple[Module, ...], code: str) -> None:
    with raises(SourceError, code=code):
        streamconv.convert(gemma(tmp_path, pooling("mean"), *modules), tmp_path / "out.gguf")
