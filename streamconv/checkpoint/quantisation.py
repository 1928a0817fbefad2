"""Whether a checkpoint is quantised: its tensors decide, not what its config says.

A model that was trained on a quantised base and merged to 16 bits often keeps the base's `quantization_config`, and
some quantised ones have lost theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.checkpoint.config import Config
from streamconv.checkpoint.safetensors import SourceTensor
from streamconv.errors import RunWarning, SourceError

KEYS = ("quantization_config", "quantization")  # of transformers, of mlx-lm

# Methods whose 16-bit weights are quantised while the model runs, as it was trained: plain weights are another model.
# transformers, utils/quantization_config.py: BitNetQuantConfig, whose `linear_class` autobitlinear does so.
_RUN_TIME_METHODS = frozenset({"bitnet"})

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "C64"})
_INDICES = frozenset({"I64", "BOOL"})  # positions, counters, masks
_BUFFERS = (".bias", ".masked_bias", "position_ids", "_mask")  # small integers that are not weights

# What lies beside packed weights, by method (safetensors names; FACTS of transformers, AutoGPTQ, AutoAWQ, mlx-lm,
# compressed-tensors, hqq, optimum-quanto, DeepSeek, ModelOpt).
_BESIDE = re.compile(
    r"\.(absmax|quant_map|nested_absmax|quant_state\..+|SCB|weight_format"
    r"|qweight|qzeros|g_idx|scales|biases|qbiases"
    r"|weight_scale(_inv|_2)?|weight_packed|weight_shape|weight_zero_point|weight_global_scale|qscale_weight"
    r"|W_q|_data|_scale|_shift)$"
    r"|_(blocks|scales|scale_inv)$"
)


def check_quantisation(config: Config, tensors: Mapping[str, SourceTensor]) -> list[RunWarning]:
    """Warnings of a checkpoint that its config calls quantised, and that is not.

    Args:
        config: Its config.json.
        tensors: All its tensors by their stored names.

    Raises:
        SourceError: It is quantised (`quantised`), or its 16-bit weights are while it runs (`quantised-at-runtime`).
    """
    methods = dict(_methods(config))
    packed = list(quantised_names(tensors))
    if packed:
        method = next(iter(methods.values()), "")
        example = f"{packed[0]} ({tensors[packed[0]].dtype})"
        count = f"{len(packed)} of {len(tensors)} tensors hold or describe packed weights, such as {example}"
        what = f"the checkpoint is quantised{f' ({method})' if method else ''}: {count}"
        hint = (
            "convert the 16-bit checkpoint that it was made from, or dequantise it first (model.dequantize(), save it)"
        )
        raise SourceError(what, file=config.file, hint=hint, code="quantised")
    for key, method in methods.items():
        if method in _RUN_TIME_METHODS:
            what = f"{key} is {method}, which quantises these weights at runtime; without that they are another"
            raise SourceError(f"{what} model", file=config.file, hint=_RUN_IT, code="quantised-at-runtime")
    if not methods:
        return []
    said = " and ".join(f"{key} ({method})" if method != key else key for key, method in methods.items())
    what = f"config.json has {said}, but no tensor is quantised: it was ignored"
    return [RunWarning("quantization-config", what)]


_RUN_IT = "run it with transformers; llama.cpp has an architecture of its own for BitNet"


def quantised_names(tensors: Mapping[str, SourceTensor]) -> Iterator[str]:
    """The tensors that hold packed weights, or that only packed weights need."""
    for name, tensor in tensors.items():
        is_packed = tensor.dtype not in _FLOATS and tensor.dtype not in _INDICES and not name.endswith(_BUFFERS)
        if is_packed or _BESIDE.search(name):
            yield name


def _methods(config: Config) -> Iterator[tuple[str, str]]:
    """The method's name by the config's key; the key itself where the method is unknown."""
    sections: list[Mapping[str, Any]] = [config.raw]
    sections += [section for section in config.raw.values() if isinstance(section, dict) and "model_type" in section]
    for section in sections:
        for key in KEYS:
            if settings := section.get(key):
                yield key, _method(settings) or key


def _method(settings: Any) -> str | None:
    """A method's name; mlx-lm states none, and always both of these (mlx_lm/utils.py, quantize_model)."""
    if not isinstance(settings, dict):
        return None
    method = settings.get("quant_method")
    if isinstance(method, str):
        return method
    return f"MLX, {settings['bits']} bits" if {"bits", "group_size"} <= settings.keys() else None
