"""llama.cpp's defaults for missing keys that it reads for every architecture.

Defaults for an architecture's own keys, and exceptions, are in its file (`Key(default=...)`).
Source: load_hparams in src/llama-model.cpp of the llama.cpp inside llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from streamconv.gguf.format import PackedArray, Scalar

# The first value is llama.cpp's default, the others are equivalent.
_FIXED: Final[Mapping[str, tuple[Scalar, ...]]] = {
    "rope.freq_base": (10_000.0,),
    "rope.scaling.type": ("linear", "none"),  # by a factor of 1
    "rope.scaling.factor": (1.0, 0.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "attention.causal": (True,),
    "pooling_type": (0,),
}
# Keys whose default is the value of another.
_AS_ANOTHER: Final[Mapping[str, str]] = {
    "attention.head_count_kv": "attention.head_count",
    "rope.dimension_count": "attention.key_length",
    "rope.scaling.original_context_length": "context_length",
    "embedding_length_out": "embedding_length",
}
_HEAD_SIZES: Final = ("attention.key_length", "attention.value_length")  # the width by the number of heads


def common_defaults(
    arch: str, written: Mapping[str, Scalar | PackedArray], n_vocab: int | None
) -> dict[str, tuple[Scalar, ...]]:
    """Return, by key, the values that mean the same as a missing key.

    Args:
        arch: The architecture, with which the keys begin.
        written: The model's keys, from which some defaults follow.
        n_vocab: The number of tokens.
    """
    found = {f"{arch}.{name}": values for name, values in _FIXED.items()}
    heads, width = written.get(f"{arch}.attention.head_count"), written.get(f"{arch}.embedding_length")
    if isinstance(heads, int) and isinstance(width, int) and heads:
        found |= {f"{arch}.{name}": (width // heads,) for name in _HEAD_SIZES}
    for name, other in _AS_ANOTHER.items():
        value = written.get(f"{arch}.{other}")
        if isinstance(value, int):
            found[f"{arch}.{name}"] = (value,)
    if n_vocab is not None:
        found[f"{arch}.vocab_size"] = (n_vocab,)
    return found
