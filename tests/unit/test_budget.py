"""One ledger: what a run projects is the sum of its terms, and what is measured stays under it, for each command.

Each command runs in a process of its own, whose peak the kernel measures. A term that were 0 would let one of these
tests fail: that is tried, term by term.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adapters, shapes, vocabulary
from streamconv.budget import MIB, PROCESS, UNACCOUNTED, Budget
from streamconv.errors import BudgetError
from tests.raising import raises
from tests.tools import gguf_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")

CLOSE = 1.25  # projected over measured, where nothing hostile is parsed

# Runs a command and prints what it projected, what was measured, and what it held that no term accounts for. With a
# second word that term is 0, wherever it is reserved or proved.
PROGRAM = """
import io, json, sys
from contextlib import contextmanager, redirect_stdout
from streamconv import budget
from streamconv.budget import Budget

zero, words = sys.argv[1], sys.argv[2:]
ledgers, real = [], {name: getattr(Budget, name) for name in ("__init__", "reserve", "lend", "check", "settle")}

def begin(self, *args, **keywords):
    real["__init__"](self, *args, **keywords)
    if zero == "process":
        self.terms["process"] = 0
    ledgers.append(self)

def zeroed(name):
    def call(self, term, nbytes, **keywords):
        return real[name](self, term, 0 if zero and term.startswith(zero) else nbytes, **keywords)
    return call

Budget.__init__ = begin
for name in ("reserve", "lend", "check"):
    setattr(Budget, name, zeroed(name))
from streamconv.engine.layout import MemoryProof
terms = MemoryProof.terms.fget
MemoryProof.terms = property(lambda self: {k: 0 if k == zero else v for k, v in terms(self).items()})
from streamconv.cli import main
said = io.StringIO()
with redirect_stdout(said):
    code = main(words)
report = json.loads(said.getvalue().splitlines()[-1])
memory = report.get("memory") or {}
print(json.dumps({
    "code": code,
    "projected": memory.get("projected") or max(ledger.projected for ledger in ledgers),
    "measured": budget.resident_nbytes()[1],
    "unaccounted": max(ledger.terms.get("unaccounted", 0) for ledger in ledgers),
    "terms": memory.get("terms"),
}))
"""


def run(*words: str | Path, zero: str = "", **environ: str) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, zero, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environ)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["code"] == 0, done.stderr
    return found


def holds(found: dict[str, Any]) -> bool:
    """Whether everything that was held had a term, and what was projected was enough."""
    return not found["unaccounted"] and found["measured"] <= found["projected"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(cache: Path) -> Make:
    """A checkpoint in one of the benchmarks' shapes, with some of it changed; large ones have holes for weights."""

    def made(name: str, *, label: str | None = None, sparse: bool = False, **changes: Any) -> Path:
        shape = shapes.replace(shapes.SHAPES[name], name=label or name, **changes)
        return shapes.checkpoint(shape, cache, sparse)

    return made


# ---------------------------------------------------------------- every command


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny", {}),
        ("tiny", {"label": "shards", "n_shards": 7}),
        ("tiny-128k", {}),
        ("few-tensors", {}),
        ("many-tensors", {"label": "many", "n_shards": 31}),
        ("350m", {"label": "350m", "sparse": True, "vocabulary": vocabulary.SMALL}),
    ],
    ids=["small", "shards", "vocabulary", "bytes", "tensors", "large"],
)
@pytest.mark.parametrize("how", [("bf16",), ("q8_0", "--verify"), ("f16", "--io", "positioned")], ids=" ".join)
def test_convert(make: Make, tmp_path: Path, name: str, changes: dict[str, Any], how: tuple[str, ...]) -> None:
    outtype, *options = how
    source = make(name, **changes)
    found = run("convert", source, "-o", tmp_path / "out.gguf", "--outtype", outtype, "--json", *options)
    assert holds(found) and found["projected"] <= CLOSE * found["measured"], found
    assert found["projected"] == sum(found["terms"].values())


def test_convert_without_a_compiler(make: Make, tmp_path: Path) -> None:
    words = ("convert", make("few-tensors"), "-o", tmp_path / "out.gguf", "--outtype", "q8_0", "--json")
    assert holds(found := run(*words, STREAMCONV_KERNELS="0")), found


def test_a_plan_for_671b_parameters(make: Make) -> None:
    source = giant(make)
    assert holds(found := run("convert", source, "--dry-run", "--json")), found
    assert found["projected"] <= 160 * MIB
    assert holds(found := run("inspect", source, "--json")), found
    assert found["projected"] <= CLOSE * found["measured"], found


@pytest.fixture(scope="module")
def adapter(make: Make, cache: Path) -> Path:
    return adapters.adapter(shapes.SHAPES["tiny"], cache)


def test_lora(make: Make, adapter: Path, tmp_path: Path) -> None:
    found = run("lora", adapter, "--base", make("tiny"), "-o", tmp_path / "a.gguf", "--json")
    assert holds(found) and found["projected"] <= CLOSE * found["measured"], found


def test_lora_for_a_gguf(make: Make, adapter: Path, tmp_path: Path) -> None:
    run("convert", make("tiny"), "-o", tmp_path / "base.gguf", "--outtype", "q8_0", "--json")
    found = run("lora", adapter, "--base", tmp_path / "base.gguf", "-o", tmp_path / "a.gguf", "--json")
    assert holds(found) and found["projected"] <= CLOSE * found["measured"], found
    assert "GGUF headers" in found["terms"]


@pytest.mark.parametrize("verified", [(), ("--verify",)], ids=" ".join)
def test_quantize(make: Make, tmp_path: Path, verified: tuple[str, ...]) -> None:
    run("convert", make("many-tensors"), "-o", tmp_path / "base.gguf", "--outtype", "bf16", "--json")
    words = ("quantize", tmp_path / "base.gguf", "-o", tmp_path / "q.gguf", "--outtype", "q4_0", "--json", *verified)
    assert holds(found := run(*words)) and found["projected"] <= CLOSE * found["measured"], found
    assert "GGUF headers" in found["terms"]


def test_an_importance_matrix(make: Make, tmp_path: Path) -> None:
    source = make("many-tensors")
    words = ("convert", source, "-o", tmp_path / "q.gguf", "--outtype", "q4_0", "--json", "--imatrix")
    assert holds(found := run(*words, many_importances(tmp_path, 5_000))), found
    assert found["projected"] <= CLOSE * found["measured"], found
    assert found["terms"]["importance matrix"] > 5_000 * 500


@pytest.mark.parametrize("outtype", ["bf16", "q8_0"])
def test_merge(make: Make, adapter: Path, tmp_path: Path, outtype: str) -> None:
    words = ("convert", make("tiny"), "--adapter", adapter, "-o", tmp_path / "m.gguf", "--outtype", outtype, "--json")
    assert holds(found := run(*words)) and found["projected"] <= CLOSE * found["measured"], found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny", {}),
        ("tiny", {"label": "shards", "n_shards": 7}),
        ("tiny", {"label": "tiny-65k", "vocabulary": vocabulary.LFM2}),
        ("tiny-128k", {}),
        ("many-tensors", {"label": "many", "n_shards": 31}),
    ],
    ids=["small", "shards", "65,536 tokens", "128,256 tokens", "tensors"],
)
def test_verify_and_inspect(make: Make, tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    source, out = make(name, **changes), tmp_path / "out.gguf"
    run("convert", source, "-o", out, "--outtype", "q8_0", "--json")
    assert holds(found := run("verify", out, "--source", source, "--json")), found
    assert found["projected"] <= CLOSE * found["measured"], found
    for what in (source, out):
        assert holds(found := run("inspect", what, "--json")), found
        assert found["projected"] <= CLOSE * found["measured"], found


def test_batch(make: Make, adapter: Path, tmp_path: Path) -> None:
    """Each job is a process with a bound of its own."""
    base, other = make("tiny"), make("tiny-128k")
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(
        f"""
        [[job]]
        source = "{base}"
        output = "a.gguf"
        outtype = "q8_0"
        verify = true

        [[job]]
        source = "{other}"
        output = "b.gguf"
        max_memory = "110MiB"

        [[job]]
        command = "lora"
        source = "{adapter}"
        base = "{base}"
        output = "c.gguf"
        """
    )
    command = [sys.executable, "-m", "streamconv", "batch", "--json", str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line)["report"] for line in done.stdout.splitlines()]
    for report in reports:
        measured, memory = report["peak_rss_nbytes"], report["memory"]
        assert measured <= memory["projected"] <= CLOSE * measured
        assert memory["projected"] == sum(memory["terms"].values()) <= memory["allowed"]
    assert len(reports) == 3 and 110 * MIB in {report["memory"]["allowed"] for report in reports}


# ---------------------------------------------------------------- no term is idle
# What parsing takes is held in test_checkpoint.py.


def large_config(source: Path) -> None:
    """A config with a list that nobody reads."""
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unused": [[n, n + 0.5] for n in range(60_000)]}))


def giant(make: Make) -> Path:
    return make("671b", sparse=True, vocabulary=vocabulary.SMALL)


def large(make: Make) -> Path:
    return make("350m", label="350m", sparse=True, vocabulary=vocabulary.SMALL)


def many_importances(folder: Path, n_entries: int) -> Path:
    """An importance matrix with an entry of the shapes of 64 columns, and others that no model has."""
    names = ["blk.0.ffn_up.weight", *(f"unused.{n}.weight" for n in range(n_entries))]
    widths = [64, *[1] * n_entries]
    entries = b"".join(
        struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, width) + struct.pack("<f", 2.0) * width
        for name, width in zip(names, widths, strict=True)
    )
    path = folder / "importances.dat"
    path.write_bytes(struct.pack("<i", len(names)) + entries)
    return path


def many_names(folder: Path) -> Path:
    """A GGUF file of 45,000 tensors, each of 128 bytes."""
    tensors = [gguf_bytes.tensor(f"blk.{n}.some_tensor.weight", (32,), offset=128 * n) for n in range(45_000)]
    path = folder / "names.gguf"
    path.write_bytes(gguf_bytes.gguf([], tensors, bytes(128 * len(tensors))))
    return path


def converted(make: Make, folder: Path) -> Path:
    run("convert", make("few-tensors"), "-o", folder / "other.gguf", "--outtype", "q8_0", "--json")
    return folder / "other.gguf"


CONVERT = ("-o", "OUT", "--json", "--outtype")
ZEROED: dict[str, Callable[[Make, Path], tuple[tuple[Any, ...], dict[str, str]]]] = {
    "process": lambda make, tmp: (("convert", make("tiny"), *CONVERT, "bf16"), {}),
    "config": lambda make, tmp: (("convert", make("tiny", label="config"), *CONVERT, "bf16"), {}),
    "tensors": lambda make, tmp: (("convert", giant(make), "--dry-run", "--json"), {}),
    "plan": lambda make, tmp: (("convert", giant(make), "--dry-run", "--json"), {}),
    "listing": lambda make, tmp: (("inspect", giant(make), "--json"), {}),
    "vocabulary": lambda make, tmp: (("convert", make("tiny-128k"), *CONVERT, "bf16"), {}),
    "reading the vocabulary": lambda make, tmp: (("inspect", make("tiny-128k"), "--json"), {}),
    "modules": lambda make, tmp: (("convert", make("tiny"), *CONVERT, "bf16", "--threads", "1"), {}),
    "chunks": lambda make, tmp: (("convert", make("few-tensors"), *CONVERT, "bf16"), {}),
    "scratch": lambda make, tmp: (
        ("convert", make("few-tensors"), *CONVERT, "q8_0", "--threads", "4"),
        {"STREAMCONV_KERNELS": "0"},
    ),
    "importance matrix": lambda make, tmp: (
        ("convert", make("few-tensors"), *CONVERT, "q4_0", "--imatrix", many_importances(tmp, 30_000)),
        {},
    ),
    "GGUF headers": lambda make, tmp: (("inspect", many_names(tmp), "--json"), {}),
    "windows": lambda make, tmp: (("convert", large(make), *CONVERT, "bf16"), {}),
    "verification": lambda make, tmp: (("verify", converted(make, tmp), "--source", make("few-tensors"), "--json"), {}),
}


@pytest.mark.parametrize("term", ZEROED)
def test_no_term_is_idle(make: Make, tmp_path: Path, term: str) -> None:
    words, environ = ZEROED[term](make, tmp_path)
    if term == "config":
        large_config(words[1])
    words = tuple(tmp_path / "out.gguf" if word == "OUT" else word for word in words)
    assert holds(found := run(*words, **environ)), found
    (tmp_path / "out.gguf").unlink(missing_ok=True)
    assert not holds(found := run(*words, zero=term, **environ)), found


THREADS = """
import sys, threading
import numpy as np
from streamconv.budget import resident_nbytes
from streamconv.engine.layout import THREAD_NBYTES
from streamconv.threads import start_threads

def work():
    np.arange(1000).sum()
    barrier.wait()
    barrier.wait()

work_before = np.arange(1000).sum()
n, before = 60, resident_nbytes()[0]
barrier = threading.Barrier(n + 1)
threads = [threading.Thread(target=work) for _ in range(n)]
start_threads(threads)
barrier.wait()
each = (resident_nbytes()[0] - before) / n
barrier.wait()
sys.exit(0 if 0 < each <= THREAD_NBYTES else f"{each:,.0f} bytes a thread")
"""


def test_a_thread_takes_less_than_its_term_and_not_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the ledger itself


def test_what_is_lent_is_given_back() -> None:
    budget = Budget(100 * MIB, 40 * MIB)
    budget.reserve("vocabulary", 10 * MIB)
    with budget.lend("reading", 45 * MIB):
        assert budget.held == 95 * MIB and budget.left == 5 * MIB
    assert budget.terms == {PROCESS: 40 * MIB, "vocabulary": 10 * MIB}
    assert budget.projected == 95 * MIB and budget.peak_of == "reading"
    budget.reserve("plan", 1 * MIB)
    assert budget.projected == 95 * MIB


def test_what_is_not_left_is_refused_and_named() -> None:
    budget = Budget(100 * MIB, 40 * MIB)
    for take in (budget.reserve, budget.check, lambda *words, **more: budget.lend(*words, **more).__enter__()):
        with raises(BudgetError, code="memory-bound") as caught:
            take("vocabulary", 61 * MIB, file="tokenizer.json")
        assert caught.value.file == "tokenizer.json" and caught.value.hint == "--max-memory 103MiB"
    assert budget.terms == {PROCESS: 40 * MIB}


def test_what_no_term_accounts_for_is_held_in_the_end() -> None:
    budget = Budget(1 << 40, 1 << 39)
    budget.settle()
    assert budget.terms[UNACCOUNTED] == 0
    budget = Budget(1 << 40, MIB)
    budget.settle()
    assert budget.terms[UNACCOUNTED] > 10 * MIB


@pytest.mark.parametrize("bound", ["10MB", "60MiB"])
@pytest.mark.parametrize("name", ["tiny", "tiny-128k", "many-tensors", "671b"])
@pytest.mark.parametrize("options", [(), ("--verify",)], ids=" ".join)
def test_a_hint_is_sufficient_the_first_time(
    make: Make, tmp_path: Path, name: str, bound: str, options: tuple[str, ...]
) -> None:
    source = make(name, sparse=name == "671b", **({"vocabulary": vocabulary.SMALL} if name == "671b" else {}))
    words = ["convert", str(source), "-o", str(tmp_path / "out.gguf"), "--outtype", "q8_0", "--dry-run", *options]

    def attempt(bound: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "streamconv", *words, "--max-memory", bound]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    first = attempt(bound)
    if first.returncode == 0:
        return
    assert first.returncode == 4, first.stderr
    hint = first.stderr.rpartition("--max-memory ")[2].strip(" )\n")
    second = attempt(hint)
    assert second.returncode == 0, f"{first.stderr}{second.stderr}"


def test_verification_is_reserved_before_anything_is_written(make: Make, tmp_path: Path) -> None:
    """A bound under which the file can be written, and not compared, is refused at once."""
    words = ("convert", make("many-tensors"), "-o", tmp_path / "out.gguf", "--outtype", "q8_0", "--json")
    command = [sys.executable, "-m", "streamconv", *map(str, words), "--threads", "1", "--max-memory"]
    for bound in range(50, 90):
        done = subprocess.run([*command, f"{bound}MiB", "--dry-run"], capture_output=True, check=False)
        if done.returncode == 0:
            break
    done = subprocess.run([*command, f"{bound}MiB", "--verify"], capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (4, "memory-bound")
    assert not any(tmp_path.iterdir())
