"""Libraries of the extra `test`, imported where a test first uses them.

Where one is missing, the tests that use it fail, and all others are collected and run.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Extra:
    """Stands for a module until an attribute of it is used; ModuleNotFoundError then, if it is not installed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


distributed = Extra("distributed")
sentencepiece = Extra("sentencepiece")
tokenizers = Extra("tokenizers")
xllamacpp = Extra("xllamacpp")
