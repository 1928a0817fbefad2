"""What `inspect` prints fits: the terminal where there is one, 120 columns in a pipe; what is cut tells its length."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import streamconv
from streamconv.cli import main
from tests import tiny

WIDTH = 120


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind, with long lists and texts among its values."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint = tiny.llama(
        folder / "llama",
        config={"quiet_list": list(range(700)), "a_text": "word " * 333, "nested": {f"k{n}": n for n in range(90)}},
    )
    streamconv.convert(checkpoint, folder / "llama.gguf", outtype="q8_0")
    adapter = tiny.peft_adapter(folder / ("adapter" + "-long" * 30), checkpoint)
    return {"checkpoint": checkpoint, "gguf": folder / "llama.gguf", "adapter": adapter}


def printed(path: Path, *options: str, **environ: str) -> list[str]:
    """The lines that a pipe gets."""
    done = subprocess.run(
        [sys.executable, "-m", "streamconv", "inspect", str(path), *options],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"} | environ,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["checkpoint", "gguf", "adapter"])
def test_a_pipe_gets_120_columns(kind: str, models: dict[str, Path]) -> None:
    lines = printed(models[kind], "--tensors")
    assert max(map(len, lines)) <= WIDTH
    assert max(map(len, printed(models[kind], "--tensors", COLUMNS="999"))) <= WIDTH
    assert max(map(len, printed(models[kind], "--tensors", COLUMNS="70"))) <= 70


def test_cut_values_tell_their_length(models: dict[str, Path]) -> None:
    lines = printed(models["gguf"])
    assert max(map(len, lines)) <= WIDTH

    def line(key: str) -> str:
        return next(line for line in lines if line.split()[:1] == [key])

    found = streamconv.inspect(models["gguf"]).metadata
    tokens, template = found["tokenizer.ggml.tokens"], found["tokenizer.chat_template"]
    assert len(json.dumps(tokens)) > WIDTH
    assert f"  {len(tokens):,}: [" in line("tokenizer.ggml.tokens")
    assert line("tokenizer.ggml.tokens").endswith(", ...]")
    assert line("tokenizer.chat_template").endswith(f"... ({len(template):,} characters)")
    config = printed(models["checkpoint"])
    assert any("  700: [0, 1, 2, " in line and line.endswith(", ...]") for line in config)
    assert any(line.endswith(f"... ({333 * 5:,} characters)") for line in config)
    assert any("nested" in line and "90: {" in line and line.endswith(", ...}") for line in config)


def test_short_values_are_whole(models: dict[str, Path]) -> None:
    assert any(line.endswith('  ["LlamaForCausalLM"]') for line in printed(models["checkpoint"]))


def test_json_has_everything(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(models["checkpoint"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metadata"]
    assert found["quiet_list"] == list(range(700))
    assert found["a_text"] == "word " * 333


def test_a_terminal_gets_its_own_width(models: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "streamconv", "inspect", str(models["gguf"]), "--tensors"]
    ours, theirs = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 61, 0, 0))
    environ = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(command, stdout=theirs, env=environ) as child:
        os.close(theirs)
        text = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            text += part
    os.close(ours)
    assert child.returncode == 0
    widths = [len(line) for line in text.decode().splitlines()]
    assert 55 < max(widths) <= 61
