"""The words of --outtype, one row each. Nothing slow is imported here, since `--help` prints them.

A row has llama-quantize's name of a file type, in lower case, and the main type of its tensors (see policy.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Outtype:
    """One word of --outtype.

    Attributes:
        name: The word.
        type: GGML's name of the type of tensors to which no rule applies.
        file_type: llama.cpp's name of general.file_type, without its prefix ("MOSTLY_"), for a mix, in which some
            tensors get another type (mix_rules.py). "" if it follows from the type.
    """

    name: str
    type: str
    file_type: str = ""

    @property
    def is_mix(self) -> bool:
        """Whether it is made by llama-quantize, not by llama.cpp's converter."""
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
    """`word` in lower case, with llama-quantize's aliases replaced."""
    word = word.lower()
    return ALIASES.get(word, word)
