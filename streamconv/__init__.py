"""Convert Hugging Face safetensors checkpoints and LoRA adapters to GGUF, streaming, in bounded memory.

    import streamconv
    report = streamconv.convert("LFM2-1.2B", "LFM2-1.2B-BF16.gguf", outtype="bf16")
    report = streamconv.convert_adapter("my-adapter", base="Llama-3.2-1B.gguf", dst="my-adapter.gguf")

The library prints nothing. It raises StreamconvError and its subclasses, and TypeError for a wrong keyword.
KeyboardInterrupt and exceptions of the caller's own functions pass through.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from streamconv.errors import (
    BudgetError,
    Caution,
    DestinationError,
    Interrupted,
    RunWarning,
    SourceError,
    StreamconvError,
    UsageError,
    VerifyError,
)

if TYPE_CHECKING:
    from streamconv.api.convert_lora import convert_adapter
    from streamconv.api.convert_model import convert
    from streamconv.api.inspect_file import inspect
    from streamconv.api.list_quants import quants
    from streamconv.api.quantize_file import quantize
    from streamconv.api.verify_file import verify
    from streamconv.files.store import Blob, Identity, Store
    from streamconv.options import SplitOptions
    from streamconv.report import Report

__version__ = "0.1.0"

__all__ = [
    "Blob",
    "BudgetError",
    "Caution",
    "DestinationError",
    "Identity",
    "Interrupted",
    "Report",
    "RunWarning",
    "SourceError",
    "SplitOptions",
    "Store",
    "StreamconvError",
    "UsageError",
    "VerifyError",
    "convert",
    "convert_adapter",
    "inspect",
    "quantize",
    "quants",
    "verify",
]

# Loaded on first use: importing numpy and gguf takes longer than `streamconv --help` should.
_HOMES = {
    "Blob": "streamconv.files.store",
    "Identity": "streamconv.files.store",
    "Store": "streamconv.files.store",
    "convert": "streamconv.api.convert_model",
    "convert_adapter": "streamconv.api.convert_lora",
    "inspect": "streamconv.api.inspect_file",
    "quantize": "streamconv.api.quantize_file",
    "quants": "streamconv.api.list_quants",
    "Report": "streamconv.report",
    "SplitOptions": "streamconv.options",
    "verify": "streamconv.api.verify_file",
}


if not TYPE_CHECKING:  # type checkers would else accept any name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'streamconv' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, including those not loaded yet, and the modules: for dir(), help() and Tab."""
    shown = {name for name, value in globals().items() if name.startswith("__") or isinstance(value, ModuleType)}
    return sorted({*shown, *__all__})
