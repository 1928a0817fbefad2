"""Asks llama.cpp's own quantizer for the types of tensors: `python -m tests.tools.make_mix_goldens PYTHON`.

PYTHON has llama-cpp-python (see quantize.py, which it runs). Writes tests/data/goldens/mixes.json: for each case of
tests/mixed_models.py a letter for each tensor, and of some models the digest of all data.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from streamconv.ggml.mixes import MIXES
from tests import mixed_models
from tests.mixed_models import LETTERS, MODELS, REFUSED, WITH_DATA, Case, Model

GOLDENS = Path(__file__).parents[1] / "data" / "goldens" / "mixes.json"
PROGRAM = Path(__file__).with_name("quantize.py")


def job(case: Case, folder: Path) -> dict[str, Any]:
    options = case.options
    found: dict[str, Any] = {
        "src": str(folder / f"{case.model}.gguf"),
        "ftype": int(MIXES[case.mix].file_type),
        "pure": options.pure,
        "leave_output": options.leave_output,
        "overrides": [(pattern.pattern, int(type_)) for pattern, type_ in options.overrides],
    }
    if options.output_type is not None:
        found["output_type"] = int(options.output_type)
    if options.embedding_type is not None:
        found["embedding_type"] = int(options.embedding_type)
    if case.weighted:
        found["importance"] = json.loads((folder / f"{case.model}.json").read_text())
    return found


def write_model(name: str, model: Model, folder: Path) -> None:
    mixed_models.write(model, folder / f"{name}.gguf")
    index, offset = {}, 0
    with (folder / f"{name}.weights").open("wb") as file:
        for tensor, shape in model.tensors.items():
            if mixed_models.has_importance(tensor) and len(shape) > 1:
                weights = mixed_models.importance(tensor, shape)
                index[tensor] = [file.name, offset, weights.size]
                offset += file.write(weights.tobytes())
    (folder / f"{name}.json").write_text(json.dumps(index))


def results(name: str, model: Model, folder: Path, python: str) -> Iterator[tuple[Case, str, str | None]]:
    """(case, letters, digest or None) of the files that llama.cpp makes of one model."""
    found = [case for case in mixed_models.cases() if case.model == name]
    jobs = [{**job(case, folder), "dst": str(folder / f"{i}.gguf")} for i, case in enumerate(found)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [python, "-P", PROGRAM, folder / "jobs.json"], capture_output=True, text=True, check=False, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    for i, (case, status) in enumerate(zip(found, json.loads(done.stdout), strict=True)):
        yield case, *(result(case, model, folder / f"{i}.gguf") if status == 0 else (REFUSED, None))


def result(case: Case, model: Model, path: Path) -> tuple[str, str | None]:
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert tensors.keys() == model.tensors.keys()
    letters = "".join(LETTERS[tensors[name].tensor_type] for name in model.tensors)
    if case.model not in WITH_DATA or case.variant:
        return letters, None
    digest = hashlib.sha256()
    for name in model.tensors:
        digest.update(tensors[name].data.tobytes())
    return letters, digest.hexdigest()[:16]


def main(python: str) -> None:
    version = subprocess.run(
        [python, "-c", "import llama_cpp; print(llama_cpp.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    types, digests = {}, {}
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as directory:
            write_model(name, model := make(), Path(directory))
            for case, letters, digest in results(name, model, Path(directory), python):
                types[str(case)] = letters
                if digest is not None:
                    digests[str(case)] = digest
    goldens = {"llama-cpp-python": version, "types": types, "digests": digests}
    GOLDENS.write_text(json.dumps(goldens, indent=0) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
