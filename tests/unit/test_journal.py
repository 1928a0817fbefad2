"""The journal: what is read back is exactly what was written, up to the first byte that is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.output import journal as journals
from streamconv.output.journal import Header, Journal, Record, Stamp

HEADER = Header(9_000, {"option outtype": "bf16", "source a.safetensors": "123 456 abc"})
RECORDS = (
    Record(3_000, {"a": [1, 0]}),
    Record(6_000, {"a": [1, 0], "blk.0.ä": [0, 7]}),
    Record(9_000, {"a": [2, 3]}, Stamp(17, 9_000, 1_700_000_000_123_456_789)),
)


def begin(path: Path, header: Header = HEADER) -> Journal:
    return Journal.begin(path, os.open(path, os.O_RDWR | os.O_CREAT), header)


def write(path: Path, header: Header = HEADER, records: tuple[Record, ...] = RECORDS) -> list[int]:
    """A journal, and where its header and each of its records end."""
    journal = begin(path, header)
    ends = [path.stat().st_size]
    for record in records:
        journal.append(record)
        ends.append(path.stat().st_size)
    journal.close()
    return ends


def test_the_last_record_counts(tmp_path: Path) -> None:
    ends = write(tmp_path / "j")
    contents = journals.read(tmp_path / "j")
    assert contents is not None
    assert (contents.header, contents.record, contents.end) == (HEADER, RECORDS[-1], ends[-1])


def test_without_records_nothing_is_done(tmp_path: Path) -> None:
    write(tmp_path / "j", records=())
    contents = journals.read(tmp_path / "j")
    assert contents is not None
    assert contents.record == Record(0, {}, None)


def test_a_torn_journal_ends_before_the_tear(tmp_path: Path) -> None:
    ends = write(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "j"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        contents = journals.read(path)
        if length < ends[0]:
            assert contents is None
            continue
        assert contents is not None
        n_records = sum(length >= end for end in ends[1:])
        assert contents.record == (RECORDS[n_records - 1] if n_records else Record())
        assert contents.end == ends[n_records]


def test_a_damaged_journal_ends_before_the_damage(tmp_path: Path) -> None:
    ends = write(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "j"
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        contents = journals.read(path)
        intact = sum(at >= end for end in ends)
        assert (contents.end if contents else 0) == (ends[intact - 1] if intact else 0)


def test_lines_of_another_journal_do_not_count(tmp_path: Path) -> None:
    """A record is good only after the very lines that it was written after."""
    ends = write(tmp_path / "a")
    other_ends = write(tmp_path / "b", header=Header(9_000, {"option outtype": "q8_0"}))
    mine, other = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    (tmp_path / "mixed").write_bytes(mine[: ends[1]] + other[other_ends[1] :])
    (tmp_path / "repeated").write_bytes(mine[: ends[1]] + mine[ends[0] :])
    (tmp_path / "skipped").write_bytes(mine[: ends[1]] + mine[ends[2] :])
    for name in ("mixed", "repeated", "skipped"):
        contents = journals.read(tmp_path / name)
        assert contents is not None
        assert contents.record == RECORDS[0], name


@pytest.mark.parametrize("tear", [0, 1, 40])
@pytest.mark.parametrize("garbage", [b"", b"\n" * 2000], ids=["", "garbage"])
def test_it_goes_on_after_a_tear(tmp_path: Path, tear: int, garbage: bytes) -> None:
    path = tmp_path / "j"
    ends = write(path)
    os.truncate(path, ends[1] + tear)
    with path.open("ab") as file:
        file.write(garbage)
    contents = journals.read(path)
    assert contents is not None
    journal = Journal.reopen(path, os.open(path, os.O_RDWR), contents)
    journal.append(Record(4_000, {}))
    journal.append(Record(5_000, {}))
    journal.close()
    again = journals.read(path)
    assert again is not None
    assert (again.record, again.header) == (Record(5_000, {}), HEADER)


@given(st.binary(max_size=400))
def test_anything_can_be_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "j"
    path.write_bytes(data)
    assert journals.read(path) is None


@pytest.mark.parametrize("payload", [b"[]", b"1", b"{}", b'{"version":', b"[" * 100_000, b'"\xff"', b"NaN"])
def test_a_valid_digest_over_nonsense(tmp_path: Path, payload: bytes) -> None:
    digest = journals._digest(b"", payload)
    (tmp_path / "j").write_bytes(digest.hex().encode() + b" " + payload + b"\n")
    assert journals.read(tmp_path / "j") is None
    write(tmp_path / "k", records=())
    contents = journals.read(tmp_path / "k")
    assert contents is not None
    with (tmp_path / "k").open("ab") as file:
        file.write(journals._digest(contents.digest, payload).hex().encode() + b" " + payload + b"\n")
    assert journals.read(tmp_path / "k") == contents


def test_a_missing_journal_is_none(tmp_path: Path) -> None:
    assert journals.read(tmp_path / "j") is None


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "j")
    (tmp_path / "link").symlink_to("j")
    with pytest.raises(OSError, match="symbolic links"):
        journals.read(tmp_path / "link")


def test_removing_spares_the_journal_of_another_run(tmp_path: Path) -> None:
    path = tmp_path / "j"
    mine = begin(path)
    path.unlink()
    other = begin(path)
    mine.remove()
    mine.close()
    assert path.exists()
    other.remove()
    other.close()
    assert not path.exists()


def test_differences_are_named() -> None:
    other = Header(
        9_001, {"option outtype": "q8_0", "source b.safetensors": "1"}, version=journals.VERSION + 1
    ).differences(HEADER)
    assert "option outtype (was q8_0, is bf16)" in other
    assert "source b.safetensors (removed)" in other
    assert "output size (was 9001, is 9000)" in other
    assert "1 more" in other
    assert HEADER.differences(Header(9_000, dict(HEADER.identity))) == ""


def test_a_long_value_is_not_shown() -> None:
    before, after = Header(1, {"header": "a" * 64}), Header(1, {"header": "b" * 64})
    assert before.differences(after) == "header (changed)"


def test_a_journal_of_another_version_is_read(tmp_path: Path) -> None:
    write(tmp_path / "j", header=Header(9_000, HEADER.identity, version=2), records=())
    contents = journals.read(tmp_path / "j")
    assert contents is not None
    assert "journal format (was 2, is 1)" in contents.header.differences(HEADER)
