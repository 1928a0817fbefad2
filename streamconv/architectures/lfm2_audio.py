"""LFM2-Audio and LFM2.5-Audio, the text half: an LFM2 under another name.

The encoder (FastConformer) and its adapter, which llama.cpp's converter makes a projector of, are left out here, and so
is what speaks: the depthformer and the codec, of which neither converter makes a file.
Source: LFM2Model and LFM2AudioModel in llama.cpp's conversion/lfm2.py; liquid-audio's lfm2_audio.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.architectures import lfm2
from streamconv.recipe import Caveat, Drop

ENCODER = ("conformer.", "audio_adapter.", "audio_embedding.")
VOCODER = ("depthformer.", "depth_embeddings.", "depth_linear.", "codebook_offsets", "audio_loss_weight")

RECIPE = replace(
    lfm2.RECIPE,
    description="LFM2-Audio and LFM2.5-Audio, the text model",
    hf_names=("Lfm2AudioForConditionalGeneration",),
    bodies=(),
    model_type="lfm2_audio",
    config_root="lfm",
    prefixes={"lfm.": "model."},
    drops=(
        *(Drop(f"{name}*", "belongs to the audio encoder") for name in ENCODER),
        *(Drop(f"{name}*", "is used only for speech output or training") for name in VOCODER),
    ),
    caveats=(
        Caveat(
            "the file has the text half alone: the audio encoder is left out, and so is the vocoder (depthformer and "
            "codec), of which no converter of llama.cpp's makes a file either",
            lambda model: True,
            code="text-half",
        ),
    ),
)
