"""Small checkpoints as transformers writes them: LFM2, LFM2-MoE and Llama, with all components of the real ones.

By default the extents of a model's shapes are pairwise distinct, so that no axis can be mistaken for another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import tokenizer as tokenizers
from tests.tiny.files import ABSENT, NOTHING, Config, Float, Tensor, noise, write_config, write_json, write_shards


def lfm2(
    directory: Path,
    *,
    seed: int = 1,
    n_layers: int = 4,
    attention: Sequence[int] = (2,),
    hidden: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    ff: int = 96,
    conv_l: int = 3,
    vocab: int = 416,
    tied: bool = True,
    auto_adjust: bool = True,
    layers_by: Sequence[str] = ("layer_types",),
    dtype: str = "BF16",
    n_shards: int = 1,
    pre: str = "lfm2",
    config: Config = NOTHING,
) -> Path:
    """An `Lfm2ForCausalLM` checkpoint.

    `layers_by` names the config keys that say which layers attend. `ff` is the width of w1; with `auto_adjust` the
    config says 3/2 of it, as published ones do. `config` overrides keys of config.json, here as below.
    """
    directory.mkdir(parents=True, exist_ok=True)
    w = _Weights(seed, dtype)
    _lfm2_layers(w, n_layers, attention, hidden, hidden // n_heads, n_kv_heads, conv_l)
    for i in range(n_layers):
        _gated_ffn(w, f"model.layers.{i}.feed_forward", ff, hidden)
    _lfm2_ends(w, vocab, hidden, tied)
    settings = _lfm2_config(n_layers, attention, hidden, n_heads, n_kv_heads, conv_l, vocab, tied, dtype) | {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "block_auto_adjust_ff_dim": auto_adjust,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 16,
        "intermediate_size": ff * 3 // 2 if auto_adjust else ff,
        "layer_types": _layer_types(n_layers, attention) if "layer_types" in layers_by else ABSENT,
        "full_attn_idxs": list(attention) if "full_attn_idxs" in layers_by else ABSENT,
    }
    _write_configs(directory, settings, config)
    write_shards(directory, w.tensors, n_shards)
    tokenizers.write_bpe(directory, pre=pre)
    return directory


def lfm2moe(
    directory: Path,
    *,
    seed: int = 2,
    n_layers: int = 4,
    attention: Sequence[int] = (1, 3),
    hidden: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    ff: int = 96,
    n_dense: int = 1,
    n_experts: int = 6,
    n_used: int = 2,
    moe_ff: int = 160,
    conv_l: int = 3,
    vocab: int = 416,
    tied: bool = True,
    stacked: bool = False,
    expert_bias: bool = True,
    dtype: str = "BF16",
    n_shards: int = 1,
    config: Config = NOTHING,
) -> Path:
    """An `Lfm2MoeForCausalLM` checkpoint: experts one by one as published, or `stacked` as transformers holds them."""
    directory.mkdir(parents=True, exist_ok=True)
    w = _Weights(seed, dtype)
    _lfm2_layers(w, n_layers, attention, hidden, hidden // n_heads, n_kv_heads, conv_l)
    for i in range(n_layers):
        prefix = f"model.layers.{i}.feed_forward"
        if i < n_dense:
            _gated_ffn(w, prefix, ff, hidden)
            continue
        w.linear(f"{prefix}.gate", n_experts, hidden)
        if expert_bias:
            w.add(f"{prefix}.expert_bias", noise(f"{prefix}.expert_bias", (n_experts,), 0.1, seed), "F32")
        for e in range(n_experts):
            _gated_ffn(w, f"{prefix}.experts.{e}", moe_ff, hidden)
        if stacked:
            _stack_experts(w, prefix, n_experts)
    _lfm2_ends(w, vocab, hidden, tied)
    settings = _lfm2_config(n_layers, attention, hidden, n_heads, n_kv_heads, conv_l, vocab, tied, dtype) | {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "intermediate_size": ff,
        "layer_types": _layer_types(n_layers, attention),
        "moe_intermediate_size": moe_ff,
        "norm_topk_prob": True,
        "num_dense_layers": n_dense,
        "num_experts": n_experts,
        "num_experts_per_tok": n_used,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": expert_bias,
    }
    _write_configs(directory, settings, config)
    write_shards(directory, w.tensors, n_shards)
    tokenizers.write_bpe(directory)
    return directory


def llama(
    directory: Path,
    *,
    seed: int = 3,
    n_layers: int = 2,
    hidden: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int | None = None,
    ff: int = 160,
    vocab: int | None = None,
    tied: bool = True,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: Config | None = None,
    rope_parameters: bool = True,
    tokenizer: str = "llama-bpe",
    dtype: str = "F32",
    n_shards: int = 1,
    config: Config = NOTHING,
) -> Path:
    """A `LlamaForCausalLM` checkpoint.

    `rope_parameters` false writes the config of transformers 4 (`rope_theta`, `rope_scaling`). `tokenizer` is one of
    PRE_TOKENIZERS, or `spm` (tokenizer.model and tokenizer.json), `spm-model` or `spm-json` (one of the two).
    """
    directory.mkdir(parents=True, exist_ok=True)
    size = head_dim or hidden // n_heads
    w = _Weights(seed, dtype)
    if vocab is None:
        vocab = tokenizers.N_SPM_TOKENS if tokenizer.startswith("spm") else tokenizers.N_BPE_TOKENS
    w.embedding("model.embed_tokens", vocab, hidden)
    for i in range(n_layers):
        prefix = f"model.layers.{i}"
        for name, n_rows, n_columns in (
            ("q_proj", n_heads * size, hidden),
            ("k_proj", n_kv_heads * size, hidden),
            ("v_proj", n_kv_heads * size, hidden),
            ("o_proj", hidden, n_heads * size),
        ):
            w.linear(f"{prefix}.self_attn.{name}", n_rows, n_columns, bias=attention_bias)
        for name, n_rows, n_columns in (("gate_proj", ff, hidden), ("up_proj", ff, hidden), ("down_proj", hidden, ff)):
            w.linear(f"{prefix}.mlp.{name}", n_rows, n_columns, bias=mlp_bias)
        w.norm(f"{prefix}.input_layernorm", hidden)
        w.norm(f"{prefix}.post_attention_layernorm", hidden)
    w.norm("model.norm", hidden)
    if not tied:
        w.embedding("lm_head", vocab, hidden)
    rope = {"rope_theta": rope_theta, "rope_type": "default"} | dict(rope_scaling or {})
    settings = _common_config(n_layers, hidden, n_heads, n_kv_heads, vocab, tied, dtype) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": attention_bias,
        "attention_dropout": 0.0,
        "head_dim": ABSENT if head_dim is None else head_dim,
        "hidden_act": "silu",
        "intermediate_size": ff,
        "mlp_bias": mlp_bias,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope if rope_parameters else ABSENT,
        "rope_theta": ABSENT if rope_parameters else rope_theta,
        "rope_scaling": ABSENT if rope_parameters else (dict(rope_scaling) if rope_scaling else None),
    }
    _write_configs(directory, settings, config)
    write_shards(directory, w.tensors, n_shards)
    if tokenizer.startswith("spm"):
        tokenizers.write_spm(directory, model=tokenizer != "spm-json", fast=tokenizer != "spm-model")
    else:
        tokenizers.write_bpe(directory, pre=tokenizer)
    return directory


class _Weights:
    """The tensors of a model under construction."""

    def __init__(self, seed: int, dtype: str) -> None:
        self.seed, self.dtype = seed, dtype
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, values: Float, dtype: str | None = None) -> None:
        self.tensors[name] = Tensor.of(values, dtype or self.dtype)

    def linear(self, module: str, n_rows: int, n_columns: int, bias: bool = False) -> None:
        """A weight that keeps the size of what it is applied to."""
        self.add(
            f"{module}.weight", noise(f"{module}.weight", (n_rows, n_columns), 1 / math.sqrt(n_columns), self.seed)
        )
        if bias:
            self.add(f"{module}.bias", noise(f"{module}.bias", (n_rows,), 0.2, self.seed))

    def norm(self, module: str, n: int) -> None:
        self.add(f"{module}.weight", 1 + noise(f"{module}.weight", (n,), 0.2, self.seed))

    def embedding(self, module: str, n_tokens: int, hidden: int) -> None:
        """An embedding or head that gives logits of about 2.5 standard deviations: neither flat nor one-hot."""
        self.add(f"{module}.weight", noise(f"{module}.weight", (n_tokens, hidden), 2.5 / math.sqrt(hidden), self.seed))


def _lfm2_layers(
    w: _Weights, n_layers: int, attention: Sequence[int], hidden: int, head_dim: int, n_kv_heads: int, conv_l: int
) -> None:
    for i in range(n_layers):
        prefix = f"model.layers.{i}"
        if i in attention:
            w.linear(f"{prefix}.self_attn.q_proj", hidden, hidden)
            w.linear(f"{prefix}.self_attn.k_proj", n_kv_heads * head_dim, hidden)
            w.linear(f"{prefix}.self_attn.v_proj", n_kv_heads * head_dim, hidden)
            w.linear(f"{prefix}.self_attn.out_proj", hidden, hidden)
            w.norm(f"{prefix}.self_attn.q_layernorm", head_dim)
            w.norm(f"{prefix}.self_attn.k_layernorm", head_dim)
        else:
            kernel = f"{prefix}.conv.conv.weight"
            w.add(kernel, noise(kernel, (hidden, 1, conv_l), 1 / math.sqrt(conv_l), w.seed))
            w.linear(f"{prefix}.conv.in_proj", 3 * hidden, hidden)
            w.linear(f"{prefix}.conv.out_proj", hidden, hidden)
        w.norm(f"{prefix}.operator_norm", hidden)
        w.norm(f"{prefix}.ffn_norm", hidden)


def _lfm2_ends(w: _Weights, vocab: int, hidden: int, tied: bool) -> None:
    w.embedding("model.embed_tokens", vocab, hidden)
    w.norm("model.embedding_norm", hidden)
    if not tied:
        w.embedding("lm_head", vocab, hidden)


def _gated_ffn(w: _Weights, prefix: str, ff: int, hidden: int) -> None:
    w.linear(f"{prefix}.w1", ff, hidden)
    w.linear(f"{prefix}.w2", hidden, ff)
    w.linear(f"{prefix}.w3", ff, hidden)


def _stack_experts(w: _Weights, prefix: str, n_experts: int) -> None:
    """gate_up_proj [E, 2 M, H] and down_proj [E, H, M], as transformers 5 holds the experts of LFM2-MoE."""
    taken = {
        (e, name): w.tensors.pop(f"{prefix}.experts.{e}.{name}.weight").float32()
        for e in range(n_experts)
        for name in ("w1", "w2", "w3")
    }
    gate_up = [np.concatenate([taken[e, "w1"], taken[e, "w3"]]) for e in range(n_experts)]
    w.add(f"{prefix}.experts.gate_up_proj", np.stack(gate_up))
    w.add(f"{prefix}.experts.down_proj", np.stack([taken[e, "w2"] for e in range(n_experts)]))


def _layer_types(n_layers: int, attention: Sequence[int]) -> list[str]:
    return ["full_attention" if i in attention else "conv" for i in range(n_layers)]


def _common_config(
    n_layers: int, hidden: int, n_heads: int, n_kv_heads: int, vocab: int, tied: bool, dtype: str
) -> dict[str, Any]:
    return {
        "bos_token_id": 1,
        "dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
        "eos_token_id": 2,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "max_position_embeddings": 640,
        "num_attention_heads": n_heads,
        "num_hidden_layers": n_layers,
        "num_key_value_heads": n_kv_heads,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": vocab,
    }


def _lfm2_config(
    n_layers: int,
    attention: Sequence[int],
    hidden: int,
    n_heads: int,
    n_kv_heads: int,
    conv_l: int,
    vocab: int,
    tied: bool,
    dtype: str,
) -> dict[str, Any]:
    return _common_config(n_layers, hidden, n_heads, n_kv_heads, vocab, tied, dtype) | {
        "conv_L_cache": conv_l,
        "conv_bias": False,
        "norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    }


def _write_configs(directory: Path, settings: Config, overrides: Config) -> None:
    write_config(directory / "config.json", settings, overrides)
    generation = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "transformers_version": "5.23.0",
    }
    write_json(directory / "generation_config.json", generation)
