"""llama.cpp's converters, run now on the same sources: what is committed of them is current, and ours is the same.

Every outtype of every case is compared with the committed goldens by tests/golden; here each case has one.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest

import streamconv
from tests import cases
from tests.oracles import ggufs
from tests.parity.conftest import MEMORY, Sources
from tests.tools import llama_cpp

pytestmark = pytest.mark.parity

CONVERTIBLE = [name for name in cases.MODELS if "tensors" in cases.record(name)["llamacpp"]]


@pytest.mark.parametrize(("name", "outtype"), zip(CONVERTIBLE, cycle(("auto", "q8_0", "f32")), strict=False))
def test_models(sources: Sources, tmp_path: Path, name: str, outtype: str) -> None:
    src = sources.model(name)
    theirs = ggufs.read(llama_cpp.convert(src, tmp_path / "theirs.gguf", outtype, pre=cases.PRE[name])).golden()
    assert theirs == cases.golden(name, outtype), "the committed golden is out of date"
    streamconv.convert(src, tmp_path / "ours.gguf", outtype=outtype, max_memory=MEMORY)
    ours = ggufs.read(tmp_path / "ours.gguf")
    faults = ggufs.tensor_faults(ours, theirs) + ggufs.key_faults(ours, theirs)
    faults = [fault for fault in faults if "exp_probs_b.bias: only in ours" not in fault]
    assert faults == []
    if ours.tensors.keys() == theirs["tensors"].keys():
        assert streamconv.verify(tmp_path / "theirs.gguf", src).warnings == []


@pytest.mark.parametrize("name", ["llama-plain", "llama-ends", "llama-bf16", "lfm2-plain", "lfm2moe-plain"])
def test_adapters(sources: Sources, tmp_path: Path, name: str) -> None:
    adapter, base = sources.adapter(name)
    theirs = ggufs.read(llama_cpp.convert_lora(adapter, base, tmp_path / "theirs.gguf", "f16")).golden()
    assert theirs == cases.golden(name, "f16"), "the committed golden is out of date"
    streamconv.convert_adapter(adapter, base, tmp_path / "ours.gguf", outtype="f16", max_memory=MEMORY)
    assert ggufs.tensor_faults(ggufs.read(tmp_path / "ours.gguf"), theirs) == []
    assert streamconv.verify(tmp_path / "theirs.gguf", adapter, base=base).warnings == []


@pytest.mark.parametrize("name", ["lfm2moe-stacked", "lfm2moe-scaled"])
def test_what_llama_cpp_cannot_convert(sources: Sources, tmp_path: Path, name: str) -> None:
    """If this fails, llama.cpp has learnt it: make its goldens."""
    with pytest.raises(llama_cpp.ConverterError):
        llama_cpp.convert(sources.model(name), tmp_path / "theirs.gguf", "f32", pre="lfm2")
