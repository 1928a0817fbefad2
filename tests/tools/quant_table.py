"""What each outtype loses on a real model: `python -m tests.tools.quant_table` prints the table of docs/quantising.md.

The model is SmolLM2-135M-Instruct (smollm2.py). Each file is made from the same checkpoint by `streamconv.convert`; its
error is `verify(..., error=True)`'s. What it predicts after each prefix of a text is compared with the F16 file's
prediction, both by llama.cpp: the mean KL divergence, and how often both find the same token likeliest.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import streamconv
from streamconv.report import Report
from tests.oracles import runtime
from tests.tools import smollm2

OUTTYPES = (
    *(
        "f16",
        "bf16",
        "q8_0",
        "q6_k",
        "q5_k_m",
        "q5_k_s",
        "q5_1",
        "q5_0",
        "q4_k_m",
        "q4_k_s",
        "q4_1",
        "iq4_nl",
        "iq4_xs",
    ),
    *("q4_0", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
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
SKIPPED = 8  # prefixes at the beginning, after which anything may follow


def predictions(path: Path, ids: list[int], step: int) -> NDArray[np.float32]:
    """Natural log-probabilities [positions, vocab] after prefixes of `ids`."""
    with runtime.Runtime(path, n_ctx=1024, caching=True) as loaded:
        found = [loaded.next_logprobs(ids[:end]) for end in range(SKIPPED, len(ids) + 1, step)]
    return np.stack(found).astype(np.float32)


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
    parser.add_argument("--step", type=int, default=1, help="tokens from one prefix to the next (default 1)")
    parser.add_argument("--outtype", action="append", choices=OUTTYPES, help="only these; may be repeated")
    args = parser.parse_args()
    source = smollm2.checkpoint()
    ids: list[int] = []
    expected: NDArray[np.float32] | None = None
    for outtype in ("f16", *(one for one in OUTTYPES[1:] if args.outtype is None or one in args.outtype)):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / f"{outtype}.gguf"
            made = streamconv.convert(source, out, outtype=outtype)
            measured = streamconv.verify(out, source, error=True)
            ids = ids or runtime.tokenize(out, TEXT)
            found = predictions(out, ids, args.step)
        if expected is None:
            expected = found
            print(f"{len(ids)} tokens, {len(found)} predictions", flush=True)
            print(HEAD)
        print(row(outtype, made, measured, *divergence(expected, found)), flush=True)


if __name__ == "__main__":
    main()
