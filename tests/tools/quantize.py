"""llama.cpp's quantizer, as a program: `PYTHON -P tests/tools/quantize.py SRC.gguf DST.gguf Q4_K_M [THREADS]`, or many.

Runs under a Python that has llama-cpp-python, which pip builds from source in a quarter of an hour: the engine of
llama-quantize is a function of its library. Imports nothing else; -P keeps the neighbour of that name out of the way.
With a single argument, a file of JSON: a list of jobs, whose answers are printed, 0 where all went well. A job is an
object of `src`, `dst`, `ftype` (a number), and of what llama-quantize has options for: `pure`, `allow_requantize`,
`leave_output`, `output_type`, `embedding_type` (numbers), `overrides` (a list of [pattern, number]), `importance` (an
object of name: [file of float32, offset, count]).
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any


class _Override(ctypes.Structure):
    """llama.h's llama_model_tensor_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class _Importance(ctypes.Structure):
    """llama.h's llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _address(array: Any) -> Any:
    return ctypes.cast(array, ctypes.c_void_p).value


def quantize(src: str, dst: str, ftype: int, **options: Any) -> int:
    """0, or what the library answers; options as in a job."""
    import llama_cpp  # type: ignore[import-not-found]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    params.nthread = options.get("threads", 1)
    params.pure = options.get("pure", False)
    params.allow_requantize = options.get("allow_requantize", False)
    params.quantize_output_tensor = not options.get("leave_output", False)
    if "output_type" in options:
        params.output_tensor_type = options["output_type"]
    if "embedding_type" in options:
        params.token_embedding_type = options["embedding_type"]
    kept: list[Any] = []  # what the library gets the address of
    if options.get("overrides"):
        rows = [(pattern.encode(), type_) for pattern, type_ in options["overrides"]]
        kept.append((_Override * (len(rows) + 1))(*rows))
        params.tt_overrides = ctypes.cast(kept[-1], type(params.tt_overrides))
    if options.get("importance"):
        entries = []
        for name, (path, offset, count) in options["importance"].items():
            with Path(path).open("rb") as file:
                file.seek(offset)
                kept.append(ctypes.create_string_buffer(file.read(4 * count), 4 * count))
            entries.append((name.encode(), _address(kept[-1]), count))
        kept.append((_Importance * (len(entries) + 1))(*entries))
        params.imatrix = ctypes.cast(kept[-1], type(params.imatrix))
    return int(llama_cpp.llama_model_quantize(src.encode(), dst.encode(), ctypes.byref(params)))


def main(*arguments: str) -> int:
    import llama_cpp

    if len(arguments) == 1:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        print(json.dumps([quantize(**job) for job in json.loads(Path(arguments[0]).read_text())]))
        return 0
    src, dst, ftype, *threads = arguments
    options = {"threads": int(threads[0])} if threads else {}
    return quantize(src, dst, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}"), **options)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _SILENT(level: int, text: bytes, data: object) -> None:  # noqa: N802
    if level >= 4:  # errors
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
