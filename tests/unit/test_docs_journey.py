"""docs/journey.md can be followed: its commands run as they stand, and what they make is loaded by llama.cpp.

Two tools are not run, as there is no network in a test: `hf` (its options are compared with its own help, and what it
downloads is in the cache) and `ollama`, of which the Modelfile's lines are looked at.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from streamconv import cli
from tests import tiny
from tests.oracles import ggufs, runtime
from tests.unit.test_sources import cache

PAGE = Path(__file__).parents[2] / "docs" / "journey.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
            for line in block.splitlines()]  # fmt: skip
REPO, ADAPTER = "LiquidAI/LFM2-1.2B", "lora_model"
IDS = [1, 33, 120, 7]


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder after somebody copied every command of streamconv's."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = tiny.lfm2(tmp_path / "base")
    cache(tmp_path / "hub", REPO, base)
    tiny.peft_adapter(Path(ADAPTER), base, targets=("q_proj", "v_proj", "w1"), config={"base_model_name_or_path": REPO})
    for block in re.findall(r"^```toml\n# (\S+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE):
        Path(block[0]).write_text(block[1])
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "streamconv":
            assert cli.main(words[1:]) == 0, command
    return Path.cwd()


def test_every_command_of_ours_runs_and_llama_cpp_runs_what_it_made(
    followed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [shlex.split(command) for command in COMMANDS if command.startswith("llama-") and " -m " in command]
    assert len(run) == 3
    seen = []
    for words in run:
        adapters = [(words[words.index("--lora") + 1], 1.0)] if "--lora" in words else []
        seen.append(runtime.next_token_logprobs(words[words.index("-m") + 1], IDS, adapters, positions=(3,)))
    merged, _, applied = seen
    alone = runtime.next_token_logprobs("LFM2-1.2B-Q4_K_M.gguf", IDS, positions=(3,))
    assert runtime.kl(alone, applied) > 1e-6 < runtime.kl(alone, merged)  # the adapter is in both
    assert {path.name for path in (followed / "out").iterdir()} == {
        f"my-model-{outtype}.gguf" for outtype in ("q4_k_m", "q5_k_m", "q8_0")
    }
    assert ggufs.read("my-adapter.gguf")["general.type"] == "adapter"


def test_ollama_gets_what_it_needs(followed: Path) -> None:
    (name,) = (shlex.split(line)[-1] for line in COMMANDS if line.startswith("ollama create"))
    origin = re.search(r"^FROM (.+)$", Path(name).read_text(), re.MULTILINE)
    assert origin is not None and (followed / origin[1]).exists()
    patterns = shlex.split(next(line for line in COMMANDS if line.startswith("hf upload")))
    published = {path.name for one in patterns[patterns.index("--include") + 1 :] for path in followed.glob(one)}
    assert {"my-model-Q4_K_M.gguf", "my-model-Q4_K_M.gguf.manifest.json"} <= published


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("hf ")])
def test_hf_has_these_options(command: str) -> None:
    words = shlex.split(command)
    hf = Path(sys.executable).with_name("hf")
    shown = subprocess.run([hf, words[1], "--help"], capture_output=True, text=True, check=True).stdout
    assert [word for word in words if word.startswith("--") and word not in shown] == []


def test_every_command_is_of_a_tool_that_the_test_knows() -> None:
    tools = {shlex.split(command)[0] for command in COMMANDS}
    assert tools == {"pip", "hf", "streamconv", "llama-cli", "llama-server", "ollama"}
