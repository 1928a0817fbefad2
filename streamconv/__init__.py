"""Hugging Face safetensors checkpoints and LoRA adapters to GGUF, streaming, in bounded memory.

    import streamconv
    report = streamconv.convert("LFM2-1.2B", "LFM2-1.2B-BF16.gguf", outtype="bf16")
    report = streamconv.convert_adapter("my-adapter", base="Llama-3.2-1B.gguf", dst="my-adapter.gguf")

The library prints nothing and raises StreamconvError alone.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from streamconv.errors import (
    BudgetError,
    Caution,
    DestinationError,
    Interrupted,
    SourceError,
    StreamconvError,
    UsageError,
    VerifyError,
)

if TYPE_CHECKING:
    from streamconv.adapter import convert_adapter
    from streamconv.convert import convert
    from streamconv.report import Report
    from streamconv.split import SplitOptions
    from streamconv.verify import verify

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Caution",
    "DestinationError",
    "Interrupted",
    "Report",
    "SourceError",
    "SplitOptions",
    "StreamconvError",
    "UsageError",
    "VerifyError",
    "convert",
    "convert_adapter",
    "verify",
]

# Loaded when first asked for: numpy and gguf take longer to import than `streamconv --help` may take.
_HOMES = {
    "convert": "streamconv.convert",
    "convert_adapter": "streamconv.adapter",
    "Report": "streamconv.report",
    "SplitOptions": "streamconv.split",
    "verify": "streamconv.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamconv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """Keeps `streamconv.convert` the function: importing the module of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _HOMES and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
