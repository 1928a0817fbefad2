"""Nodes that fold a batch norm, whose mean and variance training has fixed, into a scale and a shift.

Each operation is a single IEEE F32 operation, in the order of ConformerAudioModel in llama.cpp's conversion/gemma.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from streamconv.lazy.arithmetic import Floats, InPlace, widened
from streamconv.lazy.node import LazyTensor, Piece, Step, Workspace


class _OfSeveral(InPlace):
    """Base class of nodes that need the same rows of all their parents, which have one shape."""

    def __init__(self, *parents: LazyTensor) -> None:
        super().__init__(parents[0])
        shapes = [parent.spec.shape for parent in parents]
        if len(set(shapes)) > 1:
            raise ValueError(f"{' and '.join(map(str, shapes))} are not of one shape")
        self.parents = tuple(map(widened, parents))

    def needs(self, rows: range) -> Iterator[Step]:
        yield tuple(Piece(parent, rows) for parent in self.parents)


class NormScale(_OfSeveral):
    """weight / sqrt(variance + epsilon).

    Args:
        weight: [channels].
        variance: [channels].
        epsilon: What keeps a variance of zero from being divided by.
    """

    def __init__(self, weight: LazyTensor, variance: LazyTensor, epsilon: float) -> None:
        super().__init__(weight, variance)
        self.epsilon = np.float32(epsilon)

    def change(self, values: Floats, others: Sequence[Floats], work: Workspace) -> None:
        (deviation,) = others
        np.sqrt(np.add(deviation, self.epsilon, out=deviation), out=deviation)
        np.divide(values, deviation, out=values)

    def describe(self) -> str:
        return f"epsilon {float(self.epsilon)!r}"


class NormShift(_OfSeveral):
    """bias - mean * scale.

    Args:
        bias: [channels].
        mean: [channels].
        scale: [channels], as `NormScale` makes it.
    """

    def __init__(self, bias: LazyTensor, mean: LazyTensor, scale: LazyTensor) -> None:
        super().__init__(bias, mean, scale)

    def change(self, values: Floats, others: Sequence[Floats], work: Workspace) -> None:
        mean, scale = others
        np.subtract(values, np.multiply(mean, scale, out=mean), out=values)

    def describe(self) -> str:
        return ""
