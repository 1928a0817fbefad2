"""Make the references of the families again: `python -m tests.tools.families [NAME ...]`. Needs torch; half an hour.

transformers and PEFT save a random model for each entry of tests/families/table.py and an adapter on it, from which
names, shapes and configs are kept in tests/data/families. Filled with values that numpy makes from the entry's seed,
they are given to llama.cpp's converter, to llama.cpp and back to transformers. The same table and versions give the
same bytes. `--check` makes them without changing anything, and reports differences from the committed files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tests import cases, families, tiny
from tests.families import Family, build, images, tokenizers
from tests.oracles import ggufs, reference, runtime
from tests.tools import llama_cpp, vectors
from tests.tools import quantize as quantizer

# What adapter_config.json says of the machine that made it.
_BOS = 1  # of every family's tokenizer
_OF_TYPE = ("general.architecture", "general.type", "general.file_type", "general.quantization_version")
_MACHINE = ("base_model_name_or_path", "auto_mapping", "revision")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.tools.families", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *families.FAMILIES])
    parser.add_argument(
        "--quantizer", metavar="PYTHON", help="one with llama-cpp-python: makes the Q4_K_M references alone"
    )
    parser.add_argument("--check", action="store_true", help="change nothing, and fail where a reference differs")
    options = parser.parse_args(arguments)
    failed = []
    for name in options.names or families.FAMILIES:
        print(name, end=" ", flush=True)
        try:
            if options.quantizer:
                print(quantize(name, options.quantizer), flush=True)
            else:
                print(check(name) if options.check else make(name), flush=True)
        except Exception as error:
            failed.append(name)
            print(f"FAILED {type(error).__name__}: {error}", flush=True)
    print(f"{len(failed)} failed: {' '.join(failed)}")
    return 1 if failed else 0


def make(name: str) -> str:
    """The references of a family, written to tests/data/families; returns the distances in a line."""
    folder = families.DATA / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        _save_shapes(name, folder, Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        record, logits, seen = _references(name, Path(scratch))
    if (folder / "golden.json").exists() and _tensors(families.record(name)) == _tensors(record):
        record |= {key: value for key, value in families.record(name).items() if key == "q4_k_m"}
    (folder / "golden.json").write_text(ggufs.compact(record), encoding="utf-8")
    np.save(folder / "logits.npy", logits)
    if seen is not None:
        np.save(folder / "images.npy", seen)
    families.record.cache_clear()
    return _line(record)


def quantize(name: str, python: str) -> str:
    """Adds type and digest of each tensor of llama.cpp's Q4_K_M file, quantised from its F32 file."""
    family, record = families.FAMILIES[name], families.record(name)
    if "f32" in record["llamacpp"]["errors"]:
        return "has no F32 file"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        src = build.write_checkpoint(name, scratch / name)
        plain = _converted(family, src, scratch)["f32"]
        script = Path(quantizer.__file__)
        subprocess.run([python, "-P", script, plain, scratch / "q4.gguf", "Q4_K_M"], check=True, capture_output=True)
        tensors = ggufs.read(scratch / "q4.gguf").golden()["tensors"]
    record["q4_k_m"] = {tensor: [entry["type"], entry["sha256"]] for tensor, entry in tensors.items()}
    (families.DATA / name / "golden.json").write_text(ggufs.compact(record), encoding="utf-8")
    return str(dict(Counter(type_ for type_, _ in record["q4_k_m"].values())))


def check(name: str) -> str:
    """The same, compared with what is committed; AssertionError where they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        record, logits, seen = _references(name, Path(scratch))
    committed = families.record(name)
    for key in ("digest", "adapter_digest", "llamacpp", "mmproj"):
        assert record.get(key) == committed.get(key), key
    distance = max(_between(name, a, b) for a, b in zip(families.logits(name), logits, strict=True))
    assert distance < 1e-9, distance
    assert seen is None or runtime.kl(families.image_logprobs(name), seen) < 1e-9
    return _line(record)


def _save_shapes(name: str, folder: Path, scratch: Path) -> None:
    """config.json, adapter_config.json and spec.json, of a model and an adapter that their libraries save."""
    family = families.FAMILIES[name]
    kind: Any = reference.class_of(family.hf_name)
    settings = {
        "bos_token_id": _BOS,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "vocab_size": tokenizers.n_vocab(family.tokenizer),
    }
    config = kind.config_class(**settings | dict(family.config))
    model = kind._from_config(config, dtype=getattr(torch, family.dtype), attn_implementation="eager")
    model.save_pretrained(scratch / "model")
    written = json.loads((scratch / "model" / "config.json").read_text(encoding="utf-8"))
    written |= {"architectures": [family.saved_as]} if family.saved_as else {}
    tiny.write_json(folder / "config.json", written | dict(family.settings))
    targets = family.targets if isinstance(family.targets, str) else list(family.targets)
    lora = peft.LoraConfig(
        r=build.RANK, lora_alpha=build.ALPHA, target_modules=targets, task_type=family.task_type, bias="none"
    )
    peft.get_peft_model(model.float(), lora).save_pretrained(scratch / "adapter")
    adapter = json.loads((scratch / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    if isinstance(adapter["target_modules"], list):
        adapter["target_modules"].sort()  # PEFT has a set
    tiny.write_json(folder / "adapter_config.json", adapter | dict.fromkeys(_MACHINE))
    spec = {"tensors": _spelled(family, _shapes(scratch / "model")), "adapter": _shapes(scratch / "adapter")}
    if family.vectors is not None:
        vectors.save(family.vectors, config.hidden_size, getattr(torch, family.dtype), scratch / "model")
        spec["modules"] = vectors.keep(scratch / "model", folder)
    text = json.dumps(spec, separators=(",", ":")).replace('],"', '],\n"') + "\n"
    (folder / "spec.json").write_text(text, encoding="utf-8")


def _image_logits(src: Path, kind: Any) -> NDArray[np.float32]:
    """transformers' logits [images, vocab] after each of the images, its patches cut by hand, in a text."""
    model = reference.load(src, kind=kind)
    config = json.loads((src / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(src / "tokenizer.json"))
    texts = (f"{images.BEFORE}<|image_start|>", f"<|image_end|>{images.AFTER}")
    before, after = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    size, factor = config["vision_config"]["patch_size"], config["downsample_factor"]
    found = []
    for height, width in images.SIZES:
        shape = (height // size, width // size)
        mean, std = (np.array(one, dtype=np.float32) for one in _normalisation(src))
        values = (images.pixels(height, width).astype(np.float32) / 255 - mean) / std
        patches = values.reshape(shape[0], size, shape[1], size, 3).swapaxes(1, 2).reshape(1, shape[0] * shape[1], -1)
        n_tokens = shape[0] * shape[1] // factor**2
        ids = [_BOS, *before, *[config["image_token_id"]] * n_tokens, *after]
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor([ids]),
                pixel_values=torch.from_numpy(np.ascontiguousarray(patches)),
                spatial_shapes=torch.tensor([shape]),
                pixel_attention_mask=torch.ones(1, patches.shape[1], dtype=torch.long),
            ).logits
        found.append(logits[0, -1].float().numpy())
    return np.stack(found)


def _normalisation(src: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels, as the processor of a checkpoint has them."""
    said: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (src / name).exists():
            read = json.loads((src / name).read_text(encoding="utf-8"))
            said |= read | read.get("image_processor", {})
    return said["image_mean"], said["image_std"]


def _spelled(family: families.Family, shapes: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """By the names that a publisher has for the tensors."""
    found = {}
    for name, shape in shapes.items():
        old = next((beginning for beginning in family.spelled if name.startswith(beginning)), "")
        found[family.spelled.get(old, "") + name.removeprefix(old)] = shape
    return found


def _shapes(directory: Path) -> dict[str, list[Any]]:
    return {name: [tensor.dtype, *tensor.shape] for name, tensor in sorted(tiny.tensors_of(directory).items())}


def _references(name: str, scratch: Path) -> tuple[dict[str, Any], NDArray[np.float32], NDArray[Any] | None]:
    """What llama.cpp's converter, its runtime, transformers and PEFT make of a family's checkpoint and adapter."""
    family = families.FAMILIES[name]
    src = build.write_checkpoint(name, scratch / name)
    adapter = build.write_adapter(name, scratch / "adapter")
    logits = [_outputs(family, src, path) for path in (None, adapter)]
    merged = _outputs(family, src, adapter, merge=True)
    assert _between(name, logits[1], merged) < 1e-9, "merged is not applied"
    change = _between(name, logits[0], logits[1])
    assert change > 1e-5, f"the adapter changes next to nothing: {change}"
    kept = np.stack(logits).astype(np.float32)
    made = _converted(family, src, scratch)
    record = {
        "digest": tiny.digest(src),
        "adapter_digest": tiny.digest(adapter),
        "llamacpp": ggufs.packed({outtype: _golden(file) for outtype, file in made.items()}),
        "kl": _distance(name, kept[0], made["f32"]),
    }
    seen = None
    if family.has_projector:
        (scratch / "projectors").mkdir()
        files = llama_cpp.convert_all(src, scratch / "projectors", cases.OUTTYPES, mmproj=True)
        record["mmproj"] = ggufs.packed({outtype: _golden(file, kept=_OF_TYPE) for outtype, file in files.items()})
        seen = families.see(Path(made["f32"]), Path(files["f32"]))
        record["image_kl"] = runtime.kl(_image_logits(src, reference.class_of(family.hf_name)), seen)
    record["adapter_kl"] = _adapter_distance(name, kept[1], made["f32"], adapter, src, scratch)
    return record, kept, seen


def _converted(family: Family, src: Path, scratch: Path) -> dict[str, Path | str]:
    """llama.cpp's file, or its error, of each outtype."""
    if family.vectors is None or not family.vectors.dense:
        return llama_cpp.convert_all(src, scratch, cases.OUTTYPES, pre=family.pre)
    # Dense layers of EmbeddingGemma are written where that is asked for, and those of one run are kept for the next.
    found: dict[str, Path | str] = {}
    for outtype in cases.OUTTYPES:
        dst = scratch / f"{outtype}.gguf"
        try:
            options = ["--sentence-transformers-dense-modules"]
            found[outtype] = llama_cpp.convert(src, dst, outtype, pre=family.pre, options=options)
        except llama_cpp.ConverterError as error:
            found[outtype] = str(error)
    return found


def _outputs(family: Family, src: Path, adapter: Path | None, *, merge: bool = False) -> NDArray[np.float32]:
    """What transformers, and sentence-transformers' modules after it, make of the prompt."""
    kind = reference.class_of(family.hf_name)
    if family.vectors is None:
        logits = reference.logits(src, families.IDS, kind=kind, adapter=adapter, merge=merge)
        return np.asarray(logits[list(families.POSITIONS)], np.float32)
    if family.vectors.answers is not None:
        texts = vectors.questions(src, families.QUERY, families.DOCUMENTS)
        lasts = [reference.logits(src, ids, kind=kind, adapter=adapter, merge=merge)[-1] for ids in texts]
        return vectors.scores(src, np.stack(lasts))
    hidden = (reference.hidden_states(src, ids, adapter, merge=merge, kind=kind) for ids in families.texts(family))
    return np.concatenate([vectors.apply(src, states) for states in hidden])


def _between(name: str, one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    is_text = families.FAMILIES[name].vectors is None
    return families.distance(name, one, runtime.normalized(other) if is_text else np.asarray(other, np.float64))


def _golden(made: Path | str, kept: Collection[str] = ()) -> dict[str, Any]:
    if isinstance(made, str):
        return {"error": made}
    golden = ggufs.read(made).golden()
    golden["kv"] = {key: entry for key, entry in golden["kv"].items() if key in kept or not key.startswith("general.")}
    return golden


def _distance(name: str, logits: NDArray[np.float32], made: Path | str, adapters: Any = ()) -> float | str:
    """The distance of llama.cpp's own file from transformers, or why there is none."""
    if isinstance(made, str):
        return made
    outcome = runtime.load(made, adapters, gives=families.gives(name))
    if outcome.status != "loaded":
        return f"{outcome.status}: {outcome.log.strip().splitlines()[-1]}"
    found = families.run(name, made, adapters)
    same = found.shape == logits.shape
    return families.distance(name, logits, found) if same else f"gives {list(found.shape)}, not {list(logits.shape)}"


def _adapter_distance(
    name: str, logits: NDArray[np.float32], base: Path | str, adapter: Path, src: Path, scratch: Path
) -> float | str:
    try:
        made = llama_cpp.convert_lora(adapter, src, scratch / "adapter.gguf", pre=families.FAMILIES[name].pre)
    except llama_cpp.ConverterError as error:
        return str(error)
    return _distance(name, logits, base, [(made, 1.0)])


def _tensors(record: Mapping[str, Any]) -> Any:
    return record["llamacpp"].get("tensors")


def _line(record: Mapping[str, Any]) -> str:
    """The distances, and what llama.cpp's converter refused."""
    errors = record["llamacpp"]["errors"]
    shown = [
        f"{key}={record[key]:.1e}" if isinstance(record[key], float) else f"{key}: {record[key]}"
        for key in ("kl", "adapter_kl")
    ]
    shown += [f"image_kl={record['image_kl']:.1e}"] if "image_kl" in record else []
    return "; ".join([*shown, *dict.fromkeys(f"{outtype}: {error}" for outtype, error in errors.items())])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
