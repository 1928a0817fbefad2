"""llama.cpp's own converter, convert_hf_to_gguf.py, where LLAMA_CPP names the folder that holds it.

Fair: default options, its own Python (LLAMA_CPP_PYTHON) with the packages it asks for, and no sync at its end, which
favours it. One function of it is replaced: it finds the pre-tokenizer's name by hashing the ids of a test text, and a
synthetic vocabulary has no known hash; the text is still tokenised, only the answer is given.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from benchmarks.converters import Converter

_SHIM = Path(__file__).with_name("llama_cpp_shim.py")
SCRIPT = "convert_hf_to_gguf.py"


def python() -> Path:
    return Path(os.environ.get("LLAMA_CPP_PYTHON") or sys.executable).expanduser()


def converter() -> Converter | None:
    """The peer, or None where LLAMA_CPP is not set.

    Raises FileNotFoundError, with a line for the user, where that holds no script or there is no such Python.
    """
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        return None
    script = Path(folder).expanduser() / SCRIPT
    if not script.is_file():
        raise FileNotFoundError(f"LLAMA_CPP={folder} holds no {SCRIPT}")
    if shutil.which(python()) is None:
        raise FileNotFoundError(f"LLAMA_CPP_PYTHON={python()} is no program")

    def command(src: Path, dst: Path, outtype: str) -> list[str]:
        return [str(python()), str(_SHIM), str(script), str(src), "--outfile", str(dst), "--outtype", outtype]

    return Converter("llama.cpp", command)
