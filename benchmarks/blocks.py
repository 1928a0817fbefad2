"""The speed of block quantisation alone: `python -m benchmarks.blocks` prints Melem/s on one core, beside ggml's.

The comparison is fair because ours and `ggml_quantize_chunk` (PyPI xllamacpp: llama.cpp's baseline build) take turns on
the same F32 rows (normal, sigma 0.02), in memory that was touched before; the best of many calls is the speed of one
core, independent of other load on the machine. `c-baseline` is the kernel for CPUs without AVX2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from gguf.constants import GGMLQuantizationType

from streamconv.ggml import blocks
from streamconv.ggml.blocks import BLOCK_TYPES, REFERENCE, BlockKernel
from tests.oracles import ggml

N_COLUMNS = 2048
F32 = GGMLQuantizationType.F32


def kernels() -> dict[str, BlockKernel]:
    best = blocks.best_kernel()
    if best is REFERENCE:
        return {"numpy": REFERENCE}
    from streamconv.ggml import _blocks  # type: ignore[attr-defined]

    baseline = blocks.compiled_kernel(_blocks, baseline=True)
    return {"c": best, "c-baseline": baseline, "plain": blocks.plain_kernel(), "numpy": REFERENCE}


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(target: GGMLQuantizationType, weighted: bool, n_rows: int, seconds: float) -> dict[str, float]:
    """Melem/s by kernel, `ggml` among them: the best calls within `seconds` of each, in turn."""
    rng = np.random.default_rng(1)
    rows = (rng.standard_normal((n_rows, N_COLUMNS)) * 0.02).astype(np.float32)
    importance = rng.gamma(0.5, 2.0, N_COLUMNS).astype(np.float32) if weighted else None
    block = BLOCK_TYPES[target]
    out = np.zeros(rows.size // block.n_elements * block.nbytes, dtype=np.uint8)
    slab = rows.reshape(-1).view(np.uint8)
    work: dict[str, Callable[[], object]] = {
        name: lambda kernel=kernel: blocks.quantize_rows(target, F32, slab, N_COLUMNS, importance, out, kernel)
        for name, kernel in kernels().items()
    }
    work["ggml"] = lambda: ggml.quantize(target, rows, importance)
    best = dict.fromkeys(work, float("inf"))
    spent = dict.fromkeys(work, 0.0)
    while any(total < seconds for total in spent.values()):
        for name, call in work.items():
            if spent[name] < seconds:
                taken = seconds_of(call)
                best[name], spent[name] = min(best[name], taken), spent[name] + taken
    return {name: rows.size / taken / 1e6 for name, taken in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each kernel and type (default 0.2)")
    parser.add_argument("--rows", type=int, default=32, help=f"of {N_COLUMNS} elements in each call (default 32)")
    parser.add_argument(
        "--type", action="append", choices=[type_.name for type_ in BLOCK_TYPES], help="may be repeated"
    )
    args = parser.parse_args()
    names = [*kernels(), "ggml"]
    print(f"{'Melem/s':18}" + "".join(f"{name:>12}" for name in names) + f"{names[0] + ' / ggml':>14}")
    for target in BLOCK_TYPES:
        if args.type and target.name not in args.type:
            continue
        for weighted in (False, True):
            found = measure(target, weighted, args.rows, args.seconds)
            line = f"{target.name:8}{'imatrix' if weighted else 'plain':10}"
            line += "".join(f"{found[name]:12.1f}" for name in names)
            print(f"{line}{found[names[0]] / found['ggml']:13.1f}x", flush=True)


if __name__ == "__main__":
    main()
