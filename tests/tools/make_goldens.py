"""Make the references of the built cases anew: `python -m tests.tools.make_goldens [CASE ...]`. Needs torch; minutes.

Owns: tests/data/goldens. What llama.cpp's converter makes of each case for each outtype (or its error), and the logits
of transformers and PEFT in float32. Invariant: same case, same versions, same bytes.
"""

from __future__ import annotations

import json
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
    (cases.GOLDENS / f"{name}.json").write_text(_compact(record))
    np.save(cases.GOLDENS / f"{name}.logits.npy", logits[list(cases.POSITIONS)].astype(np.float32))


def _llama_cpp(convert: Convert, scratch: Path) -> dict[str, Any]:
    """The files of all outtypes in one: types and digests side by side, `auto` as the name of the type it chose."""
    goldens: dict[str, Any] = {}
    for outtype in cases.OUTTYPES:
        try:
            goldens[outtype] = ggufs.read(convert(scratch / f"{outtype}.gguf", outtype)).golden()
        except llama_cpp.ConverterError as error:
            goldens[outtype] = {"error": str(error)}
    errors = {outtype: golden["error"] for outtype, golden in goldens.items() if "error" in golden}
    whole = {outtype: golden for outtype, golden in goldens.items() if "error" not in golden}
    if not whole:
        return {"errors": errors}
    auto = whole.pop("auto", None)
    first = whole["f32"]
    shared = {k: entry for k, entry in first["kv"].items() if all(g["kv"].get(k) == entry for g in whole.values())}
    return {
        "auto": next((outtype for outtype, golden in whole.items() if golden == auto), None),
        "errors": errors,
        "kv": shared,
        "kv_of": {o: {k: e for k, e in golden["kv"].items() if k not in shared} for o, golden in whole.items()},
        "order": first["order"],
        "tensors": {name: _by_outtype(name, whole) for name in first["tensors"]},
    }


def _by_outtype(name: str, goldens: dict[str, Any]) -> dict[str, Any]:
    """{"ne", OUTTYPE: [type, sha256]}, without the outtypes that leave the tensor as f32 does."""
    entries = {outtype: golden["tensors"][name] for outtype, golden in goldens.items()}
    plain = entries["f32"]
    different = {o: [entry["type"], entry["sha256"]] for o, entry in entries.items() if o == "f32" or entry != plain}
    return {"ne": plain["ne"]} | different


def _compact(value: Any) -> str:
    """JSON with one line for a tensor or key, so that a change shows in a diff."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return text.replace('},"', '},\n"') + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
