"""A run goes on only with work that it would have done itself: whatever decides a byte is compared, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.errors import Interrupted, ResumeError
from streamconv.lazy.arithmetic import Scale
from streamconv.lazy.views import PairHalves
from tests import tiny

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def set_config(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def interrupt(model: Path, out: Path, **options: Any) -> None:
    with pytest.raises(Interrupted):
        streamconv.convert(model, out, cancel=lambda: True, **options)
    assert out.with_name(f"{out.name}.part").exists()


def refused(model: Path, out: Path, **options: Any) -> str:
    """What the message says of a run that must not go on; nothing of the work may be gone."""
    left = {path: path.read_bytes() for path in out.parent.glob("*.part*")}
    with pytest.raises(ResumeError) as caught:
        streamconv.convert(model, out, **options)
    assert (caught.value.code, caught.value.exit_code) == ("resume-mismatch", 3)
    assert "--restart" in (caught.value.hint or "")
    assert {path: path.read_bytes() for path in out.parent.glob("*.part*")} == left
    assert not out.exists()
    return caught.value.message


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.gguf"


@pytest.mark.parametrize(
    ("make", "before", "after", "named"),
    [
        (tiny.lfm2moe, {"routed_scaling_factor": 1.0}, {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        (tiny.llama, {"rope_scaling": LLAMA3}, {"rope_scaling": LLAMA3 | {"factor": 16.0}}, "rope_scaling"),
    ],
    ids=["factor of the experts", "factors of RoPE"],
)
def test_a_config_that_no_key_shows(
    tmp_path: Path,
    out: Path,
    make: Callable[[Path], Path],
    before: dict[str, Any],
    after: dict[str, Any],
    named: str,
) -> None:
    model = make(tmp_path / "model")
    set_config(model, **before)
    interrupt(model, out, outtype="f32")
    set_config(model, **after)
    assert named in refused(model, out, outtype="f32")
    for options in ({"resume": True}, {"force": True}, {"resume": True, "force": True}):
        refused(model, out, outtype="f32", **options)
    report = streamconv.convert(model, out, outtype="f32", restart=True)
    streamconv.convert(model, tmp_path / "fresh.gguf", outtype="f32")
    assert not report.resumed
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_the_same_config_goes_on(tmp_path: Path, out: Path) -> None:
    model = tiny.lfm2moe(tmp_path / "model")
    interrupt(model, out)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps(json.loads(text), indent=7))  # the same values
    streamconv.convert(model, out)
    streamconv.convert(model, tmp_path / "fresh.gguf")
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_another_version_of_streamconv(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(tmp_path / "model")
    interrupt(model, out)
    monkeypatch.setattr(streamconv, "__version__", "99.1")
    assert "streamconv (was " in refused(model, out)


def test_another_version_of_gguf(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(tmp_path / "model")
    interrupt(model, out)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.1")
    assert "gguf (was " in refused(model, out)


def test_another_chain_of_operations(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(tmp_path / "model")
    interrupt(model, out)
    with monkeypatch.context() as patch:
        patch.setattr(PairHalves, "describe", lambda self: "in another order")
        assert "operations (changed)" in refused(model, out)

    class Twice(Scale):
        """An operation that there is not yet."""

        def __init__(self, parent: Any, n_heads: int) -> None:
            super().__init__(parent, 1.0)

    monkeypatch.setattr("streamconv.lazy.views.PairHalves", Twice)
    assert "operations (changed)" in refused(model, out)


@pytest.mark.parametrize("number", [0, 1])
def test_two_adapters_whose_files_have_one_name(tmp_path: Path, out: Path, number: int) -> None:
    model = tiny.llama(tmp_path / "model")
    adapters = [tiny.peft_adapter(tmp_path / name, model, seed=seed) for seed, name in enumerate("ab", 1)]
    merged: Any = [(adapter, 0.5) for adapter in adapters]
    interrupt(model, out, adapters=merged)
    weights = adapters[number] / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = bytes(4)
    weights.write_bytes(data)
    assert "adapter_model.safetensors" in refused(model, out, adapters=merged)
