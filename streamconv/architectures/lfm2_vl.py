"""LFM2-VL and LFM2.5-VL: an LFM2 with image input, and its projector file (SigLIP 2 and two linear layers).

Sources: transformers' Lfm2VlConfig, Siglip2VisionConfig, modeling_lfm2_vl.py and modeling_siglip2.py; LFM2VLModel in
llama.cpp's conversion/lfm2.py, MmprojModel in conversion/base.py; tools/mtmd/clip.cpp, mtmd-image.h and
models/siglip.cpp of the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streamconv.architectures import lfm2
from streamconv.recipe import (
    BOOL,
    F32,
    STRING,
    Caveat,
    Columns,
    Computed,
    Config,
    Dim,
    Drop,
    Key,
    Model,
    Output,
    Refusal,
    Reshape,
    Tensor,
)

TOWER, LAYER, BLOCK = "vision_tower.", "vision_tower.encoder.layers.{i}.", "v.blk.{i}."
PROJECTOR = "multi_modal_projector."

# Names in Liquid's files contain `vision_model.`; those of transformers 5 do not; those of mlx-vlm also lack `model.`.
PREFIXES = {
    "model.vision_tower.vision_model.": TOWER,
    "model.vision_tower.": TOWER,
    "vision_tower.vision_model.": TOWER,
    "model.multi_modal_projector.": PROJECTOR,
}

GELU: Final = (None, "gelu", "gelu_pytorch_tanh", "gelu_new")  # all of them the tanh form in the runtime
IMAGE: Final = 0.5  # mean and standard deviation of a channel: IMAGENET_STANDARD_MEAN and _STD of transformers

# mtmd_image_preprocessor_lfm2 in mtmd-image.h, and set_limit_image_tokens in clip.cpp: settings without GGUF keys.
BUILT_IN: Final[Mapping[str, Any]] = {
    "tile_size": 512,
    "min_tiles": 2,
    "max_tiles": 10,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "max_pixels_tolerance": 2.0,
    "use_thumbnail": True,
    "do_image_splitting": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}


def patch_size(config: Config) -> int | None:
    """The side of a square patch, in pixels; configs have one number or two equal ones."""
    value = config.raw.get("patch_size")
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return Config({"patch_size": value[0]}, config.file).integer("patch_size")
    return config.integer("patch_size")


def downsampling(config: Config) -> int | None:
    return config.whole.integer("downsample_factor")


def has_norm(config: Config) -> bool:
    return config.whole.flag("projector_use_layernorm") is not False


def has_bias(config: Config) -> bool:
    return config.whole.flag("projector_bias") is not False


def no_bias(dim: str) -> Any:
    """Zeros if the projector has no bias, since the runtime requires one."""

    def zeros(model: Model) -> NDArray[np.float32] | None:
        return None if has_bias(model.config) else np.zeros(model.dims[dim], dtype=np.float32)

    return zeros


def channels_first(model: Model) -> NDArray[np.int64]:
    """The columns of a patch, stored as (row, column, channel), in the order (channel, row, column)."""
    size, channels = model.dims["P"], model.dims["C"]
    return np.arange(size * size * channels).reshape(size, size, channels).transpose(2, 0, 1).reshape(-1)


def n_blocks(model: Model) -> int:
    """The number of layers up to `vision_feature_layer`, whose output is used: -1 is the last, -2 the one before."""
    layer = model.config.whole.raw.get("vision_feature_layer")
    if layer is None:
        return model.n_layers
    if type(layer) is not int or not -model.n_layers <= layer <= model.n_layers or layer == 0:
        raise model.config.whole.wrong("vision_feature_layer", f"a layer from -{model.n_layers} to {model.n_layers}")
    return layer if layer > 0 else model.n_layers + 1 + layer


def processor(model: Model) -> Config:
    """The image processor's settings, from both files and the section that newer versions of transformers write."""
    config = model.config
    older, newer = config.beside("preprocessor_config.json"), config.beside("processor_config.json")
    section = newer.section("image_processor")
    raw = {**older.raw, **newer.raw, **(section.raw if section else {})}
    return Config(raw, newer.file if newer.raw else older.file)


def of_channels(key: str, without: float) -> Any:
    """The values of `key` for the three channels; `without` for each if images are not normalised."""

    def values(model: Model) -> list[float]:
        said = processor(model)
        if said.flag("do_normalize") is False:
            return [without] * 3
        return said.numbers(key, 3) or [IMAGE] * 3

    return values


def deviations(model: Model) -> list[float]:
    """By which the runtime divides each channel."""
    values = of_channels("image_std", 1.0)(model)
    if min(values) <= 0:
        raise processor(model).wrong("image_std", "numbers above 0")
    return list(values)


def _is_other(key: str, value: object) -> Any:
    return lambda model: processor(model).raw.get(key, value) not in (None, value)


def both(source: str, target: str, shape: str, **words: Any) -> tuple[Tensor, Tensor]:
    """The weight and bias of a module."""
    return (
        Tensor(f"{source}.weight", f"{target}.weight", shape, **words),
        Tensor(f"{source}.bias", f"{target}.bias", shape.split()[0], **words),
    )


PROJECTOR_FILE = Output(
    role="mmproj",
    arch="clip",
    general_type="mmproj",
    config_root="vision_config",
    prefixes=PREFIXES,
    dims={
        "L": Dim("num_hidden_layers"),
        "H": Dim("hidden_size"),
        "F": Dim("intermediate_size"),
        "A": Dim("num_attention_heads", 12),
        "P": Dim(patch_size, 16, rule="patch_size"),
        "C": Dim("num_channels", 3),
        "N": Dim("num_patches"),
        "S": Dim(downsampling, 2, rule="downsample_factor"),
        "M": Dim(lambda config: config.whole.integer("projector_hidden_size"), rule="projector_hidden_size"),
        "T": Dim(lambda config: None, rule="the width of the text model"),
    },
    tensors=(
        Tensor(
            f"{TOWER}embeddings.patch_embedding.weight",
            "v.patch_embd.weight",
            "H P*P*C",
            (Columns(channels_first), Reshape("H C P P")),
            f32=True,
            or_f16=True,
        ),
        Tensor(f"{TOWER}embeddings.patch_embedding.bias", "v.patch_embd.bias", "H"),
        Tensor(
            f"{TOWER}embeddings.position_embedding.weight",
            "v.position_embd.weight",
            "N H",
            f32=True,
            no_adapter="it is a table of positions",
        ),
        *both(f"{LAYER}layer_norm1", f"{BLOCK}ln1", "H"),
        *both(f"{LAYER}self_attn.q_proj", f"{BLOCK}attn_q", "H H"),
        *both(f"{LAYER}self_attn.k_proj", f"{BLOCK}attn_k", "H H"),
        *both(f"{LAYER}self_attn.v_proj", f"{BLOCK}attn_v", "H H"),
        *both(f"{LAYER}self_attn.out_proj", f"{BLOCK}attn_out", "H H"),
        *both(f"{LAYER}layer_norm2", f"{BLOCK}ln2", "H"),
        *both(f"{LAYER}mlp.fc1", f"{BLOCK}ffn_up", "F H"),
        *both(f"{LAYER}mlp.fc2", f"{BLOCK}ffn_down", "H F"),
        *both(f"{TOWER}post_layernorm", "v.post_ln", "H"),
        *both(f"{PROJECTOR}layer_norm", "mm.input_norm", "S*S*H", required=has_norm),
        Tensor(f"{PROJECTOR}linear_1.weight", "mm.1.weight", "M S*S*H"),
        Tensor(f"{PROJECTOR}linear_1.bias", "mm.1.bias", "M", required=has_bias),
        Tensor(f"{PROJECTOR}linear_2.weight", "mm.2.weight", "T M"),
        Tensor(f"{PROJECTOR}linear_2.bias", "mm.2.bias", "T", required=has_bias),
    ),
    tokens=("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|img_row_1_col_1|>"),
    computed=(Computed("mm.1.bias", no_bias("M")), Computed("mm.2.bias", no_bias("T"))),
    drops=(Drop(f"{TOWER}head.*", "pools patches, which LFM2-VL uses one by one"),),
    keys=(
        Key("clip.has_vision_encoder", lambda model: True, BOOL, default=False),
        Key("clip.projector_type", lambda model: "lfm2", STRING),
        Key("clip.use_gelu", lambda model: True, BOOL, default=False),
        Key("clip.vision.projection_dim", "T"),
        Key("clip.vision.image_size", lambda model: model.dims["P"] * isqrt(model.dims["N"])),
        Key("clip.vision.patch_size", "P"),
        Key("clip.vision.embedding_length", "H"),
        Key("clip.vision.feed_forward_length", "F"),
        Key("clip.vision.block_count", n_blocks),
        Key("clip.vision.attention.head_count", "A"),
        Key(
            "clip.vision.attention.layer_norm_epsilon",
            lambda model: model.config.positive("layer_norm_eps") or 1e-6,
            F32,
        ),
        Key("clip.vision.image_mean", of_channels("image_mean", 0.0), F32),
        Key("clip.vision.image_std", deviations, F32),
        Key("clip.vision.projector.scale_factor", "S", default=1),
    ),
    refusals=(
        Refusal(
            "its projector makes vectors of {T}, which is not the size of the text model's",
            lambda m: m.main is not None and m.dims["T"] != m.main.dims["H"],
        ),
        Refusal("{A} heads do not share its width {H} evenly", lambda m: m.dims["H"] % m.dims["A"] != 0),
        Refusal("{N} positions are not a square", lambda m: isqrt(m.dims["N"]) ** 2 != m.dims["N"]),
        Refusal("images have {C} channels, but the runtime uses three", lambda m: m.dims["C"] != 3),
        Refusal(
            "hidden_act is {hidden_act!r}, but the runtime supports only forms of gelu",
            lambda m: m.config.text("hidden_act") not in GELU,
        ),
        Refusal(
            "projector_hidden_act is not gelu, which is fixed in the runtime",
            lambda m: m.config.whole.text("projector_hidden_act") not in GELU,
        ),
        Caveat(
            "vision_feature_layer is not the last layer: the layers after it are not used, as in llama.cpp's converter "
            "and unlike transformers 5",
            lambda m: n_blocks(m) != m.n_layers,
            code="vision-feature-layer",
        ),
        Caveat(
            "no image_mean in preprocessor_config.json or processor_config.json: 0.5 was used, the processor's default",
            lambda m: processor(m).raw.get("image_mean") is None,
            code="processor-missing",
        ),
        *(
            Caveat(
                f"the processor's {key} is not {value}, which is fixed in the runtime",
                _is_other(key, value),
                code="processor-built-in",
            )
            for key, value in BUILT_IN.items()
        ),
    ),
)

RECIPE = replace(
    lfm2.RECIPE,
    description="LFM2-VL and LFM2.5-VL, with their projector",
    hf_names=("Lfm2VlForConditionalGeneration",),
    bodies=("Lfm2VlModel",),
    model_type="lfm2_vl",
    text_types=("", "lfm2"),
    config_root="text_config",
    prefixes={
        "model.language_model.": "model.",
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "language_model.": "model.",
    },
    outputs=(PROJECTOR_FILE,),
)
