"""Models for llama-quantize's mixes: no runtime would run them, but what decides a tensor's type is as in real ones.

Matrices are BF16, with few rows; what they hold follows from the name alone, so that a golden needs only digests.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.ggml.mixes import MIXES, MixOptions, parse_override
from tests.tools import gguf_bytes

Shape = tuple[int, ...]  # row-major
Keys = dict[str, int | float | list[int]]
F32, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.BF16


@dataclass(frozen=True)
class Model:
    """One case.

    Attributes:
        architecture: of the file.
        keys: numbers of the architecture, without its name; a list is an array of int32.
        tensors: row-major shapes by name.
    """

    architecture: str
    keys: Keys
    tensors: dict[str, Shape]


@dataclass
class _Maker:
    """Collects the tensors of a transformer of width `d`; rows are few."""

    d: int
    f: int
    tensors: dict[str, Shape] = field(default_factory=dict)

    def add(self, layer: int, **shapes: Shape) -> None:
        for name, shape in shapes.items():
            self.tensors[f"blk.{layer}.{name}.weight"] = shape

    def attention(self, layer: int) -> None:
        d = self.d
        self.add(layer, attn_q=(8, d), attn_k=(4, d), attn_v=(4, d), attn_output=(8, d), attn_q_norm=(32,))

    def feed_forward(self, layer: int) -> None:
        self.add(layer, attn_norm=(self.d,), ffn_norm=(self.d,))
        self.add(layer, ffn_gate=(6, self.d), ffn_up=(6, self.d), ffn_down=(8, self.f))

    def experts(self, layer: int, n: int) -> None:
        self.add(layer, attn_norm=(self.d,), ffn_norm=(self.d,), ffn_gate_inp=(n, self.d))
        self.add(layer, ffn_gate_exps=(n, 2, self.d), ffn_up_exps=(n, 2, self.d), ffn_down_exps=(n, 2, self.f))
        self.tensors[f"blk.{layer}.exp_probs_b.bias"] = (n,)

    def ends(self, tied: bool) -> None:
        self.tensors["token_embd.weight"] = (16, self.d)
        self.tensors["output_norm.weight"] = (self.d,)
        if not tied:
            self.tensors["output.weight"] = (16, self.d)


def _keys(d: int, f: int, n_layers: int, n_heads: int, n_kv_heads: int | list[int]) -> Keys:
    return {
        "block_count": n_layers,
        "context_length": 128,
        "embedding_length": d,
        "feed_forward_length": f,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "vocab_size": 16,
    }


def _llama(
    n_layers: int, n_heads: int, n_kv_heads: int, tied: bool, d: int = 256, f: int = 512, architecture: str = "llama"
) -> Model:
    made = _Maker(d, f)
    for layer in range(n_layers):
        made.attention(layer)
        made.feed_forward(layer)
    made.ends(tied)
    return Model(architecture, _keys(d, f, n_layers, n_heads, n_kv_heads), made.tensors)


def _mixtral() -> Model:
    made = _Maker(256, 256)
    for layer in range(10):
        made.attention(layer)
        made.experts(layer, 8)
    made.ends(tied=False)
    keys = _keys(256, 256, 10, 8, 2)
    return Model("llama", {**keys, "expert_count": 8, "expert_used_count": 2}, made.tensors)


def _lfm2(n_layers: int, attention: tuple[int, ...], n_experts: int = 0, tied: bool = True) -> Model:
    made = _Maker(256, 512)
    for layer in range(n_layers):
        if layer in attention:
            made.attention(layer)
        else:
            made.add(layer, **{"shortconv.conv": (256, 3), "shortconv.in_proj": (6, 256)})
            made.add(layer, **{"shortconv.out_proj": (8, 256)})
        if n_experts and layer >= 2:
            made.experts(layer, n_experts)
        else:
            made.feed_forward(layer)
    made.ends(tied)
    del made.tensors["output_norm.weight"]
    made.tensors["token_embd_norm.weight"] = (256,)
    keys = _keys(256, 512, n_layers, 32, [8 if layer in attention else 0 for layer in range(n_layers)])
    keys |= {"shortconv.l_cache": 3}
    if n_experts:
        keys |= {"expert_count": n_experts, "expert_used_count": 4, "expert_feed_forward_length": 512}
        keys |= {"leading_dense_block_count": 2, "expert_gating_func": 2}
    return Model("lfm2moe" if n_experts else "lfm2", keys, made.tensors)


def _falcon() -> Model:
    made = _Maker(256, 256)
    for layer in range(16):
        made.add(layer, attn_qkv=(8, 256), attn_output=(8, 256), attn_norm=(256,))
        made.add(layer, ffn_up=(6, 256), ffn_down=(8, 256))
    made.ends(tied=False)
    return Model("falcon", _keys(256, 256, 16, 8, 1), made.tensors)


def _names() -> Model:
    """Names by themselves: what is never quantised, what is, whatever stands around."""
    model = _llama(2, 8, 8, tied=False)
    tensors = model.tensors
    kept = "ssm_conv1d attn_rel_b time_mix_w1 time_mix_decay_w2 altup_proj laurel_l per_layer_model_proj indexer.k_proj"
    for name in (*kept.split(), "attn_kv_b", "ffn_gate_up_exps", "nextn.eh_proj", "ssm_in", "attn_sinks"):
        tensors[f"blk.1.{name}.weight"] = (4, 256)
    tensors |= {"blk.1.one_row.weight": (1, 256), "blk.1.stacked_rows.weight": (3, 1, 256)}
    tensors |= {"blk.1.attn_q.bias": (4, 256), "per_layer_token_embd.weight": (8, 256), "mm.1.weight": (8, 256)}
    tensors |= {"v.blk.0.attn_v.weight": (8, 256), "v.patch_embd.weight": (8, 256), "blk.10.odd.weight": (8, 32)}
    return model


MODELS: dict[str, Callable[[], Model]] = {
    "lfm2": lambda: _lfm2(16, (2, 5, 8, 10, 12, 14)),
    "lfm2-30": lambda: _lfm2(30, (2, 6, 10, 14, 18, 21, 24, 27), tied=False),
    "lfm2-from-0": lambda: _lfm2(10, (0, 3, 6, 9)),
    "lfm2moe": lambda: _lfm2(24, (2, 6, 10, 14, 18, 21), n_experts=4),
    "llama-gqa": lambda: _llama(32, 16, 4, tied=False),
    "llama-tied": lambda: _llama(13, 4, 4, tied=True),
    "llama-70b": lambda: _llama(80, 16, 2, tied=False),
    "qwen2-70b": lambda: _llama(80, 16, 2, tied=False, architecture="qwen2"),
    "llama-rows": lambda: _llama(4, 8, 2, tied=False, d=288, f=344),
    "llama-rows-tied": lambda: _llama(4, 8, 2, tied=True, d=80, f=256),
    "mixtral": _mixtral,
    "falcon": _falcon,
    "names": _names,
}


def type_of(shape: Shape) -> GGMLQuantizationType:
    """As a converter leaves it."""
    return BF16 if len(shape) > 1 else F32


def values(name: str, shape: Shape) -> NDArray[np.uint8]:
    """The bytes of a tensor: random numbers from its name, cut to BF16 where it is a matrix."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    numbers = (rng.standard_normal(shape) * 0.03).astype(np.float32)
    if type_of(shape) == BF16:
        return (numbers.reshape(-1).view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return numbers.reshape(-1).view(np.uint8)


def importance(name: str, shape: Shape) -> NDArray[np.float32]:
    """Weights [experts, columns] of a tensor, from its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    return rng.gamma(0.7, 3.0, (shape[0] if len(shape) == 3 else 1, shape[-1])).astype(np.float32)


def has_importance(name: str) -> bool:
    """As llama-imatrix leaves it: layers alone."""
    return name.startswith("blk.")


def write(model: Model, path: Path) -> None:
    """The lossless file."""
    path.write_bytes(b"".join(_bytes(model)))


def _bytes(model: Model) -> Iterator[bytes]:
    keys = [gguf_bytes.key("general.architecture", gguf_bytes.STRING, gguf_bytes.text(model.architecture))]
    for name, value in model.keys.items():
        name = f"{model.architecture}.{name}"
        if isinstance(value, list):
            keys.append(gguf_bytes.array(name, 5, struct.pack(f"<{len(value)}i", *value), len(value)))
        else:
            keys.append(gguf_bytes.number(name, "f" if isinstance(value, float) else "I", value))
    infos, offset = [], 0
    for name, shape in model.tensors.items():
        infos.append(gguf_bytes.tensor(name, shape[::-1], int(type_of(shape)), offset))
        offset += -(-values(name, shape).nbytes // 32) * 32
    yield gguf_bytes.gguf(keys, infos)
    for name, shape in model.tensors.items():
        data = values(name, shape).tobytes()
        yield data + bytes(-len(data) % 32)


# One letter a type, so that a golden is a line for each file.
LETTERS = {
    GGMLQuantizationType[name]: letter
    for name, letter in (
        ("F32", "f"), ("F16", "h"), ("BF16", "b"), ("Q8_0", "8"), ("Q4_0", "0"), ("Q4_1", "1"), ("Q5_0", "z"),
        ("Q5_1", "y"), ("Q2_K", "2"), ("Q3_K", "3"), ("Q4_K", "4"), ("Q5_K", "5"), ("Q6_K", "6"), ("IQ4_NL", "n"),
        ("IQ4_XS", "x"), ("TQ1_0", "t"), ("TQ2_0", "u"),
    )
}  # fmt: skip
REFUSED = "refused"

# What llama-quantize has options for.
VARIANTS: dict[str, MixOptions] = {
    "pure": MixOptions(pure=True),
    "leave-output": MixOptions(leave_output=True),
    "output": MixOptions(output_type=GGMLQuantizationType.Q4_K),
    "embedding": MixOptions(embedding_type=GGMLQuantizationType.Q5_K),
    "both": MixOptions(output_type=GGMLQuantizationType.Q5_1, embedding_type=GGMLQuantizationType.Q8_0, pure=True),
    "overrides": MixOptions(
        overrides=tuple(map(parse_override, ("attn_v=q8_0", r"blk\.(1|3)\.ffn_down=F16", "EMBD=q4_0", "ffn=q3_K"))),
        embedding_type=GGMLQuantizationType.Q6_K,
    ),
    "pure-overrides": MixOptions(overrides=(parse_override("attn_(k|v)=q6_k"),), pure=True),
}


@dataclass(frozen=True)
class Case:
    """One file to be made: model, mix, a variant or none, with importance or without."""

    model: str
    mix: str
    variant: str = ""
    weighted: bool = False

    def __str__(self) -> str:
        return " ".join(filter(None, (self.model, self.mix, self.variant, "imatrix" if self.weighted else "")))

    @property
    def options(self) -> MixOptions:
        return VARIANTS[self.variant] if self.variant else MixOptions()


def cases() -> list[Case]:
    """Every model in every mix, plain and weighted; every variant of some."""
    plain = [Case(model, mix, weighted=weighted) for model in MODELS for mix in MIXES for weighted in (False, True)]
    varied = [(model, variant) for model in ("lfm2", "llama-gqa", "names") for variant in VARIANTS]
    # llama.cpp dies of a type that is asked for rows that do not divide.
    varied += [("llama-rows-tied", variant) for variant in ("pure", "leave-output", "pure-overrides")]
    return plain + [Case(model, mix, variant) for model, variant in varied for mix in ("q4_k_m", "q2_k", "q5_0")]


# Models whose data is compared, too: three-dimensional experts, rows that do not divide, convolutions.
WITH_DATA = ("lfm2-from-0", "mixtral", "llama-rows-tied")
