"""Hostile checkpoints and adapters: each idea, and a part of the one line that it must end in.

Invariant: a row's base is valid (the first test says so), so that what is refused is the row's own edit. An empty
pattern says that the idea is harmless, and is converted.
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
    """`base` names a checkpoint or adapter of test_attacks.py; `expected` is a pattern of the error's line."""

    base: str
    edit: Edit
    expected: str
    exit_code: int = 3
    options: tuple[str, ...] = ()


def lfm2(edit: Edit, expected: str, exit_code: int = 3, *options: str) -> Attack:
    return Attack("lfm2", edit, expected, exit_code, options)


def shards(edit: Edit, expected: str) -> Attack:
    return Attack("shards", edit, expected)


def moe(edit: Edit, expected: str) -> Attack:
    return Attack("lfm2moe", edit, expected)


def llama(edit: Edit, expected: str) -> Attack:
    return Attack("llama", edit, expected)


def peft(edit: Edit, expected: str) -> Attack:
    return Attack("peft", edit, expected)


def mlx(edit: Edit, expected: str) -> Attack:
    return Attack("mlx", edit, expected)


def spm(edit: Edit, expected: str) -> Attack:
    return Attack("spm", edit, expected)


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
    "an empty file": lfm2(e.write(e.WEIGHTS, b""), "this is an empty file"),
    "seven bytes": lfm2(e.write(e.WEIGHTS, b"\0" * 7), "nothing but zeros"),
    "a header of no bytes": lfm2(e.write(e.WEIGHTS, bytes(8)), "nothing but zeros"),
    "a Git LFS pointer": lfm2(e.write(e.WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "an HTML page": lfm2(e.write(e.WEIGHTS, b"<!DOCTYPE html><html>" * 9), "an HTML page"),
    "a pickle under the name": lfm2(e.write(e.WEIGHTS, b"\x80\x02}q\x00." * 9), "a PyTorch pickle"),
    "a header length of 2**64-1": lfm2(length(2**64 - 1), "claims a header of 18,446,744,073,709,551,615 bytes"),
    "a header length of 2**63": lfm2(length(2**63), "claims a header"),
    "a header length of 100,000,001": lfm2(length(100_000_001), "claims a header"),
    "a header length one short": lfm2(length(lambda n: n - 1), "not a valid safetensors"),
    "a header length one long": lfm2(length(lambda n: n + 1), "not a valid safetensors"),
    "the last byte missing": lfm2(cut(1), "truncated|not a valid safetensors"),
    "one byte too many": lfm2(cut(-1), "not a valid safetensors"),
    "half of the data": lfm2(cut(30_000), "truncated|not a valid safetensors"),
    "a header that is no JSON": lfm2(header(lambda t: b"{" + b"x" * 100), "not a valid safetensors"),
    "a header that is a list": lfm2(header(lambda t: b"[1, 2, 3, 4]"), "not a valid safetensors"),
    "a header that is no UTF-8": lfm2(header_text(NORM, "model.\udcff"), "not a valid safetensors"),
    "a header nested 100,000 deep": lfm2(header(lambda t: b'{"a":' + DEEP.encode() + b"}"), "not a valid safetensors"),
    "a tensor twice": lfm2(
        header_text(
            '"__metadata__": ', f'"{NORM}": {{"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}}, "__metadata__": '
        ),
        "duplicate key",
    ),
    "metadata that is no map of strings": lfm2(header(lambda t: t.update(__metadata__={"a": 1})), "not a valid"),
    "an entry that is null": lfm2(header(lambda t: t.update({NORM: None})), "not a valid safetensors"),
    "an entry without offsets": lfm2(header(lambda t: t[NORM].pop("data_offsets")), "not a valid safetensors"),
    "an unknown dtype": lfm2(entry(NORM, dtype="F128"), "not a valid safetensors"),
    "a dtype that does not convert": lfm2(entry(NORM, dtype="I16"), "dtype I16 cannot be converted"),
    "a quantised dtype": lfm2(entry(W1, dtype="F8_E4M3", shape=[192, 64]), "shape"),
    "a shape of strings": lfm2(entry(NORM, shape=["64"]), "not a valid safetensors"),
    "a shape of a fraction": lfm2(entry(NORM, shape=[64.0]), "not a valid safetensors"),
    "a negative extent": lfm2(entry(NORM, shape=[-64]), "not a valid safetensors"),
    "an extent of 2**63": lfm2(entry(NORM, shape=[2**63]), "not a valid safetensors"),
    "a product that wraps to its size": lfm2(entry(NORM, shape=[2**63, 2, 64]), "not a valid safetensors"),
    "a product that wraps to zero": lfm2(entry(NORM, shape=[2**32, 2**32]), "not a valid safetensors"),
    "4,000 dimensions": lfm2(entry(NORM, shape=[64] + [1] * 4000), "has shape"),
    "a shape that the file has no bytes for": lfm2(entry(NORM, shape=[65]), "not a valid safetensors"),
    "an empty tensor": lfm2(entry(NORM, shape=[0], data_offsets=[0, 0]), "not a valid safetensors"),
    "offsets in reverse": lfm2(
        header(lambda t: t[NORM].update(data_offsets=t[NORM]["data_offsets"][::-1])), "not a valid"
    ),
    "negative offsets": lfm2(entry(NORM, data_offsets=[-128, 0]), "not a valid safetensors"),
    "offsets of 2**64-1": lfm2(entry(NORM, data_offsets=[2**64 - 129, 2**64 - 1]), "truncated|not a valid safetensors"),
    "offsets of fractions": lfm2(entry(NORM, data_offsets=[0.0, 128.0]), "not a valid safetensors"),
    "three offsets": lfm2(header(lambda t: t[NORM]["data_offsets"].append(1)), "not a valid safetensors"),
    "a hole": lfm2(header(lambda t: _shift(t, 2)), "not a valid safetensors"),
    "two tensors on the same bytes": lfm2(header(_alias), "not a valid safetensors"),
    "two tensors that exchanged their bytes": lfm2(header(_swap_offsets), ""),  # legal: no byte says which is which
    "a name with NUL": lfm2(rename(NORM, "model.\0norm"), "holds what no tensor name holds"),
    "a name with an escape sequence": lfm2(rename(NORM, "\x1b[31mmodel"), r"'\\x1b\[31mmodel' holds what no"),
    "a name with a line break": lfm2(rename(NORM, "model\nnorm"), "holds what no tensor name holds"),
    "a name with slashes": lfm2(rename(NORM, "../../etc/passwd"), "holds what no tensor name holds"),
    "a name that turns text around": lfm2(rename(NORM, "model.\u202e.weight"), "holds what no tensor name holds"),
    "an empty name": lfm2(rename(NORM, ""), "holds what no tensor name holds"),
    "a name of 100,000 characters": lfm2(rename(NORM, "a" * 100_000), "unknown tensors: a{20,}"),
    "a target above 63 bytes": lfm2(rename(NORM, f"model.layers.{'9' * 80}.ffn_norm.weight"), "unknown tensors"),
    "a layer of 999,999": lfm2(
        rename(W1, "model.layers.999999.feed_forward.w1.weight"), "tensors with no place in the model"
    ),
    "a layer with a leading zero": lfm2(rename(W1, "model.layers.00.feed_forward.w1.weight"), "unknown tensors"),
    "a negative layer": lfm2(rename(W1, "model.layers.-1.feed_forward.w1.weight"), "unknown tensors"),
    "an expert of 999,999": moe(
        rename(
            "model.layers.1.feed_forward.experts.0.w1.weight", "model.layers.1.feed_forward.experts.999999.w1.weight"
        ),
        "num_experts",
    ),
    "a missing tensor": lfm2(rename(NORM, "__metadata__2"), "unknown tensors"),
    "w1 and w3 exchanged with w2": lfm2(
        header(
            lambda t: {
                (W1.replace("w1", "w2") if n == W1 else W1 if n == W1.replace("w1", "w2") else n): v
                for n, v in t.items()
            }
        ),
        "has shape",
    ),
    "a FIFO": lfm2(lambda d: (d.joinpath(e.WEIGHTS).unlink(), os.mkfifo(d / e.WEIGHTS)), "not a regular file|missing"),
    "a directory": lfm2(
        lambda d: (d.joinpath(e.WEIGHTS).unlink(), d.joinpath(e.WEIGHTS).mkdir()), "no .safetensors|not a regular"
    ),
    "a link to /dev/zero": lfm2(
        lambda d: (d.joinpath(e.WEIGHTS).unlink(), d.joinpath(e.WEIGHTS).symlink_to("/dev/zero")),
        "not a regular file|safetensors",
    ),
    "a link to nowhere": lfm2(
        lambda d: (d.joinpath(e.WEIGHTS).unlink(), d.joinpath(e.WEIGHTS).symlink_to("nowhere")), "safetensors"
    ),
    "a link to itself": lfm2(
        lambda d: (d.joinpath(e.WEIGHTS).unlink(), d.joinpath(e.WEIGHTS).symlink_to(e.WEIGHTS)), "safetensors"
    ),
    "a link to a regular file elsewhere": lfm2(e.link(e.WEIGHTS, "blob"), ""),  # the Hugging Face cache is made of them
    "only pickled weights": lfm2(lambda d: (d / e.WEIGHTS).rename(d / "pytorch_model.bin"), "only pickled weights"),
}

INDEXES: dict[str, Attack] = {
    "an absolute path": shards(index(lambda v: v["weight_map"].update({NORM: "/etc/passwd"})), "no file beside it"),
    "a path with ..": shards(index(lambda v: v["weight_map"].update({NORM: "../x.safetensors"})), "no file beside it"),
    "the name ..": shards(index(lambda v: v["weight_map"].update({NORM: ".."})), "no file beside it"),
    "a name with NUL": shards(index(lambda v: v["weight_map"].update({NORM: "a\0b"})), "no file beside it"),
    "a name of 5,000 characters": shards(index(lambda v: v["weight_map"].update({NORM: "a" * 5000})), "names 'a{60}"),
    "a number for a name": shards(index(lambda v: v["weight_map"].update({NORM: 7})), "names 7"),
    "a shard that is not there": shards(e.remove("model-00002-of-00002.safetensors"), "the shard is missing"),
    "a tensor in the wrong shard": shards(
        index(lambda v: v["weight_map"].update({NORM: "model-00001-of-00002.safetensors"})), "does not hold"
    ),
    "a tensor that no shard holds": shards(
        index(lambda v: v["weight_map"].update({"x": "model-00001-of-00002.safetensors"})), "does not hold"
    ),
    "a tensor that the index leaves out": shards(index(lambda v: v["weight_map"].pop(NORM)), "does not name this"),
    "a tensor in two shards": shards(
        lambda d: (d / "model-00002-of-00002.safetensors").write_bytes(
            (d / "model-00001-of-00002.safetensors").read_bytes()
        ),
        "is in .* as well",
    ),
    "no weight_map": shards(index(lambda v: v.pop("weight_map")), "no weight_map"),
    "an empty weight_map": shards(index(lambda v: v["weight_map"].clear()), "no weight_map"),
    "an index that is a list": shards(e.write("model.safetensors.index.json", "[]"), "expected a JSON object"),
}


def _key(key: str, value: Any, expected: str, base: str = "lfm2") -> Attack:
    return Attack(base, config(**{key: value}), expected)


CONFIGS: dict[str, Attack] = {
    "no config.json": lfm2(e.remove("config.json"), "no config.json"),
    "an empty config.json": lfm2(e.write("config.json", ""), "malformed JSON"),
    "a list": lfm2(e.write("config.json", "[1]"), "expected a JSON object, found list"),
    "not UTF-8": lfm2(e.write("config.json", b'{"a": "\xff"}'), "not UTF-8 at byte 7"),
    "UTF-16": lfm2(e.write("config.json", "{}".encode("utf-16")), "not UTF-8"),
    "100,000 levels": lfm2(e.write("config.json", '{"a":' + DEEP + "}"), "nested too deeply"),
    "a key twice": lfm2(e.text("config.json", "{", '{"vocab_size": 1, '), "duplicate key 'vocab_size'"),
    "NaN": _key("norm_eps", float("nan"), "NaN is not a JSON number"),
    "Infinity": _key("norm_eps", float("inf"), "Infinity is not a JSON number"),
    "a number beyond all floats": lfm2(e.text("config.json", "1e-05", "1e999"), "beyond all numbers"),
    "a number of 5,000 digits": lfm2(
        e.text("config.json", '"hidden_size": 64', '"hidden_size": ' + "9" * 5000), "malformed JSON"
    ),
    "hidden_size as a string": _key("hidden_size", "64", "hidden_size is '64', expected a whole number"),
    "hidden_size as a fraction": _key("hidden_size", 64.5, "hidden_size is 64.5"),
    "hidden_size as 64.0": _key("hidden_size", 64.0, "hidden_size is 64.0"),
    "hidden_size as a list": _key("hidden_size", [64], "hidden_size is"),
    "hidden_size as true": _key("hidden_size", True, "hidden_size is True"),
    "hidden_size 0": _key("hidden_size", 0, "hidden_size is 0"),
    "hidden_size -64": _key("hidden_size", -64, "hidden_size is -64"),
    "hidden_size 2**64": _key("hidden_size", 2**64, "hidden_size is 18446744073709551616"),
    "hidden_size 2**31-1": _key("hidden_size", 2**31 - 1, "hidden_size=2147483647"),
    "hidden_size null": _key("hidden_size", None, ""),  # follows from the tensors
    "zero heads": _key("num_attention_heads", 0, "num_attention_heads is 0"),
    "heads that do not divide": _key("num_attention_heads", 7, "num_attention_heads|shape"),
    "more heads than columns": _key("num_attention_heads", 4096, "shape|num_attention_heads"),
    "zero key heads": _key("num_key_value_heads", 0, "num_key_value_heads is 0"),
    "key heads that do not divide": _key("num_key_value_heads", 3, "shape|num_key_value_heads"),
    "zero layers": _key("num_hidden_layers", 0, "num_hidden_layers is 0"),
    "a layer too few": _key("num_hidden_layers", 3, "num_hidden_layers"),
    "a layer too many": _key("num_hidden_layers", 5, "missing|layer"),
    "2**31-1 layers": _key("num_hidden_layers", 2**31 - 1, "layers are no model"),
    "vocab_size that is not the embedding's": _key("vocab_size", 417, "vocab_size=417"),
    "an unknown architecture": _key("architectures", ["Qwen9ForCausalLM"], "Qwen9ForCausalLM"),
    "architectures as a string": _key("architectures", "Lfm2ForCausalLM", "architectures"),
    "architectures of null": _key("architectures", [None], "architectures"),
    "architectures empty": _key("architectures", [], ""),
    "neither architectures nor model_type": lfm2(
        config(architectures=ABSENT, model_type=ABSENT), "a model without a name"
    ),
    "layer_types of unknown words": _key(
        "layer_types", ["convolution"] * 4, "layer_types in config.json makes layer 0 'convolution'"
    ),
    "layer_types too short": _key("layer_types", ["conv"], "layer_types in config.json is of 1 layers"),
    "layer_types against the tensors": _key("layer_types", ["conv"] * 4, "layer"),
    "layer_types of numbers": _key("layer_types", [1, 2, 3, 4], "layer_types"),
    "layer_types of 100,000 entries": _key(
        "layer_types", ["conv"] * 100_000, "layer_types in config.json is of 100000"
    ),
    "full_attn_idxs out of range": lfm2(config(layer_types=None, full_attn_idxs=[2, 99]), "layers from 0 to 3"),
    "full_attn_idxs negative": lfm2(config(layer_types=None, full_attn_idxs=[-2]), "layers from 0 to 3"),
    "norm_eps 0": _key("norm_eps", 0, "norm_eps is 0"),
    "norm_eps negative": _key("norm_eps", -1e-5, "norm_eps is"),
    "norm_eps as a string": _key("norm_eps", "1e-5", "norm_eps is '1e-5'"),
    "norm_eps beyond float32": _key("norm_eps", 1e300, "norm_eps is"),
    "rope_theta 0": _key("rope_parameters", {"rope_theta": 0.0}, "rope_theta is 0"),
    "rope_theta as a list": _key("rope_parameters", {"rope_theta": [1]}, "rope_theta is"),
    "rope_parameters as a string": _key("rope_parameters", "default", "rope_parameters is"),
    "an unknown rope_type": _key("rope_parameters", {"rope_type": "x\ny"}, r"x\\ny"),
    "a context of 10**30": _key("max_position_embeddings", 10**30, "max_position_embeddings is"),
    "conv_L_cache that is not the kernel's": _key("conv_L_cache", 4, "conv_L_cache"),
    "conv_bias": _key("conv_bias", True, "conv_bias"),
    "untied without a head": _key("tie_word_embeddings", False, "lm_head|tie"),
    "tie_word_embeddings as a string": _key("tie_word_embeddings", "false", "tie_word_embeddings is 'false'"),
    "block_multiple_of 0": _key("block_multiple_of", 0, "block_multiple_of"),
    "block_ffn_dim_multiplier 1e30": _key("block_ffn_dim_multiplier", 1e30, "block_ffn_dim_multiplier|w1"),
    "quantised weights": _key("quantization_config", {"quant_method": "gptq"}, "quantization_config|gptq"),
    "head_dim 0": _key("head_dim", 0, "head_dim is 0", "llama"),
    "an odd head_dim": llama(config(head_dim=15), "head_dim|shape"),
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
        "factor",
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
        "high_freq_factor|low",
    ),
    "experts used beyond those there": _key("num_experts_per_tok", 99, "99 of 6 experts cannot be used", "lfm2moe"),
    "zero experts": _key("num_experts", 0, "num_experts", "lfm2moe"),
    "an expert too many": _key("num_experts", 7, "num_experts|experts", "lfm2moe"),
    "2**31-1 experts": _key("num_experts", 2**31 - 1, "num_experts|experts", "lfm2moe"),
    "a routed_scaling_factor of 0": _key("routed_scaling_factor", 0, "", "lfm2moe"),  # zeros, as transformers has it
}


TOKENIZERS: dict[str, Attack] = {
    "no tokenizer": lfm2(e.remove("tokenizer.json"), "no tokenizer"),
    "an empty tokenizer.json": lfm2(e.write("tokenizer.json", ""), "tokenizer.json"),
    "a list": lfm2(e.write("tokenizer.json", "[]"), "tokenizer.json"),
    "cut in the middle": lfm2(cut(3000, "tokenizer.json"), "tokenizer.json"),
    "not UTF-8": lfm2(
        lambda d: (d / "tokenizer.json").write_bytes(
            (d / "tokenizer.json").read_bytes().replace(b'"<tool>"', b'"\xff\xfe"')
        ),
        "UTF-8",
    ),
    "a lone surrogate": lfm2(e.text("tokenizer.json", '"<tool>"', '"\\ud800"'), "tokenizer.json"),
    "100,000 levels": lfm2(e.tokenizer(lambda v: v.clear()), "tokenizer.json"),
    "levels in a part": lfm2(
        e.text("tokenizer.json", '"version"', f'"normalizer2": {DEEP}, "version"'), "deep|tokenizer.json"
    ),
    "an id twice": lfm2(e.model(lambda m: _first_token(m["vocab"], 299)), "299"),
    "a negative id": lfm2(e.model(lambda m: _first_token(m["vocab"], -1)), "-1"),
    "an id of 2**31": lfm2(e.model(lambda m: _first_token(m["vocab"], 2**31)), "2,147,483,648"),
    "an id of 10**30": lfm2(e.model(lambda m: _first_token(m["vocab"], 10**30)), "tokenizer.json"),
    "an id that is a fraction": lfm2(e.model(lambda m: _first_token(m["vocab"], 1.5)), "1.5"),  # type: ignore[arg-type]
    "an id that is a string": lfm2(e.model(lambda m: _first_token(m["vocab"], "7")), "tokenizer.json"),  # type: ignore[arg-type]
    "an id that is true": lfm2(e.model(lambda m: _first_token(m["vocab"], True)), "tokenizer.json"),
    "a token twice": lfm2(e.text("tokenizer.json", '"vocab": {', '"vocab": {"Ġthe": 0, '), "tokenizer.json"),
    "an empty vocabulary": lfm2(e.model(lambda m: m["vocab"].clear()), "vocabulary|merge|token"),
    "vocab as a list": lfm2(e.model(lambda m: m.update(vocab=[["a", 1.0]])), "tokenizer.json"),
    "a merge of an unknown token": lfm2(e.model(lambda m: m["merges"].append(["Ġzzz", "qqq"])), "merge"),
    "a merge whose result is unknown": lfm2(e.model(lambda m: m["merges"].append(["t", "q"])), "merge"),
    "a merge of one part": lfm2(e.model(lambda m: m["merges"].append(["t"])), "merge"),
    "a merge of three parts": lfm2(e.model(lambda m: m["merges"].append(["t", "h", "e"])), "merge"),
    "a merge of numbers": lfm2(e.model(lambda m: m["merges"].append([1, 2])), "merge"),
    "merges as an object": lfm2(e.model(lambda m: m.update(merges={})), r"expected '\[', found"),
    "no merges": lfm2(e.model(lambda m: m.pop("merges")), "merges"),
    "a WordPiece model": lfm2(e.model(lambda m: m.update(type="WordPiece")), "WordPiece"),
    "a Unigram model": lfm2(e.model(lambda m: m.update(type="Unigram")), "Unigram"),
    "a model type of null": lfm2(e.model(lambda m: m.update(type=None)), ""),  # BPE, as the tokenizers library reads it
    "an end_of_word_suffix": lfm2(e.model(lambda m: m.update(end_of_word_suffix="</w>")), "end_of_word_suffix"),
    "an added token of a negative id": lfm2(e.tokenizer(lambda v: v["added_tokens"][0].update(id=-5)), "-5"),
    "an added token of id 2**40": lfm2(e.tokenizer(lambda v: v["added_tokens"][0].update(id=2**40)), "1099511627776"),
    "an added token beyond the rows": lfm2(e.tokenizer(lambda v: v["added_tokens"][-1].update(id=416)), "416"),
    "an added token without content": lfm2(e.tokenizer(lambda v: v["added_tokens"][0].pop("content")), "content|added"),
    "an added token's content a number": lfm2(
        e.tokenizer(lambda v: v["added_tokens"][0].update(content=5)), "content|added"
    ),
    "two added tokens of one id": lfm2(e.tokenizer(lambda v: v["added_tokens"][-1].update(id=2)), "tokenizer.json"),
    "more tokens than rows": lfm2(e.model(lambda m: m["vocab"].update({f"zz{n}": 404 + n for n in range(13)})), "416"),
    "an unknown pre-tokenizer": Attack(
        "llama", e.tokenizer(lambda v: v["pre_tokenizer"].update(type="Whitespace")), "pre_tokenizer|pre-tokenizer|byte"
    ),
    "a pre-tokenizer that is a number": lfm2(
        e.tokenizer(lambda v: v.update(pre_tokenizer=5)), "the pre-tokenizer is none that is known"
    ),
    "an eos_token_id beyond the rows": lfm2(
        config("generation_config.json", eos_token_id=10**9), ""
    ),  # config.json's holds
    "tokenizer_config.json that is a list": lfm2(e.write("tokenizer_config.json", "[]"), "expected a JSON object"),
    "a chat template of numbers": lfm2(config("tokenizer_config.json", chat_template=5), "chat_template"),
    "a chat template that runs code": lfm2(
        config("tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"), ""
    ),  # text
    "an auto_map of Python code": lfm2(config(auto_map={"AutoModel": "evil--modeling.Evil"}), ""),  # never looked at
    "tokenizer.model empty": spm(e.write("tokenizer.model", b""), "tokenizer.model"),
    "tokenizer.model cut": spm(cut(41, "tokenizer.model"), "tokenizer.model"),
    "tokenizer.model of 0xff": spm(e.write("tokenizer.model", b"\xff" * 500), "tokenizer.model"),
    "a piece of 2**60 bytes": spm(
        e.write("tokenizer.model", b"\x0a" + b"\xff" * 8 + b"\x0f" + b"x" * 50), "tokenizer.model"
    ),
}


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
FACTORS = "adapter_model.safetensors"


def _adapter(**values: Any) -> Edit:
    return config("adapter_config.json", **values)


ADAPTERS: dict[str, Attack] = {
    "no adapter_config.json": peft(e.remove("adapter_config.json"), "adapter_config.json"),
    "a config that is a list": peft(e.write("adapter_config.json", "[]"), "expected a JSON object"),
    "no weights": peft(e.remove(FACTORS), "adapter_model|safetensors"),
    "a pickle": peft(lambda d: (d / FACTORS).rename(d / "adapter_model.bin"), "pickle|adapter_model"),
    "weights cut": peft(cut(1, FACTORS), "truncated|not a valid safetensors"),
    "r 0": peft(_adapter(r=0), "r is 0|rank"),
    "r as a string": peft(_adapter(r="8"), "r is"),
    "r that is not the factors'": peft(_adapter(r=9), "rank"),
    "lora_alpha as a string": peft(_adapter(lora_alpha="12"), "lora_alpha"),
    "lora_alpha NaN": peft(_adapter(lora_alpha=float("nan")), "NaN"),
    "lora_alpha 1e300": peft(_adapter(lora_alpha=1e300), "lora_alpha|scale"),
    "lora_alpha null": peft(_adapter(lora_alpha=None), ""),  # PEFT's default, which the converter says
    "a pattern that is no regular expression": peft(_adapter(alpha_pattern={"(": 3}), "alpha_pattern"),
    "a pattern that never ends": peft(_adapter(alpha_pattern={"(.*)*(.*)*(.*)*(.*)*x$": 3}), "alpha_pattern"),
    "a pattern of 10,000 characters": peft(_adapter(alpha_pattern={"a" * 10_000: 3}), "alpha_pattern"),
    "a pattern's value a string": peft(_adapter(alpha_pattern={"q_proj": "3"}), "q_proj is '3', expected a number"),
    "rank_pattern as a list": peft(_adapter(rank_pattern=[1]), "rank_pattern"),
    "another method": peft(_adapter(peft_type="PREFIX_TUNING"), "PREFIX_TUNING"),
    "a factor without its partner": peft(rename(A, A.replace("lora_A", "lora_C"), FACTORS), "lora_"),
    "factors of a module that is not there": peft(
        rename(A, A.replace("layers.0", "layers.9"), FACTORS), "layers.9.self_attn.q_proj: has no lora_B"
    ),
    "a factor of another width": peft(e.header(lambda t: t[A].update(shape=[16, 32]), FACTORS), "do not fit"),
    "a factor that lies the other way round": peft(
        e.header(lambda t: t[A].update(shape=t[A]["shape"][::-1]), FACTORS), ""
    ),  # the shapes say so
    "a factor of one dimension": peft(e.header(lambda t: t[A].update(shape=[512]), FACTORS), "do not fit"),
    "a factor of integers": peft(e.header(lambda t: t[A].update(dtype="I32"), FACTORS), "I32"),
    "a name with NUL": peft(rename(A, "a\0b", FACTORS), "holds what no tensor name holds"),
    "an MLX scale as a string": mlx(_adapter(lora_parameters={"rank": 8, "scale": "1.5"}), "scale"),
    "MLX without parameters": mlx(_adapter(lora_parameters=ABSENT), "lora_parameters|scale"),
    "an MLX rank of 0": mlx(_adapter(lora_parameters={"rank": 0, "scale": 1.5}), "rank"),
}

GROUPS: dict[str, dict[str, Attack]] = {
    "safetensors": SAFETENSORS,
    "index": INDEXES,
    "config": CONFIGS,
    "tokenizer": TOKENIZERS,
    "adapter": ADAPTERS,
}

ALL = {f"{group}: {name}": attack for group, attacks in GROUPS.items() for name, attack in attacks.items()}
