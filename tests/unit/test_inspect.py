"""What `inspect` says of a model's files: the JSON that scripts rely on, and lines for people."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from streamconv.api import inspect_file as inspect_module
from streamconv.api.inspect_file import Inspection, inspect
from streamconv.cli.inspection import render
from streamconv.errors import SourceError
from tests.attacks.gguf_files import FATAL, LISTED
from tests.oracles import ggufs
from tests.raising import raises
from tests.tools import gguf_bytes as raw
from tests.unit.test_gguf_set import make_part

CASES = Path(__file__).parents[1] / "data" / "cases"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def as_json(found: Inspection) -> dict[str, Any]:
    """Through the text that is printed, which must be JSON by the standard."""
    result: dict[str, Any] = json.loads(json.dumps(found.to_json(), allow_nan=False))
    return result


def copy(name: str, to: Path) -> Path:
    return Path(shutil.copytree(CASES / name, to / name))


class TestGGUF:
    def test_json_of_a_model(self) -> None:
        path = CASES / "llama-given.base.gguf"
        theirs, found = ggufs.read(path), as_json(inspect(path))
        data_offset = found["tensors"][0]["offset"]
        assert {key: found[key] for key in list(found)[:6]} == {
            "schema": 1,
            "kind": "gguf",
            "path": str(path),
            "architecture": "llama",
            "n_tensors": len(theirs.tensors),
            "n_parameters": sum(math.prod(tensor.shape) for tensor in theirs.tensors.values()),
        }
        assert list(found)[6:] == ["metadata", "metadata_types", "tensors", "problems"]
        assert found["metadata"].keys() == found["metadata_types"].keys() == theirs.keys.keys()
        for name, value in theirs.keys.items():
            if value.type[-1] == "FLOAT32":
                assert np.float32(found["metadata"][name]) == np.float32(value.value)
            else:
                assert found["metadata"][name] == value.value
        assert found["metadata"]["llama.attention.layer_norm_rms_epsilon"] == 1e-6  # not 9.999999974752427e-07
        assert found["metadata_types"]["tokenizer.ggml.tokens"] == "array[string]"
        assert found["metadata_types"]["llama.block_count"] == "uint32"
        assert found["tensors"] == [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "type": tensor.type,
                "nbytes": len(tensor.raw),
                "offset": data_offset + tensor.offset,
                "file": path.name,
            }
            for tensor in theirs.tensors.values()
        ]
        assert found["problems"] == []

    def test_offsets_are_those_of_the_bytes(self) -> None:
        path = CASES / "llama-given.base.gguf"
        content, theirs = path.read_bytes(), ggufs.read(path)
        for tensor in as_json(inspect(path))["tensors"]:
            stored = content[tensor["offset"] : tensor["offset"] + tensor["nbytes"]]
            assert stored == theirs.tensors[tensor["name"]].raw.tobytes()

    def test_long_arrays_and_texts_are_cut(self, tmp_path: Path) -> None:
        numbers = struct.pack("<1025H", *range(1025))
        keys = [
            raw.array("n.1024", raw.NUMBERS["H"], numbers[:-2], 1024),
            raw.array("n.1025", raw.NUMBERS["H"], numbers, 1025),
            raw.array("t.1025", raw.STRING, b"".join(raw.text(f"{i}" + "x" * 2000) for i in range(1025)), 1025),
            raw.key("text", raw.STRING, raw.text("y" * 65536)),
            raw.key("long text", raw.STRING, raw.text("z" * 65537)),
        ]
        found = as_json(inspect(write(tmp_path / "x.gguf", raw.gguf(keys))))["metadata"]
        assert found["n.1024"] == list(range(1024))
        assert found["n.1025"] == {"length": 1025, "first": list(range(8))}
        assert found["t.1025"] == {"length": 1025, "first": [f"{i}" + "x" * 1023 for i in range(8)]}
        assert found["text"] == "y" * 65536
        assert found["long text"] == {"length": 65537, "first": ["z" * 1024]}

    def test_floats_are_json(self, tmp_path: Path) -> None:
        keys = [
            raw.number("f", "f", 0.1),
            raw.number("d", "d", 0.1),
            raw.number("nan", "f", math.nan),
            raw.array("inf", raw.NUMBERS["d"], struct.pack("<2d", math.inf, -math.inf), 2),
        ]
        found = as_json(inspect(write(tmp_path / "x.gguf", raw.gguf(keys))))["metadata"]
        assert found == {"f": 0.1, "d": 0.1, "nan": "nan", "inf": ["inf", "-inf"]}

    def test_all_arrays_together_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inspect_module, "ARRAYS_NBYTES", 100_000)
        texts = b"".join(raw.text("w" * 4000) for _ in range(20))
        path = write(tmp_path / "x.gguf", raw.gguf([raw.array(f"a.{i}", raw.STRING, texts, 20) for i in range(200)]))
        found = as_json(inspect(path))["metadata"]
        assert len(found["a.0"]) == 20
        assert found["a.1"] == {"length": 20, "first": ["w" * 1024] * 8}
        assert found["a.199"] == {"length": 20, "first": []}
        assert len(json.dumps(found)) < 200_000

    def test_a_split_is_one_model(self, tmp_path: Path) -> None:
        first, second, third = (make_part(tmp_path, number) for number in (1, 2, 3))
        found = inspect(first)
        files = [tensor["file"] for tensor in as_json(found)["tensors"]]
        assert files == [first.name] * 2 + [second.name] * 2 + [third.name] * 2
        assert (found.problems, found.architecture, found.form) == ([], "llama", "GGUF version 3, 3 parts")
        third.unlink()
        found = inspect(first)
        assert [problem.code for problem in found.problems] == ["split-missing"]
        assert "missing or unreadable parts: 3 of 3" in "\n".join(render(found))

    @pytest.mark.parametrize(("content", "code"), LISTED.values(), ids=LISTED.keys())
    def test_malformed_files_are_shown_with_their_problems(self, content: bytes, code: str, tmp_path: Path) -> None:
        tracemalloc.start()
        found = inspect(write(tmp_path / "x.gguf", content))
        lines = list(render(found, tensors=True))
        text = json.dumps(as_json(found))
        peak_nbytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_nbytes < 1 << 20
        assert code in [problem["code"] for problem in json.loads(text)["problems"]]
        assert f"[{code}]" in "\n".join(lines)
        assert all(line.isprintable() and len(line) <= 80 for line in lines)

    @pytest.mark.parametrize(("content", "code"), FATAL.values(), ids=FATAL.keys())
    def test_what_cannot_be_parsed_is_an_error(self, content: bytes, code: str, tmp_path: Path) -> None:
        with raises(SourceError, code=code):
            inspect(write(tmp_path / "x.gguf", content))

    def test_a_folder_of_ggufs(self, tmp_path: Path) -> None:
        for name in "ab":
            write(tmp_path / f"{name}.gguf", raw.gguf())
        with pytest.raises(SourceError, match=r"a folder with 2 GGUF files \(name one of them, as .*/a\.gguf\)"):
            inspect(tmp_path)


class TestCheckpoint:
    def test_json(self) -> None:
        path = CASES / "lfm2-given"
        found = as_json(inspect(path))
        assert [found[key] for key in ("kind", "path", "architecture", "n_tensors")] == [
            "checkpoint",
            str(path),
            "lfm2",
            37,
        ]
        assert found["metadata"] == json.loads((path / "config.json").read_text())
        assert found["metadata_types"]["vocab_size"] == "integer"
        assert found["metadata_types"]["layer_types"] == "array"
        assert found["problems"] == []
        tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
        kernel = tensors["model.layers.0.conv.conv.weight"]
        assert (kernel["type"], len(kernel["shape"]), kernel["nbytes"]) == ("BF16", 3, 2 * math.prod(kernel["shape"]))
        assert {tensor["file"] for tensor in tensors.values()} == {file.name for file in path.glob("*.safetensors")}
        for tensor in tensors.values():
            header = (path / tensor["file"]).read_bytes()
            start = 8 + int.from_bytes(header[:8], "little")
            entry = json.loads(header[8:start])[tensor["name"]]
            assert [tensor["offset"], tensor["offset"] + tensor["nbytes"]] == [
                start + at for at in entry["data_offsets"]
            ]

    def test_what_would_be_converted(self) -> None:
        golden = json.loads((CASES / "lfm2-given.golden.json").read_text())["llamacpp:auto"]["tensors"]
        expected: dict[str, list[int]] = {}
        for entry in golden.values():
            total = expected.setdefault(entry["type"], [0, 0])
            total[0] += 1
            total[1] += math.prod(entry["ne"])
        made = inspect(CASES / "lfm2-given").conversion
        assert made is not None
        assert (made.architecture, made.outtype) == ("lfm2", "bf16")
        assert {name: [total.n_tensors, total.n_parameters] for name, total in made.totals.items()} == expected
        assert {name: total.nbytes for name, total in made.totals.items()} == {
            name: n_parameters * {"BF16": 2, "F32": 4}[name] for name, (_, n_parameters) in expected.items()
        }

    def test_a_missing_shard_leaves_the_others_to_see(self, tmp_path: Path) -> None:
        path = copy("lfm2-given", tmp_path)
        (path / "model-00002-of-00002.safetensors").unlink()
        found = inspect(path)
        assert (found.architecture, found.conversion) == ("lfm2", None)
        assert 0 < len(found.tensors) < 37
        assert ["model-00002-of-00002" in str(problem.file) for problem in found.problems] == [True]

    def test_one_shard_by_itself(self) -> None:
        path = CASES / "lfm2-given" / "model-00002-of-00002.safetensors"
        found = inspect(path)
        assert (found.kind, found.architecture, found.conversion) == ("checkpoint", "lfm2", None)
        assert found.metadata["model_type"] == "lfm2"
        assert {tensor.file for tensor in found.tensors} == {path.name}
        assert [problem.message.partition(",")[0] for problem in found.problems] == ["is shard 2 of 2"]

    def test_a_shard_cut_off(self, tmp_path: Path) -> None:
        path = copy("lfm2-given", tmp_path)
        os.truncate(path / "model-00001-of-00002.safetensors", 150_000)
        found = inspect(path)
        assert {tensor.file for tensor in found.tensors} == {"model-00002-of-00002.safetensors"}
        assert [problem.file.name for problem in found.problems] == ["model-00001-of-00002.safetensors"]

    def test_disagreements_with_the_config(self, tmp_path: Path) -> None:
        path = copy("lfm2-given", tmp_path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3, "vocab_size": 11}))
        found = inspect(path)
        assert (found.conversion, len(found.tensors), len(found.problems)) == (None, 37, 1)
        assert "expected [11, 64]" in found.problems[0].message

    def test_a_tokenizer_that_is_missing_or_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = copy("lfm2-given", tmp_path)
        monkeypatch.setattr(inspect_module, "vocabulary_nbytes", lambda folder, n_vocab: (1 << 40, 0))
        assert [warning.code for warning in inspect(path).warnings] == ["tokenizer-size"]
        monkeypatch.undo()
        assert inspect(path).warnings == []
        (path / "tokenizer.json").unlink()
        found = inspect(path)
        assert [problem.message.partition(":")[0] for problem in found.problems] == ["no tokenizer"]

    def test_an_architecture_that_is_not_supported(self, tmp_path: Path) -> None:
        path = copy("lfm2-given", tmp_path)
        (path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
        found = inspect(path)
        assert (found.architecture, found.conversion, len(found.tensors)) == (None, None, 37)
        assert "MambaForCausalLM is not supported" in found.problems[0].message

    def test_one_file_alone(self, tmp_path: Path) -> None:
        path = Path(shutil.copy(CASES / "llama-given" / "model.safetensors", tmp_path / "weights.safetensors"))
        found = inspect(path)
        assert (found.kind, len(found.tensors), found.metadata) == ("checkpoint", 20, {})
        assert any("config.json" in str(problem.file) + problem.message for problem in found.problems)

    def test_no_weights_yet(self, tmp_path: Path) -> None:
        shutil.copy(CASES / "lfm2-given" / "config.json", tmp_path)
        found = inspect(tmp_path)
        assert (found.architecture, found.tensors) == ("lfm2", [])
        assert [problem.message for problem in found.problems] == [
            "no .safetensors file (download the weights as well)"
        ]

    @pytest.mark.parametrize("text", [None, "{", "[]"])
    def test_a_config_that_is_none_is_one_problem(self, tmp_path: Path, text: str | None) -> None:
        path = copy("llama-given", tmp_path)
        (path / "config.json").unlink()
        if text is not None:
            (path / "config.json").write_text(text)
        (problem,) = inspect(path).problems
        assert "config.json" in f"{problem.file} {problem.message}"

    def test_nothing_to_see(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "none", tmp_path / "none.safetensors"):
            with pytest.raises(SourceError):
                inspect(path)

    def test_long_lists_of_a_config_are_cut(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"short": list(range(1024)), "long": list(range(1025))}))
        found = inspect(tmp_path)
        assert found.metadata["short"] == list(range(1024))
        assert found.metadata["long"] == {"length": 1025, "first": list(range(8))}


class TestAdapter:
    @pytest.mark.parametrize(
        ("name", "form"), [("lora-given", "LoRA, PEFT, 14 modules"), ("mlx-given", "LoRA, MLX, 14 modules")]
    )
    def test_json(self, name: str, form: str) -> None:
        found = inspect(CASES / name)
        result = as_json(found)
        assert (result["kind"], found.form, result["problems"]) == ("adapter", form, [])
        assert result["metadata"] == json.loads((CASES / name / "adapter_config.json").read_text())
        assert all(tensor["file"].startswith("adapter") for tensor in result["tensors"])

    def test_what_it_converts_to_follows_from_its_base(self, tmp_path: Path) -> None:
        path = copy("lora-given", tmp_path)
        config = json.loads((path / "adapter_config.json").read_text())
        for name, base in (("owner/base", "owner/base"), ("/home/other/a base", "BASE"), (None, "BASE")):
            (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
            lines = list(render(inspect(path), width=1000))
            assert lines[-2:] == [
                "the result of a conversion depends on its base:",
                f"  streamconv lora {path} --base {base} --dry-run",
            ]
        (path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
        assert not any("--dry-run" in line for line in render(inspect(path), width=1000))

    def test_the_weights_by_name(self) -> None:
        assert inspect(CASES / "mlx-given" / "adapters.safetensors").kind == "adapter"

    def test_what_cannot_be_carried(self, tmp_path: Path) -> None:
        path = copy("lora-given", tmp_path)
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
        assert [problem.code for problem in inspect(path).problems] == ["init"]

    def test_factors_without_a_partner_and_tensors_that_are_none(self, tmp_path: Path) -> None:
        path = copy("lora-given", tmp_path)
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        first = next(iter(tensors))
        assert "lora_A" in first
        del tensors[first]
        save_file({**tensors, "base_model.model.lm_head.weight": np.zeros((3, 5), dtype=np.float32)}, file)
        found = inspect(path)
        assert [problem.code for problem in found.problems] == ["weight", "partner"]
        assert found.problems[1].message.endswith(": has no lora_A")

    @pytest.mark.parametrize("gone", ["adapter_config.json", "adapter_model.safetensors"])
    def test_half_an_adapter(self, tmp_path: Path, gone: str) -> None:
        path = copy("lora-given", tmp_path)
        (path / gone).unlink()
        found = inspect(path)
        assert (found.kind, bool(found.metadata)) == ("adapter", gone != "adapter_config.json")
        assert bool(found.tensors) == (gone == "adapter_config.json")
        assert gone in found.problems[0].message


@pytest.mark.parametrize("name", ["llama-given.base.gguf", "lfm2-given", "lora-given", "llama-given/model.safetensors"])
def test_nothing_stays_open(name: str, tmp_path: Path) -> None:
    before = sorted(Path("/dev/fd").iterdir())
    found = [inspect(CASES / name)]  # kept, so that nothing is closed by chance
    if (CASES / name).is_dir():
        broken = copy(name, tmp_path)
        next(broken.glob("*config.json")).unlink()
        found.append(inspect(broken))
    assert sorted(Path("/dev/fd").iterdir()) == before


def test_what_the_system_refuses_is_a_source_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(SourceError, match=f"^{tmp_path}: cannot be read: Permission denied"):
        inspect(tmp_path)


HOSTILE = "\x1b[31m\a\r\n\u202e\u2028世"


class TestText:
    def test_a_small_model_to_the_letter(self, tmp_path: Path) -> None:
        keys = [
            raw.key("general.architecture", raw.STRING, raw.text("llama")),
            raw.number("llama.block_count", "I", 2),
            raw.array("llama.list", raw.NUMBERS["i"], struct.pack("<3i", 1, 0, -7), 3),
            raw.array("tokenizer.ggml.tokens", raw.STRING, raw.text("Ġa") * 2000, 2000),
        ]
        tensors = [
            raw.tensor("token_embd.weight", (64, 1500), raw.Q8_0),
            raw.tensor("output_norm.weight", (64,), offset=102_016),
        ]
        path = write(tmp_path / "x.gguf", raw.gguf(keys, tensors, bytes(102_016 + 256)))
        lines = list(render(inspect(path), width=72, tensors=True, head=3))
        assert lines[1:] == [
            "gguf: GGUF version 3, architecture llama",
            "2 tensors, 96.1 k parameters, 102,256 bytes",
            "",
            "metadata (4)",
            "  general.architecture   string         llama",
            "  llama.block_count      uint32         2",
            "  llama.list             array[int32]   [1, 0, -7]",
            "  ... 1 more",
            "",
            "types (2)",
            "  Q8_0            1 tensor   96.0 k parameters    102,000 bytes",
            "  F32             1 tensor       64 parameters        256 bytes",
            "",
            "tensors (2)",
            "  Q8_0  102,000 bytes  1500x64  token_embd.weight",
            "  F32       256 bytes       64  output_norm.weight",
        ]
        row = "  tokenizer.ggml.tokens  array[string]  2,000: "
        cut, whole = (next(line for line in render(inspect(path), width=w) if "Ġ" in line) for w in (72, 1000))
        assert cut == row + '["Ġa", "Ġa", "Ġa", ...]'
        assert whole == row + "[" + '"Ġa", ' * 8 + "...]"

    def test_nothing_of_a_stranger_reaches_the_terminal_but_visible_characters(self, tmp_path: Path) -> None:
        keys = [
            raw.key("general.architecture", raw.STRING, raw.text(HOSTILE)),
            raw.key(HOSTILE, raw.STRING, raw.text(HOSTILE * 40)),
            raw.array("a", raw.STRING, raw.text(HOSTILE) * 3, 3),
        ]
        tensors = [raw.tensor(HOSTILE, (3,)), raw.tensor(HOSTILE + "2", (33,), raw.Q8_0, offset=32)]
        path = write(tmp_path / "x\x1b\n.gguf", raw.gguf(keys, tensors, bytes(64)))
        for width in (40, 80, 1000):
            lines = list(render(inspect(path), width=width, tensors=True))
            assert all(line.isprintable() for line in lines)
            assert r"\x1b[31m\x07\r\n\u202e\u2028世" in "".join(lines) or width == 40
        assert as_json(inspect(path))["architecture"] == HOSTILE

    def test_wide_characters_count_twice(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.gguf", raw.gguf([raw.key("k", raw.STRING, raw.text("世" * 100))]))
        line = next(line for line in render(inspect(path), width=40) if "世" in line)
        assert line == "  k  string  " + "世" * 3 + "... (100 characters)"

    def test_a_line_cannot_hide_its_length_behind_combining_marks(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.gguf", raw.gguf([raw.key("k", raw.STRING, raw.text("e" + "\u0301" * 500))]))
        assert all(len(line) <= 80 for line in render(inspect(path)))

    def test_long_tensor_names_are_cut_in_the_middle(self, tmp_path: Path) -> None:
        name = "base_model.model.model.layers.15.self_attn.q_proj.lora_A.weight"
        path = write(tmp_path / "x.gguf", raw.gguf(tensors=[raw.tensor(name, (2048, 16))], data=bytes(131_072)))
        cut, whole = (list(render(inspect(path), width=width, tensors=True)) for width in (80, 1000))
        assert cut[-1] == "  F32  131,072 bytes  16x2048  base_model.model.model....tn.q_proj.lora_A.weight"
        assert whole[-1] == f"  F32  131,072 bytes  16x2048  {name}"

    def test_every_width_is_kept(self) -> None:
        for name in ("llama-given.base.gguf", "lfm2-given", "lora-given"):
            for width in (20, 33, 80):
                assert all(len(line) <= width for line in render(inspect(CASES / name), width=width, tensors=True))
