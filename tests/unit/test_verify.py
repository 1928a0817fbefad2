"""Verify: files of streamconv and of other tools pass, in any order and type; each difference is named, exit 6."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

import streamconv
from streamconv.api import run as run_module
from streamconv.api.convert_lora import convert_adapter
from streamconv.api.verify_file import verify
from streamconv.budget import MIB, RUN_TO_RUN_NBYTES, Budget
from streamconv.check import tensors as compare
from streamconv.cli import main
from streamconv.engine.layout import MODULES_NBYTES
from streamconv.errors import BudgetError, SourceError, UsageError, VerifyError
from streamconv.ggml import _kernels
from streamconv.ggml import encode as codecs
from streamconv.ggml.blocks import best_kernel, quantize_rows
from streamconv.ggml.element_types import TYPES
from streamconv.ggml.rows import Encode
from streamconv.gguf.reader import GGUFFile
from streamconv.lazy.leaves import Resident
from streamconv.lazy.node import Workspace, peak_nbytes
from streamconv.lazy.scratch import Scratch
from streamconv.options import SplitOptions
from tests import cases, tiny
from tests.oracles import ggufs
from tests.raising import raises

Q8_0 = gguf.GGMLQuantizationType.Q8_0
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
QUERY = "blk.2.attn_q.weight"
NORM = "blk.1.attn_norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.lfm2(tmp_path_factory.mktemp("source") / "lfm2")


def made(source: Path, tmp_path: Path, outtype: str = "auto", **keywords: Any) -> Path:
    out = tmp_path / f"{outtype}.gguf"
    streamconv.convert(source, out, outtype=outtype, **keywords)
    return out


def rewritten(
    path: Path,
    out: Path,
    *,
    keys: Callable[[dict[str, Any]], None] = lambda _: None,
    tensors: Callable[[dict[str, tuple[Any, Any]]], dict[str, tuple[Any, Any]] | None] = lambda _: None,
    types: dict[str, list[str]] | None = None,
) -> Path:
    """The file as gguf-py writes it, after its keys ({name: value}) and tensors ({name: (raw, type)}) were changed.

    types: of the keys that are new, or that shall have another, as ["ARRAY", "INT32"].
    """
    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values = {name: field.contents() for name, field in fields.items()}
    data = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    keys(values)
    data = tensors(data) or data
    writer = gguf.GGUFWriter(out, values.pop("general.architecture"))
    for name, value in values.items():
        given = (types or {}).get(name)
        kinds = [gguf.GGUFValueType[kind] for kind in given] if given else fields[name].types
        sub_type = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kinds[0], sub_type)
    for name, (raw, type_) in data.items():
        writer.add_tensor(name, raw, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def with_keys_of(path: Path, out: Path, kv: dict[str, Any]) -> Path:
    """The file with the keys of another tool's, of which there is a golden; hashed ones are the same in both."""

    def change(keys: dict[str, Any]) -> None:
        for name in set(keys) - set(kv):
            del keys[name]
        keys.update({name: kv[name]["value"] for name in kv if not isinstance(kv[name]["value"], dict)})
        keys.update({name: [0.0] * kv[name]["value"]["n"] for name in set(kv) - set(keys)})  # scores, which are zeros

    return rewritten(path, out, keys=change, types={name: entry["type"] for name, entry in kv.items()})


def flip(path: Path, tensor: str, byte: int, bit: int) -> None:
    """One bit of a tensor's data."""
    with GGUFFile.open(path) as file:
        at = file.tensors[tensor].offset + byte
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


# ---------------------------------------------------------------- what is right


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("model", [tiny.lfm2, tiny.lfm2moe, tiny.llama], ids=lambda model: model.__name__)
def test_what_we_write(model: Callable[[Path], Path], outtype: str, tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    report = verify(made(source, tmp_path, outtype), source)
    assert report.verified
    assert report.command == "verify"


@pytest.mark.parametrize("dialect", ["llama.cpp", "ollama-legacy"])
def test_either_dialect(source: Path, dialect: str, tmp_path: Path) -> None:
    assert verify(made(source, tmp_path, dialect=dialect), source).verified


def test_parts(source: Path, tmp_path: Path) -> None:
    streamconv.convert(source, tmp_path / "x.gguf", outtype="q8_0", split=SplitOptions(max_tensors=9))
    parts = sorted(tmp_path.glob("x-*.gguf"))
    assert len(parts) > 2
    report = verify(parts[0], source)
    assert [output.path for output in report.outputs] == parts
    flip(parts[2], next(iter(ggufs.read(parts[2]).tensors)), 0, 7)
    with pytest.raises(VerifyError, match=parts[2].name):
        verify(parts[0], source)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_another_writer_and_order(source: Path, outtype: str, tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(len(ggufs.read(made(source, tmp_path, outtype)).tensors))
    other = rewritten(
        tmp_path / f"{outtype}.gguf",
        tmp_path / "other.gguf",
        tensors=lambda data: {name: data[name] for name in np.array(list(data))[order].tolist()},
    )
    assert list(ggufs.read(other).tensors) != list(ggufs.read(tmp_path / f"{outtype}.gguf").tensors)
    assert verify(other, source).verified


def test_types_of_its_own(source: Path, tmp_path: Path) -> None:
    """A file may have each tensor in a type of its own, whatever --outtype would have given."""
    f32, f16, q8 = (ggufs.read(made(source, tmp_path, name)).tensors for name in ("f32", "f16", "q8_0"))
    kinds = [f32, f16, q8]

    def mixed(data: dict[str, Any]) -> dict[str, Any]:
        return {
            name: (t.raw.reshape(*t.shape[:-1], -1), gguf.GGMLQuantizationType[t.type])
            if t.type != "F32"
            else (t.raw.view(np.float32).reshape(t.shape), gguf.GGMLQuantizationType.F32)
            for number, name in enumerate(data)
            for t in [kinds[number % 3][name]]
        }

    other = rewritten(tmp_path / "q8_0.gguf", tmp_path / "mixed.gguf", tensors=mixed)
    assert {t.type for t in ggufs.read(other).tensors.values()} == {"F32", "F16", "Q8_0"}
    assert verify(other, source).verified


def test_adapters(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base)
    out = tmp_path / "adapter.gguf"
    convert_adapter(adapter, base, out)
    assert verify(out, adapter, base=base).verified
    with raises(SourceError, code="base-missing"):
        verify(out, adapter)
    flip(out, "blk.0.attn_q.weight.lora_b", 5, 3)
    with pytest.raises(VerifyError, match=r"blk\.0\.attn_q\.weight\.lora_b: row 0, column 1 is"):
        verify(out, adapter, base=base)


@pytest.mark.parametrize(
    ("name", "maker", "told"),
    [
        ("lfm2-given", "llamacpp:f32", 0),
        ("llama-given", "llamacpp:q8_0", 0),
        ("llama-given", "ollama_seed", 3),  # no rope.freq_base, whose default is meant; three keys of its own
    ],
)
def test_other_tools_keys(name: str, maker: str, told: int, tmp_path: Path) -> None:
    source, golden = cases.GIVEN / name, cases.given_golden(name)[maker]
    other = with_keys_of(made(source, tmp_path), tmp_path / "other.gguf", golden["kv"])
    assert set(ggufs.read(other).keys) == set(golden["kv"])
    assert len(verify(other, source).warnings) == told


@pytest.mark.parametrize("name", ["lfm2-untied", "lfm2moe", "llama", "llama-linear", "llama-yarn", "llama-spm"])
def test_llama_cpps_keys(name: str, tmp_path: Path) -> None:
    source = cases.build(name, tmp_path)
    other = with_keys_of(made(source, tmp_path), tmp_path / "other.gguf", cases.golden(name, "auto")["kv"])
    assert verify(other, source).warnings == []


def test_llama_cpps_adapter_keys(tmp_path: Path) -> None:
    adapter, base = (cases.GIVEN / name for name in ("lora-given", "llama-given"))
    convert_adapter(adapter, base, tmp_path / "ours.gguf")
    kv = dict(cases.given_golden("lora-given")["llamacpp:f32"]["kv"])
    other = with_keys_of(tmp_path / "ours.gguf", tmp_path / "other.gguf", kv)
    assert verify(other, adapter, base=base).warnings == []
    del kv["adapter.lora.alpha"]
    other = with_keys_of(tmp_path / "ours.gguf", tmp_path / "other.gguf", kv)
    with pytest.raises(
        VerifyError, match=r"adapter\.lora\.alpha is missing; according to the source it should be 12\.0"
    ):
        verify(other, adapter, base=base)


def test_what_is_only_another_look(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"lfm2.more": "x", "tokenizer.chat_template": "{{ other }}", "general.name": "Other"}
    types = {name: ["STRING"] for name in changes}
    out = made(source, tmp_path)
    other = rewritten(out, tmp_path / "other.gguf", keys=lambda keys: keys.update(changes), types=types)
    assert main(["verify", str(other), "--source", str(source), "--quiet"]) == 0
    assert "streamconv: warning: key lfm2.more is 'x'" in capsys.readouterr().err
    told = [warning.message for warning in verify(other, source).warnings]
    assert [message.split()[1] for message in told] == ["tokenizer.chat_template", "lfm2.more"]
    assert told[1] == "key lfm2.more is 'x', but the source does not define it"


def test_a_pre_tokenizer_that_was_named(source: Path, tmp_path: Path) -> None:
    out = made(source, tmp_path, pre="qwen2")
    assert verify(out, source, pre="qwen2").verified
    assert main(["verify", str(out), "--source", str(source), "--pre", "qwen2", "--quiet"]) == 0
    with pytest.raises(
        VerifyError, match=r"key tokenizer\.ggml\.pre is 'qwen2', but according to the source it should be 'lfm2'"
    ):
        verify(out, source)


def test_a_number_stands_for_every_layer(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    out = made(source, tmp_path)
    key, n_layers = "llama.attention.head_count_kv", ggufs.read(out)["llama.block_count"]
    n_heads = ggufs.read(out)[key]
    for values, is_same in (([n_heads] * n_layers, True), ([n_heads] * (n_layers - 1), False)):
        other = rewritten(
            out,
            tmp_path / "other.gguf",
            keys=lambda keys, values=values: keys.update({key: values}),
            types={key: ["ARRAY", "INT32"]},
        )
        if is_same:
            assert verify(other, source).verified
        else:
            with pytest.raises(VerifyError, match=rf"head_count_kv\[{n_layers - 1}\] is missing"):
                verify(other, source)


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("outtype", "tensor", "byte", "bit", "where"),
    [
        ("f32", QUERY, (17 * 64 + 5) * 4 + 2, 1, "row 17, column 5"),
        ("f16", QUERY, (17 * 64 + 5) * 2 + 1, 0, "row 17, column 5"),
        ("bf16", QUERY, (63 * 64 + 63) * 2, 0, "row 63, column 63"),
        ("q8_0", QUERY, (17 * 2 + 1) * 34 + 2 + 7, 6, "row 17, column 39"),  # the second block's number 7
        ("q8_0", QUERY, (17 * 2 + 1) * 34, 2, "row 17, column 32"),  # that block's scale
        ("bf16", NORM, 4 * 9, 4, "element 9"),
        ("q8_0", "token_embd.weight", 415 * 2 * 34 + 40, 0, "row 415, column 36"),
    ],
)
def test_a_flipped_bit(
    source: Path, outtype: str, tensor: str, byte: int, bit: int, where: str, tmp_path: Path
) -> None:
    out = made(source, tmp_path, outtype)
    before = ggufs.read(out).tensors[tensor].float64()
    flip(out, tensor, byte, bit)
    after = ggufs.read(out).tensors[tensor].float64()
    with pytest.raises(VerifyError, match=rf"{tensor}: {where} is") as caught:
        verify(out, source)
    place = tuple(np.argwhere(before != after)[0])
    assert f"{where} is {after[place]:.9g}, but according to the source it should be {before[place]:.9g}" in str(
        caught.value
    )


def test_the_first_in_file_order_is_named(source: Path, tmp_path: Path) -> None:
    out = made(source, tmp_path)
    names = list(ggufs.read(out).tensors)
    for name in (names[20], names[7], names[30]):
        flip(out, name, 1, 6)
    for threads in (1, 3):
        with pytest.raises(VerifyError) as caught:
            verify(out, source, threads=threads)
        assert caught.value.tensor == names[7]


@pytest.mark.parametrize("threads", [1, 3])
def test_how_far_it_is(source: Path, tmp_path: Path, threads: int) -> None:
    out, told = made(source, tmp_path), []
    verify(out, source, threads=threads, progress=lambda done, total: told.append((done, total, threading.get_ident())))
    with GGUFFile.open(out) as file:
        total = sum(tensor.nbytes or 0 for tensor in file.tensors.values())
    assert told == sorted(told) and told[-1] == (total, total, threading.get_ident())


@pytest.mark.parametrize("measures", [False, True])
def test_a_file_that_changes_while_it_is_verified(source: Path, tmp_path: Path, measures: bool) -> None:
    """No verdict on bytes that may be of either."""
    out = made(source, tmp_path)

    def touch(done: int, total: int) -> None:
        os.utime(out, ns=(1, 1))

    with pytest.raises(SourceError) as caught:
        verify(out, source, progress=touch, error=measures)
    assert (caught.value.code, caught.value.file) == ("source-changed", str(out))


def test_tensors_that_exchanged_their_data(source: Path, tmp_path: Path) -> None:
    def swap(data: dict[str, Any]) -> None:
        data["blk.0.ffn_gate.weight"], data["blk.0.ffn_up.weight"] = (
            data["blk.0.ffn_up.weight"],
            data["blk.0.ffn_gate.weight"],
        )

    other = rewritten(made(source, tmp_path), tmp_path / "other.gguf", tensors=swap)
    with pytest.raises(VerifyError, match=r"blk\.0\.ffn_(gate|up)\.weight: row 0, column 0 is"):
        verify(other, source)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "lfm2.rope.freq_base",
            0.0,
            r"key lfm2.rope.freq_base is 0.0, but according to the source it should be 1000000.0",
        ),  # Ollama's
        (
            "lfm2.attention.head_count_kv",
            [0, 0, 0, 0],
            r"head_count_kv\[2\] is 0, but according to the source it should be 2",
        ),  # Ollama's
        (
            "lfm2.attention.head_count_kv",
            [0, 0, 2],
            r"head_count_kv\[3\] is missing, but according to the source it should be 0",
        ),
        ("lfm2.block_count", 5, "block_count is 5, but according to the source it should be 4"),
        ("lfm2.attention.layer_norm_rms_epsilon", 1.1e-5, "layer_norm_rms_epsilon is 1.1"),
        (
            "general.architecture",
            "llama",
            "general.architecture is 'llama', but according to the source it should be 'lfm2'",
        ),
    ],
)
def test_a_wrong_key(source: Path, key: str, value: Any, words: str, tmp_path: Path) -> None:
    other = rewritten(made(source, tmp_path), tmp_path / "other.gguf", keys=lambda keys: keys.update({key: value}))
    with pytest.raises(VerifyError, match=words):
        verify(other, source)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lfm2.block_count", "block_count is missing; according to the source it should be 4"),
        (
            "lfm2.attention.head_count_kv",
            "head_count_kv is missing; according to the source it should be an array of 4",
        ),
        (
            "lfm2.rope.freq_base",
            r"freq_base is missing; according to the source it should be 1000000\.0",
        ),  # and 10000 without it
        ("tokenizer.ggml.model", "model is missing; according to the source it should be 'gpt2'"),
        ("tokenizer.ggml.pre", "pre is missing; according to the source it should be 'lfm2'"),
        ("tokenizer.ggml.tokens", "tokens is missing; according to the source it should be an array of 416"),
        ("tokenizer.ggml.merges", "merges is missing; according to the source it should be an array of"),
        ("tokenizer.ggml.token_type", "token_type is missing; according to the source it should be an array of 416"),
        ("tokenizer.ggml.eos_token_id", "eos_token_id is missing; according to the source it should be"),
    ],
)
def test_a_missing_key(source: Path, key: str, words: str, tmp_path: Path) -> None:
    other = rewritten(made(source, tmp_path), tmp_path / "other.gguf", keys=lambda keys: keys.pop(key))
    with pytest.raises(VerifyError, match=rf"{key.rpartition('.')[0]}\.{words}"):
        verify(other, source)


@pytest.mark.parametrize(
    ("key", "value", "type_", "words"),
    [
        ("tokenizer.ggml.eos_token_id", 9, "UINT32", "is 9, but according to the source it should be"),
        ("tokenizer.ggml.model", "llama", "STRING", "is 'llama', but according to the source it should be 'gpt2'"),
        ("tokenizer.ggml.pre", "qwen2", "STRING", "is 'qwen2', but according to the source it should be 'lfm2'"),
        ("tokenizer.ggml.add_bos_token", False, "BOOL", "is False, but according to the source it should be True"),
        ("tokenizer.ggml.add_eos_token", True, "BOOL", "is True, "),
        ("lfm2.block_count", 4, "INT32", "has type int32, but according to the source it should be uint32"),
        (
            "lfm2.rope.scaling.factor",
            4.0,
            "FLOAT32",
            r"is 4\.0, but the source does not define it; without the key, loaders use 1\.0",
        ),
    ],
)
def test_another_key(source: Path, key: str, value: Any, type_: str, words: str, tmp_path: Path) -> None:
    out = made(source, tmp_path)
    other = rewritten(out, tmp_path / "other.gguf", keys=lambda keys: keys.update({key: value}), types={key: [type_]})
    with pytest.raises(VerifyError, match=f"key {key} {words}"):
        verify(other, source)


def test_another_kind_or_score_of_a_token(source: Path, tmp_path: Path) -> None:
    spm = tiny.llama(tmp_path / "spm", tokenizer="spm")
    for model, key, value in ((source, "token_type", 4), (spm, "scores", -0.5)):

        def change(keys: dict[str, Any], key: str = key, value: float = value) -> None:
            keys[f"tokenizer.ggml.{key}"][7] = value

        other = rewritten(made(model, tmp_path, force=True), tmp_path / "other.gguf", keys=change)
        with pytest.raises(VerifyError, match=rf"{key}\[7\] is {value}, but according to the source it should be"):
            verify(other, model)


def test_options_that_are_not_for_this_kind_of_file(source: Path, tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base)
    convert_adapter(adapter, base, tmp_path / "adapter.gguf")
    model = made(source, tmp_path)
    for out, src, keywords, words in (
        (model, source, {"base": base}, "is a model, and --base"),
        (model, source, {"scale": 2.0}, "is a model, and --scale"),
        (tmp_path / "adapter.gguf", adapter, {"base": base, "adapters": [(adapter, 1.0)]}, "an adapter, and --adapter"),
        (tmp_path / "adapter.gguf", adapter, {"base": base, "pre": "x"}, "an adapter, and --pre"),
    ):
        with pytest.raises(UsageError, match=words):
            verify(out, src, **keywords)


def test_a_wrong_token(source: Path, tmp_path: Path) -> None:
    def change(keys: dict[str, Any]) -> None:
        keys["tokenizer.ggml.tokens"][300] = "other"

    other = rewritten(made(source, tmp_path), tmp_path / "other.gguf", keys=change)
    with pytest.raises(VerifyError, match=r"tokenizer.ggml.tokens\[300\] is 'other'"):
        verify(other, source)


def test_a_double_that_was_rounded_once_more_is_the_same(source: Path, tmp_path: Path) -> None:
    epsilon = float(np.nextafter(np.float32(1e-5), np.float32(1)))
    key = "lfm2.attention.layer_norm_rms_epsilon"
    other = rewritten(made(source, tmp_path), tmp_path / "other.gguf", keys=lambda keys: keys.update({key: epsilon}))
    assert verify(other, source).verified


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: {n: t for n, t in data.items() if n != QUERY}, "tensors-differ"),
        (lambda data: {**data, "blk.9.extra.weight": data[NORM]}, "tensors-differ"),
        (lambda data: {**data, NORM: (data[NORM][0].reshape(2, 32), data[NORM][1])}, "shape-differs"),
        (lambda data: {**data, NORM: (np.zeros((2, 18), np.uint8), gguf.GGMLQuantizationType.Q4_0)}, "shape-differs"),
    ],
    ids=["lacking", "extra", "reshaped", "another type and shape"],
)
def test_the_wrong_tensors(source: Path, change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    other = rewritten(made(source, tmp_path), tmp_path / "other.gguf", tensors=change)
    with raises(VerifyError, code=words):
        verify(other, source)


def test_a_type_that_cannot_be_made_again(source: Path, tmp_path: Path) -> None:
    def quantise(data: dict[str, Any]) -> dict[str, Any]:
        rows, columns = data[QUERY][0].shape
        blocks = np.zeros((rows, columns // 32 * 17), np.uint8)
        return {**data, QUERY: (blocks, gguf.GGMLQuantizationType.MXFP4)}

    other = rewritten(made(source, tmp_path, "f32"), tmp_path / "other.gguf", tensors=quantise)
    with pytest.raises(VerifyError, match=r"type MXFP4 cannot be verified.*F32, F16, Q4_0"):
        verify(other, source)


def test_another_payload_of_nan_is_the_same_value(tmp_path: Path) -> None:
    source = tiny.lfm2(tmp_path / "source")
    path = source / "model.safetensors"
    tensors = tiny.read_safetensors(path)
    name = "model.layers.2.self_attn.q_proj.weight"
    bits = np.frombuffer(tensors[name].data, np.uint16).copy()
    bits[70] = 0x7F81  # a signalling NaN
    tensors[name] = tiny.Tensor("BF16", tensors[name].shape, bits.tobytes())
    tiny.write_safetensors(path, tensors)
    out = made(source, tmp_path)
    flip(out, QUERY, 140, 6)  # made quiet
    assert verify(out, source).verified
    flip(out, QUERY, 142, 6)  # its neighbour is a number
    with pytest.raises(VerifyError, match=r"row 1, column 7 is .* \(BF16; 1 of 64 values of the row differ\)"):
        verify(out, source)


def test_a_structure_that_a_strict_loader_refuses(source: Path, tmp_path: Path) -> None:
    out = made(source, tmp_path)
    out.write_bytes(out.read_bytes()[:-64])
    with pytest.raises(SourceError):
        verify(out, source)


def test_a_source_that_is_another_model(source: Path, tmp_path: Path) -> None:
    other = tiny.lfm2(tmp_path / "other", seed=99)
    with pytest.raises(VerifyError, match=r"row 0, column 0 is"):
        verify(made(source, tmp_path), other)


# ---------------------------------------------------------------- how it is done


def test_compiled_kernels_have_no_part_in_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong makes a wrong file, and is not believed when that is read back."""

    def wrong(*arguments: Any) -> Any:
        raise AssertionError("a compiled kernel was called")

    out = made(source, tmp_path, "q8_0")
    monkeypatch.setattr(_kernels, "encode", wrong)
    with pytest.raises(AssertionError):
        made(source, tmp_path, "f16")
    assert verify(out, source).verified


def test_verify_before_the_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """convert --verify refuses a file that came out wrong, and leaves nothing of it."""
    real = run_module.stream

    def spoiled(layout: Any, sink: Any, *arguments: Any, **keywords: Any) -> Any:
        tally = real(layout, sink, *arguments, **keywords)
        (part,) = tmp_path.glob("*.part")
        with part.open("r+b") as file:
            file.seek(layout.steps[3].offset + 10)
            file.write(b"\xaa")
        return tally

    monkeypatch.setattr(run_module, "stream", spoiled)
    out = tmp_path / "out.gguf"
    assert main(["convert", str(source), "-o", str(out), "--verify", "--quiet"]) == 6
    assert list(tmp_path.iterdir()) == []
    assert main(["convert", str(source), "-o", str(out), "--quiet"]) == 0  # what --verify is for
    assert main(["verify", str(out), "--source", str(source), "--quiet"]) == 6


def test_the_commands_exit_codes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    assert main(["convert", str(source), "-o", str(out), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True
    assert main(["verify", str(out), "--source", str(source)]) == 0
    assert "tensors match" in capsys.readouterr().out
    flip(out, QUERY, 0, 6)
    assert main(["verify", str(out), "--source", str(source), "--json"]) == 6
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["exit_code"], error["tensor"]) == ("verify", 6, QUERY)


def test_digests(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = streamconv.convert(source, out, outtype="q8_0", sha256=True)
    content = out.read_bytes()
    manifest = json.loads((tmp_path / "out.gguf.manifest.json").read_text())
    assert manifest["sha256"] == report.outputs[0].sha256 == hashlib.sha256(content).hexdigest()
    assert manifest["nbytes"] == len(content)
    stored = ggufs.read(out).tensors
    assert [entry["name"] for entry in manifest["tensors"]] == list(stored)
    for entry in manifest["tensors"]:
        data = content[entry["offset"] : entry["offset"] + entry["nbytes"]]
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() == stored[entry["name"]].sha256
        assert (tuple(entry["shape"]), entry["type"]) == (stored[entry["name"]].shape, stored[entry["name"]].type)


def test_memory_bounds_the_threads() -> None:
    tensor = Encode(Resident(tiny.noise("x", (300, 640), 1.0)), "x", Q8_0)
    steps: Any = [SimpleNamespace(tensor=tensor)]
    process = 1 << 40  # more than there is, so that nothing is unaccounted for
    worker, fixed = compare.comparer_nbytes(steps), process + MODULES_NBYTES + compare.listed_nbytes(steps)

    def threads(allowed: int) -> int:
        return compare.prove_comparison(steps, Budget(allowed, process), threads=4).workers

    assert threads(1 << 50) == 4
    assert threads(fixed + 3 * worker - 1) == 2
    assert threads(fixed + worker) == 1
    needed = math.ceil((fixed + worker + RUN_TO_RUN_NBYTES) / MIB)
    with pytest.raises(BudgetError, match=f"needs {needed} MiB"):
        threads(fixed + worker - 1)


@pytest.mark.parametrize("shape", [(300, 640), (1, 1 << 20), (5, 320_000)])
@pytest.mark.parametrize("outtype", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16, Q8_0])
def test_comparing_takes_what_it_declares(
    shape: tuple[int, int], outtype: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    tensor = Encode(Resident(tiny.noise("x", shape, 1.0)), "x", outtype)
    out = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(out, "x")
    writer.add_tensor("x", np.full((shape[0], tensor.spec.row_nbytes), 7, np.uint8), raw_dtype=outtype) if (
        outtype != gguf.GGMLQuantizationType.F32
    ) else writer.add_tensor("x", np.full(shape, 7.0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(out) as file:
        pair = compare._pair(tensor, file, file.tensors["x"])
        work = Workspace(Scratch(peak_nbytes(tensor, pair.slab_rows)), codecs.REFERENCE)
        declared = compare._worker_nbytes(tensor) - peak_nbytes(tensor, pair.slab_rows)
        gguf.dequantize(np.zeros(34, np.uint8), Q8_0)  # what is imported or cached once
        tracemalloc.start()
        try:
            with pytest.raises(VerifyError, match="row 0, column 0"):
                compare._compare_rows(pair, range(pair.slab_rows), work)
            assert tracemalloc.get_traced_memory()[1] <= declared + (128 << 10)
        finally:
            tracemalloc.stop()


def test_verify_keeps_to_the_bound(tmp_path: Path) -> None:
    """A whole process under --max-memory, on a tensor larger than that."""
    source = tiny.llama(tmp_path / "source", vocab=404, n_layers=1, hidden=64, ff=160_000, dtype="BF16")
    out = tmp_path / "out.gguf"
    limit = 96 * MIB
    streamconv.convert(source, out, outtype="f32")
    code = (
        "import json, streamconv;"
        f"print(json.dumps(streamconv.verify({str(out)!r}, {str(source)!r}, max_memory={limit}).to_json()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    report = json.loads(done.stdout)
    assert out.stat().st_size > 100 * MIB
    assert report["peak_rss_nbytes"] <= limit


@pytest.mark.parametrize("type_", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.IQ4_NL])
def test_block_types_are_made_again_by_the_reference(
    type_: gguf.GGMLQuantizationType, source: Path, tmp_path: Path
) -> None:
    def quantise(data: dict[str, Any]) -> dict[str, Any]:
        rows = np.ascontiguousarray(data[QUERY][0])
        row_nbytes = TYPES[type_].dtype.row_nbytes(rows.shape[1])
        out = np.zeros((len(rows), row_nbytes), np.uint8)
        raw = rows.reshape(-1).view(np.uint8)
        assert quantize_rows(type_, gguf.GGMLQuantizationType.F32, raw, rows.shape[1], None, out, best_kernel()) is None
        return {**data, QUERY: (out, type_)}

    other = rewritten(made(source, tmp_path, "f32"), tmp_path / "other.gguf", tensors=quantise)
    assert verify(other, source).verified
    damaged = bytearray(other.read_bytes())
    with GGUFFile.open(other) as file:
        damaged[file.tensors[QUERY].offset + 1] ^= 0x10
    other.write_bytes(damaged)
    with pytest.raises(VerifyError, match=QUERY):
        verify(other, source)
