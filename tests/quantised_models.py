"""Checkpoints that llama-quantize's goldens are made of, and what is asked of it: small, with rows of whole blocks."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamconv.ggml.mixes import MIXES
from tests import tiny

Floats = NDArray[np.float32]

MODELS: dict[str, Callable[[Path], Path]] = {
    "lfm2": lambda path: tiny.lfm2(path, hidden=256, ff=512, n_layers=6, attention=(2, 4)),
    "lfm2moe": lambda path: tiny.lfm2moe(path, hidden=256, ff=512, moe_ff=768, n_experts=5),
    "llama": lambda path: tiny.llama(path, hidden=256, ff=768, n_layers=5, tied=False, dtype="F16"),
    "llama-f32": lambda path: tiny.llama(path, hidden=256, ff=416, n_layers=2, tied=True, dtype="F32"),
}
# The outtype of the file that llama-quantize reads: it loses nothing.
LOSSLESS = {"lfm2": "bf16", "lfm2moe": "bf16", "llama": "f16", "llama-f32": "f32"}
# Of files that are quantised already, by their outtype: what is made of them with --allow-requantize.
AGAIN = {"q8_0": ("q4_k_m", "q6_k"), "q6_k": ("q4_k_m", "iq4_xs"), "q4_k_m": ("q3_k_m", "q5_0"), "q5_1": ("q4_0",)}
WITHOUT_IMPORTANCE = ("blk.1.attn_q.weight", "token_embd.weight", "output.weight")


def smallest(path: Path) -> Path:
    """The model whose Q4_K_M file by llama.cpp's quantizer is kept whole."""
    return tiny.lfm2(path, hidden=256, ff=256, n_layers=2, attention=(1,))


@dataclass(frozen=True)
class Case:
    """What is made of a model: an outtype, with importances or without, and the options of `convert`."""

    model: str
    outtype: str
    weighted: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        said = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.model} {self.outtype}{' imatrix' * self.weighted}{said}"


OPTIONS: tuple[dict[str, Any], ...] = (
    {"pure": True},
    {"leave_output_tensor": True},
    {"output_tensor_type": "f32", "token_embedding_type": "q5_1"},
    {"tensor_type": ["Attn_V=q8_0", "ffn_(up|gate).*=iq4_xs", "blk\\.0\\.=f16"]},
)


def cases() -> Iterator[Case]:
    for model in MODELS:
        for outtype in MIXES:
            if outtype != "q2_k_s" and not (outtype == "q8_0" and model.startswith("llama")):
                yield Case(model, outtype)
            if outtype != "q2_k_s" or model == "lfm2":  # which needs importances of all that is Q2_K
                yield Case(model, outtype, weighted=True)
        for options in OPTIONS:
            yield Case(model, "q4_k_m", options=options)
        yield Case(model, "q8_0", options={"tensor_type": ["ffn_down=q4_0"]})


def importance(name: str, shape: tuple[int, ...]) -> Floats | None:
    """[matrices, columns], decided by the name alone; None for a tensor of which nothing is known."""
    if len(shape) < 2 or name in WITHOUT_IMPORTANCE or not name.endswith(".weight"):
        return None
    n_matrices = shape[-3] if len(shape) > 2 else 1
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return rng.gamma(0.5, 40.0, (n_matrices, shape[-1])).astype(np.float32)


def write_imatrix(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """The older form, of as many entries as have importances."""
    found = {name: values for name, shape in shapes.items() if (values := importance(name, shape)) is not None}
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(found)))
        for name, values in found.items():
            file.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, values.size))
            file.write(values.tobytes())
    return path
