"""The speed of encoding alone: `python -m benchmarks.codecs` prints GB/s of source bytes for each kernel and type pair.

The comparison is fair because kernels take turns on the same weights (normal, sigma 0.02, so that some become F16's
subnormals), with source and result in memory that was touched before; the best of many calls is the speed of one core,
independent of other load on the machine. Two threads are compared with two processes in the same run: the difference is
the time that threads wait for each other, mostly for the interpreter lock.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from streamconv.ggml import encode as codecs
from streamconv.ggml.reference import BF16, F16, F32, FLOATS, Q8_0
from streamconv.lazy.dtype import Dtype
from streamconv.lazy.scratch import Scratch, aligned_buffer

N_ROWS, N_COLUMNS = 512, 2048  # 2 MiB of BF16, a piece of a chunk
N_ROUNDS = 3

Pair = tuple[Dtype, Dtype]


def weights(source: Dtype) -> NDArray[np.uint8]:
    """The same numbers in any type, as bytes in aligned memory."""
    numbers = (np.random.default_rng(1).standard_normal(N_ROWS * N_COLUMNS) * 0.02).astype(np.float32)
    slab = aligned_buffer(numbers.size * FLOATS[source].bits.itemsize)
    if source == BF16:
        numbers = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    slab[:] = (numbers.astype(np.float16) if source == F16 else numbers).view(np.uint8)
    return slab


def rates(pair: Pair, seconds: float, kernel: codecs.Kernel, start: Callable[[], object] = lambda: None) -> list[float]:
    """GB/s of source bytes, of each call within `seconds`; one type to itself stays in place, as in a conversion."""
    source, target = pair
    slab = weights(source)
    out = slab if source == target else aligned_buffer(N_ROWS * target.row_nbytes(N_COLUMNS))
    scratch = Scratch(codecs.encode_scratch_nbytes(source, target, N_ROWS, N_COLUMNS))
    codecs.encode(source, target, slab, out, scratch, N_COLUMNS, kernel)
    start()
    found = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        codecs.encode(source, target, slab, out, scratch, N_COLUMNS, kernel)
        found.append(slab.nbytes / (time.perf_counter() - begin) / 1e9)
    return found


def two_threads(pair: Pair, seconds: float, kernel: codecs.Kernel) -> float:
    """GB/s of both together."""
    together = threading.Barrier(2)
    found: list[float] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(statistics.harmonic_mean(rates(pair, seconds, kernel, together.wait)))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(found)


def two_processes(pair: Pair, seconds: float, kernel: codecs.Kernel) -> float:
    """GB/s of both together."""
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)
    results = context.SimpleQueue()

    def work() -> None:
        results.put(statistics.harmonic_mean(rates(pair, seconds, kernel, together.wait)))

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    found: list[float] = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(found)


def kernels() -> Iterator[codecs.Kernel]:
    if (best := codecs.best_kernel()) is not codecs.REFERENCE:
        yield best
    yield codecs.REFERENCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each sample (default 0.3)")
    seconds = parser.parse_args().seconds
    print(
        f"{'':14}{'kernel':8}{'best':>7}{'median':>8}{'2 threads':>11}{'2 processes':>13}{'ratio':>7}   GB/s of source"
    )
    for pair in itertools.product((BF16, F16, F32), (F32, F16, BF16, Q8_0)):
        for kernel in kernels():
            single = [rate for _ in range(N_ROUNDS) for rate in rates(pair, seconds, kernel)]
            double = [
                (two_threads(pair, seconds, kernel), two_processes(pair, seconds, kernel)) for _ in range(N_ROUNDS)
            ]
            threads, processes = (statistics.median(side) for side in zip(*double, strict=True))
            ratio = statistics.median(a / b for a, b in double)
            print(
                f"{pair[0].name:>5} -> {pair[1].name:5}{kernel.name:8}{max(single):7.2f}"
                f"{statistics.median(single):8.2f}{threads:11.2f}{processes:13.2f}{ratio:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
