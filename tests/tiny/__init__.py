"""Tiny checkpoints and adapters made from seeds by numpy alone, in a few milliseconds each: the inputs of the tests."""

from tests.tiny import variants
from tests.tiny.adapters import mlx_adapter, peft_adapter
from tests.tiny.files import (
    ABSENT,
    Tensor,
    digest,
    noise,
    read_safetensors,
    tensors_of,
    write_json,
    write_safetensors,
    write_shards,
)
from tests.tiny.models import lfm2, lfm2moe, llama
from tests.tiny.tokenizer import N_BPE_TOKENS, N_SPM_TOKENS, PRE_TOKENIZERS, sentencepiece_model, write_bpe, write_spm

__all__ = [
    "ABSENT",
    "N_BPE_TOKENS",
    "N_SPM_TOKENS",
    "PRE_TOKENIZERS",
    "Tensor",
    "digest",
    "lfm2",
    "lfm2moe",
    "llama",
    "mlx_adapter",
    "noise",
    "peft_adapter",
    "read_safetensors",
    "sentencepiece_model",
    "tensors_of",
    "variants",
    "write_bpe",
    "write_json",
    "write_safetensors",
    "write_shards",
    "write_spm",
]
