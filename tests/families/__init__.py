"""Families: kinds of checkpoints as transformers saves them, proved by one tool and one test each (see README.md)."""

from tests.families.build import (
    DATA,
    IDS,
    N_CTX,
    POSITIONS,
    adapter,
    checkpoint,
    distance,
    golden,
    image_logprobs,
    logits,
    predictions,
    projector,
    record,
    run,
    see,
    texts,
)
from tests.families.table import FAMILIES, Family

__all__ = [
    "DATA",
    "FAMILIES",
    "IDS",
    "N_CTX",
    "POSITIONS",
    "Family",
    "adapter",
    "checkpoint",
    "distance",
    "golden",
    "image_logprobs",
    "logits",
    "predictions",
    "projector",
    "record",
    "run",
    "see",
    "texts",
]
