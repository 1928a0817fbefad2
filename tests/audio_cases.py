"""The audio models with committed references, which tools/make_audio_goldens.py makes."""

from __future__ import annotations

import json
import struct
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import cases
from tests.oracles import ggufs, runtime
from tests.tiny import noise
from tests.tiny.audio import lfm2_audio

GOLDENS = cases.GOLDENS / "audio.json"

# llama.cpp's converter takes convolutions and layers of the adapter for layers of the encoder, and needs as many.
N_LAYERS = 7

MODELS: dict[str, cases.Builder] = {
    "lfm2_5-audio": partial(lfm2_audio, n_layers=N_LAYERS),
    "lfm2-audio": partial(
        lfm2_audio, n_layers=N_LAYERS, seed=51, detokenizer=False, dtype="F16", n_heads=8, n_mels=128, channels=20
    ),
}
ROLES = {"model": ("", False), "mmproj": ("", True), "detokenizer": ("audio_detokenizer", False)}


@cache
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDENS.read_text(encoding="utf-8"))
    return found


def norms_path(name: str) -> Path:
    return cases.GOLDENS / f"audio.{name}.norms.npy"


def norms(name: str) -> NDArray[np.float32]:
    """Scale and shift of each layer's folded batch norm as llama.cpp's converter made them, [layers, 2, width]."""
    return np.asarray(np.load(norms_path(name)), np.float32)


def heard_path(name: str) -> Path:
    return cases.GOLDENS / f"audio.{name}.heard.npy"


def sound(pitch: float = 440) -> bytes:
    """A WAV file: half a second of two tones, the lower one of `pitch` Hz, and noise."""
    n, rate = 8000, 16000
    times = np.arange(n) / rate
    wave = 0.3 * np.sin(2 * np.pi * pitch * times) + 0.2 * np.sin(2 * np.pi * 1870 * times * (1 + times))
    samples = (32767 * (wave + noise("sound", (n,), 0.05))).astype("<i2").tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate,
                       2, 16, b"data", len(samples))  # fmt: skip
    return head + samples


def heard(name: str) -> NDArray[np.float32]:
    """What llama.cpp predicts after `sound()` from its own converter's files, log-probabilities [vocab]."""
    return np.asarray(np.load(heard_path(name)), np.float32)


def hear(gguf: Path, mmproj: Path, wav: bytes) -> NDArray[np.float64]:
    """What llama.cpp predicts from two files after a text with a sound in it, log-probabilities [vocab]."""
    with runtime.Runtime(gguf, mmproj=mmproj, n_ctx=256) as model:
        return model.logprobs_after_media("the", wav, "dog")


def golden(name: str, role: str, outtype: str) -> dict[str, Any]:
    """What llama.cpp's converter made of one file of a model."""
    return ggufs.unpacked(record()[name][role], outtype)
