"""Checkpoints in the shapes of published models, made from a seed, as input of the benchmarks.

A folder with the name of a shape is complete (it is renamed when its last byte is on disk), the same shape gives the
same bytes, and no two matrices of a dense checkpoint start at the same place of the random block.

Configs have the keys and values of the published ones (LiquidAI/LFM2-350M, -1.2B, -2.6B and -8B-A1B), and the
parameter counts are the published ones too: 354,483,968, 1,170,340,608, 2,569,272,320 and 8.3 billion.

    python -m benchmarks.shapes 350m 1.2b            # fills BENCH_CACHE, .cache/bench by default
    python -m benchmarks.shapes --sparse 8b-a1b      # holes in place of weights: right sizes, hardly any disk
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import vocabulary
from benchmarks.vocabulary import Vocabulary

MAKER_VERSION: Final = 1  # raise it when the bytes of a shape change, and cached folders are made again
N_BLOCK: Final = 1 << 23  # elements of the random block that all weights are cut from
TOKENIZER_NBYTES: Final = 16 << 20  # the largest, and then some
CONV_KERNEL: Final = 3
DTYPE_NBYTES: Final = {"BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture-of-experts part of LFM2-MoE."""

    n_experts: int
    n_used: int
    n_dense_layers: int
    feed_forward: int


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's dimensions. `feed_forward` is the width that the tensors have."""

    name: str
    hidden: int
    feed_forward: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    attention_layers: tuple[int, ...]
    vocabulary: Vocabulary = vocabulary.LFM2
    n_shards: int = 1
    experts: Experts | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(self))


@dataclass(frozen=True, slots=True)
class SourceTensor:
    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_NBYTES[self.dtype]


_SIXTEEN = (2, 5, 8, 10, 12, 14)
_TINY = Shape("tiny", 256, 768, 4, 4, 2, (2,), vocabulary.SMALL, n_shards=2)
_350M = Shape("350m", 1024, 4608, 16, 16, 8, _SIXTEEN)
_LAYERED = Shape("", 64, 0, 0, 2, 1, (), vocabulary.SMALL)

SHAPES: Final = {
    shape.name: shape
    for shape in (
        _TINY,
        _350M,
        Shape("1.2b", 2048, 8192, 16, 32, 8, _SIXTEEN, n_shards=3),
        Shape("2.6b", 2048, 10752, 30, 32, 8, (2, 5, 9, 13, 17, 21, 24, 27), n_shards=2),
        Shape("8b-a1b", 2048, 7168, 24, 32, 8, (2, 6, 10, 14, 18, 21), n_shards=4, experts=Experts(32, 4, 2, 1792)),
        # As many tensors, of such sizes, as DeepSeek-V3 has; for plans alone, with holes for weights.
        Shape(
            "671b", 7168, 18432, 61, 128, 128, tuple(range(1, 61, 3)), n_shards=156, experts=Experts(256, 8, 3, 2048)
        ),
        replace(_350M, name="350m-128k", vocabulary=vocabulary.LLAMA_3),
        replace(_TINY, name="tiny-128k", vocabulary=vocabulary.LLAMA_3),
        # The same bytes in ten times as many tensors: what a tensor costs beside its bytes.
        replace(_LAYERED, name="few-tensors", n_layers=25, feed_forward=2336, attention_layers=tuple(range(2, 25, 5))),
        replace(
            _LAYERED, name="many-tensors", n_layers=250, feed_forward=160, attention_layers=tuple(range(2, 250, 5))
        ),
    )
}


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json: as published, 16-layer models name the attending layers, others give every layer's type."""
    types = ["full_attention" if layer in shape.attention_layers else "conv" for layer in range(shape.n_layers)]
    common: dict[str, Any] = {
        "bos_token_id": 1,
        "conv_L_cache": CONV_KERNEL,
        "conv_bias": False,
        "eos_token_id": 7,
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "max_position_embeddings": 128_000,
        "norm_eps": 1e-05,
        "num_attention_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.n_kv_heads,
        "pad_token_id": 0,
        "rope_theta": 1_000_000.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_pos_enc": True,
        "vocab_size": shape.vocabulary.n_rows,
    }
    return common | (_dense_config(shape, types) if shape.experts is None else _moe_config(shape, shape.experts, types))


def _moe_config(shape: Shape, experts: Experts, types: list[str]) -> dict[str, Any]:
    return {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "intermediate_size": shape.feed_forward,
        "layer_types": types,
        "moe_intermediate_size": experts.feed_forward,
        "norm_topk_prob": True,
        "num_dense_layers": experts.n_dense_layers,
        "num_experts": experts.n_experts,
        "num_experts_per_tok": experts.n_used,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": True,
    }


def _dense_config(shape: Shape, types: list[str]) -> dict[str, Any]:
    auto_adjust = shape.n_layers == 16
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "block_auto_adjust_ff_dim": auto_adjust,
        "block_dim": shape.hidden,
        # 350M and 1.2B say 6656 and 12288, which auto-adjust to 4608 and 8192: two thirds, up to a multiple of 256.
        "block_ff_dim": {1024: 6656, 2048: 12288}[shape.hidden] if auto_adjust else shape.feed_forward,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "block_norm_eps": 1e-05,
        "block_use_swiglu": True,
        "conv_dim": shape.hidden,
        **({"full_attn_idxs": list(shape.attention_layers)} if auto_adjust else {"layer_types": types}),
    }


def tensors_of(shape: Shape) -> Iterator[SourceTensor]:
    """Every tensor of the checkpoint in the model's order, shapes row-major."""
    hidden = shape.hidden
    yield SourceTensor("model.embed_tokens.weight", (shape.vocabulary.n_rows, hidden))
    for layer in range(shape.n_layers):
        prefix = f"model.layers.{layer}"
        yield from _operator(shape, prefix, layer in shape.attention_layers)
        yield from _feed_forward(shape, f"{prefix}.feed_forward", layer)
        yield SourceTensor(f"{prefix}.operator_norm.weight", (hidden,))
        yield SourceTensor(f"{prefix}.ffn_norm.weight", (hidden,))
    yield SourceTensor("model.embedding_norm.weight", (hidden,))


def _operator(shape: Shape, prefix: str, attends: bool) -> Iterator[SourceTensor]:
    hidden = shape.hidden
    if not attends:
        yield SourceTensor(f"{prefix}.conv.conv.weight", (hidden, 1, CONV_KERNEL))
        yield SourceTensor(f"{prefix}.conv.in_proj.weight", (3 * hidden, hidden))
        yield SourceTensor(f"{prefix}.conv.out_proj.weight", (hidden, hidden))
        return
    head = hidden // shape.n_heads
    for part, n_rows in (
        ("q", hidden),
        ("k", head * shape.n_kv_heads),
        ("v", head * shape.n_kv_heads),
        ("out", hidden),
    ):
        yield SourceTensor(f"{prefix}.self_attn.{part}_proj.weight", (n_rows, hidden))
    for part in ("q", "k"):
        yield SourceTensor(f"{prefix}.self_attn.{part}_layernorm.weight", (head,))


def _feed_forward(shape: Shape, prefix: str, layer: int) -> Iterator[SourceTensor]:
    hidden, experts = shape.hidden, shape.experts
    if experts is None or layer < experts.n_dense_layers:
        yield from _gated(prefix, hidden, shape.feed_forward)
        return
    yield SourceTensor(f"{prefix}.gate.weight", (experts.n_experts, hidden))
    yield SourceTensor(f"{prefix}.expert_bias", (experts.n_experts,), "F32")
    for expert in range(experts.n_experts):
        yield from _gated(f"{prefix}.experts.{expert}", hidden, experts.feed_forward)


def _gated(prefix: str, hidden: int, feed_forward: int) -> Iterator[SourceTensor]:
    yield SourceTensor(f"{prefix}.w1.weight", (feed_forward, hidden))
    yield SourceTensor(f"{prefix}.w2.weight", (hidden, feed_forward))
    yield SourceTensor(f"{prefix}.w3.weight", (feed_forward, hidden))


class Weights:
    """Random weights of a real model's scale: matrices normal around 0, vectors (norms) around 1."""

    def __init__(self, n_tensors: int) -> None:
        self._rng = np.random.default_rng(0)
        self._starts = iter(self._rng.choice(N_BLOCK, n_tensors, replace=False).tolist())
        self._block = _bf16_bits(self._rng.standard_normal(N_BLOCK, dtype=np.float32) * np.float32(0.02))

    def pieces(self, tensor: SourceTensor) -> Iterator[NDArray[np.uint16] | NDArray[np.float32]]:
        """The elements of `tensor` in arrays of any length."""
        n_elements = math.prod(tensor.shape)
        if tensor.dtype == "F32":
            yield self._rng.standard_normal(n_elements, dtype=np.float32)
        elif len(tensor.shape) == 1:
            yield _bf16_bits(1 + self._rng.standard_normal(n_elements, dtype=np.float32) * np.float32(0.1))
        else:
            start = next(self._starts)
            while n_elements:
                piece = self._block[start : start + n_elements]
                yield piece
                n_elements -= len(piece)
                start = 0


def _bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def cache_folder() -> Path:
    return Path(os.environ.get("BENCH_CACHE", ".cache/bench"))


def checkpoint(shape: Shape, cache: Path, sparse: bool = False) -> Path:
    """The folder of `shape` in `cache`, made if it is not there. Raises OSError where the disk is too small."""
    folder = cache / (f"{shape.name}-sparse" if sparse else shape.name)
    stamp = hashlib.sha256(json.dumps([MAKER_VERSION, sparse, asdict(shape)]).encode()).hexdigest()
    if folder.is_dir() and (folder / ".stamp").read_text() == stamp:
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    free_nbytes = shutil.disk_usage(cache).free
    needed_nbytes = 2 * shape.nbytes + TOKENIZER_NBYTES
    if not sparse and free_nbytes < needed_nbytes:
        raise OSError(
            f"{shape.name} and a copy of it need {needed_nbytes >> 20} MiB, {cache} has {free_nbytes >> 20}:"
            f" make it with holes, SPARSE={shape.name}"
        )
    part = folder.with_name(f"{folder.name}.part")
    for stale in (part, folder):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir()
    _write_json(part / "config.json", config_of(shape))
    _write_json(part / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0})
    vocabulary.write_tokenizer(part, shape.vocabulary)
    _write_shards(part, shape, sparse)
    (part / ".stamp").write_text(stamp)
    part.rename(folder)
    return folder


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _write_shards(folder: Path, shape: Shape, sparse: bool) -> None:
    shards = _split(list(tensors_of(shape)), shape.n_shards)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    weights = None if sparse else Weights(sum(map(len, shards)))
    for name, tensors in zip(names, shards, strict=True):
        _write_shard(folder / name, tensors, weights)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": shape.nbytes}, "weight_map": dict(sorted(weight_map.items()))},
        )


def _split(tensors: Sequence[SourceTensor], n_shards: int) -> list[list[SourceTensor]]:
    """`n_shards` runs of tensors, about equal in bytes."""
    total_nbytes = sum(tensor.nbytes for tensor in tensors)
    shards: list[list[SourceTensor]] = [[] for _ in range(n_shards)]
    done_nbytes = 0
    for tensor in tensors:
        shards[done_nbytes * n_shards // total_nbytes].append(tensor)
        done_nbytes += tensor.nbytes
    return shards


def _write_shard(path: Path, tensors: Sequence[SourceTensor], weights: Weights | None) -> None:
    """One safetensors file; without weights, a hole where the data would be."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if weights is None:
            file.truncate(8 + len(raw) + offset)
        else:
            for tensor in tensors:
                for piece in weights.pieces(tensor):
                    file.write(piece.data)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make checkpoints in the shapes of published models.")
    parser.add_argument("shapes", nargs="+", choices=sorted(SHAPES), metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--sparse", action="store_true", help="holes in place of weights")
    args = parser.parse_args()
    for name in args.shapes:
        print(checkpoint(SHAPES[name], cache_folder(), args.sparse))


if __name__ == "__main__":
    main()
