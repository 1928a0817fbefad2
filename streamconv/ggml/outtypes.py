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
            mix_rules.py says which tensors of such a file get another type.
    """

    name: str
    type: str
    file_type: str = ""

    @property
    def is_mix(self) -> bool:
        """Whether llama-quantize makes it, and not llama.cpp's converter."""
        return bool(self.file_type)


OUTTYPES: Final[Mapping[str, Outtype]] = MappingProxyType(
    {
        row.name: row
        for row in (
            #       word      type      llama.cpp's file type
            Outtype("f32",    "F32"),
            Outtype("f16",    "F16"),
            Outtype("bf16",   "BF16"),
            Outtype("q8_0",   "Q8_0"),
            Outtype("q6_k",   "Q6_K",   "Q6_K"),
            Outtype("q5_k_m", "Q5_K",   "Q5_K_M"),
            Outtype("q5_k_s", "Q5_K",   "Q5_K_S"),
            Outtype("q5_1",   "Q5_1",   "Q5_1"),
            Outtype("q5_0",   "Q5_0",   "Q5_0"),
            Outtype("q4_k_m", "Q4_K",   "Q4_K_M"),
            Outtype("q4_k_s", "Q4_K",   "Q4_K_S"),
            Outtype("q4_1",   "Q4_1",   "Q4_1"),
            Outtype("q4_0",   "Q4_0",   "Q4_0"),
            Outtype("iq4_nl", "IQ4_NL", "IQ4_NL"),
            Outtype("iq4_xs", "IQ4_XS", "IQ4_XS"),
            Outtype("q3_k_l", "Q3_K",   "Q3_K_L"),
            Outtype("q3_k_m", "Q3_K",   "Q3_K_M"),
            Outtype("q3_k_s", "Q3_K",   "Q3_K_S"),
            Outtype("q2_k",   "Q2_K",   "Q2_K"),
            Outtype("q2_k_s", "Q2_K",   "Q2_K_S"),
            Outtype("tq2_0",  "TQ2_0",  "TQ2_0"),
            Outtype("tq1_0",  "TQ1_0",  "TQ1_0"),
        )
    }
)  # fmt: skip
AUTO: Final = "auto"
WORDS: Final = (AUTO, *OUTTYPES)
ALIASES: Final[Mapping[str, str]] = MappingProxyType({"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"})


def canonical(word: str) -> str:
    """The word of a row for `word` in either case, or for llama-quantize's other name of it."""
    word = word.lower()
    return ALIASES.get(word, word)
