"""LFM2-VL whose text model is an LFM2-MoE: layers as in lfm2moe.py, names and projector as in lfm2_vl.py."""

from __future__ import annotations

from dataclasses import replace

from streamconv.architectures import lfm2_vl, lfm2moe

RECIPE = replace(
    lfm2moe.RECIPE,
    description="LFM2-VL with an LFM2-MoE as its text model, and their projector",
    hf_names=lfm2_vl.RECIPE.hf_names,
    bodies=lfm2_vl.RECIPE.bodies,
    model_type=lfm2_vl.RECIPE.model_type,
    text_types=("lfm2_moe",),
    config_root=lfm2_vl.RECIPE.config_root,
    prefixes=lfm2_vl.RECIPE.prefixes,
    outputs=lfm2_vl.RECIPE.outputs,
)
