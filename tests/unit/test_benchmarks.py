"""What the benchmark says: shapes with the published sizes, tokenizers that hold together, and honest arithmetic."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest
from safetensors import safe_open

from benchmarks import cases, machine, plots, run, summary, vocabulary
from benchmarks import sample as sample_module
from benchmarks.baselines import llama_cpp
from benchmarks.bench import Bench, BenchError, Sample, Settings
from benchmarks.cases import cgroup, convert, earlier, kernels, memory, merge, per_tensor, quantise, reads, startup
from benchmarks.converters import Converter
from benchmarks.sample import Point, measure
from benchmarks.shapes import SHAPES, checkpoint, shard_paths, tensors_of
from tests.extras import tokenizers


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "MODELS",
        "OUTTYPES",
        "PAIRS",
        "SPARSE",
        "CASES",
        "LLAMA_CPP",
        "LLAMA_CPP_PYTHON",
        "LLAMA_QUANTIZE_PYTHON",
        "BENCH_CACHE",
        "EARLIER",
        "CACHES",
    ):
        monkeypatch.delenv(name, raising=False)


def sample(converter: str, pair: int = 0, wall: float = 1.0, peak_mib: float = 50.0, **other: object) -> Sample:
    values: dict[str, object] = {"case": convert.NAME, "model": "1.2b", "outtype": "bf16", "cache": "warm"}
    values |= {"user_seconds": 0.5, "system_seconds": 0.25, "peak_anon_nbytes": 0, "peak_file_nbytes": 0}
    values |= {"output_nbytes": 7, "exit_code": 0, **other}
    peak = int(peak_mib * summary.MIB)
    return Sample(converter=converter, pair=pair, wall_seconds=wall, peak_rss_nbytes=peak, **values)  # type: ignore[arg-type]


def whole_run(case: str) -> list[Sample]:
    """Samples of a case in the order in which it takes them: two pairs, two models where it converts all of them."""
    models = {per_tensor.NAME: (per_tensor.FEW, per_tensor.MANY), cgroup.NAME: ("1.2b",), startup.NAME: ("",)}
    converters = {
        convert.NAME: ("cp", "streamconv-numpy", "streamconv", "llama.cpp"),
        earlier.NAME: ("streamconv", earlier.OTHER),
        merge.NAME: (merge.MERGING, "streamconv"),
        memory.NAME: ("streamconv", "streamconv-numpy", "llama.cpp"),
        reads.NAME: ("streamconv-mapped", "streamconv-positioned"),
        startup.NAME: (startup.HELP, startup.DRY_RUN, startup.IMPORTS),
    }
    timeline = [Point(0.0, 5 << 20, 7 << 20), Point(0.5, 9 << 20, 7 << 20)]
    return [
        sample(
            *(converter, pair, 1 + number / 7 + pair / 3, 40.0 + number),
            case=name,
            model=model,
            outtype=outtype,
            cache=cache,
            timeline=timeline,
        )
        for outtype in ("bf16", "q8_0")
        for pair in range(2)
        for cache in (("warm", "cold") if case in (convert.NAME, reads.NAME) else ("warm",))
        for number, (model, converter, name) in enumerate(
            (model, converter, name)
            for model in models.get(case, ("350m", "1.2b"))
            for converter in converters.get(case, ("streamconv",))
            for name in ((cgroup.NAME, cgroup.INSIDE) if case == cgroup.NAME else (case,))
        )
    ]


def bench(folder: Path, peer: Converter | None = None) -> Bench:
    return Bench(Settings(("tiny",), ("bf16",), 1, frozenset(), folder, peer), folder)


def script(name: str, text: str) -> Converter:
    return Converter(name, lambda _src, _dst, _outtype: [sys.executable, "-S", "-c", text])


FAILS = "print('first line'); print('no such thing'); raise SystemExit(2)"
ALL_CASES = [case.NAME for case in cases.CASES]
PAINTERS = (plots._memory_over_time, plots._peak_against_size, plots._wall_against_cp)


@pytest.mark.parametrize(
    ("name", "n_parameters", "n_tensors"),
    [
        ("350m", 354_483_968, 148),
        ("1.2b", 1_170_340_608, 148),
        ("2.6b", 2_569_272_320, 266),
        ("8b-a1b", 8_339_930_560, 2302),
    ],
)
def test_shapes_are_those_of_the_published_models(name: str, n_parameters: int, n_tensors: int) -> None:
    tensors = list(tensors_of(SHAPES[name]))
    assert sum(math.prod(tensor.shape) for tensor in tensors) == n_parameters
    assert len({tensor.name for tensor in tensors}) == len(tensors) == n_tensors


def test_many_and_few_tensors_differ_in_nothing_but_their_number() -> None:
    few, many = SHAPES[per_tensor.FEW], SHAPES[per_tensor.MANY]
    assert many.nbytes == pytest.approx(few.nbytes, rel=0.01)
    assert len(list(tensors_of(many))) > 9 * len(list(tensors_of(few)))


def test_a_checkpoint_is_valid_and_made_once(tmp_path: Path) -> None:
    folder = checkpoint(SHAPES["tiny"], tmp_path)
    seen: dict[str, tuple[int, ...]] = {}
    for path in shard_paths(folder):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                seen[name] = tuple(file.get_slice(name).get_shape())
    assert seen == {tensor.name: tensor.shape for tensor in tensors_of(SHAPES["tiny"])}
    sizes = [path.stat().st_size for path in shard_paths(folder)]
    assert len(sizes) == SHAPES["tiny"].n_shards
    assert min(sizes) > 0.6 * max(sizes)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(seen)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert checkpoint(SHAPES["tiny"], tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_room_is_asked_for_the_checkpoint_and_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: MagicMock(free=24 << 20))
    with pytest.raises(
        OSError, match=r"^tiny and a copy of it need 32 MiB, .* has 24: make it with holes, SPARSE=tiny$"
    ):
        checkpoint(SHAPES["tiny"], tmp_path)
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: MagicMock(free=40 << 20))
    assert checkpoint(SHAPES["tiny"], tmp_path).is_dir()


def test_an_interrupted_checkpoint_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "tiny-sparse.part").mkdir(parents=True)
    (tmp_path / "tiny-sparse.part" / "junk").write_text("junk")
    folder = checkpoint(SHAPES["tiny"], tmp_path, sparse=True)
    assert not (folder / "junk").exists()
    assert sum(path.stat().st_size for path in shard_paths(folder)) > SHAPES["tiny"].nbytes


@pytest.mark.parametrize("counts", [vocabulary.SMALL, vocabulary.LFM2])
def test_a_tokenizer_has_its_counts_and_works(tmp_path: Path, counts: vocabulary.Vocabulary) -> None:
    vocabulary.write_tokenizer(tmp_path, counts)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert len(model["merges"]) == len({tuple(merge) for merge in model["merges"]}) == counts.n_merges
    assert all({head, tail, head + tail} <= model["vocab"].keys() for head, tail in model["merges"])
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == counts.n_tokens
    ids = tokenizer.encode("<|im_start|>the ocean, 17 islands\n").ids
    assert ids[0] == 6
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>the ocean, 17 islands\n"


def test_more_merges_than_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="splits"):
        vocabulary.make_merges(50, 5000, 0)


def test_ratios_are_taken_pair_by_pair() -> None:
    samples = [sample("cp", 0, 2.0), sample("cp", 1, 4.0), sample("streamconv", 1, 3.0), sample("streamconv", 0, 1.0)]
    samples.append(sample("streamconv", 2, 100.0))  # its cp is missing
    assert summary.ratios(samples, "streamconv", "cp") == [0.5, 0.75]


def test_a_peak_is_the_highest_and_a_bar_is_told_missed() -> None:
    samples = [sample("cp", pair, 1.0) for pair in range(3)]
    samples += [sample("streamconv", pair, 0.7, peak) for pair, peak in enumerate((60.0, 97.0, 61.0))]
    wall, peak = convert.rows(samples)
    assert (wall.value, wall.bar) == (0.7, 0.8)
    assert wall.cells()[-1] == "<= 0.8 held"
    assert peak.value == 97.0
    assert peak.cells()[-1] == "<= 96 MISSED"


def test_flatness_is_the_distance_between_models() -> None:
    made = [sample("streamconv", 0, 1.0, peak, case=memory.NAME, model=model) for model, peak in (("a", 50), ("b", 59))]
    assert memory.rows(made)[-1].cells()[-1] == "<= 8 MISSED"


def test_the_cost_of_a_tensor_is_a_difference_within_pairs() -> None:
    n_more = len(list(tensors_of(SHAPES["many-tensors"]))) - len(list(tensors_of(SHAPES["few-tensors"])))
    samples = [
        sample("streamconv", pair, wall, case=per_tensor.NAME, model=model)
        for pair, (few, many) in enumerate([(1.0, 1.0 + n_more / 1000), (5.0, 5.0 + 3 * n_more / 1000)])
        for model, wall in ((per_tensor.FEW, few), (per_tensor.MANY, many))
    ]
    assert per_tensor.rows(samples)[0].value == pytest.approx(2.0)


def test_versions_are_compared_within_pairs() -> None:
    seconds = {("streamconv", 0): (1.0, 2.0), ("earlier", 0): (2.0, 1.0), ("streamconv", 1): (6.0, 9.0)}
    seconds[("earlier", 1)] = (2.0, 3.0)
    samples = [
        sample(version, pair, wall, case=earlier.NAME, user_seconds=processor, system_seconds=0.0)
        for (version, pair), (wall, processor) in seconds.items()
    ]
    figures = {row.figure: (row.value, row.low, row.high) for row in earlier.rows(samples)}
    assert figures["wall / earlier"] == (1.75, 0.5, 3.0) and figures["CPU / earlier"] == (2.5, 2.0, 3.0)


def test_only_the_states_of_the_cache_that_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench(tmp_path)
    made.settings = replace(made.settings, caches=("warm",), earlier=script("earlier", ""))
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(Bench, "convert", lambda *words: seen.append((words[1], words[6])))
    monkeypatch.setattr(Bench, "source", lambda *words: tmp_path)
    for case in (convert, reads, earlier):
        case.measure(made)
    assert {name for name, _ in seen} == {convert.NAME, reads.NAME, earlier.NAME}
    assert {cache for _, cache in seen} == {"warm"}


def test_the_peak_of_a_command_is_its_own_even_after_it_has_freed_it(tmp_path: Path) -> None:
    nbytes = 64 << 20
    program = f"x = bytearray({nbytes}); del x; raise SystemExit(3)"
    got = measure([sys.executable, "-S", "-c", program], tmp_path / "log")
    assert nbytes < got.peak_rss_nbytes < 2 * nbytes
    assert got.exit_code == 3
    idle = measure([sys.executable, "-S", "-c", "print('hello')"], tmp_path / "log")
    assert idle.peak_rss_nbytes < nbytes / 2
    assert (tmp_path / "log").read_text() == "hello\n"


def test_a_command_runs_as_an_installed_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    program = "import sys; raise SystemExit(4 if sys.dont_write_bytecode else 0)"
    assert measure([sys.executable, "-S", "-c", program], tmp_path / "log").exit_code == 0


@pytest.mark.parametrize("case", ALL_CASES)
def test_a_run_cut_short_at_any_sample_gives_the_rows_it_can(case: str) -> None:
    samples = whole_run(case)
    n_rows = [len(cases.rows(samples[:n])) for n in range(len(samples) + 1)]
    assert n_rows == sorted(n_rows)
    assert n_rows[0] == 0
    assert n_rows[-1] > 0


@pytest.mark.parametrize("case", ALL_CASES)
def test_samples_in_any_part_give_rows(case: str) -> None:
    samples = whole_run(case)
    for number in range(len(samples)):
        cases.rows(samples[number:])
        cases.rows(samples[:number] + samples[number + 1 :])


@pytest.mark.parametrize("case", ALL_CASES)
def test_failed_samples_change_no_figure(case: str) -> None:
    good = whole_run(case)
    failed = [
        sample(s.converter, s.pair, 1000.0, 5000.0, case=s.case, model=s.model, outtype=s.outtype, exit_code=1)
        for s in good
    ]
    figures = [row for row in cases.rows([*failed, *good]) if row.figure != "runs that failed"]
    assert figures
    assert figures == [row for row in cases.rows(good) if row.figure != "runs that failed"]
    assert [row for row in cases.rows(failed) if row.figure != "runs that failed"] == []
    assert summary.conversions([*failed, *good]) == summary.conversions(good)


def test_failures_inside_the_cgroup_are_counted() -> None:
    samples = [sample("streamconv", pair, case=cgroup.INSIDE, exit_code=-9 * (pair == 1)) for pair in range(3)]
    (row,) = cases.rows(samples)
    assert (row.figure, row.value) == ("runs that failed", 1)
    assert row.cells()[-1] == "<= 0 MISSED"


@pytest.mark.parametrize("case", ALL_CASES)
def test_pictures_of_a_part_of_a_run(case: str) -> None:
    samples = whole_run(case)
    for paint in PAINTERS:
        drawn = []
        for n in range(len(samples) + 1):
            axes = MagicMock()
            assert paint(axes, samples[:n]) == (axes.plot.called or axes.errorbar.called)
            drawn.append(axes.plot.called or axes.errorbar.called)
        assert drawn[-1] == (case == convert.NAME or (case == memory.NAME and paint == plots._peak_against_size))


def test_an_outtype_without_cp_has_no_point() -> None:
    samples = [s for s in whole_run(convert.NAME) if (s.converter, s.outtype) != ("cp", "bf16")]
    axes = MagicMock()
    assert plots._wall_against_cp(axes, samples)
    assert {len(call.args[0]) for call in axes.errorbar.call_args_list} == {1}
    assert not plots._wall_against_cp(MagicMock(), [s for s in samples if s.converter != "cp"])


def test_a_sample_without_a_timeline_is_no_line() -> None:
    assert not plots._memory_over_time(MagicMock(), [sample("streamconv")])


def test_models_without_a_pair_in_common_have_no_step() -> None:
    samples = [sample("streamconv", pair, model=model) for pair, model in enumerate(("350m", "1.2b"))]
    assert [row.model for row in convert.rows(samples)] == ["350m", "1.2b"]


def test_the_cgroup_gets_less_by_what_was_mapped_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    def enter(limit_nbytes: int) -> AbstractContextManager[list[str]]:
        events.append(limit_nbytes)
        return nullcontext(["inside"])

    def convert_one(case: str, *_arguments: object, **_options: object) -> Sample:
        events.append(case)
        return sample("streamconv", case=case, peak_file_nbytes=(20 + len(events)) << 20)

    monkeypatch.setattr(cgroup, "memory_cgroup", enter)
    measured = MagicMock(convert=convert_one)
    measured.settings = Settings(("tiny",), ("bf16",), 2, frozenset(), Path(), None)
    cgroup.measure(measured)
    assert events == [cgroup.NAME, 107 << 20, cgroup.INSIDE, cgroup.NAME, 104 << 20, cgroup.INSIDE]


def test_a_cgroup_that_nobody_may_enter_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what fails to enter would count as a conversion that failed in there."""
    monkeypatch.setattr(machine, "_cgroup_parent", lambda: (tmp_path, "memory.max"))
    monkeypatch.setattr(machine, "_forbid_swap", lambda group, _limit: (group / "cgroup.procs").mkdir())
    monkeypatch.setattr(machine, "_remove_cgroup", shutil.rmtree)
    with pytest.raises(machine.Unavailable, match="no process may enter the cgroup"):
        with machine.memory_cgroup(128 << 20):
            pytest.fail("entered")
    assert not [*tmp_path.iterdir()]


def test_a_cgroup_is_limited_without_swap_and_entered_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files of version 2, as the kernel would have made them."""

    def make(group: Path, exist_ok: bool = False) -> None:
        os.mkdir(group)  # noqa: PTH102 (it is what stands in for mkdir)
        (group / "memory.swap.max").touch()

    monkeypatch.setattr(machine, "_cgroup_parent", lambda: (tmp_path, "memory.max"))
    monkeypatch.setattr(machine, "_remove_cgroup", shutil.rmtree)
    monkeypatch.setattr(Path, "mkdir", make)
    with machine.memory_cgroup(128 << 20) as prefix:
        (group,) = tmp_path.iterdir()
        assert (group / "memory.max").read_text() == str(128 << 20)
        assert (group / "memory.swap.max").read_text() == "0"
        done = subprocess.run([*prefix, "sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
        assert (group / "cgroup.procs").read_text() == done.stdout


def test_a_peer_that_failed_outside_is_not_tried_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "memory_cgroup", lambda _limit: pytest.fail("tried"))
    measured = bench(tmp_path, script("llama.cpp", FAILS))
    measured.settings = replace(measured.settings, n_pairs=0)
    measured.samples.append(sample("llama.cpp", exit_code=1))
    cgroup.measure(measured)
    assert measured.notes == ["cgroup-128MiB llama.cpp: left out: it failed outside"]


def test_the_peaks_of_each_converter_are_apart_for_themselves() -> None:
    made = {"streamconv": (50, 51), "streamconv-numpy": (60, 64), "llama.cpp": (900, 3900)}
    samples = [
        sample(converter, 0, 1.0, peak, case=memory.NAME, model=model)
        for converter, peaks in made.items()
        for model, peak in zip(("350m", "1.2b"), peaks, strict=True)
    ]
    apart = {row.what: (row.value, row.bar) for row in memory.rows(samples) if row.figure == "peaks apart, MiB"}
    assert apart == {"streamconv": (1.0, 8), "streamconv-numpy": (4.0, 8), "llama.cpp": (3000.0, None)}


def test_the_failure_of_the_peer_leaves_out_the_peer_alone(tmp_path: Path) -> None:
    peer = script("llama.cpp", FAILS)
    measured = bench(tmp_path, peer)
    for pair in range(2):
        measured.convert(convert.NAME, peer, "tiny", tmp_path / "src", "bf16", "any", pair)
    assert measured.notes == ["convert tiny bf16: left out: llama.cpp ended with 2: no such thing"]
    assert [failed.exit_code for failed in measured.samples] == [2, 2]


def test_the_failure_of_another_ends_the_case(tmp_path: Path) -> None:
    measured = bench(tmp_path, script("llama.cpp", ""))
    with pytest.raises(BenchError, match=r"^streamconv ended with 2: no such thing$"):
        measured.convert(convert.NAME, script("streamconv", FAILS), "tiny", tmp_path / "src", "bf16", "any")


@pytest.mark.parametrize(("kept", "is_warm"), [([1.0], True), ([0.9, 0.5, 1.0], True), ([0.5, 0.6, 0.7], False)])
def test_a_source_that_does_not_stay_warm_is_told(
    kept: list[float], is_warm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = bench(tmp_path)
    src = tmp_path / "src"
    src.mkdir()
    (src / "model.safetensors").write_bytes(b"weights")
    found = cycle(kept)
    monkeypatch.setattr(machine, "cached_fraction", lambda _path: next(found))
    for pair in range(2):
        measured.convert(convert.NAME, script("streamconv", ""), "tiny", src, "bf16", "warm", pair)
    assert measured.notes == ([] if is_warm else ["src: warm in name alone: the page cache keeps 70% of a shard"])


@pytest.mark.parametrize("case", [convert, merge, cgroup])
def test_a_case_without_a_dense_model_says_that_it_is_left_out(
    case: cases.Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = Bench(Settings(("tiny",), ("bf16",), 1, frozenset({"tiny"}), tmp_path, None), tmp_path)
    case.measure(measured)
    assert f"{case.NAME}: left out: no model without holes" in measured.notes
    assert case.NAME in capsys.readouterr().err


@pytest.mark.parametrize("error", [BenchError("broken"), KeyboardInterrupt(), ZeroDivisionError()])
def test_what_was_measured_is_kept_however_the_run_ends(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_one(bench: Bench) -> None:
        bench.samples.append(sample("streamconv", case=memory.NAME))
        raise error

    monkeypatch.setattr(memory, "measure", measure_one)
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    monkeypatch.setattr(
        sys, "argv", ["run", "--cases", memory.NAME, "--cache", f"{tmp_path}/cache", "--out", f"{tmp_path}/out"]
    )
    (tmp_path / "cache" / "out").mkdir(parents=True)
    if isinstance(error, ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            run.main()
    else:
        assert run.main() == 1
    assert len((tmp_path / "out" / "raw.csv").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "out" / "env.json").read_text())["settings"]["cases"] == [memory.NAME]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["out"]


STOPPED_BY_TERM = """
import os, signal, sys
from benchmarks import run
from benchmarks.cases import memory

def measure(bench):
    os.kill(os.getpid(), signal.SIGTERM)

memory.measure = measure
sys.exit(run.main())
"""


def test_a_terminated_run_is_kept_and_tidied_as_an_interrupted_one(tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    options = ["--cases", memory.NAME, "--cache", str(cache), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", STOPPED_BY_TERM, *options], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "!!! memory: left out: interrupted; what was measured until then is kept\n",
    )
    assert (out / "summary.md").is_file()
    assert not [*cache.iterdir()]


def test_a_launcher_that_is_interrupted_says_nothing(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-I", "-S", str(sample_module._LAUNCHER), str(tmp_path / "log"), "sleep", "600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    child = psutil.Process(int(launcher.stdout.readline()))
    launcher.send_signal(signal.SIGINT)
    assert launcher.communicate(timeout=10) == ("", "")
    child.kill()


def test_a_launcher_that_is_killed_gives_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the kernel where memory is short: an error of the case, which the run survives."""
    launcher = tmp_path / "launch.py"
    launcher.write_text("import os; print(os.getpid(), flush=True); os.kill(os.getpid(), 9)")
    monkeypatch.setattr(sample_module, "_LAUNCHER", launcher)
    with pytest.raises(OSError, match=r"^the launcher of true was ended \(-9\), and its figures with it$"):
        measure(["true"], tmp_path / "log")


def test_the_summary_names_the_settings_and_models_with_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda _bench: None)
    options = ["--models", "350m 8b-a1b", "--cases", "memory", "--pairs", "4", "--outtypes", "f16"]
    monkeypatch.setattr(sys, "argv", ["run", *options, "--cache", f"{tmp_path}/cache", "--out", f"{tmp_path}/out"])
    assert run.main() == 0
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "Models: 350m, 8b-a1b (holes in place of weights);" in text
    assert "Output types: f16. Pairs: 4. Cases: memory." in text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PAIRS", "0", "0 is not a count of one or more"),
        ("MODELS", "", "argument --models: none is named; there are tiny, 350m"),
        ("OUTTYPES", " ", "argument --outtypes: none is named; there are f32, bf16, f16, q8_0"),
        ("BENCH_CACHE", __file__, f"File exists: '{__file__}'"),
        ("EARLIER", "~/nowhere", "EARLIER=~/nowhere is no program: name the Python of its environment"),
        ("CACHES", "hot", "argument --caches: no hot; there are warm, cold"),
        ("LLAMA_CPP", "~/nowhere", "LLAMA_CPP=~/nowhere holds no convert_hf_to_gguf.py"),
    ],
)
def test_a_wrong_setting_is_a_usage_error(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_name_given_twice_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--models", "tiny 350m tiny", "--cache", str(tmp_path)])
    assert run._options().models == ("tiny", "350m")


def test_no_run_is_kept_in_place_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda _bench: None)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sys, "argv", ["run", "--cases", memory.NAME, "--cache", str(tmp_path / "cache")])
    monkeypatch.setattr(run.time, "strftime", lambda _format: "2026-01-02")
    monkeypatch.setenv("BENCH_HOST", "here")
    for _ in range(3):
        assert run.main() == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "2026-01-02-here",
        "2026-01-02-here-2",
        "2026-01-02-here-3",
    }


def test_a_python_that_is_none_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / llama_cpp.SCRIPT).touch()
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setenv("LLAMA_CPP_PYTHON", "/bin/true")
    monkeypatch.setattr(sys, "argv", ["run", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^make bench: LLAMA_CPP_PYTHON=/bin/true is no Python that runs$"):
        run.main()
    assert not (tmp_path / "out").exists()


def test_the_home_folder_is_expanded_and_an_old_layout_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / llama_cpp.SCRIPT).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_CPP", "~/llama.cpp")
    peer = llama_cpp.converter()
    assert peer
    assert measure(peer.command(tmp_path, tmp_path / "out", "f16"), tmp_path / "log").exit_code == 1
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "needs a llama.cpp that has its converters in conversion/" in line


def test_an_interrupted_measurement_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = psutil.Process().children(recursive=True)

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.sample.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(["sleep", "600"], tmp_path / "log")
    assert psutil.Process().children(recursive=True) == others


def test_quantising_is_held_against_all_three() -> None:
    """Whose walls are 6, 2, 4 and 60 seconds; peaks of three models lie 5 MiB apart."""
    timed = [
        sample(name, wall=wall, case=quantise.NAME, outtype="q4_k_m", output_nbytes=nbytes)
        for name, wall, nbytes in (
            *(("streamconv", 6.0, 7 * 10**8), ("cp", 4.0, 23 * 10**8)),
            *((quantise.OWN_BF16.name, 2.0, 23 * 10**8), ("llama.cpp", 60.0, 30 * 10**8)),
        )
    ]
    peaks = [
        sample("streamconv", case=quantise.MEMORY, model=model, outtype="q4_k_m", peak_mib=peak)
        for model, peak in (("350m", 80.0), ("1.2b", 83.0), ("8b-a1b", 85.0))
    ]
    found = {(row.figure, row.what, row.model): (row.value, row.bar) for row in quantise.rows([*timed, *peaks])}
    ours = ("streamconv", "1.2b")
    assert found["wall / cp", *ours] == (1.5, 3.0)
    assert found["wall / own bf16", *ours] == (3.0, 4.5)
    assert found["wall / llama.cpp", *ours] == (pytest.approx(0.1), 0.125)
    assert found["MB on disk", "llama.cpp", "1.2b"] == (3000, None)
    assert found["peak MiB", *ours] == (83.0, 96)
    assert found["peaks apart, MiB", "streamconv", "3 models"] == (5.0, 8)


def test_kernels_are_held_against_ggml() -> None:
    samples = [
        sample(name, wall=wall, case=kernels.NAME, model="", outtype=f"Q4_K {kind}", cache="any")
        for kind in kernels.KINDS
        for name, wall in (("c", 5.0), ("numpy", 100.0), ("ggml", 40.0))
    ]
    found = {(row.outtype, row.what, row.figure): row for row in kernels.rows(samples)}
    for kind in kernels.KINDS:
        row = found[f"Q4_K {kind}", "c", "time / ggml"]
        assert (row.value, row.bar) == (0.125, pytest.approx(1 / 7))
        assert found[f"Q4_K {kind}", "numpy", "Melem/s"].value == 10


def test_the_pipeline_of_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llama_cpp.pipeline() is None
    (tmp_path / llama_cpp.SCRIPT).touch()
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert llama_cpp.pipeline() is None
    monkeypatch.setenv("LLAMA_QUANTIZE_PYTHON", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        llama_cpp.pipeline()
    monkeypatch.setenv("LLAMA_QUANTIZE_PYTHON", sys.executable)
    made = llama_cpp.pipeline()
    assert made is not None
    command = made.command(tmp_path / "a b", tmp_path / "out", "q4_k_m")
    assert measure(command, tmp_path / "log").exit_code == 1  # there is no llama.cpp in that folder
    assert (tmp_path / "out").is_dir()
