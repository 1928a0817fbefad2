"""What README and docs say of small machines and large models: a 1 GB machine, shards of any size, 45,036 tensors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import shapes, vocabulary
from tests import tiny

README = Path(__file__).parents[2] / "README.md"
SECTION = "## From fine-tune to one GGUF on a 1 GB machine"
NAME = "LFM2-112K-My-Adapter-Q8_0.gguf"
HOLE_NBYTES = 5 << 30


def blocks(section: str) -> list[str]:
    """The code blocks of one section of README."""
    (text,) = re.findall(rf"^{re.escape(section)}\n(.*?)^## ", README.read_text(encoding="utf-8"), re.M | re.S)
    return re.findall(r"^```\n(.*?)^```", text, re.M | re.S)


def with_hole(directory: Path) -> Path:
    """A tiny Llama in one shard of 5 GiB: behind a tensor that is not converted, and takes no disk, the weights."""
    tiny.llama(directory)
    tensors = tiny.tensors_of(directory)
    (path,) = directory.glob("*.safetensors")
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name in tensors:
        header[name]["data_offsets"] = [offset + HOLE_NBYTES for offset in header[name]["data_offsets"]]
    hole = {"dtype": "F32", "shape": [HOLE_NBYTES // 4], "data_offsets": [0, HOLE_NBYTES]}
    text = json.dumps({"model.rotary_emb.inv_freq": hole, **header}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(HOLE_NBYTES, os.SEEK_CUR)
        file.write(content[start:])
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v holds on Linux")
def test_the_blocks_for_a_1_gb_machine_do_what_they_say(tmp_path: Path) -> None:
    """With a shard that has more bytes than there are addresses."""
    base = with_hole(tmp_path / "LFM2-1.2B")
    tiny.peft_adapter(tmp_path / "my-adapter", tiny.llama(tmp_path / "whole"))
    (block,) = blocks(SECTION)
    named, written = "LFM2-1.2B-My-Adapter-Q8_0.gguf", tmp_path / NAME
    assert "ulimit -v 1048576" in block and f"-> {named}" in block
    block = block.replace(named, written.name)  # a model of this size is called otherwise
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", block], cwd=tmp_path, capture_output=True, text=True, check=False, env=environ
    )
    assert done.returncode == 0, done.stderr
    assert 0 < written.stat().st_size < 1 << 20
    assert base.joinpath("model.safetensors").stat().st_size > HOLE_NBYTES


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 671B parameters in 156 shards, with holes for weights and a small vocabulary."""
    shape = shapes.replace(shapes.SHAPES["671b"], vocabulary=vocabulary.SMALL)
    return shapes.checkpoint(shape, tmp_path_factory.mktemp("giant"), sparse=True)


@pytest.mark.parametrize("bound", [None, "160MiB"])
def test_a_model_of_671b_parameters_is_planned(giant: Path, bound: str | None) -> None:
    command = [sys.executable, "-m", "streamconv", "convert", str(giant), "--dry-run", "--json"]
    command += ["--max-memory", bound] if bound else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=giant.parent)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len([name for row in report["plan"] for name in row["source"]]) == 45_036
    assert report["peak_rss_nbytes"] <= report["memory"]["projected"] <= 160 << 20
