"""Hostile checkpoints and adapters: each idea, and the code of the error that it must lead to.

A row's base is valid (the first test checks that), so that the refusal is due to the row's own edit. An empty code
means that the idea is harmless, and the result converts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tests.attacks import edits as e
from tests.attacks.edits import ABSENT, Edit, config, cut, entry, header, header_text, index, length, rename

NORM = "model.embedding_norm.weight"
EMBEDDING = "model.embed_tokens.weight"
W1 = "model.layers.0.feed_forward.w1.weight"
DEEP = "[" * 100_000 + "]" * 100_000


@dataclass(frozen=True)
class Attack:
    """`base` names a checkpoint or adapter of test_attacks.py; `code` is the error's, or its first problem's."""

    base: str
    edit: Edit
    code: str
    exit_code: int = 3
    options: tuple[str, ...] = ()


def lfm2(edit: Edit, code: str, exit_code: int = 3, *options: str) -> Attack:
    return Attack("lfm2", edit, code, exit_code, options)


def shards(edit: Edit, code: str) -> Attack:
    return Attack("shards", edit, code)


def moe(edit: Edit, code: str) -> Attack:
    return Attack("lfm2moe", edit, code)


def llama(edit: Edit, code: str) -> Attack:
    return Attack("llama", edit, code)


def peft(edit: Edit, code: str) -> Attack:
    return Attack("peft", edit, code)


def mlx(edit: Edit, code: str) -> Attack:
    return Attack("mlx", edit, code)


def spm(edit: Edit, code: str) -> Attack:
    return Attack("spm", edit, code)


def _swap_offsets(table: dict[str, Any]) -> None:
    a, b = table[NORM], table["model.layers.0.ffn_norm.weight"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


def _shift(table: dict[str, Any], by: int) -> None:
    table[NORM]["data_offsets"] = [offset + by for offset in table[NORM]["data_offsets"]]


def _alias(table: dict[str, Any]) -> None:
    table[NORM]["data_offsets"] = table["model.layers.0.ffn_norm.weight"]["data_offsets"]


def _first_token(vocab: dict[str, int], id_: int) -> None:
    vocab[next(token for token, known in vocab.items() if known == 300)] = id_


SAFETENSORS: dict[str, Attack] = {
    "an empty file": lfm2(e.write(e.WEIGHTS, b""), "not-safetensors"),
    "seven bytes": lfm2(e.write(e.WEIGHTS, b"\0" * 7), "not-safetensors"),
    "a header of no bytes": lfm2(e.write(e.WEIGHTS, bytes(8)), "not-safetensors"),
    "a Git LFS pointer": lfm2(e.write(e.WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "not-safetensors"),
    "an HTML page": lfm2(e.write(e.WEIGHTS, b"<!DOCTYPE html><html>" * 9), "not-safetensors"),
    "a pickle under the name": lfm2(e.write(e.WEIGHTS, b"\x80\x02}q\x00." * 9), "not-safetensors"),
    "a header length of 2**64-1": lfm2(length(2**64 - 1), "safetensors-length"),
    "a header length of 2**63": lfm2(length(2**63), "safetensors-length"),
    "a header length of 100,000,001": lfm2(length(100_000_001), "safetensors-length"),
    "a header length one short": lfm2(length(lambda n: n - 1), "data-cover"),
    "a header length one long": lfm2(length(lambda n: n + 1), "not-utf8"),
    "the last byte missing": lfm2(cut(1), "shard-truncated"),
    "one byte too many": lfm2(cut(-1), "data-cover"),
    "half of the data": lfm2(cut(30_000), "shard-truncated"),
    "a header that is not JSON": lfm2(header(lambda t: b"{" + b"x" * 100), "json-malformed"),
    "a header that is a list": lfm2(header(lambda t: b"[1, 2, 3, 4]"), "header-start"),
    "a header that is not UTF-8": lfm2(header_text(NORM, "model.\udcff"), "not-utf8"),
    "a header nested 100,000 deep": lfm2(header(lambda t: b'{"a":' + DEEP.encode() + b"}"), "json-nested"),
    "a tensor twice": lfm2(
        header_text(
            '"__metadata__": ', f'"{NORM}": {{"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}}, "__metadata__": '
        ),
        "json-malformed",
    ),
    "metadata that is no map of strings": lfm2(header(lambda t: t.update(__metadata__={"a": 1})), "header-metadata"),
    "an entry that is null": lfm2(header(lambda t: t.update({NORM: None})), "header-entry"),
    "an entry without offsets": lfm2(header(lambda t: t[NORM].pop("data_offsets")), "header-start"),
    "an unknown dtype": lfm2(entry(NORM, dtype="F128"), "header-dtype"),
    "a dtype that does not convert": lfm2(entry(NORM, dtype="I16"), "quantised"),
    "a quantised dtype": lfm2(entry(W1, dtype="F8_E4M3", shape=[192, 64]), "quantised"),
    "a shape of strings": lfm2(entry(NORM, shape=["64"]), "header-shape"),
    "a shape of a fraction": lfm2(entry(NORM, shape=[64.0]), "header-shape"),
    "a negative extent": lfm2(entry(NORM, shape=[-64]), "header-shape"),
    "an extent of 2**63": lfm2(entry(NORM, shape=[2**63]), "header-nbytes"),
    "a product that wraps to its size": lfm2(entry(NORM, shape=[2**63, 2, 64]), "header-elements"),
    "a product that wraps to zero": lfm2(entry(NORM, shape=[2**32, 2**32]), "header-elements"),
    "4,000 dimensions": lfm2(entry(NORM, shape=[64] + [1] * 4000), "shape-mismatch"),
    "a shape that the file has no bytes for": lfm2(entry(NORM, shape=[65]), "header-nbytes"),
    "an empty tensor": lfm2(entry(NORM, shape=[0], data_offsets=[0, 0]), "data-cover"),
    "offsets in reverse": lfm2(
        header(lambda t: t[NORM].update(data_offsets=t[NORM]["data_offsets"][::-1])), "header-offsets"
    ),
    "negative offsets": lfm2(entry(NORM, data_offsets=[-128, 0]), "header-offsets"),
    "offsets of 2**64-1": lfm2(entry(NORM, data_offsets=[2**64 - 129, 2**64 - 1]), "data-cover"),
    "offsets of fractions": lfm2(entry(NORM, data_offsets=[0.0, 128.0]), "header-offsets"),
    "three offsets": lfm2(header(lambda t: t[NORM]["data_offsets"].append(1)), "header-offsets"),
    "a hole": lfm2(header(lambda t: _shift(t, 2)), "data-cover"),
    "two tensors on the same bytes": lfm2(header(_alias), "data-cover"),
    "two tensors that exchanged their bytes": lfm2(header(_swap_offsets), ""),  # legal: no byte says which is which
    "a name with NUL": lfm2(rename(NORM, "model.\0norm"), "tensor-name"),
    "a name with an escape sequence": lfm2(rename(NORM, "\x1b[31mmodel"), "tensor-name"),
    "a name with a line break": lfm2(rename(NORM, "model\nnorm"), "tensor-name"),
    "a name with slashes": lfm2(rename(NORM, "../../etc/passwd"), "tensor-name"),
    "a name that turns text around": lfm2(rename(NORM, "model.\u202e.weight"), "tensor-name"),
    "an empty name": lfm2(rename(NORM, ""), "tensor-name"),
    "a name of 100,000 characters": lfm2(rename(NORM, "a" * 100_000), "tensors-unknown"),
    "a target above 63 bytes": lfm2(rename(NORM, f"model.layers.{'9' * 80}.ffn_norm.weight"), "tensors-unknown"),
    "a layer of 999,999": lfm2(rename(W1, "model.layers.999999.feed_forward.w1.weight"), "tensors-missing"),
    "a layer with a leading zero": lfm2(rename(W1, "model.layers.00.feed_forward.w1.weight"), "tensors-unknown"),
    "a negative layer": lfm2(rename(W1, "model.layers.-1.feed_forward.w1.weight"), "tensors-unknown"),
    "an expert of 999,999": moe(
        rename(
            "model.layers.1.feed_forward.experts.0.w1.weight", "model.layers.1.feed_forward.experts.999999.w1.weight"
        ),
        "tensors-missing",
    ),
    "a missing tensor": lfm2(rename(NORM, "__metadata__2"), "tensors-unknown"),
    "w1 and w3 exchanged with w2": lfm2(
        header(
            lambda t: {
                (W1.replace("w1", "w2") if n == W1 else W1 if n == W1.replace("w1", "w2") else n): v
                for n, v in t.items()
            }
        ),
        "shape-mismatch",
    ),
    "a FIFO": lfm2(lambda d: (d.joinpath(e.WEIGHTS).unlink(), os.mkfifo(d / e.WEIGHTS)), "not-regular-file"),
    "a directory": lfm2(lambda d: (d.joinpath(e.WEIGHTS).unlink(), d.joinpath(e.WEIGHTS).mkdir()), "not-regular-file"),
    "a link to /dev/zero": lfm2(
        lambda d: (d.joinpath(e.WEIGHTS).unlink(), d.joinpath(e.WEIGHTS).symlink_to("/dev/zero")),
        "not-regular-file",
    ),
    "a link to nowhere": lfm2(
        lambda d: (d.joinpath(e.WEIGHTS).unlink(), d.joinpath(e.WEIGHTS).symlink_to("nowhere")), "shard-missing"
    ),
    "a link to itself": lfm2(
        lambda d: (d.joinpath(e.WEIGHTS).unlink(), d.joinpath(e.WEIGHTS).symlink_to(e.WEIGHTS)), "shard-missing"
    ),
    "a link to a regular file elsewhere": lfm2(e.link(e.WEIGHTS, "blob"), ""),  # the Hugging Face cache is made of them
    "only pickled weights": lfm2(lambda d: (d / e.WEIGHTS).rename(d / "pytorch_model.bin"), "pickled"),
}

INDEXES: dict[str, Attack] = {
    "an absolute path": shards(index(lambda v: v["weight_map"].update({NORM: "/etc/passwd"})), "index"),
    "a path with ..": shards(index(lambda v: v["weight_map"].update({NORM: "../x.safetensors"})), "index"),
    "the name ..": shards(index(lambda v: v["weight_map"].update({NORM: ".."})), "index"),
    "a name with NUL": shards(index(lambda v: v["weight_map"].update({NORM: "a\0b"})), "index"),
    "a name of 5,000 characters": shards(index(lambda v: v["weight_map"].update({NORM: "a" * 5000})), "index"),
    "a number for a name": shards(index(lambda v: v["weight_map"].update({NORM: 7})), "index"),
    "a shard that is not there": shards(e.remove("model-00002-of-00002.safetensors"), "shard-missing"),
    "a tensor in the wrong shard": shards(
        index(lambda v: v["weight_map"].update({NORM: "model-00001-of-00002.safetensors"})), "index-mismatch"
    ),
    "a tensor that no shard holds": shards(
        index(lambda v: v["weight_map"].update({"x": "model-00001-of-00002.safetensors"})), "index-mismatch"
    ),
    "a tensor that the index leaves out": shards(index(lambda v: v["weight_map"].pop(NORM)), "index-mismatch"),
    "a tensor in two shards": shards(
        lambda d: (d / "model-00002-of-00002.safetensors").write_bytes(
            (d / "model-00001-of-00002.safetensors").read_bytes()
        ),
        "tensor-twice",
    ),
    "no weight_map": shards(index(lambda v: v.pop("weight_map")), "index"),
    "an empty weight_map": shards(index(lambda v: v["weight_map"].clear()), "index"),
    "an index that is a list": shards(e.write("model.safetensors.index.json", "[]"), "json-not-object"),
}


def _key(key: str, value: Any, code: str, base: str = "lfm2") -> Attack:
    return Attack(base, config(**{key: value}), code)


CONFIGS: dict[str, Attack] = {
    "no config.json": lfm2(e.remove("config.json"), "config-missing"),
    "an empty config.json": lfm2(e.write("config.json", ""), "other-file-kind"),
    "a list": lfm2(e.write("config.json", "[1]"), "json-not-object"),
    "not UTF-8": lfm2(e.write("config.json", b'{"a": "\xff"}'), "not-utf8"),
    "UTF-16": lfm2(e.write("config.json", "{}".encode("utf-16")), "not-utf8"),
    "100,000 levels": lfm2(e.write("config.json", '{"a":' + DEEP + "}"), "json-nested"),
    "a key twice": lfm2(e.text("config.json", "{", '{"vocab_size": 1, '), "json-malformed"),
    "NaN": _key("norm_eps", float("nan"), "json-malformed"),
    "Infinity": _key("norm_eps", float("inf"), "json-malformed"),
    "a number beyond all floats": lfm2(e.text("config.json", "1e-05", "1e999"), "json-malformed"),
    "a number of 5,000 digits": lfm2(
        e.text("config.json", '"hidden_size": 64', '"hidden_size": ' + "9" * 5000), "json-malformed"
    ),
    "hidden_size as a string": _key("hidden_size", "64", "config-value"),
    "hidden_size as a fraction": _key("hidden_size", 64.5, "config-value"),
    "hidden_size as 64.0": _key("hidden_size", 64.0, "config-value"),
    "hidden_size as a list": _key("hidden_size", [64], "config-value"),
    "hidden_size as true": _key("hidden_size", True, "config-value"),
    "hidden_size 0": _key("hidden_size", 0, "config-value"),
    "hidden_size -64": _key("hidden_size", -64, "config-value"),
    "hidden_size 2**64": _key("hidden_size", 2**64, "config-value"),
    "hidden_size 2**31-1": _key("hidden_size", 2**31 - 1, "unrunnable"),
    "hidden_size null": _key("hidden_size", None, ""),  # follows from the tensors
    "zero heads": _key("num_attention_heads", 0, "config-value"),
    "heads that do not divide": _key("num_attention_heads", 7, "unrunnable"),
    "more heads than columns": _key("num_attention_heads", 4096, "unrunnable"),
    "zero key heads": _key("num_key_value_heads", 0, "config-value"),
    "key heads that do not divide": _key("num_key_value_heads", 3, "unrunnable"),
    "zero layers": _key("num_hidden_layers", 0, "config-value"),
    "a layer too few": _key("num_hidden_layers", 3, "config-contradiction"),
    "a layer too many": _key("num_hidden_layers", 5, "layer-tensors"),
    "2**31-1 layers": _key("num_hidden_layers", 2**31 - 1, "layer-count"),
    "vocab_size that is not the embedding's": _key("vocab_size", 417, "shape-mismatch"),
    "an unknown architecture": _key("architectures", ["Qwen9ForCausalLM"], "architecture-unsupported"),
    "architectures as a string": _key("architectures", "Lfm2ForCausalLM", "config-value"),
    "architectures of null": _key("architectures", [None], "config-value"),
    "architectures empty": _key("architectures", [], ""),
    "neither architectures nor model_type": lfm2(
        config(architectures=ABSENT, model_type=ABSENT), "architecture-unsupported"
    ),
    "layer_types of unknown words": _key("layer_types", ["convolution"] * 4, "config-contradiction"),
    "layer_types too short": _key("layer_types", ["conv"], "config-contradiction"),
    "layer_types against the tensors": _key("layer_types", ["conv"] * 4, "config-contradiction"),
    "layer_types of numbers": _key("layer_types", [1, 2, 3, 4], "config-value"),
    "layer_types of 100,000 entries": _key("layer_types", ["conv"] * 100_000, "config-contradiction"),
    "full_attn_idxs out of range": lfm2(config(layer_types=None, full_attn_idxs=[2, 99]), "config-value"),
    "full_attn_idxs negative": lfm2(config(layer_types=None, full_attn_idxs=[-2]), "config-value"),
    "norm_eps 0": _key("norm_eps", 0, "config-value"),
    "norm_eps negative": _key("norm_eps", -1e-5, "config-value"),
    "norm_eps as a string": _key("norm_eps", "1e-5", "config-value"),
    "norm_eps beyond float32": _key("norm_eps", 1e300, "config-value"),
    "rope_theta 0": _key("rope_parameters", {"rope_theta": 0.0}, "config-value"),
    "rope_theta as a list": _key("rope_parameters", {"rope_theta": [1]}, "config-value"),
    "rope_parameters as a string": _key("rope_parameters", "default", "config-value"),
    "an unknown rope_type": _key("rope_parameters", {"rope_type": "x\ny"}, "unrunnable"),
    "a context of 10**30": _key("max_position_embeddings", 10**30, "config-value"),
    "conv_L_cache that is not the kernel's": _key("conv_L_cache", 4, "shape-mismatch"),
    "conv_bias": _key("conv_bias", True, "unrunnable"),
    "untied without a head": _key("tie_word_embeddings", False, "head-missing"),
    "tie_word_embeddings as a string": _key("tie_word_embeddings", "false", "config-value"),
    "block_multiple_of 0": _key("block_multiple_of", 0, "config-value"),
    "block_ffn_dim_multiplier 1e30": _key("block_ffn_dim_multiplier", 1e30, "shape-mismatch"),
    "a left-over quantization_config": _key("quantization_config", {"quant_method": "gptq"}, ""),
    "weights quantised as they run": _key("quantization_config", {"quant_method": "bitnet"}, "quantised-at-runtime"),
    "head_dim 0": _key("head_dim", 0, "config-value", "llama"),
    "an odd head_dim": llama(config(head_dim=15), "unrunnable"),
    "llama3 RoPE with a factor of 0": llama(
        config(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 0,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 32,
            }
        ),
        "config-value",
    ),
    "llama3 RoPE with equal bounds": llama(
        config(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 32,
            }
        ),
        "unrunnable",
    ),
    "experts used beyond those there": _key("num_experts_per_tok", 99, "unrunnable", "lfm2moe"),
    "zero experts": _key("num_experts", 0, "config-value", "lfm2moe"),
    "an expert too many": _key("num_experts", 7, "shape-mismatch", "lfm2moe"),
    "2**31-1 experts": _key("num_experts", 2**31 - 1, "shape-mismatch", "lfm2moe"),
    "a routed_scaling_factor of 0": _key("routed_scaling_factor", 0, "", "lfm2moe"),  # zeros, as transformers has it
}


TOKENIZERS: dict[str, Attack] = {
    "no tokenizer": lfm2(e.remove("tokenizer.json"), "tokenizer-missing"),
    "an empty tokenizer.json": lfm2(e.write("tokenizer.json", ""), "other-file-kind"),
    "a list": lfm2(e.write("tokenizer.json", "[]"), "json-malformed"),
    "cut in the middle": lfm2(cut(3000, "tokenizer.json"), "json-malformed"),
    "not UTF-8": lfm2(
        lambda d: (d / "tokenizer.json").write_bytes(
            (d / "tokenizer.json").read_bytes().replace(b'"<tool>"', b'"\xff\xfe"')
        ),
        "not-utf8",
    ),
    "a lone surrogate": lfm2(e.text("tokenizer.json", '"<tool>"', '"\\ud800"'), "tokenizer-malformed"),
    "100,000 levels": lfm2(e.tokenizer(lambda v: v.clear()), "tokenizer-malformed"),
    "levels in a part": lfm2(e.text("tokenizer.json", '"version"', f'"normalizer2": {DEEP}, "version"'), "json-nested"),
    "an id twice": lfm2(e.model(lambda m: _first_token(m["vocab"], 299)), "token-ids"),
    "a negative id": lfm2(e.model(lambda m: _first_token(m["vocab"], -1)), "json-malformed"),
    "an id of 2**31": lfm2(e.model(lambda m: _first_token(m["vocab"], 2**31)), "tokens-beyond-rows"),
    "an id of 10**30": lfm2(e.model(lambda m: _first_token(m["vocab"], 10**30)), "json-malformed"),
    "an id that is a fraction": lfm2(e.model(lambda m: _first_token(m["vocab"], 1.5)), "json-malformed"),  # type: ignore[arg-type]
    "an id that is a string": lfm2(e.model(lambda m: _first_token(m["vocab"], "7")), "json-malformed"),  # type: ignore[arg-type]
    "an id that is true": lfm2(e.model(lambda m: _first_token(m["vocab"], True)), "json-malformed"),
    "a token twice": lfm2(e.text("tokenizer.json", '"vocab": {', '"vocab": {"Ġthe": 0, '), "token-twice"),
    "an empty vocabulary": lfm2(e.model(lambda m: m["vocab"].clear()), "merge-unknown-token"),
    "vocab as a list": lfm2(e.model(lambda m: m.update(vocab=[["a", 1.0]])), "merge-unknown-token"),
    "a merge of an unknown token": lfm2(e.model(lambda m: m["merges"].append(["Ġzzz", "qqq"])), "merge-unknown-token"),
    "a merge whose result is unknown": lfm2(e.model(lambda m: m["merges"].append(["t", "q"])), "merge-unknown-token"),
    "a merge of one part": lfm2(e.model(lambda m: m["merges"].append(["t"])), "json-malformed"),
    "a merge of three parts": lfm2(e.model(lambda m: m["merges"].append(["t", "h", "e"])), "json-malformed"),
    "a merge of numbers": lfm2(e.model(lambda m: m["merges"].append([1, 2])), "json-malformed"),
    "merges as an object": lfm2(e.model(lambda m: m.update(merges={})), "json-malformed"),
    "no merges": lfm2(e.model(lambda m: m.pop("merges")), "tokenizer-unsupported"),
    "a WordPiece model": lfm2(e.model(lambda m: m.update(type="WordPiece")), "tokenizer-unsupported"),
    "a Unigram model": lfm2(e.model(lambda m: m.update(type="Unigram")), "tokenizer-unsupported"),
    "a model type of null": lfm2(e.model(lambda m: m.update(type=None)), ""),  # BPE, as the tokenizers library reads it
    "an end_of_word_suffix": lfm2(e.model(lambda m: m.update(end_of_word_suffix="</w>")), "tokenizer-unsupported"),
    "an added token of a negative id": lfm2(
        e.tokenizer(lambda v: v["added_tokens"][0].update(id=-5)), "tokenizer-malformed"
    ),
    "an added token of id 2**40": lfm2(e.tokenizer(lambda v: v["added_tokens"][0].update(id=2**40)), ""),
    "an added token beyond the rows": lfm2(e.tokenizer(lambda v: v["added_tokens"][-1].update(id=416)), ""),
    "an added token without content": lfm2(
        e.tokenizer(lambda v: v["added_tokens"][0].pop("content")), "tokenizer-malformed"
    ),
    "an added token's content a number": lfm2(
        e.tokenizer(lambda v: v["added_tokens"][0].update(content=5)), "tokenizer-malformed"
    ),
    "two added tokens of one id": lfm2(e.tokenizer(lambda v: v["added_tokens"][-1].update(id=2)), "token-ids"),
    "more tokens than rows": lfm2(
        e.model(lambda m: m["vocab"].update({f"zz{n}": 404 + n for n in range(13)})), "tokens-beyond-rows"
    ),
    "an unknown pre-tokenizer": Attack(
        "llama", e.tokenizer(lambda v: v["pre_tokenizer"].update(type="Whitespace")), "pre-unknown"
    ),
    "a pre-tokenizer that is a number": lfm2(e.tokenizer(lambda v: v.update(pre_tokenizer=5)), "pre-unknown"),
    "an eos_token_id beyond the rows": lfm2(
        config("generation_config.json", eos_token_id=10**9), ""
    ),  # config.json's holds
    "tokenizer_config.json that is a list": lfm2(e.write("tokenizer_config.json", "[]"), "json-not-object"),
    "a chat template of numbers": lfm2(config("tokenizer_config.json", chat_template=5), "chat-template-malformed"),
    "a chat template that runs code": lfm2(
        config("tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"), ""
    ),  # text
    "an auto_map of Python code": lfm2(config(auto_map={"AutoModel": "evil--modeling.Evil"}), ""),  # never looked at
    "tokenizer.model empty": spm(e.write("tokenizer.model", b""), "sentencepiece-malformed"),
    "tokenizer.model cut": spm(cut(41, "tokenizer.model"), "sentencepiece-malformed"),
    "tokenizer.model of 0xff": spm(e.write("tokenizer.model", b"\xff" * 500), "sentencepiece-malformed"),
    "a piece of 2**60 bytes": spm(
        e.write("tokenizer.model", b"\x0a" + b"\xff" * 8 + b"\x0f" + b"x" * 50), "sentencepiece-malformed"
    ),
}


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
FACTORS = "adapter_model.safetensors"


def _adapter(**values: Any) -> Edit:
    return config("adapter_config.json", **values)


ADAPTERS: dict[str, Attack] = {
    "no adapter_config.json": peft(e.remove("adapter_config.json"), "config-missing"),
    "a config that is a list": peft(e.write("adapter_config.json", "[]"), "json-not-object"),
    "no weights": peft(e.remove(FACTORS), "weights-missing"),
    "a pickle": peft(lambda d: (d / FACTORS).rename(d / "adapter_model.bin"), "weights-missing"),
    "weights cut": peft(cut(1, FACTORS), "shard-truncated"),
    "r 0": peft(_adapter(r=0), "config"),
    "r as a string": peft(_adapter(r="8"), "config"),
    "r that is not the factors'": peft(_adapter(r=9), "rank"),
    "lora_alpha as a string": peft(_adapter(lora_alpha="12"), "config"),
    "lora_alpha NaN": peft(_adapter(lora_alpha=float("nan")), "json-malformed"),
    "lora_alpha 1e300": peft(_adapter(lora_alpha=1e300), "config"),
    "lora_alpha null": peft(_adapter(lora_alpha=None), ""),  # PEFT's default, which the converter says
    "a pattern that is not a regular expression": peft(_adapter(alpha_pattern={"(": 3}), "pattern"),
    "a pattern that never ends": peft(_adapter(alpha_pattern={"(.*)*(.*)*(.*)*(.*)*x$": 3}), "pattern"),
    "a pattern of 10,000 characters": peft(_adapter(alpha_pattern={"a" * 10_000: 3}), "pattern"),
    "a pattern's value a string": peft(_adapter(alpha_pattern={"q_proj": "3"}), "config"),
    "rank_pattern as a list": peft(_adapter(rank_pattern=[1]), "config"),
    "another method": peft(_adapter(peft_type="PREFIX_TUNING"), "peft-type"),
    "a factor without its partner": peft(rename(A, A.replace("lora_A", "lora_C"), FACTORS), "unknown"),
    "factors of a module that is not there": peft(rename(A, A.replace("layers.0", "layers.9"), FACTORS), "partner"),
    "a factor of another width": peft(e.header(lambda t: t[A].update(shape=[16, 32]), FACTORS), "shape"),
    "a factor that lies the other way round": peft(
        e.header(lambda t: t[A].update(shape=t[A]["shape"][::-1]), FACTORS), ""
    ),  # the shapes say so
    "a factor of one dimension": peft(e.header(lambda t: t[A].update(shape=[512]), FACTORS), "shape"),
    "a factor of integers": peft(e.header(lambda t: t[A].update(dtype="I32"), FACTORS), "dtype"),
    "a name with NUL": peft(rename(A, "a\0b", FACTORS), "tensor-name"),
    "an MLX scale as a string": mlx(_adapter(lora_parameters={"rank": 8, "scale": "1.5"}), "config"),
    "MLX without parameters": mlx(_adapter(lora_parameters=ABSENT), "config"),
    "an MLX rank of 0": mlx(_adapter(lora_parameters={"rank": 0, "scale": 1.5}), "config"),
}

GROUPS: dict[str, dict[str, Attack]] = {
    "safetensors": SAFETENSORS,
    "index": INDEXES,
    "config": CONFIGS,
    "tokenizer": TOKENIZERS,
    "adapter": ADAPTERS,
}

ALL = {f"{group}: {name}": attack for group, attacks in GROUPS.items() for name, attack in attacks.items()}
