"""An architecture that nobody has: all that one file in architectures/ can say, and a checkpoint of it.

`MODULE` is the text of that file. `targets` says in numpy, and in none of its words, what its GGUF tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests import tiny

MODULE = '''
"""Made-up: a mixture of experts with a vision tower."""

import numpy as np

from streamconv.recipe import (
    BOOL, F32, Claim, Columns, Dim, Key, Output, PerLayer, Permute, PlusOne, Recipe, Scale, Split, Tensor, Transpose,
)

LAYER, BLOCK = "model.layers.{i}.", "blk.{i}."
VISION, V_BLOCK = "vision.blocks.{i}.", "v.blk.{i}."
DENSE, MOE = "ffn=dense", "ffn=moe"


def heads_backwards(model):
    """The runtime has the heads of the output's input in the opposite order."""
    heads, size = model.dims["A"], model.dims["D"]
    return np.arange(heads * size).reshape(heads, size)[::-1].reshape(-1)


def attention(n, name, *ops):
    return Tensor(
        LAYER + "attn.qkv.weight", BLOCK + f"{name}.weight", "(A+2*K)*D H", (Split(n, "A*D K*D K*D"), *ops)
    )


def kinds(config, n_layers):
    n_dense = config.integer("n_dense")
    return None if n_dense is None else ["dense" if i < n_dense else "moe" for i in range(n_layers)]


TOWER = Output(
    role="mmproj",
    arch="made-up-tower",
    general_type="mmproj",
    config_root="vision_config",
    prefixes={"model.vision.": "vision."},
    dims={
        "L": Dim("depth"),
        "P": Dim("width"),
        "C": Dim("channels", 3),
        "H": Dim(lambda config: None, rule="the width of the text"),
    },
    tensors=(
        Tensor("vision.patch.weight", "v.patch_embd.weight", "P C 5 7", f32=True),
        Tensor(VISION + "norm.weight", V_BLOCK + "ln1.weight", "P", (PlusOne(),)),
        Tensor(VISION + "up.weight", V_BLOCK + "ffn_up.weight", "P 2*P", (Transpose(),)),
        Tensor("vision.projector.0.weight", "mm.0.weight", "H P"),
        Tensor("vision.projector.2.weight", "mm.2.weight", "H H"),
    ),
    keys=(
        Key("clip.has_vision_encoder", lambda model: True, BOOL),
        Key("{arch}.block_count", "L"),
        Key("{arch}.embedding_length", "P"),
        Key("{arch}.projection_dim", lambda model: model.main.dims["H"]),
        Key("{arch}.image_token", lambda model: model.config.whole.integer("image_token")),
    ),
)

RECIPE = Recipe(
    arch="made-up",
    description="Made up for a test",
    hf_names=("MadeUpForConditionalGeneration",),
    model_type="made_up",
    config_root="text_config",
    prefixes={"model.text.": "model."},
    dims={
        "L": Dim(("num_hidden_layers", "n_layer")),
        "V": Dim("vocab_size"),
        "H": Dim("hidden_size"),
        "A": Dim("heads"),
        "K": Dim("kv_heads", "A"),
        "D": Dim("head_dim", "H/A"),
        "F": Dim("ffn"),
        "E": Dim("experts"),
        "M": Dim("expert_ffn"),
        "X": Dim("n_mixers"),
    },
    stacks={"": "L", "mixers": "X"},
    tensors=(
        Tensor("model.embed.weight", "token_embd.weight", "V H"),
        Tensor(LAYER + "norm.weight", BLOCK + "attn_norm.weight", "H", (PlusOne(),)),
        attention(0, "attn_q", Permute("A")),
        attention(1, "attn_k", Permute("K")),
        attention(2, "attn_v"),
        Tensor(LAYER + "attn.out.weight", BLOCK + "attn_output.weight", "H A*D", (Columns(heads_backwards),)),
        Tensor(LAYER + "mlp.gate_up.weight", BLOCK + "ffn_gate.weight", "2*F H", (Split(0, 2),), only=DENSE),
        Tensor(LAYER + "mlp.gate_up.weight", BLOCK + "ffn_up.weight", "2*F H", (Split(1, 2),), only=DENSE),
        Tensor(LAYER + "mlp.down.weight", BLOCK + "ffn_down.weight", "H F", only=DENSE),
        Tensor(LAYER + "router.weight", BLOCK + "ffn_gate_inp.weight", "E H", only=MOE, f32=True),
        Tensor(LAYER + "experts.{e}.gate_up.weight", BLOCK + "ffn_gate_exps.weight", "2*M H", (Split(0, 2),), only=MOE),
        Tensor(LAYER + "experts.{e}.gate_up.weight", BLOCK + "ffn_up_exps.weight", "2*M H", (Split(1, 2),), only=MOE),
        Tensor(
            LAYER + "experts.{e}.down.weight", BLOCK + "ffn_down_exps.weight", "H M",
            (Scale(lambda model: model.config.number("routed_scale") or 1.0),), only=MOE,
        ),
        Tensor(
            LAYER + "experts.{e}.gate_up.bias", BLOCK + "ffn_up_exps.bias", "2*M",
            (Split(1, 2, of_columns=True),), only=MOE,
        ),
        Tensor("model.mixers.{i:mixers}.mix.weight", "mix.{i:mixers}.weight", "H F", (Transpose(),)),
        Tensor("model.norm.weight", "output_norm.weight", "H", (PlusOne(),)),
        Tensor("lm_head.weight", "output.weight", "V H", required=False),
    ),
    keys=(
        Key("{arch}.vocab_size", "V"),
        Key("{arch}.block_count", "L"),
        Key("{arch}.embedding_length", "H"),
        Key("{arch}.feed_forward_length", PerLayer("ffn", {"dense": "F", "moe": "2*M"})),
        Key("{arch}.attention.head_count", "A"),
        Key("{arch}.attention.head_count_kv", "K"),
        Key("{arch}.attention.key_length", "D"),
        Key("{arch}.rope.dimension_count", "D/2"),
        Key("{arch}.attention.scales", lambda model: [1 / (1 + i) for i in range(model.n_layers)], F32),
        Key("{arch}.expert_count", "E", default=1),
        Key("{arch}.attention.causal", None, BOOL, default=True),
    ),
    axes={"ffn": ("dense", "moe")},
    claims=(Claim("n_dense", "ffn", kinds),),
    tied_by_default=True,
    outputs=(TOWER,),
)
'''

L, N, X, V, H, A, K, D, F, E, M, P = 3, 5, 7, 416, 64, 4, 2, 12, 28, 6, 20, 36
SCALE = 2.5
Arrays = dict[str, NDArray[np.float64]]

SHAPES: dict[str, tuple[int, ...]] = {
    "model.text.embed.weight": (V, H),
    "model.text.norm.weight": (H,),
    **{f"model.text.layers.{i}.norm.weight": (H,) for i in range(L)},
    **{f"model.text.layers.{i}.attn.qkv.weight": ((A + 2 * K) * D, H) for i in range(L)},
    **{f"model.text.layers.{i}.attn.out.weight": (H, A * D) for i in range(L)},
    "model.text.layers.0.mlp.gate_up.weight": (2 * F, H),
    "model.text.layers.0.mlp.down.weight": (H, F),
    **{f"model.text.layers.{i}.router.weight": (E, H) for i in range(1, L)},
    **{f"model.text.layers.{i}.experts.{e}.gate_up.weight": (2 * M, H) for i in range(1, L) for e in range(E)},
    **{f"model.text.layers.{i}.experts.{e}.down.weight": (H, M) for i in range(1, L) for e in range(E)},
    **{f"model.text.layers.{i}.experts.{e}.gate_up.bias": (2 * M,) for i in range(1, L) for e in range(E)},
    **{f"model.text.mixers.{i}.mix.weight": (H, F) for i in range(X)},
    "model.vision.patch.weight": (P, 3, 5, 7),
    **{f"model.vision.blocks.{i}.norm.weight": (P,) for i in range(N)},
    **{f"model.vision.blocks.{i}.up.weight": (P, 2 * P) for i in range(N)},
    "model.vision.projector.0.weight": (H, P),
    "model.vision.projector.2.weight": (H, H),
}
CONFIG = {
    "architectures": ["MadeUpForConditionalGeneration"],
    "model_type": "made_up",
    "image_token": 7,
    "text_config": {
        "n_layer": L, "vocab_size": V, "hidden_size": H, "heads": A, "kv_heads": K, "head_dim": D, "ffn": F,
        "experts": E, "expert_ffn": M, "n_dense": 1, "routed_scale": SCALE, "bos_token_id": 1, "eos_token_id": 2,
    },
    "vision_config": {"depth": N, "width": P},
}  # fmt: skip


def build(directory: Path, *, without: str = "nothing", **text: object) -> Path:
    """A checkpoint in BF16; of tensors whose names begin with `without`, none."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tiny.Tensor.of(tiny.noise(name, shape, 0.3), "BF16")
        for name, shape in SHAPES.items()
        if not name.startswith(without)
    }
    tiny.write_json(directory / "config.json", CONFIG | {"text_config": {**CONFIG["text_config"], **text}})  # type: ignore[dict-item]
    tiny.write_shards(directory, tensors, 2)
    tiny.write_bpe(directory)
    return directory


def stored(directory: Path) -> Arrays:
    return {name: tensor.float32().astype(np.float64) for name, tensor in tiny.tensors_of(directory).items()}


def targets(w: Mapping[str, NDArray[np.float64]]) -> Arrays:
    """The tensors of the model's file."""
    found: Arrays = {
        "token_embd.weight": w["model.text.embed.weight"],
        "output_norm.weight": w["model.text.norm.weight"] + 1,
    }
    for i in range(L):
        layer, block = f"model.text.layers.{i}.", f"blk.{i}."
        found[block + "attn_norm.weight"] = w[layer + "norm.weight"] + 1
        qkv = w[layer + "attn.qkv.weight"]
        found[block + "attn_q.weight"] = _pairs(qkv[: A * D], A)
        found[block + "attn_k.weight"] = _pairs(qkv[A * D : (A + K) * D], K)
        found[block + "attn_v.weight"] = qkv[(A + K) * D :]
        out = w[layer + "attn.out.weight"]
        found[block + "attn_output.weight"] = np.concatenate([out[:, D * a : D * (a + 1)] for a in range(A)][::-1], 1)
        if i == 0:
            found[block + "ffn_gate.weight"], found[block + "ffn_up.weight"] = np.split(
                w[layer + "mlp.gate_up.weight"], 2
            )
            found[block + "ffn_down.weight"] = w[layer + "mlp.down.weight"]
            continue
        found[block + "ffn_gate_inp.weight"] = w[layer + "router.weight"]
        gate_up = np.stack([w[f"{layer}experts.{e}.gate_up.weight"] for e in range(E)])
        found[block + "ffn_gate_exps.weight"], found[block + "ffn_up_exps.weight"] = gate_up[:, :M], gate_up[:, M:]
        found[block + "ffn_down_exps.weight"] = SCALE * np.stack(
            [w[f"{layer}experts.{e}.down.weight"] for e in range(E)]
        )
        found[block + "ffn_up_exps.bias"] = np.stack([w[f"{layer}experts.{e}.gate_up.bias"][M:] for e in range(E)])
    for i in range(X):
        found[f"mix.{i}.weight"] = w[f"model.text.mixers.{i}.mix.weight"].T
    return found


def tower(w: Mapping[str, NDArray[np.float64]]) -> Arrays:
    """The tensors of the tower's file."""
    found = {
        "v.patch_embd.weight": w["model.vision.patch.weight"],
        "mm.0.weight": w["model.vision.projector.0.weight"],
        "mm.2.weight": w["model.vision.projector.2.weight"],
    }
    for i in range(N):
        found[f"v.blk.{i}.ln1.weight"] = w[f"model.vision.blocks.{i}.norm.weight"] + 1
        found[f"v.blk.{i}.ffn_up.weight"] = w[f"model.vision.blocks.{i}.up.weight"].T
    return found


def _pairs(w: NDArray[np.float64], heads: int) -> NDArray[np.float64]:
    rows = np.split(w, heads)
    return np.concatenate([np.stack([one[: D // 2], one[D // 2 :]], 1).reshape(D, -1) for one in rows])
