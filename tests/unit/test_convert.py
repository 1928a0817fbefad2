"""A conversion as its callers see it: the report, the refusals, the bound on memory, the same bytes every time."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv
from benchmarks.shapes import SHAPES, checkpoint
from streamconv import budget as memory
from streamconv.api import run
from streamconv.cli import main
from streamconv.engine import pool as stream
from streamconv.engine.layout import CHUNK_NBYTES, MAX_WORKERS, MemoryProof
from streamconv.errors import BudgetError, DestinationError, Interrupted, SourceError, UsageError
from streamconv.ggml import encode as codecs
from streamconv.timing import Profile
from tests import tiny
from tests.fault.calls import watched
from tests.fault.program import small_steps
from tests.fault.test_errors import refusing
from tests.oracles import ggufs
from tests.raising import raises

MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.lfm2(tmp_path / "Made-Model")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "streamconv", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def rewrite(source: Path, name: str, change: Callable[[tiny.Tensor], tiny.Tensor]) -> None:
    """Put another tensor under `name` into the one shard of `source`."""
    tensors = tiny.tensors_of(source)
    tensors[name] = change(tensors[name])
    for path in source.glob("*.safetensors"):
        path.unlink()
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    tiny.write_safetensors(source / "model.safetensors", tensors)


# ---------------------------------------------------------------- the report


def test_the_report_and_its_json(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = streamconv.convert(source, out, outtype="q8_0", sha256=True)
    entry = report.to_json()
    assert list(entry) == [
        "schema", "command", "output", "outputs", "architecture", "dialect", "outtype", "n_tensors", "n_parameters",
        "types", "seconds", "peak_rss_nbytes", "verified", "resumed", "resumed_nbytes",
        "adapters", "beside", "warnings", "memory",
    ]  # fmt: skip
    (output,) = entry["outputs"]
    assert output == {"path": str(out), "nbytes": out.stat().st_size, "sha256": digest(out), "role": "model"}
    assert (entry["schema"], entry["command"], entry["architecture"], entry["outtype"]) == (
        2,
        "convert",
        "lfm2",
        "q8_0",
    )
    assert entry["n_tensors"] == sum(kind["n_tensors"] for kind in entry["types"].values())
    assert entry["verified"] is None and entry["resumed"] is False and entry["warnings"] == []


def test_a_dry_run_tells_everything_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    planned = streamconv.convert(source, tmp_path / "out.gguf", outtype="f16", dry_run=True).to_json()
    assert not list(tmp_path.glob("out*"))
    done = streamconv.convert(source, tmp_path / "out.gguf", outtype="f16").to_json()
    assert planned["outputs"] == done["outputs"]
    assert {row["target"] for row in planned["plan"]} >= {"token_embd.weight", "blk.0.shortconv.conv.weight"}
    assert len(planned["plan"]) == done["n_tensors"]
    for row in planned["plan"]:
        assert set(row) == {"source", "target", "shape", "type", "nbytes"} and row["source"]
    memory = planned["memory"]
    assert set(memory) == {"allowed", "projected", "terms", "workers", "io"}
    assert memory["terms"]["process"] < sum(memory["terms"].values()) == memory["projected"] <= memory["allowed"]
    again = streamconv.convert(source, tmp_path / "out.gguf", outtype="f16", dry_run=True)
    assert [warning.code for warning in again.warnings] == ["exists"]


def test_progress_ends_at_the_total_and_grows(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = streamconv.convert(source, tmp_path / "out.gguf", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (report.nbytes, report.nbytes)


def test_progress_grows_once_more_where_a_run_verifies(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = streamconv.convert(
        source, tmp_path / "out.gguf", verify=True, progress=lambda done, total: seen.append((done, total))
    )
    second = max(number for number, (done, _) in enumerate(seen) if done == 0)
    compared = sum(total.nbytes for total in report.types.values())
    for part, total in ((seen[:second], report.nbytes), (seen[second:], compared)):
        assert part == sorted(part) and part[-1] == (total, total)
        assert {each for _, each in part} == {total}


def test_the_default_name_follows_the_convention(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = streamconv.convert(source, outtype="bf16")
    assert report.output.name.startswith("Made-Model-") and report.output.name.endswith("-BF16.gguf")
    assert (tmp_path / report.output).is_file()


# ---------------------------------------------------------------- the same bytes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5.5 million weights, whose every output has more than one of the largest chunks."""
    return tiny.lfm2(tmp_path_factory.mktemp("large") / "Large", n_layers=3, attention=(1,), hidden=512, ff=2_912)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_no_fast_path_shows_in_the_bytes(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outtype: str
) -> None:
    """Chunks, threads, kernels and system calls, each in turn, against numpy in one thread through the page cache."""
    prove = run.prove_memory

    def made(chunk: int, workers: int, writing: int) -> str:
        def proof(*arguments: Any, **keywords: Any) -> MemoryProof:
            return replace(prove(*arguments, **keywords), chunk=chunk, workers=workers, writing=writing)

        monkeypatch.setattr(run, "prove_memory", proof)
        out = tmp_path / "out.gguf"
        assert streamconv.convert(large, out, outtype=outtype, force=True).nbytes > CHUNK_NBYTES[0]
        return digest(out)

    plain = watched(refusing("direct", "fallocate", "sync_file_range"))
    monkeypatch.setenv("STREAMCONV_KERNELS", "0")
    assert codecs.best_kernel().name == "numpy"
    with plain:
        general = made(CHUNK_NBYTES[0], 1, 0)
    assert made(CHUNK_NBYTES[2], 3, 2) == general
    monkeypatch.delenv("STREAMCONV_KERNELS")
    assert codecs.best_kernel().name == "c"
    for chunk, (workers, writing) in product(CHUNK_NBYTES, ((1, 0), (4, 4))):
        assert made(chunk, workers, writing) == general
    with watched(refusing("direct", "fallocate", "sync_file_range")):
        assert made(CHUNK_NBYTES[-1], 2, 4) == general


def test_the_place_never_shows_in_the_bytes(source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "a" / "b" / source.name
    elsewhere.parent.mkdir(parents=True)
    streamconv.convert(source, tmp_path / "one.gguf")
    source.rename(elsewhere)
    streamconv.convert(elsewhere, tmp_path / "two.gguf")
    assert digest(tmp_path / "one.gguf") == digest(tmp_path / "two.gguf")


def test_shards_never_show_in_the_tensors(tmp_path: Path) -> None:
    found = []
    for n_shards in (1, 3):
        source = tiny.lfm2(tmp_path / str(n_shards) / "M", n_shards=n_shards)
        streamconv.convert(source, tmp_path / f"{n_shards}.gguf")
        found.append((tmp_path / f"{n_shards}.gguf").read_bytes())
    assert found[0] == found[1]


# ---------------------------------------------------------------- the bound


def test_the_default_bound_is_256_mib_in_a_process_of_its_own(source: Path) -> None:
    done = command("convert", source, "--dry-run", "--json")
    assert json.loads(done.stdout)["memory"]["allowed"] == 256 * MIB


def test_a_caller_that_holds_much_already_is_not_refused(source: Path, tmp_path: Path) -> None:
    code = (
        "import numpy, streamconv; held = numpy.ones(300 << 20, dtype=numpy.uint8);"
        f"print(streamconv.convert({str(source)!r}, {str(tmp_path / 'out.gguf')!r}).n_tensors)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_bound_holds_for_a_tensor_larger_than_it(tmp_path: Path) -> None:
    """Matrices of 134 MB inside 80 MiB, by the kernel's own account of the process; one has rows of 0.5 MB."""
    shape = replace(SHAPES["tiny"], name="wide", feed_forward=262_144, n_layers=2, attention_layers=(1,))
    source = checkpoint(shape, tmp_path, sparse=True)
    out = tmp_path / "out.gguf"
    done = command("convert", source, "-o", out, "--outtype", "f16", "--max-memory", "80MiB", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    matrix = 2 * shape.hidden * shape.feed_forward
    assert matrix > 80 * MIB and out.stat().st_size > 3 * matrix
    assert report["peak_rss_nbytes"] <= 80 * MIB


def test_too_small_a_bound_names_the_one_that_suffices(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = command("convert", source, "-o", out, "--max-memory", "20M")
    assert done.returncode == 4 and not list(tmp_path.glob("out*"))
    bound = done.stderr.rpartition("--max-memory ")[2].strip(" )\n")
    assert command("convert", source, "-o", out, "--max-memory", bound).returncode == 0


def test_a_bound_that_nobody_gave_is_not_told_as_an_option(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It follows from the cgroup, of which --max-memory is the way out."""
    monkeypatch.setattr(memory, "cgroup_limit_nbytes", lambda: 20 * MIB)
    expected = r"a memory limit of 16 MiB is too small: this conversion needs (\d+) MiB \(--max-memory \1MiB\)$"
    with pytest.raises(BudgetError, match=expected):
        streamconv.convert(source, dry_run=True)


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (10, "10 bytes"),
        (300_000, "300,000 bytes"),
        (MIB - 1, "1,048,575 bytes"),
        (MIB, "1 MiB"),
        (20 * 10**6, "19 MiB"),
        (22 * MIB - 1, "21.9 MiB"),
    ],
)
def test_a_bound_is_told_as_it_is(source: Path, bound: int, said: str) -> None:
    with pytest.raises(BudgetError, match=f": a memory limit of {said} is too small"):
        streamconv.convert(source, dry_run=True, max_memory=bound)


def test_a_bound_is_refused_before_the_destination_is_touched(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        streamconv.convert(source, tmp_path / "out.gguf", max_memory=MIB)
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------- values that do not fit


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (threading.Thread, "start", RuntimeError("can't start new thread")),
        (stream, "aligned_buffer", OSError(errno.ENOMEM, "Cannot allocate memory")),
        (stream, "Scratch", OSError(errno.ENOMEM, "Cannot allocate memory")),
        (stream, "read", MemoryError()),
    ],
    ids=["thread", "chunk", "scratch", "array"],
)
@pytest.mark.parametrize("n_given", [0, 1])
def test_what_the_system_does_not_give_is_no_bug(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, n_given: int
) -> None:
    """As under `ulimit -v`, at the first request and at the second."""
    give, n_left = getattr(owner, name), n_given

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise error
        return give(*arguments, **keywords)

    monkeypatch.setattr(owner, name, refuse)
    with raises(BudgetError, code="memory-refused"):
        streamconv.convert(large, tmp_path / "out.gguf", threads=2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left in (set(), {"out.gguf.part", "out.gguf.part.journal"})
    assert not left or n_given == 1  # a worker may have written something before the next one failed


def test_more_scratch_than_declared_is_a_bug(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove = run.prove_memory
    monkeypatch.setattr(run, "prove_memory", lambda *args, **keywords: replace(prove(*args, **keywords), slab=64))
    command = ["convert", str(source), "-o", str(tmp_path / "out.gguf"), "--outtype", "q8_0", "--io", "positioned"]
    assert main([*command, "--quiet"]) == 1
    assert "internal error: Overdraft" in capsys.readouterr().err


def test_a_weight_beyond_f16_names_tensor_value_and_way_out(source: Path, tmp_path: Path) -> None:
    def grow(tensor: tiny.Tensor) -> tiny.Tensor:
        values = tensor.float32().copy()
        values[3, 5], values[7, 1] = 70_000.0, -123_392.0
        return tiny.Tensor.of(values, "BF16")

    rewrite(source, "model.layers.1.feed_forward.w2.weight", grow)
    with pytest.raises(SourceError, match="123392") as caught:
        streamconv.convert(source, tmp_path / "out.gguf", outtype="f16")
    assert caught.value.tensor == "blk.1.ffn_down.weight" and "--outtype bf16" in (caught.value.hint or "")
    assert not list(tmp_path.glob("out*"))
    streamconv.convert(source, tmp_path / "out.gguf", outtype="bf16")


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
def test_what_is_not_finite_is_counted(source: Path, tmp_path: Path, outtype: str) -> None:
    def spoil(tensor: tiny.Tensor) -> tiny.Tensor:
        values = tensor.float32().copy()
        values[0, 0], values[5, 9], values[11, 2] = np.nan, np.nan, -np.inf
        return tiny.Tensor.of(values, "BF16")

    rewrite(source, "model.layers.0.feed_forward.w1.weight", spoil)
    report = streamconv.convert(source, tmp_path / "out.gguf", outtype=outtype)
    assert [(w.code, w.tensor) for w in report.warnings] == [("non-finite", "blk.0.ffn_gate.weight")]
    assert "2 NaN and 1 infinite" in report.warnings[0].message
    with pytest.raises(SourceError, match="Q8_0 cannot hold a NaN"):
        streamconv.convert(source, tmp_path / "q.gguf", outtype="q8_0")


# ---------------------------------------------------------------- refusals


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **changes}))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(architectures=["FancyForCausalLM"]), "FancyForCausalLM is not supported"),
        (edit(architectures=["FancyForConditionalGeneration"], text_config={}), "wrapper with text_config"),
        (edit(hidden_size=96), "expected"),
        (edit(num_hidden_layers=5), "layer 4"),
        (edit(conv_bias=True), "conv_bias"),
        (edit(hidden_size="64"), "hidden_size"),
        (lambda source: (source / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    source: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(source)
    with pytest.raises(SourceError, match=message) as caught:
        streamconv.convert(source, tmp_path / "out.gguf")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))


def test_a_shard_is_not_taken_for_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny.lfm2(tmp_path / "src", n_shards=3), tmp_path / "out.gguf"
    shard = source / "model-00002-of-00003.safetensors"
    assert main(["convert", str(shard), "-o", str(out)]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"streamconv: {shard}: ") and str(source) in said and not out.exists()
    streamconv.convert(source, out)
    assert main(["verify", str(out), "--source", str(shard)]) == 3
    assert capsys.readouterr().err == said


def test_an_existing_destination_is_kept_until_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    with raises(DestinationError, code="exists"):
        streamconv.convert(source, out)
    assert out.read_bytes() == b"mine"
    streamconv.convert(source, out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"


def test_words_that_are_none(source: Path, tmp_path: Path) -> None:
    for keywords, hint in (
        ({"outtype": "iq2_xxs"}, "llama-quantize"),
        ({"dialect": "lmstudio"}, ""),
        ({"dialect": "F16"}, ""),
    ):
        with raises(UsageError, code="word-unknown") as caught:
            streamconv.convert(source, tmp_path / "out.gguf", **keywords)  # type: ignore[arg-type]
        assert hint in (caught.value.hint or "") and bool(hint) is bool(caught.value.hint)


@pytest.mark.parametrize(
    ("keywords", "code"),
    [
        ({"threads": 0}, "threads-range"),
        ({"threads": -3}, "threads-range"),
        ({"max_memory": "lots"}, "size-syntax"),
        ({"max_memory": 2.5e8}, "argument-type"),
    ],
)
def test_a_way_to_run_that_is_none(source: Path, tmp_path: Path, keywords: dict[str, Any], code: str) -> None:
    for work in (
        lambda: streamconv.convert(source, tmp_path / "out.gguf", **keywords),
        lambda: streamconv.convert_adapter(source, source, tmp_path / "out.gguf", **keywords),
        lambda: streamconv.verify(tmp_path / "out.gguf", source, **keywords),
    ):
        with raises(UsageError, code=code):
            work()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("text", "nbytes"), [("9000MiB", 9000 * MIB), ("9.3G", 9_300_000_000), ("9876543210", 9_876_543_210)]
)
def test_a_bound_as_people_write_it(source: Path, text: str, nbytes: int) -> None:
    memory = streamconv.convert(source, dry_run=True, max_memory=text).memory
    assert memory is not None and memory["allowed"] == nbytes


def test_what_a_call_takes_is_there_without_a_look_into_modules(source: Path, tmp_path: Path) -> None:
    report = streamconv.convert(source, tmp_path / "out.gguf", split=streamconv.SplitOptions(max_tensors=17))
    assert [output.path.name for output in report.outputs] == [f"out-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


def test_cancel_stops_and_resume_goes_on(tmp_path: Path) -> None:
    source = checkpoint(SHAPES["tiny"], tmp_path)
    streamconv.convert(source, tmp_path / "whole.gguf")
    out = tmp_path / "out.gguf"
    with pytest.raises(Interrupted):
        streamconv.convert(source, out, threads=1, cancel=lambda: True)
    assert not out.exists() and (tmp_path / "out.gguf.part.journal").exists()
    streamconv.convert(source, out, resume=True)
    assert digest(out) == digest(tmp_path / "whole.gguf")


def test_an_exception_of_the_caller_s_keeps_the_work(large: Path, tmp_path: Path) -> None:
    streamconv.convert(large, tmp_path / "whole.gguf")

    def show(done: int, total: int) -> None:
        if done > total // 2:
            raise ZeroDivisionError("the caller's own")

    out = tmp_path / "out.gguf"
    with small_steps():
        with pytest.raises(ZeroDivisionError, match="the caller's own"):
            streamconv.convert(large, out, threads=1, progress=show)
        assert not out.exists()
        assert streamconv.convert(large, out, threads=1).resumed
    assert digest(out) == digest(tmp_path / "whole.gguf")


def test_memory_that_runs_out_after_writing_keeps_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: Any, **__: Any) -> None:
        raise BudgetError("verifying takes more", code="memory-bound")

    out = tmp_path / "out.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(run, "compare", compare)
        with pytest.raises(BudgetError):
            streamconv.convert(source, out, verify=True)
    assert not out.exists()
    report = streamconv.convert(source, out, verify=True)
    assert report.resumed and report.verified


def test_more_threads_than_any_machine_has(source: Path, tmp_path: Path) -> None:
    """The proof once tried one number of workers after the other, down from three million."""
    tried = 0

    class Counted(MemoryProof):
        def __init__(self, *arguments: Any) -> None:
            nonlocal tried
            tried += 1
            super().__init__(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamconv.engine.layout.MemoryProof", Counted)
        report = streamconv.convert(source, tmp_path / "out.gguf", threads=3_000_000, dry_run=True)
    assert report.memory is not None and 1 <= report.memory["workers"] <= MAX_WORKERS
    assert tried <= 20 * MAX_WORKERS
    streamconv.convert(source, tmp_path / "out.gguf", threads=3_000_000, verify=True)
    streamconv.verify(tmp_path / "out.gguf", source, threads=3_000_000)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
def test_the_memory_proof_adds_up(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: int
) -> None:
    words = ["convert", str(source), "-o", str(tmp_path / "out.gguf"), "--dry-run", "--threads", str(threads)]
    assert main([*words, "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)["memory"]
    assert 1 <= proof["workers"] <= threads
    assert sum(proof["terms"].values()) == proof["projected"] <= proof["allowed"]
    assert main(words) == 0
    lines = capsys.readouterr().out.partition("memory (")[2].splitlines()[1:]
    *terms, projected = [float(re.findall(r"\d+\.\d+", line)[0]) for line in lines if "MiB" in line]
    assert len(terms) == len(proof["terms"]) and sum(terms) == pytest.approx(projected, abs=1e-9)


def test_the_folder_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(tmp_path / "My-Model")
    (model / "original").mkdir()
    monkeypatch.chdir(model / "original")
    report = streamconv.convert("..", outtype="f16")
    assert report.output.name.startswith("My-Model-") and not list(Path().glob(".*"))
    assert ggufs.read(report.output).keys["general.name"].value == "My Model"


def test_to_resume_and_to_restart_is_a_contradiction(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        streamconv.convert(source, tmp_path / "out.gguf", resume=True, restart=True)


def test_the_source_is_never_changed(source: Path, tmp_path: Path) -> None:
    before = {path.name: (digest(path), path.stat().st_mtime_ns) for path in source.iterdir()}
    streamconv.convert(source, tmp_path / "out.gguf", verify=True, sha256=True)
    assert {path.name: (digest(path), path.stat().st_mtime_ns) for path in source.iterdir()} == before


# ---------------------------------------------------------------- the command


def test_the_command_prints_one_object_for_a_failure_too(tmp_path: Path) -> None:
    done = command("convert", tmp_path / "nothing", "--json")
    assert done.returncode == 3
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"kind", "code", "exit_code", "message", "file", "tensor", "hint"} and error["exit_code"] == 3
    assert done.stderr.startswith("streamconv: ") and done.stderr.count("\n") == 1


def test_wrong_usage_is_exit_2(source: Path) -> None:
    assert command("convert").returncode == 2
    assert command("convert", source, "--outtype", "q9").returncode == 2
    assert command("frobnicate").returncode == 2
    assert command("convert", source, "--max-memory", "many").returncode == 2


def test_the_manifest_has_every_tensor(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    streamconv.convert(source, out, sha256=True)
    manifest = json.loads((tmp_path / "out.gguf.manifest.json").read_text())
    content = out.read_bytes()
    assert manifest["sha256"] == digest(out) and manifest["nbytes"] == len(content)
    for tensor in manifest["tensors"]:
        data = content[tensor["offset"] : tensor["offset"] + tensor["nbytes"]]
        assert hashlib.sha256(data).hexdigest() == tensor["sha256"]


def test_the_tensors_are_those_of_the_checkpoint(source: Path, tmp_path: Path) -> None:
    """A last look without any converter: F32 output holds the source's numbers, squeezed kernels included."""
    streamconv.convert(source, tmp_path / "out.gguf", outtype="f32")
    stored, written = tiny.tensors_of(source), ggufs.read(tmp_path / "out.gguf")
    for name, target in (
        ("model.layers.0.conv.conv.weight", "blk.0.shortconv.conv.weight"),
        ("model.layers.2.self_attn.k_proj.weight", "blk.2.attn_k.weight"),
        ("model.embedding_norm.weight", "token_embd_norm.weight"),
    ):
        assert np.array_equal(written.float64(target), np.squeeze(stored[name].float32()))


@pytest.mark.parametrize("way", ["convert", "verify", "profile"])
def test_a_signal_waits_until_all_workers_have_begun(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What a handler raises inside of `Thread.start` would leave a thread half begun, which Python tells on stderr."""
    streamconv.convert(source, tmp_path / "whole.gguf")
    begun = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        signal.raise_signal(signal.SIGINT)
        begun.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        if way == "convert":
            streamconv.convert(source, tmp_path / "out.gguf", threads=1)
        elif way == "verify":
            streamconv.verify(tmp_path / "whole.gguf", source, threads=1)
        else:
            Profile().__enter__()
    assert begun and all({signal.SIGINT, signal.SIGTERM} <= mask for mask in begun)
