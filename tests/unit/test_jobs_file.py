"""JOBS files: what a file may say, and that a wrong one is refused as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamconv import cli
from streamconv.batch import jobs_file
from streamconv.batch.jobs_file import JobSpec, read_jobs
from streamconv.errors import UsageError
from tests import tiny


def jobs_of(folder: Path, text: str, name: str = "jobs.toml") -> list[JobSpec]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_jobs(path)


def refusal(folder: Path, text: str, name: str = "jobs.toml") -> str:
    with pytest.raises(UsageError) as caught:
        jobs_of(folder, text, name)
    assert str(caught.value).startswith(str(folder / name))
    return caught.value.message


def test_every_key_is_taken_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = """
        [defaults]
        outtype = "q8_0"
        dialect = "ollama-legacy"
        base = "base.gguf"
        split_max_size = "3G"
        [[job]]
        name = "first"
        source = "a/b"
        adapter = "ad"
        output = "out/../{name}-{outtype}.gguf"
        max_memory = "96MiB"
        verify = true
        force = true
        [[job]]
        command = "lora"
        source = "/abs/x"
        outtype = "f16"
    """
    first, second = jobs_of(tmp_path, text)
    assert first == JobSpec(
        name="first",
        command="convert",
        source=f"{tmp_path}/a/b",
        output=f"{tmp_path}/first-q8_0.gguf",
        adapter=f"{tmp_path}/ad",
        outtype="q8_0",
        dialect="ollama-legacy",
        max_memory="96MiB",
        split_max_size="3G",
        verify=True,
        force=True,
    )
    assert second == JobSpec(
        name="x",
        command="lora",
        source="/abs/x",
        output=f"{tmp_path}/x-f16.gguf",
        base=f"{tmp_path}/base.gguf",
        outtype="f16",
        dialect="ollama-legacy",
    )


def test_json_lines_are_the_same_keys(tmp_path: Path) -> None:
    entries = [{"source": "b", "outtype": "f16"}, {"source": "a", "name": "line\u2028separator", "outtype": "f32"}]
    text = "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n"
    found = [(job.name, job.source, job.outtype) for job in jobs_of(tmp_path, text, "jobs.jsonl")]
    assert found == [("b", f"{tmp_path}/b", "f16"), ("line\u2028separator", f"{tmp_path}/a", "f32")]


def test_a_glob_is_a_job_for_each_match(tmp_path: Path) -> None:
    for name in ("m-two", "m-one", "other", "m[1]", ".m-cache"):
        (tmp_path / "models" / name).mkdir(parents=True)
    for name in ("m-readme.md", "m-one.gguf", ".m-store"):
        (tmp_path / "models" / name).touch()
    text = (
        '[[job]]\nsource = "models/m-*"\noutput = "{name}.gguf"\n[[job]]\nsource = "models/m[1]"\noutput = "1.gguf"\n'
    )
    found = [(Path(job.output).name, job.source) for job in jobs_of(tmp_path, text)]
    models = tmp_path / "models"
    assert found == [("1.gguf", f"{models}/m[1]"), ("m-one.gguf", f"{models}/m-one"), ("m-two.gguf", f"{models}/m-two")]
    (models / "m-three.safetensors").touch()
    assert [job.name for job in jobs_of(tmp_path, '[[job]]\nsource = "models/*m-*"\noutput = "{name}.gguf"\n')] == [
        "m-one", "m-three", "m-two",
    ]  # fmt: skip
    absolute = f'[[job]]\nsource = "{tmp_path}/models/o*"\noutput = "{{name}}.gguf"\n'
    assert [job.source for job in jobs_of(tmp_path, absolute)] == [f"{models}/other"]


def test_auto_is_named_by_what_it_means(tmp_path: Path) -> None:
    tiny.llama(tmp_path / "half", dtype="F16")
    (tmp_path / "nothing").mkdir()
    long = "x" * 300
    text = f'[[job]]\nsource = "half"\n[[job]]\nsource = "nothing"\n[[job]]\nsource = "{long}"\n'
    names = ["half-f16.gguf", "nothing-auto.gguf", f"{long}-auto.gguf"]
    assert [Path(job.output).name for job in jobs_of(tmp_path, text)] == names
    text = '[[job]]\ncommand = "verify"\nsource = "half"\noutput = "{name}-{outtype}.gguf"\n'
    assert [Path(job.output).name for job in jobs_of(tmp_path, text)] == ["half-f16.gguf"]


def test_a_repo_id_is_its_folder_in_the_cache_where_no_such_path_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "here").mkdir(parents=True)
    cached = {"owner/here": Path("/cache/not-this"), "owner/there": Path("/cache/models--owner--there/snapshots/1")}
    monkeypatch.setattr(jobs_file, "find_cached", cached.get)
    sources = ("owner/here", "owner/none", "owner/there")
    text = "".join(f'[[job]]\nsource = "{source}"\n' for source in sources)
    assert [(job.name, job.source) for job in jobs_of(tmp_path, text)] == [
        ("here", f"{tmp_path}/owner/here"),
        ("none", f"{tmp_path}/owner/none"),
        ("there", "/cache/models--owner--there/snapshots/1"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[job]]\nsource = "a"\nouttyp = "f16"\n', "job 1: unknown key 'outtyp'"),
        ('[defaults]\nouttyp = "f16"\n[[job]]\nsource = "a"\n', "defaults: unknown key 'outtyp'"),
        ('[[job]]\nsource = "a"\n[[job]]\nsource = "b"\nouttype = "q4"\n', "job 2: outtype 'q4' is not one of"),
        ('[[job]]\nsource = "a"\ncommand = "quantize"\n', "job 1: command 'quantize' is not one of"),
        ('[[job]]\nsource = 3\n', "job 1: source must be a string"),
        ('[[job]]\nsource = ""\n', "job 1: source is ''"),
        ('[[job]]\nsource = "a"\nverify = "yes"\n', "job 1: verify must be true or false"),
        ('[[job]]\nsource = "a"\nmax_memory = "lots"\n', "job 1: max_memory is 'lots'"),
        ('[[job]]\nsource = "a"\nsplit_max_size = "0"\n', "job 1: split_max_size is '0'"),
        ('[[job]]\noutput = "a.gguf"\n', "job 1: a convert job needs source"),
        ('[[job]]\nsource = "a"\ncommand = "verify"\n', "job 1: a verify job needs output"),
        ('[[job]]\nsource = "a"\nbase = "b"\n', "job 1: base does not apply to a convert job"),
        ('[[job]]\nsource = "a*"\n', "job 1: nothing matches a*"),
        ('[[job]]\nsource = "a**b"\n', "job 1: 'a**b' is not a glob"),
        ('[[job]]\nsource = "a"\noutput = "{nam}.gguf"\n', "job 1: output '{nam}.gguf' may contain only {name} and"),
        ('[[job]]\nsource = "a"\noutput = "{name.x}"\n', "job 1: output '{name.x}' may contain only {name} and"),
        ('[[job]]\nsource = "a"\n[[jobs]]\nsource = "b"\n', "jobs: not known"),
        ('[[job]]\nsource = "a"\noutput = "{name.__class__}.gguf"\n', "job 1: output '{name.__class__}.gguf' may"),
        ('[[job]]\nsource = "a"\noutput = "{name:>10000000000}"\n', "job 1: output '{name:>10000000000}' may contain"),
        ('[[job]]\nsource = "a"\noutput = "{name!r}{{}}"\n', "job 1: output '{name!r}{{}}' may contain"),
        ('[job]\nsource = "a"\n', "job is not a list of tables"),
        ("job = 3\n", "job is not a list of tables"),
        ("defaults = 3\n", "defaults is not a table"),
        ("[[job]\n", "not TOML"),
        ("", "the file contains no jobs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text).startswith(message)


@pytest.mark.parametrize(("word", "hint"), [("iq3_s", "llama-quantize"), ("q8", None)])
def test_the_way_out_of_an_unknown_outtype(tmp_path: Path, word: str, hint: str | None) -> None:
    (tmp_path / "jobs.toml").write_text(f'[[job]]\nsource = "a"\nouttype = "{word}"\n')
    with pytest.raises(UsageError) as caught:
        read_jobs(tmp_path / "jobs.toml")
    assert (hint or "") in (caught.value.hint or "") and bool(hint) is bool(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"source": "a"}\n{"source\n', "line 2 is not JSON"),
        ("\n", "the file contains no jobs"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_json_lines(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text, "jobs.jsonl").startswith(message)


def test_two_jobs_may_not_write_one_file(tmp_path: Path) -> None:
    text = '[defaults]\noutput = "x.gguf"\n[[job]]\nsource = "a"\n[[job]]\nsource = "b"\noutput = "y/../x.gguf"\n'
    assert refusal(tmp_path, text) == f"a and b would both write {tmp_path}/x.gguf"
    with pytest.raises(UsageError) as caught:
        jobs_of(tmp_path, '[[job]]\nsource = "a"\n' * 2)
    assert caught.value.hint == "give one of them another name or output"  # both have {name} in it already
    both = '[[job]]\nsource = "a"\noutput = "x.gguf"\n[[job]]\nsource = "a"\ncommand = "verify"\noutput = "x.gguf"\n'
    assert [job.command for job in jobs_of(tmp_path, both)] == ["convert", "verify"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_jobs(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="larger than 16 MiB"):
        read_jobs(Path("/dev/zero"))
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(UsageError, match="cannot be read: 'utf-8' codec"):
        read_jobs(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        ("--force replaces it", "force = true replaces it"),
        ("--max-memory 120MiB", 'max_memory = "120MiB"'),
        ("give --imatrix FILE, or --outtype q2_k", 'give imatrix = "FILE", or outtype = "q2_k"'),
        ("or try --threads 1", "or try threads = 1"),
        ("start over with --restart", "start over with --restart"),
        ("streamconv convert BASE --adapter A", "streamconv convert BASE --adapter A"),
        ("a--force or --forced", "a--force or --forced"),
    ],
)
def test_hints_name_options_as_a_jobs_file_does(hint: str, expected: str) -> None:
    assert jobs_file.in_jobs_file(hint) == expected


def test_a_job_that_would_replace_a_file_is_told_of_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.llama(tmp_path / "src")
    (tmp_path / "m.gguf").write_bytes(b"old")
    (tmp_path / "j.toml").write_text('[[job]]\nsource = "src"\noutput = "m.gguf"\n')
    assert cli.main(["batch", str(tmp_path / "j.toml"), "--json"]) == 8
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["error"]["hint"].startswith("force = true ")
