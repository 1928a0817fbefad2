"""Make data/vocab/goldens.json again: `python -m tests.tools.make_vocab_goldens`. Needs torch, transformers; a minute.

It has the keys that llama.cpp's converter writes for each case of tests/vocab_cases.py. The same versions give the same
bytes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests import vocab_cases
from tests.oracles import ggufs
from tests.tools import llama_cpp

# llama.cpp knows published vocabularies by their token ids; these have the structures of those.
PRE = {"smollm": "smollm", "gpt-2": "gpt-2", "prefix-space": "gpt-2", "roberta": "gpt-2"}


def main() -> None:
    goldens: dict[str, Any] = {}
    for name, build in vocab_cases.CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            src = Path(scratch, "src")
            src.mkdir()
            build(src)
            made = llama_cpp.convert_vocabulary(src, Path(scratch, "made.gguf"), pre=PRE.get(name, "llama-bpe"))
            kv = ggufs.read(made).golden()["kv"]
        goldens[name] = {key: value for key, value in kv.items() if key.startswith("tokenizer.")}
        print(name, flush=True)
    vocab_cases.GOLDENS.parent.mkdir(parents=True, exist_ok=True)
    vocab_cases.GOLDENS.write_text(json.dumps(goldens, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
