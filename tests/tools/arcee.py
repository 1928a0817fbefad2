"""`python -m tests.tools.arcee DIR` builds a tiny Arcee checkpoint, the newcomer of docs/adding-an-architecture.md."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from tests import tiny

N_LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FF, VOCAB = 3, 64, 4, 2, 24, 96, 404
CONFIG: dict[str, Any] = {
    "architectures": ["ArceeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": HEAD_DIM,
    "hidden_act": "relu2",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": FF,
    "max_position_embeddings": 640,
    "mlp_bias": False,
    "model_type": "arcee",
    "num_attention_heads": HEADS,
    "num_hidden_layers": N_LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": VOCAB,
}


def build(directory: Path, **config: Any) -> Path:
    """The checkpoint, in BF16; `config` replaces keys of config.json."""
    directory.mkdir(parents=True)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(N_LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm": (HIDDEN,),
            f"{layer}.self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            f"{layer}.post_attention_layernorm": (HIDDEN,),
            f"{layer}.mlp.up_proj": (FF, HIDDEN),
            f"{layer}.mlp.down_proj": (HIDDEN, FF),
        }
    tensors = {f"{module}.weight": _weight(module, shape) for module, shape in shapes.items()}
    tiny.write_shards(directory, tensors)
    tiny.write_json(directory / "config.json", CONFIG | config)
    tiny.write_bpe(directory, pre="llama-bpe")
    return directory


def _weight(module: str, shape: tuple[int, ...]) -> tiny.Tensor:
    if len(shape) == 1:
        return tiny.Tensor.of(1 + tiny.noise(module, shape, 0.2), "BF16")
    size = 2.5 if module.endswith("embed_tokens") else 1.0
    return tiny.Tensor.of(tiny.noise(module, shape, size / math.sqrt(shape[1])), "BF16")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
