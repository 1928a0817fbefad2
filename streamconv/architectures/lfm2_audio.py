"""LFM2-Audio and LFM2.5-Audio: an LFM2 with audio input, and its projector file (FastConformer and adapter).

The depthformer, which predicts the audio codes, is left out, since no converter supports it. The detokenizer,
which turns these codes into sound, has its own folder in LFM2.5-Audio and its own recipe, lfm2_audio_detokenizer.py.
Sources: LFM2AudioModel in llama.cpp's conversion/lfm2.py, ConformerAudioModel in conversion/gemma.py, MmprojModel in
conversion/base.py; tools/mtmd/clip.cpp, mtmd-audio.cpp and models/conformer.cpp of the runtime; liquid-audio's
lfm2_audio.py and NeMo's ConformerEncoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from streamconv.architectures import lfm2
from streamconv.recipe import (
    BOOL,
    F32,
    STRING,
    Caveat,
    Config,
    Dim,
    Drop,
    FoldedScale,
    FoldedShift,
    Key,
    Output,
    Refusal,
    Reshape,
    Squeeze,
    Tensor,
)

STEM, LAYER, BLOCK = "conformer.pre_encode.", "conformer.layers.{i}.", "a.blk.{i}."
ADAPTER, CODES = "audio_adapter.model.", "audio_embedding."
NORM = f"{LAYER}conv.batch_norm."
VOCODER = ("depthformer.", "depth_embeddings.", "depth_linear.", "codebook_offsets", "audio_loss_weight")

WIDTH: Final = 512  # of the positional embeddings that clip.cpp computes (PROJECTOR_TYPE_LFM2A)
KERNEL: Final = 9  # models/conformer.cpp pads four frames on both sides
EPSILON: Final = 1e-5  # of every norm in NeMo and in the runtime

# Options of NeMo's encoder, each with the values that conformer.cpp supports.
ENCODER: Final[Mapping[str, tuple[Any, ...]]] = {
    "subsampling": (None, "dw_striding"),
    "subsampling_factor": (None, 8),
    "causal_downsampling": (None, False),
    "reduction": (None,),
    "self_attention_model": (None, "rel_pos"),
    "att_context_size": (None, [-1, -1]),
    "xscaling": (None, False),
    "conv_norm_type": (None, "batch_norm"),
    "conv_context_size": (None, [(KERNEL - 1) // 2] * 2),
}
# Settings of mtmd_audio_preprocessor_conformer for which GGUF has no keys.
PREPROCESSOR: Final[Mapping[str, Any]] = {
    "sample_rate": 16000,
    "n_fft": 512,
    "window_size": 0.025,
    "window_stride": 0.01,
    "window": "hann",
    "normalize": "per_feature",
    "preemph": 0.97,
    "log": True,
}


def heard_bins(config: Config) -> int | None:
    """The number of mel bins after three convolutions of stride two."""
    bins = config.integer("feat_in")
    return None if bins is None else -(-bins // 8)


def _is_other(key: str, values: tuple[Any, ...]) -> Any:
    return lambda model: model.config.raw.get(key) not in values


def _preprocessor_differs(key: str, value: object) -> Any:
    def differs(model: Any) -> bool:
        section = model.config.whole.section("preprocessor")
        return section is not None and section.raw.get(key, value) not in (None, value)

    return differs


def both(source: str, target: str, shape: str, **words: Any) -> tuple[Tensor, Tensor]:
    """The weight and bias of a module; the runtime requires both."""
    return (
        Tensor(f"{source}.weight", f"{target}.weight", shape, **words),
        Tensor(f"{source}.bias", f"{target}.bias", shape.split()[0]),
    )


def convolution(source: str, target: str, shape: str) -> tuple[Tensor, Tensor]:
    """A convolution over time, [out, in, frames], written as a matrix."""
    return both(source, target, shape, ops=(Squeeze(),), f32=True)


def stem(number: int, shape: str) -> tuple[Tensor, Tensor]:
    """A convolution of the stem, over time and bins; the runtime adds its bias to [channels, time, bins]."""
    source, target = f"{STEM}conv.{number}", f"a.conv1d.{number}"
    return (
        Tensor(f"{source}.weight", f"{target}.weight", shape, f32=True, no_adapter="it is a convolution"),
        Tensor(f"{source}.bias", f"{target}.bias", "C", (Reshape("C 1 1"),), f32=True),
    )


PROJECTOR_FILE = Output(
    role="mmproj",
    arch="clip",
    general_type="mmproj",
    config_root="encoder",
    dims={
        "L": Dim("n_layers"),
        "H": Dim("d_model"),
        "A": Dim("n_heads"),
        "M": Dim("feat_in"),
        "B": Dim(heard_bins, rule="feat_in / 8"),
        "C": Dim("subsampling_conv_channels"),
        "K": Dim("conv_kernel_size"),
        "F": Dim(lambda config: None, rule="the width of the feed-forward networks"),
        "P": Dim(lambda config: None, rule="the width of the adapter"),
        "N": Dim(lambda config: None, rule="the number of codes"),
        "T": Dim(lambda config: None, rule="the width of the text model"),
    },
    tensors=(
        *stem(0, "C 1 3 3"),
        *stem(2, "C 1 3 3"),
        *stem(3, "C C 1 1"),
        *stem(5, "C 1 3 3"),
        *stem(6, "C C 1 1"),
        *both(f"{STEM}out", "a.pre_encode.out", "H C*B"),
        *both(f"{LAYER}norm_feed_forward1", f"{BLOCK}ffn_norm", "H"),
        *both(f"{LAYER}feed_forward1.linear1", f"{BLOCK}ffn_up", "F H"),
        *both(f"{LAYER}feed_forward1.linear2", f"{BLOCK}ffn_down", "H F"),
        *both(f"{LAYER}norm_self_att", f"{BLOCK}ln1", "H"),
        *both(f"{LAYER}self_attn.linear_q", f"{BLOCK}attn_q", "H H"),
        *both(f"{LAYER}self_attn.linear_k", f"{BLOCK}attn_k", "H H"),
        *both(f"{LAYER}self_attn.linear_v", f"{BLOCK}attn_v", "H H"),
        *both(f"{LAYER}self_attn.linear_out", f"{BLOCK}attn_out", "H H"),
        Tensor(f"{LAYER}self_attn.linear_pos.weight", f"{BLOCK}linear_pos.weight", "H H"),
        Tensor(f"{LAYER}self_attn.pos_bias_u", f"{BLOCK}pos_bias_u", "A H/A", f32=True, no_adapter="it is a bias"),
        Tensor(f"{LAYER}self_attn.pos_bias_v", f"{BLOCK}pos_bias_v", "A H/A", f32=True, no_adapter="it is a bias"),
        *both(f"{LAYER}norm_conv", f"{BLOCK}norm_conv", "H"),
        *convolution(f"{LAYER}conv.pointwise_conv1", f"{BLOCK}conv_pw1", "2*H H 1"),
        *convolution(f"{LAYER}conv.depthwise_conv", f"{BLOCK}conv_dw", "H 1 K"),
        Tensor(
            f"{NORM}weight",
            f"{BLOCK}conv_norm.weight",
            "H",
            (FoldedScale(EPSILON),),
            also=(f"{NORM}running_var",),
        ),
        Tensor(
            f"{NORM}bias",
            f"{BLOCK}conv_norm.bias",
            "H",
            (FoldedShift(EPSILON),),
            also=(f"{NORM}running_mean", f"{NORM}weight", f"{NORM}running_var"),
        ),
        *convolution(f"{LAYER}conv.pointwise_conv2", f"{BLOCK}conv_pw2", "H H 1"),
        *both(f"{LAYER}norm_feed_forward2", f"{BLOCK}ffn_norm_1", "H"),
        *both(f"{LAYER}feed_forward2.linear1", f"{BLOCK}ffn_up_1", "F H"),
        *both(f"{LAYER}feed_forward2.linear2", f"{BLOCK}ffn_down_1", "H F"),
        *both(f"{LAYER}norm_out", f"{BLOCK}ln2", "H"),
        *both(f"{ADAPTER}0", "mm.a.mlp.0", "H"),
        *both(f"{ADAPTER}1", "mm.a.mlp.1", "P H"),
        *both(f"{ADAPTER}3", "mm.a.mlp.3", "T P"),
        # For speech output, but the runtime requires the first for input too; llama.cpp's converter writes all three.
        Tensor(f"{CODES}embedding.weight", "a.position_embd.weight", "N T", f32=True, no_adapter="it is a table"),
        Tensor(f"{CODES}embedding_norm.weight", "a.position_embd_norm.weight", "T"),
        Tensor(f"{CODES}to_logits.weight", "a.embd_to_logits.weight", "N T"),
    ),
    drops=(Drop(f"{NORM}num_batches_tracked", "counts the batches seen in training"),),
    keys=(
        Key("clip.has_audio_encoder", lambda model: True, BOOL, default=False),
        Key("clip.projector_type", lambda model: "lfm2a", STRING),
        Key("clip.audio.projection_dim", "T"),
        Key("clip.audio.embedding_length", "H"),
        Key("clip.audio.feed_forward_length", "H"),  # as in llama.cpp's converter; no runtime reads it
        Key("clip.audio.block_count", "L"),
        Key("clip.audio.attention.head_count", "A"),
        Key("clip.audio.num_mel_bins", "M"),
        Key("clip.audio.attention.layer_norm_epsilon", lambda model: EPSILON, F32),
    ),
    refusals=(
        Refusal(
            "its audio adapter has an output width of {T}, which differs from the text model's hidden size",
            lambda m: m.main is not None and m.dims["T"] != m.main.dims["H"],
        ),
        Refusal("{A} heads do not share its width {H} evenly", lambda m: m.dims["H"] % m.dims["A"] != 0),
        Refusal(f"d_model is {{H}}, but the runtime supports only {WIDTH}", lambda m: m.dims["H"] != WIDTH),
        Refusal(f"conv_kernel_size is {{K}}, but the runtime supports only {KERNEL}", lambda m: m.dims["K"] != KERNEL),
        *(
            Refusal(f"{key} is {{{key}!r}}, but the runtime supports only {values[-1]!r}", _is_other(key, values))
            for key, values in ENCODER.items()
        ),
        *(
            Caveat(
                f"the preprocessor's {key} is not {value}, which is fixed in the runtime",
                _preprocessor_differs(key, value),
                code="processor-built-in",
            )
            for key, value in PREPROCESSOR.items()
        ),
    ),
)

RECIPE = replace(
    lfm2.RECIPE,
    description="LFM2-Audio and LFM2.5-Audio, with their projector and detokenizer",
    hf_names=("Lfm2AudioForConditionalGeneration",),
    bodies=(),
    model_type="lfm2_audio",
    config_root="lfm",
    prefixes={"lfm.": "model."},
    drops=tuple(Drop(f"{name}*", "is used only for speech output or training") for name in VOCODER),
    outputs=(PROJECTOR_FILE,),
    folders={"detokenizer": "audio_detokenizer"},
    caveats=(
        Caveat(
            "no file is written for the vocoder (the depthformer, which predicts the audio codes, and LFM2-Audio's "
            "codec): no converter supports it",
            lambda model: True,
            code="vocoder-left-out",
        ),
    ),
)
