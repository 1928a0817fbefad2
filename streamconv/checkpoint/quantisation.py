"""Whether a checkpoint is quantised: its tensors decide, not its config.

A model that was trained on a quantised base and merged to 16 bits often keeps the base's `quantization_config`, and
some quantised models have lost theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.checkpoint.config import Config
from streamconv.checkpoint.safetensors import SourceTensor
from streamconv.errors import RunWarning, SourceError

KEYS = ("quantization_config", "quantization")  # in transformers, in mlx-lm

# Methods that quantise 16-bit weights while the model runs, as it was trained: without that, outputs would differ.
# transformers, utils/quantization_config.py: BitNetQuantConfig, whose `linear_class` autobitlinear does so.
_RUN_TIME_METHODS = frozenset({"bitnet"})

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "C64"})
_INDICES = frozenset({"I64", "BOOL"})  # positions, counters, masks
_BUFFERS = (".bias", ".masked_bias", "position_ids", "_mask")  # small integers that are not weights

# Names of the tensors that belong to packed weights, by method: bitsandbytes; GPTQ, AWQ, MLX; FP8 (DeepSeek, ModelOpt)
# and compressed-tensors; HQQ and optimum-quanto; then MXFP4 in transformers.
_BESIDE = re.compile(
    r"\.(absmax|quant_map|nested_absmax|quant_state\..+|SCB|weight_format"
    r"|qweight|qzeros|g_idx|scales|biases|qbiases"
    r"|weight_scale(_inv|_2)?|weight_packed|weight_shape|weight_zero_point|weight_global_scale|qscale_weight"
    r"|W_q|_data|_scale|_shift)$"
    r"|_(blocks|scales|scale_inv)$"
)


def check_quantisation(config: Config, tensors: Mapping[str, SourceTensor]) -> list[RunWarning]:
    """A warning if the config says that the checkpoint is quantised, and it is not.

    Args:
        config: Its config.json.
        tensors: All its tensors by their stored names.

    Raises:
        SourceError: It is quantised (`quantised`), or its method quantises 16-bit weights while the model runs
            (`quantised-at-runtime`).
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
            what = f"{key} is {method}, which quantises these weights at runtime; llama.cpp would run them unquantised"
            raise SourceError(what, file=config.file, hint=_RUN_IT, code="quantised-at-runtime")
    if not methods:
        return []
    settings = " and ".join(f"{key} ({method})" if method != key else key for key, method in methods.items())
    what = f"config.json has {settings}, but no tensor is quantised: it was ignored"
    return [RunWarning("quantization-config", what)]


_RUN_IT = "run it with transformers; llama.cpp has an architecture of its own for BitNet"


def quantised_names(tensors: Mapping[str, SourceTensor]) -> Iterator[str]:
    """The names of tensors that hold packed weights, or that belong to them."""
    for name, tensor in tensors.items():
        is_packed = tensor.dtype not in _FLOATS and tensor.dtype not in _INDICES and not name.endswith(_BUFFERS)
        if is_packed or _BESIDE.search(name):
            yield name


def _methods(config: Config) -> Iterator[tuple[str, str]]:
    """(key in the config, name of the method or, if it is unknown, the key again)."""
    sections: list[Mapping[str, Any]] = [config.raw]
    sections += [section for section in config.raw.values() if isinstance(section, dict) and "model_type" in section]
    for section in sections:
        for key in KEYS:
            if settings := section.get(key):
                yield key, _method(settings) or key


def _method(settings: Any) -> str | None:
    """A method's name. mlx-lm gives no name, but always bits and group_size (mlx_lm/utils.py, quantize_model)."""
    if not isinstance(settings, dict):
        return None
    method = settings.get("quant_method")
    if isinstance(method, str):
        return method
    return f"MLX, {settings['bits']} bits" if {"bits", "group_size"} <= settings.keys() else None
