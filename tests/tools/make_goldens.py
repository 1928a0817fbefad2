"""Make the references of the built cases again: `python -m tests.tools.make_goldens [CASE ...]`. Needs torch; minutes.

tests/data/goldens has the result of llama.cpp's converter for each case and outtype (or its error), and the logits of
transformers and PEFT in float32. The same cases and versions give the same bytes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests import cases, tiny
from tests.oracles import ggufs, reference
from tests.tools import llama_cpp

Convert = Callable[[Path, str], Path]


def main(wanted: list[str]) -> None:
    """References of the cases named in `wanted`, or of all."""
    cases.GOLDENS.mkdir(parents=True, exist_ok=True)
    names = wanted or [*cases.MODELS, *cases.ADAPTERS, *cases.MERGES]
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            _make(name, Path(scratch))
        print(name, flush=True)


def _make(name: str, scratch: Path) -> None:
    if name in cases.MODELS:
        src = cases.MODELS[name](scratch / name)
        made = _llama_cpp(lambda dst, outtype: llama_cpp.convert(src, dst, outtype, pre=cases.PRE[name]), scratch)
        logits = reference.logits(src, cases.IDS)
    else:
        base_name, builder = (cases.ADAPTERS | cases.MERGES)[name]
        base = cases.MODELS[base_name](scratch / base_name)
        src = builder(scratch / name, base)
        made = None
        if name in cases.ADAPTERS:
            made = _llama_cpp(lambda dst, outtype: llama_cpp.convert_lora(src, base, dst, outtype), scratch)
        logits = reference.logits(base, cases.IDS, src, merge=name in cases.MERGES)
    record = {"digest": tiny.digest(src)} | ({} if made is None else {"llamacpp": made})
    (cases.GOLDENS / f"{name}.json").write_text(ggufs.compact(record))
    np.save(cases.GOLDENS / f"{name}.logits.npy", logits[list(cases.POSITIONS)].astype(np.float32))


def _llama_cpp(convert: Convert, scratch: Path) -> dict[str, Any]:
    """The files of all outtypes in one, or why there is none."""
    goldens: dict[str, Any] = {}
    for outtype in cases.OUTTYPES:
        try:
            goldens[outtype] = ggufs.read(convert(scratch / f"{outtype}.gguf", outtype)).golden()
        except llama_cpp.ConverterError as error:
            goldens[outtype] = {"error": str(error)}
    return ggufs.packed(goldens)


if __name__ == "__main__":
    main(sys.argv[1:])
