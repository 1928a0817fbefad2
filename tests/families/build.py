"""Checkpoints and adapters of the families, made by numpy from committed data: config, names, shapes and a seed.

What is built is compared with the digest that its references were made from, so that drift fails loudly.

A folder of tests/data/families holds config.json and adapter_config.json as transformers and PEFT save them, spec.json
(names, dtypes and shapes of the saved tensors), golden.json and logits.npy (the results of llama.cpp's converter and of
transformers).
"""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import tiny
from tests.families import images, tokenizers
from tests.families.table import FAMILIES, Family
from tests.oracles import ggufs, runtime

DATA = Path(__file__).resolve().parents[1] / "data" / "families"

# The prompt of the logits: longer than the windows in the table, and within every vocabulary here.
IDS = (1, 33, 120, 7, 300, 201, 64, 90, 259, 311, 18, 77, 145, 233, 9, 280, 101, 56, 330, 12, 190, 45, 270, 88)
POSITIONS = (2, 11, 23)  # the positions of IDS whose logits are kept

# What a reranker's scores are of.
QUERY = "How many legs has a spider?"
DOCUMENTS = ("A spider has eight legs.", "Ants have six legs, and spiders two more.", "Paris is in France.")

N_CTX = 256  # of the runtime; some models compute otherwise beyond a length that they state

RANK, ALPHA = 8, 12  # of each family's adapter

# Tensors that are looked up by token or make logits: of a size that gives a distribution neither flat nor certain.
_ENDS = ("embed_tokens.weight", "lm_head.weight", "embed_out.weight", "wte.weight")


def checkpoint(name: str, directory: Path) -> Path:
    """The checkpoint of a family in `directory`, the one that its references were made of."""
    built = write_checkpoint(name, directory)
    _check(name, "digest", built)
    return built


def adapter(name: str, directory: Path) -> Path:
    """The PEFT adapter on that checkpoint."""
    built = write_adapter(name, directory)
    _check(name, "adapter_digest", built)
    return built


def write_checkpoint(name: str, directory: Path) -> Path:
    """As `checkpoint`, before there are references."""
    family = FAMILIES[name]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizers.write(family.tokenizer, directory)
    shutil.copy(DATA / name / "config.json", directory)
    for file, content in family.files.items():
        tiny.write_json(directory / file, content)
    tensors = {
        tensor: tiny.Tensor.of(values(family, tensor, tuple(shape)), dtype)
        for tensor, (dtype, *shape) in spec(name)["tensors"].items()
    }
    tiny.write_safetensors(directory / "model.safetensors", tensors)
    _write_modules(name, directory)
    return directory


def _write_modules(name: str, directory: Path) -> None:
    """What sentence-transformers has beside a model that gives vectors."""
    if FAMILIES[name].vectors is None:
        return
    shutil.copy(DATA / name / "modules.json", directory)
    for config in DATA.glob(f"{name}/*/config.json"):
        folder = directory / config.parent.name
        folder.mkdir(exist_ok=True)
        shutil.copy(config, folder)
        if stored := spec(name)["modules"].get(folder.name):
            tensors = {
                tensor: tiny.Tensor.of(values(FAMILIES[name], tensor, tuple(shape)), dtype)
                for tensor, (dtype, *shape) in stored.items()
            }
            tiny.write_safetensors(folder / "model.safetensors", tensors)


def write_adapter(name: str, directory: Path) -> Path:
    """As `adapter`, before there are references."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(DATA / name / "adapter_config.json", directory)
    tensors = {
        tensor: tiny.Tensor.of(_factor(FAMILIES[name].seed, tensor, tuple(shape)), dtype)
        for tensor, (dtype, *shape) in spec(name)["adapter"].items()
    }
    tiny.write_safetensors(directory / "adapter_model.safetensors", tensors)
    return directory


def values(family: Family, name: str, shape: tuple[int, ...]) -> tiny.Float:
    """The values of a parameter: norms around their mean, small biases, matrices that keep the scale of their input."""
    if len(shape) <= 1 or "norm" in name.rpartition(".")[0].rpartition(".")[2]:
        if name.endswith("weight") and len(shape) <= 2 and "norm" in name:
            return np.float32(family.norm_mean) + tiny.noise(name, shape, 0.2, family.seed)
        return tiny.noise(name, shape, 0.1, family.seed)
    gain = family.ends_gain if name.endswith(_ENDS) else family.gain
    fan_in = math.prod(shape[1:]) if len(shape) == 4 else shape[-1]
    return tiny.noise(name, shape, gain / math.sqrt(fan_in), family.seed)


def spec(name: str) -> Any:
    """{"tensors": {name: [dtype, *shape]}, "adapter": the same} of a family."""
    return json.loads((DATA / name / "spec.json").read_text(encoding="utf-8"))


@cache
def record(name: str) -> Any:
    """What is committed of a family's references: digests, llama.cpp's files, and its distances from transformers."""
    return json.loads((DATA / name / "golden.json").read_text(encoding="utf-8"))


def golden(name: str, outtype: str) -> dict[str, Any]:
    """llama.cpp's file of a family in the form of `tests.oracles.ggufs`, without `general.*`.

    Of q4_k_m, which llama-quantize made, the tensors alone.
    """
    if outtype != "q4_k_m":
        return ggufs.unpacked(record(name)["llamacpp"], outtype)
    plain = ggufs.unpacked(record(name)["llamacpp"], "bf16")["tensors"]
    made = record(name)["q4_k_m"]
    return {"tensors": {t: {"ne": e["ne"], "sha256": made[t][1], "type": made[t][0]} for t, e in plain.items()}}


def projector(name: str, outtype: str) -> dict[str, Any]:
    """llama.cpp's projector file of a family, as `golden`; with those of `general.*` that are not the folder's."""
    return ggufs.unpacked(record(name)["mmproj"], outtype)


def logits(name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What transformers makes of IDS, float32: of the model, and with its adapter.

    Logits [POSITIONS, vocab], or the vectors of `texts`.
    """
    base, adapted = np.load(DATA / name / "logits.npy")
    return base, adapted


def image_logprobs(name: str) -> NDArray[np.float64]:
    """What llama.cpp predicts from its own two files after each image: log-probabilities [images, vocab]."""
    found: NDArray[np.float64] = np.load(DATA / name / "images.npy").astype(np.float64)
    return found


def see(gguf: Path, mmproj: Path) -> NDArray[np.float64]:
    """What llama.cpp predicts from two files after each image: log-probabilities [images, vocab]."""
    with runtime.Runtime(gguf, mmproj=mmproj, n_ctx=N_CTX) as model:
        shown = [images.png(images.pixels(*size)) for size in images.SIZES]
        return np.stack([model.logprobs_after_media(images.BEFORE, one, images.AFTER) for one in shown])


def texts(family: Family) -> list[tuple[int, ...]]:
    """The texts that a retrieval model makes vectors of: three, or one where each token has its own."""
    assert family.vectors is not None
    return [IDS] if family.vectors.pooling is None else [IDS[: position + 1] for position in POSITIONS]


def run(name: str, gguf: Path, adapters: Any = ()) -> NDArray[np.float64]:
    """What llama.cpp makes of IDS, adapters applied at runtime: log-probabilities [POSITIONS, vocab], or vectors."""
    with runtime.Runtime(gguf, adapters, n_ctx=n_ctx(name), gives=gives(name)) as model:
        return predictions(name, model)


def n_ctx(name: str) -> int:
    """Of the runtime: enough for a reranker's question."""
    return 640 if gives(name) == "scores" else N_CTX


def gives(name: str) -> str:
    """What the runtime makes with a family's file, as `runtime.Runtime` calls it."""
    wanted = FAMILIES[name].vectors
    return "tokens" if wanted is None else "vectors" if wanted.answers is None else "scores"


def predictions(name: str, model: runtime.Runtime) -> NDArray[np.float64]:
    """As `run`, of a model that is loaded."""
    if gives(name) == "scores":
        return np.array(model.scores(QUERY, DOCUMENTS))[:, None]
    if gives(name) == "tokens":
        return np.stack([model.next_logprobs(IDS[: position + 1]) for position in POSITIONS])
    return np.concatenate([model.vectors(ids) for ids in texts(FAMILIES[name])])


def distance(name: str, reference: NDArray[np.float32], made: NDArray[np.float64]) -> float:
    """How far the runtime is from transformers: KL divergence of distributions, cosine distance of vectors."""
    return runtime.kl(reference, made) if FAMILIES[name].vectors is None else runtime.distance(reference, made)


def _factor(seed: int, name: str, shape: tuple[int, ...]) -> tiny.Float:
    """Factors whose product is a tenth of the size of the weight that it changes."""
    size = 0.1 / math.sqrt(shape[-1]) if "lora_B" in name else 1 / math.sqrt(shape[-1])
    return tiny.noise(name, shape, size, seed)


def _check(name: str, key: str, built: Path) -> None:
    assert tiny.digest(built) == record(name)[key], f"{name} drifted from what its references were made of"
