"""tests/attacks/README.md, made from the tables that the tests run, so that it cannot say anything else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.attacks.gguf_files import FATAL, LISTED
from tests.attacks.sources import GROUPS

PATH = Path(__file__).parent / "README.md"

HEAD = """# Attacks

What strangers' files may hold, idea by idea, and what comes of it. Every row is a test (`pytest tests/attacks`): the
whole command runs on the file, and the test holds that the exit code is the documented one, that there is one printable
line on stderr and no traceback, that `--json` prints an error object, that nothing is left where the output would have
been, and that no byte or time of the source changed. *Converted* means that the idea is harmless: the file is as good
as any.

This page is made from the tests' tables by `python -m tests.attacks`. What fuzzing found is in `tests/fuzz/corpus`.

"""
TITLES = {
    "safetensors": "Safetensors files",
    "index": "The index of the shards",
    "config": "config.json",
    "tokenizer": "Tokenizers",
    "adapter": "Adapters",
}
GGUF_HEAD = """## GGUF files, for `inspect`, `verify` and as a `--base`

Nothing is mapped or allocated for a length that the file does not have; reading takes a window of 64 KiB. A file that
cannot be parsed is refused; one that can is shown by `inspect` with its problems, and refused by `verify` and `lora`.

"""


def render() -> str:
    lines = [HEAD]
    for group, attacks in GROUPS.items():
        lines.append(f"## {TITLES[group]}\n\n| idea | outcome |\n|---|---|\n")
        lines += [
            f"| {_cell(name)} | {_outcome(attack.code, attack.exit_code)} |\n" for name, attack in attacks.items()
        ]
        lines.append("\n")
    lines += [GGUF_HEAD, "| idea | outcome |\n|---|---|\n", *_gguf_rows()]
    return "".join(lines)


def _gguf_rows() -> Iterator[str]:
    for name, (_, code) in FATAL.items():
        yield f"| {_cell(name)} | refused, exit 3: `{code}` |\n"
    for name, (_, code) in LISTED.items():
        yield f"| {_cell(name)} | shown, with the problem `{code}`; refused elsewhere, exit 3 |\n"


def _outcome(code: str, exit_code: int) -> str:
    return f"refused, exit {exit_code}: `{code}`" if code else "converted"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")
