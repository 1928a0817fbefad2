"""Split GGUF files: the parts of llama.cpp's splits are one model, and parts that do not belong together are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamconv.errors import SourceError
from streamconv.gguf import splits as gguf_set
from streamconv.gguf.splits import GGUFSet, part_name
from tests.tools import gguf_bytes as raw


def make_part(
    folder: Path,
    number: int,
    count: int = 3,
    *,
    names: tuple[str, ...] | None = None,
    says: tuple[int, int] | None = None,
    n_tensors: int = 6,
    file_name: str | None = None,
) -> Path:
    """Part `number` (from 1), by default with two tensors of 3 values; `says` lies in its keys."""
    no, n_parts = says or (number - 1, count)
    keys = [raw.number("split.no", "H", no), raw.number("split.count", "H", n_parts)]
    keys.append(raw.number("split.tensors.count", "i", n_tensors))
    if number == 1:
        keys.append(raw.key("general.architecture", raw.STRING, raw.text("llama")))
    names = names if names is not None else (f"a.{number}", f"b.{number}")
    tensors = [raw.tensor(name, (3,), offset=32 * i) for i, name in enumerate(names)]
    path = folder / (file_name or part_name("Model-Q8", number, count))
    path.write_bytes(raw.gguf(keys, tensors, bytes([number]) * 32 * len(names)))
    return path


def messages(path: Path) -> list[str]:
    with GGUFSet.open(path) as files:
        return [f"{problem.file.name}: {problem.code}: {problem.message}" for problem in files.problems]


def test_a_single_file_is_a_set_of_one(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw.gguf([raw.number("n", "I", 7)], [raw.tensor("t", (3,))], bytes(32)))
    with GGUFSet.open(path) as files:
        assert (len(files.files), list(files.keys), list(files.tensors), files.problems) == (1, ["n"], ["t"], ())


def test_all_parts_in_order(tmp_path: Path) -> None:
    first, *_ = [make_part(tmp_path, number) for number in (1, 3, 2)]
    with GGUFSet.open(first) as files:
        assert files.problems == ()
        assert list(files.tensors) == ["a.1", "b.1", "a.2", "b.2", "a.3", "b.3"]
        assert "general.architecture" in files.keys
        for name, (file, tensor) in files.tensors.items():
            content = bytearray(12)
            file.read_into(tensor, 0, content)
            assert content == bytes([int(name[-1])]) * 12


def test_missing_parts_are_named(tmp_path: Path) -> None:
    first = make_part(tmp_path, 1, 14)
    make_part(tmp_path, 5, 14)
    expected = "split-missing: missing or unreadable parts: 2, 3, 4, 6, 7, 8, 9, 10 and 4 more of 14"
    assert messages(first) == [f"{first.name}: {expected}"]


def test_65535_parts_cost_no_more_than_those_that_are_there(tmp_path: Path) -> None:
    first = make_part(tmp_path, 1, 65535)
    assert len(messages(first)) == 1


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    first = make_part(tmp_path, 1, 4, n_tensors=9)
    make_part(tmp_path, 2, 4, says=(2, 4))
    make_part(tmp_path, 3, 4, says=(2, 5), names=("a.1", "c.3"))
    (tmp_path / part_name("Model-Q8", 4, 4)).write_bytes(raw.gguf([raw.number("split.no", "f", 3.0)]))
    assert messages(first) == [
        "Model-Q8-00002-of-00004.gguf: split: its split.no is 2, expected 1 for this part of the set",
        "Model-Q8-00003-of-00004.gguf: split: its split.count is 5, expected 4 for this part of the set",
        "Model-Q8-00004-of-00004.gguf: split: its split.no is None, expected 3 for this part of the set",
        "Model-Q8-00004-of-00004.gguf: split: its split.count is None, expected 4 for this part of the set",
        "Model-Q8-00003-of-00004.gguf: duplicate-tensor: is in Model-Q8-00001-of-00004.gguf as well",
        "Model-Q8-00001-of-00004.gguf: split: split.tensors.count is 9, the parts have 5 tensors",
    ]


def test_a_later_part_points_to_the_first(tmp_path: Path) -> None:
    second = [make_part(tmp_path, number) for number in (1, 2)][1]
    expected = "it is part 2 of 3: loaders open a set by Model-Q8-00001-of-00003.gguf"
    assert messages(second) == [f"{second.name}: split: {expected}"]


@pytest.mark.parametrize("name", ["model.gguf", "Model-Q8-00002-of-00003.gguf", "Model-Q8-00001-of-00004.gguf"])
def test_a_part_under_another_name(tmp_path: Path, name: str) -> None:
    assert "the other parts cannot be found" in messages(make_part(tmp_path, 1, file_name=name))[0]


def test_a_broken_part_is_an_error_and_leaves_nothing_open(tmp_path: Path) -> None:
    first = make_part(tmp_path, 1)
    second = make_part(tmp_path, 2)
    os.truncate(second, 130)
    before = sorted(Path("/dev/fd").iterdir())
    with pytest.raises(SourceError, match=f"^{second}: a.2: ends inside the entry of tensor a.2"):
        GGUFSet.open(first)
    assert sorted(Path("/dev/fd").iterdir()) == before


def test_memory_of_all_parts_together_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = (make_part(tmp_path, number) for number in (1, 2, 3))
    monkeypatch.setattr(gguf_set, "MAX_KEPT_NBYTES", 8000)
    with pytest.raises(SourceError, match=r"the parts up to Model-Q8-00003-of-00003\.gguf have too many names"):
        GGUFSet.open(first)
