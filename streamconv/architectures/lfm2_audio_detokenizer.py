"""The detokenizer of LFM2.5-Audio: an LFM2 with windows that turns audio codes into spectra, without a tokenizer.

The embeddings of the codes and the window of the inverse STFT that follows are not written to the GGUF file.
Sources: LFM25AudioTokenizer in llama.cpp's conversion/lfm2.py, and lfm2.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.architectures import lfm2
from streamconv.recipe import Dim, Drop, Key, Tensor

RECIPE = replace(
    lfm2.RECIPE,
    description="LFM2.5-Audio's detokenizer",
    hf_names=("Lfm25AudioTokenizer",),
    bodies=(),
    model_type="lfm25_audio_tokenizer",
    dims={**lfm2.DIMS, "O": Dim("output_size"), "W": Dim("sliding_window")},
    tensors=(
        *(row for row in lfm2.RECIPE.tensors if not row.target.startswith("dense_2.")),
        Tensor("lin.weight", "dense_2.weight", "O H", no_adapter=lfm2.NO_ADAPTER),
        Tensor("lin.bias", "dense_2.bias", "O"),
    ),
    keys=(
        *(key for key in lfm2.KEYS if key.name != "{arch}.embedding_length_out"),
        Key("{arch}.embedding_length_out", "O"),
        Key("{arch}.attention.sliding_window", "W"),
    ),
    prefixes={"lfm.": "model."},
    drops=(
        Drop("emb.emb*", "is the table of codes, which llama.cpp does not read"),
        Drop("istft.window", "belongs to the inverse STFT that follows the model"),
    ),
    has_tokenizer=False,
)
