"""How far converted adapters are from the trained ones, as a table: `python -m tests.tools.lora_distances [--real]`.

Prints the table in docs/adapters.md: for each adapter the largest KL divergence, over the positions of a prompt, of
llama.cpp's next-token distribution from PEFT's in float32: without the adapter, with streamconv's, with that of
llama.cpp's own converter (which needs torch and transformers), and with Ollama's (whose bytes `--dialect ollama-legacy`
writes, as tests/golden/test_lora.py shows). `--real` adds SmolLM2-135M with its published weights; it needs PEFT.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import streamconv
from tests import cases, tiny
from tests.oracles import runtime
from tests.tools import llama_cpp, published

ROOM = 8 << 30  # torch may be in this process
REAL_PROMPT = "The fastest way to the sea is"


@dataclass(frozen=True)
class Row:
    """An adapter, its base as a checkpoint and as a GGUF, a prompt, and PEFT's logits [positions, vocab]."""

    name: str
    adapter: Path
    checkpoint: Path
    base: Path
    ids: list[int]
    logits: NDArray[np.float32]


def measure(row: Row, scratch: Path) -> list[float | str]:
    """The distances: without the adapter, ours, llama.cpp's, Ollama's; a word where there is no file."""

    def distance(make: Callable[[Path], object] | None) -> float | str:
        dst = scratch / "adapter.gguf"
        try:
            adapters = [] if make is None else [(dst, 1.0)]
            if make is not None:
                make(dst)
        except llama_cpp.ConverterError:
            return "refused"
        return runtime.kl(row.logits, runtime.next_token_logprobs(row.base, row.ids, adapters))

    def ours(dst: Path, outtype: str = "f32", dialect: str = "llama.cpp") -> None:
        options = {"outtype": outtype, "dialect": dialect}
        streamconv.convert_adapter(row.adapter, row.base, dst, force=True, max_memory=ROOM, **options)

    return [
        distance(None),
        distance(ours),
        distance(lambda dst: llama_cpp.convert_lora(row.adapter, row.checkpoint, dst)),
        distance(lambda dst: ours(dst, "auto", "ollama-legacy")),
    ]


def given() -> Iterator[Row]:
    """The adapters in data/cases, whose logits are committed."""
    names = {
        "lora-given": "LoRA",
        "rslora-given": "rsLoRA",
        "patterns-given": "rank and alpha patterns",
        "mlx-given": "MLX",
    }
    for case, name in names.items():
        logits, ids = cases.given_logits(case), cases.given_ids()
        base = cases.GIVEN / "llama-given.base.gguf"
        yield Row(name, cases.GIVEN / case, cases.GIVEN / "llama-given", base, ids, logits)


def real(scratch: Path) -> Iterator[Row]:
    """A plain adapter and an rsLoRA on SmolLM2-135M-Instruct."""
    from tests.oracles import reference

    checkpoint, base = published.checkpoint("smollm2-135m-instruct"), scratch / "base.gguf"
    streamconv.convert(checkpoint, base, outtype="f32", max_memory=ROOM)
    ids = runtime.tokenize(base, REAL_PROMPT)
    for name, is_rslora in (("SmolLM2-135M, LoRA", False), ("SmolLM2-135M, rsLoRA", True)):
        adapter = tiny.peft_adapter(scratch / name, checkpoint, rslora=is_rslora)
        yield Row(name, adapter, checkpoint, base, ids, reference.logits(checkpoint, ids, adapter))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M as well")
    options = parser.parse_args()
    print("| adapter | none | streamconv | llama.cpp's converter | Ollama's converter |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for row in [*given(), *(real(scratch) if options.real else ())]:
            cells = [cell if isinstance(cell, str) else f"{cell:.1e}" for cell in measure(row, scratch)]
            print(f"| {row.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
