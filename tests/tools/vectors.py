"""The modules of sentence-transformers, saved beside a model and applied to its hidden states. Needs the library.

Makes that part of the references of retrieval families; tests/oracles/reference.py runs the model before the modules.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray

from streamconv.architectures import qwen3
from tests import tiny
from tests.families.table import Vectors

# The names of classes in modules.json, as most published folders have them.
_CLASSES = {
    "sentence_transformers": "sentence_transformers.models.{name}",
    "pylate": "pylate.models.{name}.{name}",
}


def _class(name: str) -> Any:
    from sentence_transformers.cross_encoder.modules import LogitScore
    from sentence_transformers.sentence_transformer import modules

    return LogitScore if name == "LogitScore" else getattr(modules, name)


def save(wanted: Vectors, width: int, dtype: torch.dtype, folder: Path) -> None:
    """modules.json and the modules' folders, beside a model whose hidden states have `width`."""
    listed = [("", "sentence_transformers.models.Transformer")]

    def add(name: str, module: Any) -> None:
        path = f"{len(listed)}_{name}"
        (folder / path).mkdir()
        module.to(dtype).save(str(folder / path))
        by = wanted.by if name == "Dense" else "sentence_transformers"
        listed.append((path, _CLASSES[by].format(name=name)))

    if wanted.pooling is not None:
        add("Pooling", _class("Pooling")(width, wanted.pooling))
    if wanted.answers is not None:
        add("LogitScore", _class("LogitScore")(*wanted.answers))
    name = "token_embeddings" if wanted.pooling is None else "sentence_embedding"
    for n_out, has_bias in wanted.dense:
        module = _class("Dense")(width, n_out, has_bias, torch.nn.Identity(), module_input_name=name)
        add("Dense", module)
        width = n_out
    entries = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(listed)]
    tiny.write_json(folder / "modules.json", entries)


def keep(saved: Path, folder: Path) -> dict[str, Any]:
    """What `save` wrote, without numbers, put into `folder`; returns names, dtypes and shapes by the modules' paths."""
    shutil.copy(saved / "modules.json", folder)
    spec = {}
    for path in sorted(saved.glob("*/config.json")):
        (folder / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, folder / path.parent.name)
        tensors = tiny.tensors_of(path.parent) if (path.parent / "model.safetensors").exists() else {}
        if tensors:
            spec[path.parent.name] = {name: [one.dtype, *one.shape] for name, one in sorted(tensors.items())}
    return spec


def apply(folder: Path, states: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [1, width], or [tokens, width] without a pooling, of hidden states [tokens, hidden] in float32."""
    tokens = torch.from_numpy(states)[None]
    features: dict[str, Any] = {"token_embeddings": tokens, "attention_mask": torch.ones(tokens.shape[:2])}
    for entry in json.loads((folder / "modules.json").read_text(encoding="utf-8"))[1:]:
        module = _class(entry["type"].rpartition(".")[2]).load(str(folder), subfolder=entry["path"])
        with torch.inference_mode():
            features = module.float().eval()(features)
    made = features.get("sentence_embedding", features["token_embeddings"][0])
    return np.asarray(made.numpy(), np.float32)


def questions(folder: Path, query: str, documents: Sequence[str]) -> list[list[int]]:
    """The tokens of what a reranker is asked of each document."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [qwen3.QUESTION.replace("{query}", query).replace("{document}", text) for text in documents]
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def scores(folder: Path, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """How likely the answer for is, [texts, 1], by the logits [texts, vocab] of what follows each."""
    entry = json.loads((folder / "modules.json").read_text(encoding="utf-8"))[1]
    module = _class("LogitScore").load(str(folder), subfolder=entry["path"])
    odds = module({"causal_logits": torch.from_numpy(logits)[:, None]})["scores"]
    return np.asarray(torch.sigmoid(odds).numpy(), np.float32)
