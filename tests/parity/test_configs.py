"""What configs leave out or spell otherwise: the same keys as of the config that transformers makes of them.

Each family's config is changed a little, completed by transformers' own class, and both are bound to the family's
tensors. What is taken must give the same keys and tensors; what is refused is safe.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from streamconv.errors import StreamconvError
from tests import inmemory
from tests.families import build
from tests.families.table import FAMILIES
from tests.inmemory import ABSENT

pytestmark = pytest.mark.parity

Changes = dict[str, Any]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 777.0}


def old(scaling: Any, **more: Any) -> Changes:
    """RoPE in the spelling of transformers 4."""
    return {"rope_parameters": ABSENT, "rope_theta": 12345.0, "rope_scaling": scaling, **more}


SPELLINGS: dict[str, Changes] = {
    "theta": old(ABSENT),
    "theta, whole": old(ABSENT, rope_theta=12345),
    "theta, null scaling": old(None),
    "theta, empty scaling": old({}),
    "linear by type": old({"type": "linear", "factor": 2.0}),
    "linear without theta": old({"type": "linear", "factor": 2.0}, rope_theta=ABSENT),
    "dynamic": old({"type": "dynamic", "factor": 2.0}),
    "llama3": old(LLAMA3 | {"original_max_position_embeddings": 128}),
    "yarn": old(YARN),
    "yarn by both words": old(YARN | {"type": "yarn"}),
    "yarn, attention": old(YARN | {"attention_factor": 1.5}),
    "yarn, magnitudes": old(YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}),
    "yarn, no original context": old({"rope_type": "yarn", "factor": 4.0}),
    "yarn, original context beside it": old(YARN, original_max_position_embeddings=200),
    "yarn, null factor": old(YARN | {"factor": None}),
    "two bases": {"rope_parameters": PLAIN, "rope_theta": 12345.0},
    "two scalings": {"rope_parameters": PLAIN, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "no type": {"rope_parameters": {"rope_theta": 777.0}},
    "no theta": {"rope_parameters": {"rope_type": "default"}},
    "theta beside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 888.0},
    "empty": {"rope_parameters": {}},
    "partial beside": {"partial_rotary_factor": 0.5},
    "partial within": {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
    "partial twice": {"partial_rotary_factor": 0.25, "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
    "torch_dtype": {"dtype": ABSENT, "torch_dtype": "float16"},
    "window": {"sliding_window": 128},
    "window, used": {"use_sliding_window": True, "sliding_window": 128},
    "window, used in part": {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
    "window, not used": {"use_sliding_window": False, "sliding_window": 128},
    "pattern": {"layer_types": ABSENT, "sliding_window_pattern": 2, "sliding_window": 128},
    "activation": {"hidden_act": "gelu"},
    "epsilon": dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon"), 0.5),
    "experts, normed": {"norm_topk_prob": True},
    "experts, as they are": {"norm_topk_prob": False},
    "experts, scaled": {"routed_scaling_factor": 2.0},
    "logits, scaled": {"logit_scale": 2.0, "logits_scaling": 3},
    "softcap": {"final_logit_softcapping": 15.0, "attn_logit_softcapping": 30.0},
    "both sides": {"use_bidirectional_attention": True},
    "every second layer without RoPE": {"no_rope_layers": ABSENT, "no_rope_layer_interval": 2},
}

# Of the tensors, not of the config: how many layers there are, of which kinds, and whether there is a head.
BY_TENSORS = {"num_hidden_layers", "tie_word_embeddings", "layer_types", "num_dense_layers", "intermediate_size"}
NOT_TRIED = {"architectures", "model_type", "transformers_version", "dtype", *BY_TENSORS}

# Where transformers 5 reads the spelling of transformers 4 otherwise than that did: `rope_theta` for some layers of an
# OLMo 3 alone, and `type` of a Gemma 3 not at all. Settings for all layers at once, which neither writes, it drops.
OTHERWISE = ("olmo3", "gemma3")
# Whose own classes have other defaults than the Llama that transformers takes them for.
OWN_CODE = ("internlm3", "iquest-coder", "stablelm-epoch")

NAMES = [
    name for name, family in FAMILIES.items() if family.vectors is None and not name.startswith(("lfm2", *OWN_CODE))
]


def bound(raw: Changes, name: str) -> tuple[dict[str, Any], list[str]] | None:
    """Keys and tensors, None for what is refused."""
    shapes = {tensor: tuple(shape) for tensor, (_, *shape) in build.spec(name)["tensors"].items()}
    stored = {one: inmemory.Stored(np.broadcast_to(np.float32(0), shape)) for one, shape in shapes.items()}
    try:
        model = inmemory.bound(copy.deepcopy(raw), stored)
        return inmemory.keys(model), [target.name for target in model.targets]
    except StreamconvError:
        return None


def completed(raw: Changes) -> Changes | None:
    """As transformers reads the config and would save it; None where it does not take it."""
    try:
        config: AutoConfig = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))
        whole = json.loads(json.dumps(config.to_dict(), default=str))
    except Exception:  # whatever the class raises
        return None
    return {**whole, "architectures": raw["architectures"]}


def changed(name: str) -> Iterator[tuple[str, Changes]]:
    raw = json.loads((build.DATA / name / "config.json").read_text(encoding="utf-8"))
    root = "text_config" if isinstance(raw.get("text_config"), dict) else None
    text = raw if root is None else raw[root]
    left_out: dict[str, Changes] = {
        f"{key} {value}": {key: value} for key in text if key not in NOT_TRIED for value in (ABSENT, None)
    }
    spelled = {} if name.startswith(OTHERWISE) else SPELLINGS
    for label, changes in {**left_out, **spelled, "as it is": {}}.items():
        new = {key: value for key, value in {**text, **changes}.items() if value is not ABSENT}
        yield label, new if root is None else {**raw, root: new}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_means_what_transformers_makes_of_it(name: str) -> None:
    n_taken, different = 0, {}
    for label, raw in changed(name):
        ours, whole = bound(raw, name), completed(raw)
        if ours is None or whole is None:
            continue
        n_taken += 1
        theirs = bound(whole, name)
        if theirs is not None and theirs != ours:
            different[label] = sorted(set(map(str, ours[0].items())) ^ set(map(str, theirs[0].items())))
    assert different == {}
    assert n_taken > 10
