"""The names of tensors in a file: llama.cpp's, and those of Ollama's first LFM2 release.

One name differs. llama.cpp (all versions since LFM2.5) and today's Ollama read LFM2's output norm as
`token_embd_norm.weight` and refuse a file without it; Ollama's first release wrote `output_norm.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

LLAMA_CPP = "llama.cpp"
OLLAMA_LEGACY = "ollama-legacy"

RENAMES: Final[Mapping[str, Mapping[str, str]]] = {
    LLAMA_CPP: {},
    OLLAMA_LEGACY: {"token_embd_norm.weight": "output_norm.weight"},
}


def written_name(target: str, dialect: str) -> str:
    """The name of the tensor `target` in a file of `dialect`."""
    return RENAMES[dialect].get(target, target)


def spellings(name: str) -> Iterator[str]:
    """`name`, then the names of the same tensor in other dialects."""
    yield name
    for renames in RENAMES.values():
        for one, other in renames.items():
            if name in (one, other):
                yield other if name == one else one
