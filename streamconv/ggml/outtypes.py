"""The words of --outtype, one row each. Nothing heavy is imported here: `--help` prints them.

A row is llama-quantize's name of a file type, in lower case, and how the types of its tensors are chosen (policy.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Outtype:
    """One word.

    Attributes:
        name: The word.
        type: GGML's name of the type that tensors get where no rule says otherwise.
        file_type: llama.cpp's name of general.file_type, without its prefix ("MOSTLY_"); "" where it is the type's own.
        mix: The rule that gives some tensors another type, by its name in policy.MIXES; "" where there is none.
    """

    name: str
    type: str
    file_type: str = ""
    mix: str = ""


OUTTYPES: Final[Mapping[str, Outtype]] = MappingProxyType(
    {
        row.name: row
        for row in (
            # word           type    file type  mix
            Outtype("f32",  "F32"),
            Outtype("f16",  "F16"),
            Outtype("bf16", "BF16"),
            Outtype("q8_0", "Q8_0"),
        )
    }
)  # fmt: skip
AUTO: Final = "auto"
WORDS: Final = (AUTO, *OUTTYPES)
