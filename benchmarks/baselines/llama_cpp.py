"""llama.cpp's own converter, convert_hf_to_gguf.py, where LLAMA_CPP names the folder that holds it.

Fair: default options, its own Python (LLAMA_CPP_PYTHON) with the packages it asks for, and no sync at its end, which
favours it. One function of it is replaced: it finds the pre-tokenizer's name by hashing the ids of a test text, and a
synthetic vocabulary has no known hash; the text is still tokenised, only the answer is given.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.converters import Converter

_SHIM = Path(__file__).with_name("llama_cpp_shim.py")
SCRIPT = "convert_hf_to_gguf.py"


def python() -> Path:
    return Path(os.environ.get("LLAMA_CPP_PYTHON", sys.executable))


def converter() -> Converter | None:
    """The peer, or None where LLAMA_CPP is not set. Raises FileNotFoundError where it holds no script."""
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        return None
    script = Path(folder) / SCRIPT
    if not script.is_file():
        raise FileNotFoundError(f"LLAMA_CPP={folder} holds no {SCRIPT}")

    def command(src: Path, dst: Path, outtype: str) -> list[str]:
        return [str(python()), str(_SHIM), str(script), str(src), "--outfile", str(dst), "--outtype", outtype]

    return Converter("llama.cpp", command)
