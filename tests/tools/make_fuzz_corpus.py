"""The valid cases of tests/fuzz/corpus, made again: `python -m tests.tools.make_fuzz_corpus`.

Weights are zeros: no target reads one, and zeros cost the repository nothing.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamconv.api.convert_model import convert
from streamconv.errors import DestinationError
from streamconv.output.destination import resolve
from streamconv.output.sink import Sink
from tests import tiny
from tests.fuzz.loop import CORPUS
from tests.fuzz.targets import IMPORTANCES, N_VOCAB, OUTPUT_NBYTES
from tests.property.test_gguf_reader import VALID
from tests.tiny.tokenizer import write_tekken
from tests.tools import gguf_bytes

BASES = CORPUS.parent / "bases"
SMALL: dict[str, Any] = {"hidden": 16, "n_heads": 2, "n_kv_heads": 1, "ff": 32}
MODELS: dict[str, Callable[[Path], Path]] = {
    "lfm2": partial(tiny.lfm2, n_layers=2, attention=(1,), vocab=404, **SMALL),
    "lfm2-shards": partial(
        tiny.lfm2, n_layers=2, attention=(0,), vocab=404, tied=False, n_shards=2, layers_by=("full_attn_idxs",), **SMALL
    ),
    "lfm2moe": partial(tiny.lfm2moe, n_layers=2, attention=(1,), vocab=404, n_experts=2, n_used=1, moe_ff=48, **SMALL),
    "lfm2moe-stacked": partial(
        tiny.lfm2moe, n_layers=2, attention=(1,), vocab=404, n_experts=2, n_used=1, moe_ff=48, stacked=True, **SMALL
    ),
    "llama": partial(
        tiny.llama,
        n_layers=1,
        tied=False,
        attention_bias=True,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        **SMALL,
    ),
    "llama-spm": partial(tiny.llama, n_layers=1, tokenizer="spm", **SMALL),
}
CARD = """---
license: other
license_name: lfm1.0
license_link: LICENSE
language:
- en
- "no"
tags:
- liquid
pipeline_tag: text-generation
base_model: LiquidAI/LFM2-1.2B
base_model_relation: finetune
datasets:
- a/b
model_name: Tiny Thing
---
# Tiny
"""
JOBS = """[defaults]
outtype = "q8_0"
output = "out/{name}-{outtype}.gguf"
[[job]]
source = "models/one"
name = "one"
split_max_size = "4G"
[[job]]
source = "adapter"
command = "lora"
base = "models/one"
max_memory = "96MiB"
force = true
"""
JOB_LINES = """{"source": "models/one", "output": "a/{name}.gguf", "verify": true}
{"source": "two", "command": "verify", "output": "b.gguf", "dialect": "ollama-legacy"}
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for name, make in MODELS.items():
            _model(name, make(scratch / name))
        _vocabularies(scratch)
        _tekken(scratch)
        _adapters(scratch)
        _ggufs(scratch)
        _journal(scratch)
    _importances()
    for name, text in (("jobs.toml", JOBS), ("jobs.jsonl", JOB_LINES)):
        _write("jobs", f"valid-{name.replace('.', '-')}", {name: text.encode()})
    generation = json.dumps({"temperature": 0.3, "top_k": 40, "min_p": 0.15, "repetition_penalty": 1.05})
    _write(
        "card",
        "valid",
        {"README.md": CARD.encode(), "generation_config.json": generation.encode(), "config.json": b"{}"},
    )


def _importances() -> None:
    tensors = {
        name: np.ones((shape[0] if len(shape) > 2 else 1, shape[-1]), "<f4") for name, shape in IMPORTANCES.items()
    }
    pairs = {}
    for name, sums in tensors.items():
        pairs |= {f"{name}.in_sum2": sums, f"{name}.counts": sums[:, :1] * 3}
    infos, data = [], b""
    for name, numbers in pairs.items():
        infos.append(gguf_bytes.tensor(name, numbers.shape[::-1], gguf_bytes.F32, len(data)))
        data += numbers.tobytes() + bytes(-numbers.nbytes % 32)
    keys = [
        gguf_bytes.key("general.type", gguf_bytes.STRING, gguf_bytes.text("imatrix")),
        gguf_bytes.array("imatrix.datasets", gguf_bytes.STRING, gguf_bytes.text("wiki"), 1),
        gguf_bytes.number("imatrix.chunk_count", "I", 4),
        gguf_bytes.number("imatrix.chunk_size", "I", 512),
    ]
    _write("imatrix", "valid-gguf", {"imatrix.gguf": gguf_bytes.gguf(keys, infos, data)})
    older = struct.pack("<i", len(tensors))
    for name, sums in tensors.items():
        older += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 5, sums.size) + sums.tobytes()
    _write("imatrix", "valid-older", {"imatrix.dat": older + struct.pack("<ii", 5, 4) + b"wiki"})


def _model(name: str, path: Path) -> None:
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    files = {
        name: _without_weights(content) if name.endswith(".safetensors") else content for name, content in files.items()
    }
    parsed = {n: c for n, c in files.items() if n == "config.json" or "safetensors" in n}
    _write("checkpoint", f"valid-{name}", parsed)
    if name in ("lfm2", "llama-spm"):
        _write("plan", f"valid-{name}", files | {"README.md": CARD.encode()})


def _without_weights(content: bytes) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    return content[:end] + bytes(len(content) - end)


def _vocabularies(scratch: Path) -> None:
    for name, keep in (("lfm2", 40), ("llama", 40)):
        files = {
            f.name: f.read_bytes() for f in (scratch / name).iterdir() if "token" in f.name or "template" in f.name
        }
        files["tokenizer.json"] = _shortened(files["tokenizer.json"], keep)
        _write("vocabulary", f"valid-{name}", files)
    spm = scratch / "llama-spm"
    companions = {f.name: f.read_bytes() for f in spm.iterdir() if f.name in ("tokenizer_config.json",)}
    tokenizer = _shortened((spm / "tokenizer.json").read_bytes(), 40)
    _write("vocabulary", "valid-spm-json", companions | {"tokenizer.json": tokenizer})
    _write(
        "vocabulary",
        "valid-spm-model",
        companions | {"tokenizer.model": _short_model((spm / "tokenizer.model").read_bytes())},
    )
    templates = {
        "tokenizer_config.json": json.dumps({"chat_template": [{"name": "default", "template": "{{ x }}"}]}).encode()
    }
    short = (CORPUS / "vocabulary" / "valid-lfm2" / "tokenizer.json").read_bytes()
    _write("vocabulary", "valid-templates", templates | {"tokenizer.json": short, "chat_template.jinja": b"{{ y }}"})


def _tekken(scratch: Path) -> None:
    """tekken.json without special tokens, as of version 3, and with, as of later ones; 14 tokens beyond the bytes."""
    listed = [{"rank": rank, "token_str": text} for rank, text in enumerate(("<unk>", "<s>", "</s>"))]
    later: dict[str, Any] = {"special_tokens": listed, "config": {"version": "v13"}}
    for name, changes in (("v3", {}), ("v13", later)):
        write_tekken(scratch, **changes)
        value = json.loads((scratch / "tekken.json").read_bytes())
        value["vocab"] = value["vocab"][: 256 + 14]
        value["config"]["default_vocab_size"] = value["config"]["default_num_special_tokens"] + 256 + 12
        _write("tekken", f"valid-{name}", {"tekken.json": json.dumps(value).encode()})


def _shortened(text: bytes, keep: int) -> bytes:
    """The tokenizer's first `keep` tokens, and the merges of these, so that an execution takes under a millisecond."""
    value = json.loads(text)
    model = value["model"]
    merges = model["merges"]
    bytes_ = [token for token, id_ in model["vocab"].items() if id_ < keep]
    made = []
    for merge in merges:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        if len(made) < 6:
            made.append(merge)
            bytes_ += [part for part in (left, right, left + right) if part not in bytes_]
    model["vocab"] = {token: index for index, token in enumerate(dict.fromkeys(bytes_))}
    model["merges"] = made
    for entry in value["added_tokens"]:
        entry["id"] = model["vocab"].get(entry["content"], len(model["vocab"]))
    assert len(model["vocab"]) < N_VOCAB
    return json.dumps(value).encode()


def _short_model(content: bytes) -> bytes:
    """Pieces 1 to 59 of a SentencePiece model, then its trainer's and normaliser's settings (fields 2 and 3)."""
    at, n_pieces, kept = 0, 0, b""
    while at < len(content):
        start = at
        tag = content[at]
        at += 1
        nbytes = shift = 0
        while True:
            byte = content[at]
            at += 1
            nbytes |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        at += nbytes
        n_pieces += tag == 0x0A
        if tag != 0x0A or n_pieces < N_VOCAB - 4:
            kept += content[start:at]
    return kept


def _adapters(scratch: Path) -> None:
    base = scratch / "llama"
    peft = tiny.peft_adapter(scratch / "peft", base, targets=("q_proj", "down_proj"), r=2)
    patterns = tiny.peft_adapter(
        scratch / "patterns", base, targets=("k_proj", "o_proj"), r=2, rslora=True, rank_pattern={"o_proj": 1},
        alpha_pattern={"k_proj": 3.0}, dtype="BF16",
    )  # fmt: skip
    mlx = tiny.mlx_adapter(scratch / "mlx", base, targets=("q_proj", "v_proj"), r=2)
    for name, path in (("peft", peft), ("patterns", patterns), ("mlx", mlx)):
        _write("adapter", f"valid-{name}", {file.name: file.read_bytes() for file in path.iterdir()})


def _ggufs(scratch: Path) -> None:
    base = scratch / "base.gguf"
    convert(scratch / "llama", base)
    content = base.read_bytes()
    BASES.mkdir(exist_ok=True)
    (BASES / "llama.gguf").write_bytes(content)
    _write("gguf", "valid", {"x.gguf": VALID})
    _write("gguf", "valid-llama", {"x.gguf": content[: len(content) // 3]})


def _journal(scratch: Path) -> None:
    import numpy as np

    dst = scratch / "out.gguf"
    try:
        with Sink.create(resolve(dst), OUTPUT_NBYTES, identity={"seed": "7"}) as sink:
            sink.write(0, np.zeros(4096, dtype=np.uint8))
            sink.record(4096, {"a": [1, 0]})
            raise DestinationError("leave it", code="leave")
    except DestinationError:
        pass
    journal = dst.with_name("out.gguf.part.journal").read_bytes()
    lines = journal.rstrip(b"\0")
    _write("journal", "valid", {"x.journal": lines})


def _write(target: str, name: str, files: dict[str, bytes]) -> None:
    folder = CORPUS / target / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)


if __name__ == "__main__":
    main()
