"""LFM2-Audio and LFM2.5-Audio as Liquid publishes them: an LFM2, a FastConformer, what speaks, and a detokenizer.

The encoder is as wide as the published one, since the runtime has that width built in; all else is small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.tiny.files import ABSENT, NOTHING, Config, Tensor, noise, tensors_of, write_config, write_shards
from tests.tiny.models import lfm2

WIDTH, KERNEL, SMALL_KERNEL = 512, 9, 3
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def lfm2_audio(
    directory: Path,
    *,
    seed: int = 41,
    n_layers: int = 2,
    n_heads: int = 4,
    ff: int = 96,
    channels: int = 24,
    n_mels: int = 80,
    adapter: int = 160,
    n_codes: int = 280,
    dtype: str = "BF16",
    detokenizer: bool = True,
    encoder: Config = NOTHING,
    config: Config = NOTHING,
) -> Path:
    """An `Lfm2AudioForConditionalGeneration` checkpoint; with `detokenizer` the folder that came with 2.5.

    `encoder` overrides keys of the config's section of that name, `config` those of the whole.
    """
    lfm2(directory, seed=seed, dtype=dtype, attention=(1,), n_layers=3)
    text = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    hidden = text["hidden_size"]
    made = {name.replace("model.", "lfm.", 1): tensor for name, tensor in tensors_of(directory).items()}
    shapes = dict(_encoder(n_layers, n_heads, ff, channels, n_mels))
    shapes |= {
        **_pair("audio_adapter.model.0", WIDTH),
        **_pair("audio_adapter.model.1", adapter, WIDTH),
        **_pair("audio_adapter.model.3", hidden, adapter),
        "audio_embedding.embedding.weight": (n_codes, hidden),
        "audio_embedding.embedding_norm.weight": (hidden,),
        "audio_embedding.to_logits.weight": (n_codes, hidden),
        "audio_loss_weights": (8,),
        "depth_linear.weight": (48, hidden),
        "depth_linear.bias": (48,),
        "depth_embeddings.0.embedding.weight": (35, 48),
        "depth_embeddings.7.embedding_norm.weight": (48,),
        "depthformer.layers.0.operator_norm.weight": (48,),
    }
    made |= {name: Tensor.of(_values(name, shape, seed), dtype) for name, shape in shapes.items()}
    made |= {f"conformer.layers.{i}.conv.batch_norm.num_batches_tracked": _count(1000 + i) for i in range(n_layers)}
    made["codebook_offsets"] = Tensor("I64", (2,), b"".join(_count(n).data for n in (0, 35)))
    write_shards(directory, made)
    section = {
        "d_model": WIDTH, "n_layers": n_layers, "n_heads": n_heads, "feat_in": n_mels, "feat_out": -1,
        "subsampling": "dw_striding", "subsampling_factor": 8, "subsampling_conv_channels": channels,
        "causal_downsampling": False, "ff_expansion_factor": 4, "self_attention_model": "rel_pos",
        "att_context_size": [-1, -1], "xscaling": False, "untie_biases": True, "pos_emb_max_len": 5000,
        "conv_kernel_size": KERNEL, "conv_norm_type": "batch_norm", "conv_context_size": None,
    } | dict(encoder)  # fmt: skip
    settings = {
        "architectures": ["Lfm2AudioForConditionalGeneration"],
        "codebooks": 8,
        "depthformer": {"dim": 48, "layers": 1, "tie": True},
        "encoder": {key: value for key, value in section.items() if value is not ABSENT},
        "lfm": text,
        "preprocessor": {"features": n_mels, "sample_rate": 16000, "n_fft": 512, "normalize": "per_feature",
                         "window": "hann", "window_size": 0.025, "window_stride": 0.01},
        "tie_audio_embeddings": False,
    }  # fmt: skip
    write_config(directory / "config.json", settings, config)
    if detokenizer:
        lfm25_detokenizer(directory / "audio_detokenizer", seed=seed + 1, dtype=dtype)
    return directory


def lfm25_detokenizer(
    directory: Path, *, seed: int = 42, dtype: str = "BF16", n_out: int = 72, config: Config = NOTHING
) -> Path:
    """The model that makes sound of codes: an LFM2 with windows, a linear layer after it, and no tokenizer."""
    lfm2(directory, seed=seed, n_layers=4, attention=(1, 3), n_kv_heads=4, hidden=96, n_heads=12, ff=80, dtype=dtype)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (directory / name).unlink(missing_ok=True)
    made = {name.replace("model.", "lfm.", 1): tensor for name, tensor in tensors_of(directory).items()}
    shapes = {"lin.weight": (n_out, 96), "lin.bias": (n_out,), "emb.emb.weight": (40, 96), "istft.window": (128,)}
    made |= {name: Tensor.of(_values(name, shape, seed), dtype) for name, shape in shapes.items()}
    write_shards(directory, made)
    text = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kinds = ["sliding_attention" if kind == "full_attention" else kind for kind in text["layer_types"]]
    more = {"architectures": ["Lfm25AudioTokenizer"], "layer_types": kinds, "output_size": n_out, "sliding_window": 30}
    write_config(directory / "config.json", text | more, config)
    return directory


def _encoder(n_layers: int, n_heads: int, ff: int, channels: int, n_mels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    stem, small = "conformer.pre_encode", (SMALL_KERNEL, SMALL_KERNEL)
    for i, (n_in, kernel) in {0: (1, small), 2: (1, small), 3: (channels, (1, 1)), 5: (1, small),
                              6: (channels, (1, 1))}.items():  # fmt: skip
        yield from _pair(f"{stem}.conv.{i}", channels, n_in, *kernel).items()
    yield from _pair(f"{stem}.out", WIDTH, channels * n_mels // 8).items()
    for i in range(n_layers):
        layer = f"conformer.layers.{i}"
        for norm in ("feed_forward1", "self_att", "conv", "feed_forward2", "out"):
            yield from _pair(f"{layer}.norm_{norm}", WIDTH).items()
        for feed in ("feed_forward1", "feed_forward2"):
            yield from _pair(f"{layer}.{feed}.linear1", ff, WIDTH).items()
            yield from _pair(f"{layer}.{feed}.linear2", WIDTH, ff).items()
        for linear in ("q", "k", "v", "out"):
            yield from _pair(f"{layer}.self_attn.linear_{linear}", WIDTH, WIDTH).items()
        yield f"{layer}.self_attn.linear_pos.weight", (WIDTH, WIDTH)
        yield from ((f"{layer}.self_attn.pos_bias_{u}", (n_heads, WIDTH // n_heads)) for u in "uv")
        yield from _pair(f"{layer}.conv.pointwise_conv1", 2 * WIDTH, WIDTH, 1).items()
        yield from _pair(f"{layer}.conv.depthwise_conv", WIDTH, 1, KERNEL).items()
        yield from _pair(f"{layer}.conv.pointwise_conv2", WIDTH, WIDTH, 1).items()
        yield from ((f"{layer}.conv.batch_norm.{part}", (WIDTH,)) for part in BATCH_NORM)


def _pair(module: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{module}.weight": shape, f"{module}.bias": shape[:1]}


def _values(name: str, shape: tuple[int, ...], seed: int) -> Any:
    if name.endswith("running_var"):
        return abs(noise(name, shape, 0.5, seed)) + 1e-4
    if len(shape) == 1:
        return noise(name, shape, 0.2, seed) + (1 if name.endswith("weight") else 0)
    return noise(name, shape, 1 / math.sqrt(math.prod(shape[1:])), seed)


def _count(n: int) -> Tensor:
    return Tensor("I64", (), n.to_bytes(8, "little"))
