"""Every family whose name an architecture takes: tensors, keys, predictions, adapters, tokens, memory.

A family is tried as soon as `tests/families/table.py` has an entry and `streamconv/architectures/` a file for its name;
see tests/data/families/README.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.ggml.outtypes import OUTTYPES
from streamconv.recipe.registry import all_recipes
from tests import cases, families
from tests.extras import tokenizers
from tests.families.table import FAMILIES
from tests.oracles import ggufs, runtime

SUPPORTED = {name for recipe in all_recipes() for name in (*recipe.hf_names, *recipe.bodies)}
NAMES = [name for name, family in FAMILIES.items() if (family.saved_as or family.hf_name) in SUPPORTED]
COMPARED = [name for name in NAMES if FAMILIES[name].without_llama_cpp is None]

KL = 1e-8  # what a file is allowed that is better than this, whatever llama.cpp's own reaches
ROUNDING = 1.05  # llama.cpp's own file predicts the same but for the order of sums


class Workshop:
    """Checkpoints of the families and what streamconv makes of them, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.predictions = cache(self._predictions)

    def source(self, name: str) -> Path:
        path = self._root / "sources" / name
        return path if path.exists() else families.checkpoint(name, path)

    def adapter(self, name: str) -> Path:
        path = self._root / "adapters" / name
        return path if path.exists() else families.adapter(name, path)

    def gguf(self, name: str, outtype: str = "f32") -> Path:
        path = self._root / f"{name}-{outtype}.gguf"
        if not path.exists():
            streamconv.convert(self.source(name), path, outtype=outtype)
        return path

    def _predictions(self, name: str) -> tuple[Any, dict[str, list[int]]]:
        """What the F32 file makes of the prompt, and its tokens of each text."""
        with runtime.Runtime(self.gguf(name), n_ctx=families.n_ctx(name), gives=families.gives(name)) as model:
            return families.predictions(name, model), {text: model.tokenize(text) for text in cases.TEXTS}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("families"))


def allowed(name: str, key: str = "kl") -> float:
    """The distance from transformers that a right file keeps to."""
    own = families.record(name)[key]
    is_right = all(wrong.startswith("tokenizer.") for wrong in FAMILIES[name].wrong_keys)
    return max(KL, ROUNDING * own) if is_right and isinstance(own, float) else KL


@pytest.mark.parametrize("outtype", [*cases.OUTTYPES, *({"q4_k_m"} & OUTTYPES.keys())])
@pytest.mark.parametrize("name", COMPARED)
def test_tensors_are_llama_cpps(workshop: Workshop, name: str, outtype: str) -> None:
    ours = ggufs.read(workshop.gguf(name, outtype))
    assert ggufs.tensor_faults(ours, families.golden(name, outtype)) == []
    assert ggufs.layout_faults(ours.path) == []


@pytest.mark.parametrize("name", COMPARED)
def test_every_key_of_llama_cpps_has_its_value(workshop: Workshop, name: str) -> None:
    ours, golden = ggufs.read(workshop.gguf(name)), families.golden(name, "f32")
    for key in (key for key in FAMILIES[name].wrong_keys if not key.startswith("clip.")):  # a projector's
        golden["kv"].pop(key, None)
        assert key in ours.keys
    assert golden["kv"].keys() - ours.keys.keys() == set()
    assert ggufs.key_faults(ours, golden) == []


@pytest.mark.parametrize("name", NAMES)
def test_run_time_predicts_what_transformers_does(workshop: Workshop, name: str) -> None:
    made, _ = workshop.predictions(name)
    assert families.distance(name, families.logits(name)[0], made) < allowed(name)


@pytest.mark.parametrize("name", NAMES)
def test_run_time_predicts_what_peft_does(workshop: Workshop, name: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    streamconv.convert_adapter(workshop.adapter(name), workshop.source(name), adapter, outtype="f32")
    made = families.run(name, workshop.gguf(name), [(adapter, 1.0)])
    assert families.distance(name, families.logits(name)[1], made) < allowed(name, "adapter_kl")


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_adapter_is_the_applied_one(workshop: Workshop, name: str, tmp_path: Path) -> None:
    merged = tmp_path / "merged.gguf"
    streamconv.convert(workshop.source(name), merged, outtype="f32", adapters=[workshop.adapter(name)])
    distance = families.distance(name, families.logits(name)[1], families.run(name, merged))
    assert distance < max(allowed(name), allowed(name, "adapter_kl"))


@pytest.mark.parametrize("name", NAMES)
def test_run_time_tokenizes_as_the_library_does(workshop: Workshop, name: str) -> None:
    reference = tokenizers.Tokenizer.from_file(str(workshop.source(name) / "tokenizer.json"))
    _, tokens = workshop.predictions(name)
    assert tokens == {text: reference.encode(text, add_special_tokens=False).ids for text in tokens}


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].tokenizer == "qwen2-eos"])
def test_run_time_ends_texts_as_the_library_does(workshop: Workshop, name: str) -> None:
    reference = tokenizers.Tokenizer.from_file(str(workshop.source(name) / "tokenizer.json"))
    with runtime.Runtime(workshop.gguf(name), gives="vectors") as model:
        tokens = model.tokenize("How many legs?", add_special=True)
    assert tokens == reference.encode("How many legs?").ids
    assert tokens[-1] == reference.token_to_id("<|im_end|>")


_CHILD = """
import json, sys, streamconv
source, out = sys.argv[1:]
projected = streamconv.convert(source, out, outtype="f16", dry_run=True).memory["projected"]
print(json.dumps([projected, streamconv.convert(source, out, outtype="f16").peak_rss_nbytes]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_projected_memory_is_what_is_used(workshop: Workshop, name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _CHILD, str(workshop.source(name)), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    projected, measured = json.loads(done.stdout)
    assert measured <= projected
