"""Asks llama.cpp's own quantizer for whole files: `python -m tests.tools.make_quantised_goldens PYTHON`.

PYTHON has llama-cpp-python (see quantize.py, which it runs). Writes tests/data/goldens/quantised.json: for each case of
tests/quantised_models.py a digest of the names, types and bytes of all tensors, and the file's general.file_type. The
Q4_K_M file of the smallest model is written whole, as q4_k_m.gguf: llama.cpp runs it beside the one made here. What
it reads is the lossless file that streamconv makes, which other goldens compare with llama.cpp's converter.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf

import streamconv
from streamconv.ggml.mixes import MIXES, parse_override, parse_type
from tests.quantised_models import AGAIN, LOSSLESS, MODELS, Case, cases, importance, smallest

GOLDENS = Path(__file__).parents[1] / "data" / "goldens" / "quantised.json"
WHOLE = GOLDENS.with_name("q4_k_m.gguf")
PROGRAM = Path(__file__).with_name("quantize.py")


def digest(path: Path) -> str:
    """Of names, types and bytes of the tensors, in the order of their names, and the file type."""
    reader = gguf.GGUFReader(path)
    found = hashlib.sha256()
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):
        found.update(f"{tensor.name} {tensor.tensor_type.name} ".encode() + tensor.data.tobytes())
    return f"{int(reader.fields['general.file_type'].contents())} {found.hexdigest()[:24]}"


def job(case: Case, src: Path, dst: Path, weights: dict[str, Any]) -> dict[str, Any]:
    options = case.options
    found: dict[str, Any] = {
        "src": str(src),
        "dst": str(dst),
        "ftype": int(MIXES[case.outtype].file_type),
        "pure": options.get("pure", False),
        "leave_output": options.get("leave_output_tensor", False),
        "overrides": [
            (pattern.pattern, int(type_)) for pattern, type_ in map(parse_override, options.get("tensor_type", ()))
        ],
    }
    if "output_tensor_type" in options:
        found["output_type"] = int(parse_type(options["output_tensor_type"]))
    if "token_embedding_type" in options:
        found["embedding_type"] = int(parse_type(options["token_embedding_type"]))
    return found | ({"importance": weights} if case.weighted else {})


def weights_of(path: Path, folder: Path) -> dict[str, Any]:
    index, offset = {}, 0
    with (folder / f"{path.stem}.weights").open("wb") as file:
        for tensor in gguf.GGUFReader(path).tensors:
            values = importance(tensor.name, tuple(map(int, tensor.shape))[::-1])
            if values is not None:
                index[tensor.name] = [file.name, offset, values.size]
                offset += file.write(values.tobytes())
    return index


def again(folder: Path, python: str) -> dict[str, str]:
    """Of files of the first model that are quantised already."""
    made, jobs, model = {}, [], next(iter(MODELS))
    for first, others in AGAIN.items():
        streamconv.convert(folder / model, folder / f"{first}.gguf", outtype=first)
        for other in others:
            dst = folder / f"{first}-{other}.gguf"
            case = Case(model, other)
            jobs.append(job(case, folder / f"{first}.gguf", dst, {}) | {"allow_requantize": True})
            made[f"{first} again {other}"] = str(dst)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [python, "-P", str(PROGRAM), str(folder / "jobs.json")]
    codes = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert not any(codes), codes
    return {name: digest(Path(dst)) for name, dst in made.items()}


def run(folder: Path, python: str) -> None:
    """Write the file of the smallest model."""
    streamconv.convert(smallest(folder / "run"), folder / "run.gguf", outtype="bf16")
    subprocess.run([python, "-P", str(PROGRAM), str(folder / "run.gguf"), str(WHOLE), "Q4_K_M"], check=True)


def main(python: str) -> int:
    made: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, make in MODELS.items():
            src = folder / f"{model}.gguf"
            streamconv.convert(make(folder / model), src, outtype=LOSSLESS[model])
            weights = weights_of(src, folder)
            found = [case for case in cases() if case.model == model]
            jobs = [job(case, src, folder / f"{n}.gguf", weights) for n, case in enumerate(found)]
            (folder / "jobs.json").write_text(json.dumps(jobs))
            command = [python, "-P", str(PROGRAM), str(folder / "jobs.json")]
            codes = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for n, (case, code) in enumerate(zip(found, codes, strict=True)):
                if code:
                    raise SystemExit(f"{case}: llama_model_quantize answers {code}")
                made[str(case)] = digest(folder / f"{n}.gguf")
        made |= again(folder, python)
        run(folder, python)
    GOLDENS.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
