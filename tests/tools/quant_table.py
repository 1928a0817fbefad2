"""What each outtype loses on a real model: `python -m tests.tools.quant_table PYTHON` prints docs/quantising.md's.

The model is SmolLM2-135M-Instruct (published.py), whose weights are published as Q4_1: on a grid, which types of four
bits would hit by luck. So each weight is moved at random within its step, which leaves a BF16 checkpoint of weights as
training leaves them. Files are made of it by `streamconv.convert`; their errors are `verify(..., error=True)`'s. What
llama.cpp predicts with each file at every token of a text is compared with its prediction with the F16 file: the mean
KL divergence, and how often both find the same token likeliest. PYTHON has llama-cpp-python, which gives all positions
of a text at once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import streamconv
from streamconv.ggml import outtypes
from streamconv.report import Report
from tests import tiny
from tests.extras import tokenizers
from tests.tools import published

# Not those that need an importance matrix, or a model trained for them; F16, the first, is what all are held to.
OUTTYPES = [name for name in outtypes.OUTTYPES if name not in ("f32", "bf16", "q2_k_s", "tq1_0", "tq2_0")]
TEXT = """The harbour lies on the north side of the island, where the cliffs keep the wind away. In the morning the
fishing boats come back, and by nine o'clock the market is full of people. An old woman sells bread and honey from a
cart; her grandson, who studies physics in the city, carries the boxes. "How much is the small jar?" asks a visitor.
"Four euros," he says, "or three if you bring the glass back." Water boils at 100 degrees Celsius at sea level, but at
95 degrees in the village above, because the pressure of the air falls with height. To compute the factorial of n in
Python, write:

def factorial(n):
    return 1 if n < 2 else n * factorial(n - 1)

In 1969 two people walked on the Moon for the first time. The first book that was printed with movable type in Europe
appeared around 1455. Of the twelve months, seven have thirty-one days, four have thirty, and February has 28."""
HEAD = "| type | file | bits per weight | relative RMS error | mean KL | same token |\n|---|---|---|---|---|---|"
SKIPPED = 8  # positions at the beginning, after which anything may follow

# Runs under PYTHON: natural log-probabilities [positions, vocab] of the file at argv[1], saved at argv[3].
_PREDICT = """
import json, sys
import numpy as np
from llama_cpp import Llama

ids = json.loads(sys.argv[2])
model = Llama(sys.argv[1], n_ctx=len(ids) + 8, n_batch=len(ids), n_threads=2, logits_all=True, verbose=False)
model.eval(ids)
logits = np.array(model.scores[: len(ids)], dtype=np.float64)
logits -= logits.max(axis=1, keepdims=True)
np.save(sys.argv[3], (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32))
"""


def spread_checkpoint(target: Path) -> Path:
    """The checkpoint with each weight moved at random within the step of its block of 32, as BF16."""
    source = published.checkpoint("smollm2-135m-instruct")
    rng = np.random.default_rng(1)
    tensors = {}
    for name, tensor in tiny.tensors_of(source).items():
        values = tensor.float32()
        if values.ndim == 2:
            apart = np.diff(np.sort(values.reshape(-1, 32), axis=1), axis=1)
            step = np.where(apart > 1e-6, apart, np.inf).min(axis=1, keepdims=True)
            moved = rng.uniform(-0.5, 0.5, (len(step), 32)) * np.where(np.isfinite(step), step, 0)
            values = (values.reshape(-1, 32) + moved).reshape(values.shape).astype(np.float32)
        tensors[name] = tiny.Tensor.of(values, "BF16")
    target.mkdir()
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    tiny.write_safetensors(target / "model.safetensors", tensors)
    return target


def predictions(python: str, path: Path, ids: list[int]) -> NDArray[np.float32]:
    """Natural log-probabilities [positions, vocab] of the tokens that follow in a text of `ids`."""
    saved = path.with_suffix(".npy")
    subprocess.run([python, "-c", _PREDICT, str(path), json.dumps(ids), str(saved)], check=True)
    found: NDArray[np.float32] = np.load(saved)[SKIPPED:]
    return found


def divergence(expected: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[float, float]:
    """(mean KL divergence of `found` from `expected`, share of positions with the same likeliest token)."""
    p = np.exp(expected.astype(np.float64))
    kl = (p * (expected.astype(np.float64) - found)).sum(axis=1)
    return float(kl.mean()), float((expected.argmax(axis=1) == found.argmax(axis=1)).mean())


def row(outtype: str, made: Report, measured: Report, kl: float, same: float) -> str:
    errors = measured.errors
    assert errors is not None and errors.relative_rms is not None
    size = f"{made.nbytes / 1e6:.1f} MB"
    bits = f"{errors.bits_per_weight:.2f}"
    return f"| {outtype.upper()} | {size} | {bits} | {errors.relative_rms:.4f} | {kl:.4f} | {100 * same:.1f}% |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("python", help="a Python with llama-cpp-python")
    python = parser.parse_args().python
    with tempfile.TemporaryDirectory() as folder:
        source = spread_checkpoint(Path(folder) / "SmolLM2-135M-Instruct")
        expected, ids = None, list[int]()
        for outtype in OUTTYPES:
            out = Path(folder) / f"{outtype}.gguf"
            made = streamconv.convert(source, out, outtype=outtype)
            measured = streamconv.verify(out, source, error=True)
            ids = ids or tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids
            found = predictions(python, out, ids)
            out.unlink()
            if expected is None:
                expected = found
                print(f"{len(found)} predictions\n{HEAD}", flush=True)
            print(row(outtype, made, measured, *divergence(expected, found)), flush=True)


if __name__ == "__main__":
    main()
