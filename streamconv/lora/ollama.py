"""Write adapters as the converter of Ollama's first LFM2 release did, to reproduce or compare old files.

That converter does not write the trained adapter: it permutes lora_a instead of lora_b (in a PEFT file, a reinterpreted
buffer), with head_count for K too, and uses only alpha from the configuration. Bytes, order, types and keys here are
Ollama's, and the run reports how far the file is from the trained adapter (fold.py writes the correct one).

Source: convert/convert_llama_adapter.go and convert.go in ollama@01cf7445, and measurements of files that it wrote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from streamconv.checkpoint.config import Config
from streamconv.checkpoint.safetensors import SourceTensor
from streamconv.errors import RunWarning
from streamconv.gguf.format import KeyValue
from streamconv.lazy.arithmetic import Scale
from streamconv.lazy.dtype import BF16
from streamconv.lazy.node import LazyTensor
from streamconv.lazy.views import PairHalves, Reflow, Transpose
from streamconv.lora.base import BaseModel
from streamconv.lora.config import Problem
from streamconv.lora.factors import slabs
from streamconv.lora.files import Factors
from streamconv.lora.fold import landed
from streamconv.lora.resolve import LoraModule
from streamconv.recipe.language import Model

ARCH = "llama"
HEAD_COUNT = "llama.attention.head_count"
# The modules that it supports, and whether their lora_a is permuted.
_TARGETS = re.compile(r"blk\.(\d+)\.(attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down)\.weight")
_PERMUTED = ("attn_q", "attn_k")
_F16, _BF16 = GGMLQuantizationType.F16, GGMLQuantizationType.BF16


@dataclass(frozen=True, slots=True)
class LegacyTensor:
    """One tensor of the file: its name, rows, type and origin."""

    target: str
    tensor: LazyTensor
    type: GGMLQuantizationType
    source: str
    is_turned: bool


@dataclass(frozen=True, slots=True)
class LegacyAdapter:
    """The file that Ollama's converter would write."""

    keys: tuple[KeyValue, ...]
    tensors: tuple[LegacyTensor, ...]
    warnings: tuple[RunWarning, ...]


def legacy_problems(base: BaseModel, modules: Sequence[LoraModule], config: Config) -> Iterator[Problem]:
    """Return the reasons why Ollama's converter would fail, or write a file that nothing loads."""
    if base.recipe.arch != ARCH:
        yield Problem(
            "legacy-arch", f"ollama-legacy supports adapters only for {ARCH}, but the base is {base.recipe.arch}"
        )
        return
    yield from landed(modules, base.model)[1]
    others = [module.name for module in modules if not _TARGETS.fullmatch(module.slot.target)]
    if others:
        yield Problem("legacy-module", "ollama-legacy has no name for it", tuple(others))
    alpha = config.raw.get("lora_alpha")
    if alpha is not None and (type(alpha) is not int or not 0 <= alpha < 1 << 32):
        yield Problem("legacy-alpha", f"ollama-legacy needs a whole number for lora_alpha, not {alpha!r}")
    for module in modules:
        heads, longest = _heads(module, base, config), max(module.a.spec.shape)
        if heads and longest % (2 * heads):
            message = (
                f"ollama-legacy splits lora_a into {heads} heads of two halves, but {longest} is not divisible by that"
            )
            yield Problem("legacy-heads", message, (module.name,))


def legacy_adapter(
    base: BaseModel, modules: Sequence[LoraModule], stored: Mapping[str, Factors], config: Config
) -> LegacyAdapter:
    """Return keys and tensors in the order of Ollama's converter; warnings give the distance from what was trained."""
    alpha = _alpha(config)
    made, warnings = [], [_warning()]
    for module in modules:
        factors = stored[module.name]
        assert factors.a is not None and factors.b is not None
        a = _written(f"{module.slot.target}.lora_a", factors.a, _heads(module, base, config))
        b = _written(f"{module.slot.target}.lora_b", factors.b, 0)
        made += [a, b]
        if _is_permuted(module) or (a.is_turned, b.is_turned) != module.turned:
            warnings.append(_distance_warning(module, base.model, a.tensor, b.tensor, _scale(alpha, module.rank)))
    warnings += _ignored_scales(modules, alpha)
    if config.raw.get("alora_invocation_tokens"):
        warnings.append(RunWarning("legacy-ignored", "alora_invocation_tokens were left out: the adapter is always on"))
    return LegacyAdapter(tuple(_keys(base, alpha)), tuple(sorted(made, key=_order)), tuple(warnings))


def _keys(base: BaseModel, alpha: float) -> list[KeyValue]:
    keys = [
        KeyValue.f32("adapter.lora.alpha", alpha),
        KeyValue.string("adapter.type", "lora"),
        KeyValue.string("general.architecture", ARCH),
        KeyValue.u32("general.file_type", LlamaFileType.MOSTLY_F16),
        KeyValue.string("general.type", "adapter"),
        KeyValue.string("general.version", "v0.2"),
        *base.keys,
    ]
    return sorted(keys, key=lambda entry: entry.key)


def _order(tensor: LegacyTensor) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.", tensor.target)
    return int(match[1]) if match else -1, tensor.target


def _alpha(config: Config) -> float:
    """`lora_parameters.alpha` unless it is zero or absent, else `lora_alpha`."""
    section = config.section("lora_parameters")
    return (section.number("alpha") if section else None) or config.number("lora_alpha") or 0.0


def _scale(alpha: float, rank: int) -> float:
    """The scale that llama.cpp's runtime derives from alpha."""
    return alpha / rank if alpha else 1.0


# ---------------------------------------------------------------- tensors


def _is_permuted(module: LoraModule) -> bool:
    match = _TARGETS.fullmatch(module.slot.target)
    return match is not None and match[2] in _PERMUTED


def _heads(module: LoraModule, base: BaseModel, config: Config) -> int:
    """The number of heads for the permutation of lora_a: head_count, also for K unless the adapter's config differs."""
    if not _is_permuted(module):
        return 0
    n_heads = base.dims.get("A", 0)
    return (config.integer("num_key_value_heads") or n_heads) if "attn_k" in module.slot.target else n_heads


def _written(target: str, stored: SourceTensor, n_heads: int) -> LegacyTensor:
    """A factor, oriented only by its stored shape: a lora_a with more rows than columns, or a lora_b with fewer, is
    transposed."""
    source = stored.lazy()
    n_rows, n_columns = stored.shape
    is_turned = n_rows > n_columns if target.endswith("lora_a") else n_rows < n_columns
    tensor: LazyTensor = source
    if is_turned:
        tensor = Transpose(PairHalves(source, n_heads) if n_heads else source)
    elif n_heads:
        tensor = Reflow(PairHalves(Reflow(source, (n_columns, n_rows)), n_heads), (n_rows, n_columns))
    return LegacyTensor(target, tensor, _BF16 if source.spec.dtype == BF16 else _F16, stored.name, is_turned)


# ---------------------------------------------------------------- warnings


def _warning() -> RunWarning:
    return RunWarning(
        "legacy",
        "an ollama-legacy file does not compute the trained adapter; use the default dialect with Ollama as well",
    )


def _ignored_scales(modules: Sequence[LoraModule], alpha: float) -> Iterator[RunWarning]:
    found: dict[tuple[float, float], list[str]] = {}
    for module in modules:
        scale = _scale(alpha, module.rank)
        if not math.isclose(scale, module.scale, rel_tol=1e-6):
            found.setdefault((scale, module.scale), []).append(module.slot.target)
    for (scale, trained), targets in found.items():
        more = f" and {len(targets) - 1} more" if len(targets) > 1 else ""
        message = f"its scale in the file is {scale:.6g}{more and ' here'}{more}, but {trained:.6g} was trained"
        yield RunWarning("legacy-scale", message, targets[0])


def _distance_warning(module: LoraModule, model: Model, a: LazyTensor, b: LazyTensor, scale: float) -> RunWarning:
    if (a.spec.shape, b.spec.shape) != (module.a.spec.shape, module.b.spec.shape):
        shapes = f"lora_a {list(a.spec.shape)}, lora_b {list(b.spec.shape)}"
        message = f"written transposed ({shapes}): llama.cpp refuses the file"
    else:
        distance = _distance(module, model, a, b, scale)
        message = f"the written change differs from the trained one by {distance:.6g} of its Frobenius norm"
    return RunWarning("legacy-distance", message, module.slot.target)


def _distance(module: LoraModule, model: Model, a: LazyTensor, b: LazyTensor, scale: float) -> float:
    """|written - trained| / |trained| of the [out, in] change, from [2r, 2r] products without computing it."""
    ((change,), _) = landed([module], model)
    left = _gram([Scale(b, scale), Scale(change.b, -module.scale)])
    right = _gram([Transpose(a), Transpose(change.a)])
    rank = b.spec.shape[1]
    trained = math.sqrt(max(float((left[rank:, rank:] * right[rank:, rank:]).sum()), 0.0))
    difference = math.sqrt(max(float((left * right).sum()), 0.0))
    return difference / trained if trained else math.inf if difference else 0.0


def _gram(tensors: Sequence[LazyTensor]) -> NDArray[np.float64]:
    """The Gram matrix, in float64, of the columns of tensors with equally many rows, side by side."""
    width = sum(tensor.spec.n_columns for tensor in tensors)
    total = np.zeros((width, width))
    for parts in zip(*(slabs(tensor) for tensor in tensors), strict=True):
        side_by_side = np.concatenate(parts, axis=1, dtype=np.float64)
        total += side_by_side.T @ side_by_side
    return total
