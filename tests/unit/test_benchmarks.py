"""What the benchmark says: shapes with the published sizes, tokenizers that hold together, and honest arithmetic."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from benchmarks import summary, vocabulary
from benchmarks.bench import Sample
from benchmarks.cases import convert, memory, per_tensor
from benchmarks.sample import measure
from benchmarks.shapes import SHAPES, checkpoint, shard_paths, tensors_of


def sample(converter: str, pair: int = 0, wall: float = 1.0, peak_mib: float = 50.0, **other: object) -> Sample:
    values: dict[str, object] = {"case": convert.NAME, "model": "1.2b", "outtype": "bf16", "cache": "warm"}
    values |= {"user_seconds": 0.5, "system_seconds": 0.25, "peak_anon_nbytes": 0, "peak_file_nbytes": 0}
    values |= {"output_nbytes": 7, "exit_code": 0, **other}
    peak = int(peak_mib * summary.MIB)
    return Sample(converter=converter, pair=pair, wall_seconds=wall, peak_rss_nbytes=peak, **values)  # type: ignore[arg-type]


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
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
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
