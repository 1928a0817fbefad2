"""llama.cpp's quantizer, as a program: `PYTHON -P tests/tools/quantize.py SRC.gguf DST.gguf Q4_K_M`.

Runs under a Python that has llama-cpp-python, which pip builds from source in a quarter of an hour: the engine of
llama-quantize is a function of its library. Imports nothing else; -P keeps the neighbour of that name out of the way.
"""

from __future__ import annotations

import ctypes
import sys


def main(src: str, dst: str, ftype: str) -> int:
    import llama_cpp  # type: ignore[import-not-found]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    params.nthread = 1
    return int(llama_cpp.llama_model_quantize(src.encode(), dst.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
