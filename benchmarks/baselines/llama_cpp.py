"""llama.cpp's own converter, convert_hf_to_gguf.py, where LLAMA_CPP names the folder that holds it.

Fair: default options, its own Python (LLAMA_CPP_PYTHON) with the packages it asks for, and no sync at its end, which
favours it. One function of it is replaced: it finds the pre-tokenizer's name by hashing the ids of a test text, and a
synthetic vocabulary has no known hash; the text is still tokenised, only the answer is given.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from benchmarks.converters import Converter

_SHIM = Path(__file__).with_name("llama_cpp_shim.py")
SCRIPT = "convert_hf_to_gguf.py"
NAME = "llama.cpp"
_QUANTIZER = Path(__file__).parents[2] / "tests" / "tools" / "quantize.py"
_N_THREADS = 2


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

    return Converter(NAME, command)


def pipeline() -> Converter | None:
    """The converter to BF16, then llama-quantize on what it made, into a folder that holds both.

    None unless LLAMA_CPP is set, and LLAMA_QUANTIZE_PYTHON names a Python with llama-cpp-python.

    Raises FileNotFoundError as `converter` does.
    """
    first, quantizer = converter(), os.environ.get("LLAMA_QUANTIZE_PYTHON")
    if first is None or not quantizer:
        return None
    if shutil.which(Path(quantizer).expanduser()) is None:
        raise FileNotFoundError(f"LLAMA_QUANTIZE_PYTHON={quantizer} is no program")

    def command(src: Path, dst: Path, outtype: str) -> list[str]:
        whole, small = dst / "bf16.gguf", dst / f"{outtype}.gguf"
        second = [str(Path(quantizer).expanduser()), "-P", str(_QUANTIZER), str(whole), str(small), outtype.upper()]
        both = f"{shlex.join(first.command(src, whole, 'bf16'))} && {shlex.join([*second, str(_N_THREADS)])}"
        return ["sh", "-c", f"mkdir {shlex.quote(str(dst))} && {both}"]

    return Converter(NAME, command)
