"""Batches: what runs, what is up to date, what is retried, what is said; each job in a process of its own."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import psutil
import pytest

import streamconv
from streamconv.batch.child import JobResult, run_job
from streamconv.batch.jobs_file import JobSpec, read_jobs
from streamconv.batch.run import EXIT_NONE_SUCCEEDED, EXIT_SOME_FAILED, run_batch, select_array
from streamconv.batch.state import State
from streamconv.cli import main
from streamconv.errors import UsageError
from streamconv.options import SplitOptions
from tests import families, terminal, tiny
from tests.holding import await_end, held_processes, hold
from tests.raising import raises

JOBS = """
[defaults]
outtype = "q8_0"
output = "out/{name}-{outtype}.gguf"
[[job]]
source = "models/*"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, and a jobs file for them."""
    tiny.llama(tmp_path / "models" / "one")
    tiny.llama(tmp_path / "models" / "two", seed=8)
    (tmp_path / "jobs.toml").write_text(JOBS)
    return tmp_path


def batch(folder: Path, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    """(exit code, the JSON lines about jobs, stderr) of `streamconv batch`."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        code = main(["batch", str(folder / "jobs.toml"), "--json", *(options or ("--jobs", "2"))])
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    return code, [line for line in lines if "job" in line or "jobs" in line], error.getvalue()


def outcome(lines: list[dict[str, Any]]) -> dict[str, tuple[str, int, int]]:
    return {line["name"]: (line["status"], line["exit_code"], line["attempts"]) for line in lines}


def assert_whole(folder: Path, *names: str) -> None:
    """The outputs are what `convert` writes, and nothing else is there."""
    assert {path.name for path in (folder / "out").iterdir()} == {f"{name}-q8_0.gguf" for name in names}
    for name in names:
        expected = folder / f"expected-{name}.gguf"
        streamconv.convert(folder / "models" / name, expected, outtype="q8_0", force=True)
        assert (folder / "out" / f"{name}-q8_0.gguf").read_bytes() == expected.read_bytes()


def test_no_code_of_the_current_folder_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a downloaded model, with Python files of a stranger in it."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(folder / "models" / "one")
    for name in ("streamconv", "gguf", "json", "numpy"):
        Path(f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder')")
    code, lines, _ = batch(folder, "--jobs", "1")
    assert (code, outcome(lines)) == (0, {"one": ("done", 0, 1), "two": ("done", 0, 1)})


def test_each_job_is_done_and_told_in_a_line(folder: Path) -> None:
    code, lines, table = batch(folder, "--jobs", "2")
    assert (code, outcome(lines)) == (0, {"one": ("done", 0, 1), "two": ("done", 0, 1)})
    assert_whole(folder, "one", "two")
    line = next(line for line in lines if line["name"] == "one")
    assert line.keys() == {"schema", "job", "name", "status", "exit_code", "attempts", "report"}
    assert line["schema"] == 1
    assert line["job"]["source"] == str(folder / "models" / "one")
    assert line["report"]["output"] == str(folder / "out" / "one-q8_0.gguf")
    assert table.splitlines()[-1] == "2 done"
    assert any(row.startswith("done         0  one  ") for row in table.splitlines())


def test_people_read_lines_and_scripts_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json stdout has a line for each job and one for all; what happens meanwhile is a log on stderr."""
    assert main(["batch", str(folder / "jobs.toml")]) == 0
    out, error = capsys.readouterr()
    assert [line.split()[:3] for line in out.splitlines()[:-1]] == [["done", "0", "one"], ["done", "0", "two"]]
    assert out.splitlines()[-1] == "2 done"
    assert next(line for line in error.splitlines() if line.startswith("one: ")) == "one: begins"
    assert [line.split()[1] for line in error.splitlines() if line.startswith("two: ")][-1] == "100%"
    assert main(["batch", str(folder / "jobs.toml"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["batch", str(folder / "jobs.toml"), "--progress", "none"]) == 0
    assert capsys.readouterr().err == ""


def test_warnings_of_jobs_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "models" / "two" / "README.md").write_text("---\nbase_model: [}\n---\n")
    assert main(["batch", str(folder / "jobs.toml"), "--quiet"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("streamconv: warning: two: ")


def test_a_failure_is_said_in_quiet_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "one-q8_0.gguf").write_bytes(b"somebody's")
    assert main(["batch", str(folder / "jobs.toml"), "--quiet"]) == EXIT_SOME_FAILED
    out, error = capsys.readouterr()
    assert out == ""
    (line,) = error.splitlines()
    assert line.startswith("failed       5  one") and "force = true" in line and "--force" not in line


def test_progress_of_each_job_is_of_its_bytes(folder: Path) -> None:
    """Called with (0, 0) as a job begins, then up to its size, and once more for the comparison."""
    (folder / "jobs.toml").write_text(JOBS + "verify = true\n")
    seen: dict[str, list[tuple[int, int]]] = {"one": [], "two": []}
    results = run_batch(
        read_jobs(folder / "jobs.toml"),
        State(folder / "state"),
        n_parallel=2,
        progress=lambda job, done, total: seen[job.name].append((done, total)),
    )
    assert [result.status for result in results] == ["done", "done"]
    for name, calls in seen.items():
        size = (folder / "out" / f"{name}-q8_0.gguf").stat().st_size
        assert calls[0] == (0, 0)
        assert (size, size) in calls
        assert calls[-1][0] == calls[-1][1] < size  # tensors' data alone is compared


def test_a_live_line_for_each_job_and_one_for_all(folder: Path) -> None:
    """On a terminal: bars that are wiped where a line is printed, and at the end."""
    code, text = terminal.run([sys.executable, "-m", "streamconv", "batch", "jobs.toml", "--jobs", "2"], folder)
    assert code == 0
    assert "of 2 jobs [" in text and "one: begins" in text and "two: begins" in text
    assert "of 0 bytes" not in text and re.search(r"one: .* bytes of [\d,]+ bytes", text)
    lines = terminal.rendered(text)
    assert [line.split()[0] for line in lines if line.strip()] == ["done", "done", "2"]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("gone", ["out.gguf", "mmproj-out.gguf"])
def test_one_of_two_outputs_that_is_gone_is_made_again(tmp_path: Path, gone: str) -> None:
    families.checkpoint("lfm2-vl", tmp_path / "model")
    jobs, state = tmp_path / "jobs.toml", tmp_path / "jobs.toml.state.jsonl"
    jobs.write_text('[[job]]\nsource = "model"\noutput = "out.gguf"\nmodelfile = true\n')
    assert batch(tmp_path)[0] == 0
    whole = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path != state}
    (tmp_path / "out.Modelfile").write_text("edited")
    (tmp_path / gone).unlink()
    _, (planned,), _ = batch(tmp_path, "--dry-run")
    assert [job["action"] for job in planned["jobs"]] == ["run"]
    code, lines, _ = batch(tmp_path)
    assert (code, outcome(lines)) == (0, {"model": ("done", 0, 1)})
    assert {path: path.read_bytes() for path in whole} == whole | {tmp_path / "out.Modelfile": b"edited"}
    assert outcome(batch(tmp_path)[1]) == {"model": ("skipped", 0, 0)}
    (tmp_path / gone).unlink()
    (tmp_path / ({"out.gguf", "mmproj-out.gguf"} - {gone}).pop()).write_bytes(b"another's")
    code, (line,), _ = batch(tmp_path)
    assert (code, line["error"]["code"]) == (EXIT_NONE_SUCCEEDED, "exists")


def test_jobs_of_one_name_are_named_after_their_outputs(folder: Path) -> None:
    (folder / "jobs.toml").write_text('[[job]]\nsource = "models/one"\nouttype = ["q8_0", "q4_0"]\n')
    assert [job.name for job in read_jobs(folder / "jobs.toml")] == ["one-q4_0", "one-q8_0"]


def test_only_what_may_be_a_repo_is_taken_for_one(folder: Path) -> None:
    (folder / "jobs.toml").write_text(
        '[[job]]\nsource = "models/three"\noutput = "a.gguf"\n[[job]]\nsource = "Nobody/Model"\noutput = "b.gguf"\n'
    )
    hints = {line["name"]: line["error"]["hint"] for line in batch(folder)[1]}
    assert hints["three"] is None and "hf download Nobody/Model" in hints["Model"]


def test_what_is_up_to_date_is_skipped(folder: Path) -> None:
    batch(folder)
    code, lines, _ = batch(folder)
    assert (code, outcome(lines)) == (0, {"one": ("skipped", 0, 0), "two": ("skipped", 0, 0)})
    card = folder / "models" / "one" / "README.md"
    card.write_text("---\nlicense: mit\n---\n")
    (folder / "out" / "two-q8_0.gguf").unlink()
    code, lines, _ = batch(folder)
    assert (code, outcome(lines)) == (EXIT_SOME_FAILED, {"one": ("failed", 5, 1), "two": ("done", 0, 1)})
    assert "exists already" in next(line["error"]["message"] for line in lines if line["name"] == "one")
    (folder / "jobs.toml").write_text(JOBS + "force = true\n")
    assert outcome(batch(folder)[1]) == {"one": ("done", 0, 1), "two": ("skipped", 0, 0)}
    assert_whole(folder, "one", "two")


def test_an_output_beside_its_source_is_no_new_source(folder: Path) -> None:
    (folder / "jobs.toml").write_text('[[job]]\nsource = "models/one"\noutput = "models/one/{name}.gguf"\n')
    assert outcome(batch(folder)[1]) == {"one": ("done", 0, 1)}
    (folder / "models" / "one" / "other.gguf").write_bytes(b"another job's")
    (folder / "models" / "one" / "other.gguf.part").write_bytes(b"another job's")
    assert outcome(batch(folder)[1]) == {"one": ("skipped", 0, 0)}


def test_a_file_beside_a_single_source_counts(folder: Path) -> None:
    (folder / "jobs.toml").write_text('[[job]]\nsource = "models/one/model.safetensors"\noutput = "x.gguf"\n')
    assert [line["status"] for line in batch(folder)[1]] == ["done"]
    assert [line["status"] for line in batch(folder)[1]] == ["skipped"]
    config = folder / "models" / "one" / "config.json"
    config.write_text(config.read_text() + " ")
    assert [line["error"]["exit_code"] for line in batch(folder)[1]] == [5]


def test_what_changes_while_a_job_runs_is_not_what_it_read(folder: Path) -> None:
    config = folder / "models" / "one" / "config.json"

    class Editing(Losing):
        def submit(self, *arguments: Any, **keywords: Any) -> Future[Any]:
            future = super().submit(*arguments, **keywords)
            config.write_text(config.read_text() + " ")
            return future

    assert [result.status for result in run_with(folder, Editing(0))] == ["done"]
    assert [result.exit_code for result in run_with(folder, Losing(0))] == [5]


def test_a_comparison_that_is_asked_for_later_is_made(folder: Path) -> None:
    batch(folder)
    (folder / "jobs.toml").write_text(JOBS + "verify = true\n")
    assert [job["action"] for job in batch(folder, "--dry-run", "--json")[1][0]["jobs"]] == ["run", "run"]
    _, lines, _ = batch(folder)
    assert outcome(lines) == {"one": ("done", 0, 1), "two": ("done", 0, 1)}
    assert {(line["job"]["command"], line["report"]["command"]) for line in lines} == {("convert", "verify")}
    assert {status for status, *_ in outcome(batch(folder)[1]).values()} == {"skipped"}
    assert_whole(folder, "one", "two")


class Killed(BaseException):
    """The batch's end at a moment when nothing can be told any more."""


@pytest.mark.parametrize("is_right", [True, False])
def test_a_batch_that_ends_before_it_could_remember_a_job(folder: Path, is_right: bool) -> None:
    def listener(result: JobResult) -> None:
        raise Killed

    with pytest.raises(Killed):
        run_batch(read_jobs(folder / "jobs.toml")[:1], State(folder / "state"), finished=listener)
    output = folder / "out" / "one-q8_0.gguf"
    if not is_right:
        output.unlink()
        streamconv.convert(folder / "models" / "two", output, outtype="q8_0")
    (result,) = run_with(folder, Losing(0))
    assert (result.job.command, result.status, result.exit_code) == (
        ("convert", "done", 0) if is_right else ("convert", "failed", 6)
    )
    assert [result.status for result in run_with(folder, Losing(0))] == (["skipped"] if is_right else ["failed"])


def test_an_output_that_was_there_before_is_none_of_the_batch(folder: Path) -> None:
    (folder / "out").mkdir()
    streamconv.convert(folder / "models" / "one", folder / "out" / "one-q8_0.gguf", outtype="f16")
    for _ in range(2):
        assert outcome(batch(folder)[1])["one"] == ("failed", 5, 1)


def test_a_state_that_cannot_be_written_ends_a_batch_before_it_begins(folder: Path) -> None:
    (folder / "jobs.toml.state.jsonl").symlink_to(folder / "nowhere" / "state")
    code, lines, error = batch(folder)
    assert (code, lines) == (5, [])
    assert error.startswith(f"streamconv: {folder}/jobs.toml.state.jsonl: the state file cannot be written: No such")
    assert not (folder / "out").exists()
    assert batch(folder, "--state", str(folder / "elsewhere"))[0] == 0
    assert {line["status"] for line in batch(folder, "--state", str(folder / "elsewhere"))[1]} == {"skipped"}


def test_what_is_no_state_is_refused(folder: Path) -> None:
    for other, words in (("/dev/zero", "the state file is larger than 256 MiB"), ("jobs.toml", "is not a state file")):
        code, lines, error = batch(folder, "--state", str(folder / other))
        assert (code, lines) == (5, [])
        assert words in error
    assert (folder / "jobs.toml").read_text() == JOBS


def test_a_torn_line_of_the_state_costs_one_job(folder: Path) -> None:
    batch(folder)
    state = folder / "jobs.toml.state.jsonl"
    state.write_bytes(state.read_bytes()[:-20])
    (folder / "jobs.toml").write_text(JOBS + "force = true\n")
    assert sorted(status for status, *_ in outcome(batch(folder)[1]).values()) == ["done", "skipped"]
    assert {status for status, *_ in outcome(batch(folder)[1]).values()} == {"skipped"}


def test_a_failed_job_stops_no_other(folder: Path) -> None:
    (folder / "models" / "bad").mkdir()
    code, lines, table = batch(folder)
    assert (code, outcome(lines)["bad"]) == (EXIT_SOME_FAILED, ("failed", 3, 1))
    assert_whole(folder, "one", "two")
    line = next(line for line in lines if line["name"] == "bad")
    assert line.keys() == {"schema", "job", "name", "status", "exit_code", "attempts", "error"}
    assert line["error"]["kind"] == "source"
    assert line["error"]["file"] == str(folder / "models" / "bad")
    assert table.splitlines()[-1] == "1 failed, 2 done"
    assert f"bad  {folder}/models/bad: the directory is empty" in table
    (folder / "jobs.toml").write_text('[[job]]\nsource = "models/bad"\n')
    assert batch(folder)[0] == EXIT_NONE_SUCCEEDED


def test_a_name_that_no_filesystem_takes_stops_no_other_job(folder: Path) -> None:
    long = "x" * 300
    (folder / "jobs.toml").write_text(
        JOBS
        + f'[[job]]\nname = "source"\nsource = "{long}"\n'
        + f'[[job]]\nname = "output"\nsource = "models/one"\noutput = "{long}.gguf"\n'
        + f'[[job]]\nname = "split"\nsource = "{long}"\nsplit_max_size = "60K"\n'
    )
    code, lines, _ = batch(folder)
    assert code == EXIT_SOME_FAILED
    assert {name: status for name, (status, *_) in outcome(lines).items()} == {
        "one": "done", "two": "done", "source": "failed", "output": "failed", "split": "failed",
    }  # fmt: skip
    assert {job["action"] for job in batch(folder, "--dry-run", "--json")[1][0]["jobs"]} == {"skip", "fail"}


def test_a_repo_that_is_not_in_the_cache_is_named(folder: Path) -> None:
    (folder / "jobs.toml").write_text('[[job]]\nsource = "Owner/Nope"\n')
    (line,) = batch(folder)[1]
    assert line["error"]["file"] == f"{folder}/Owner/Nope"
    assert (
        line["error"]["hint"]
        == "if you mean the repo Owner/Nope, run: hf download Owner/Nope (streamconv does not download)"
    )


def test_a_comparison_that_was_stopped_is_made_later(folder: Path) -> None:
    batch(folder)
    (folder / "jobs.toml").write_text(JOBS + "verify = true\n")
    jobs, state = read_jobs(folder / "jobs.toml"), folder / "jobs.toml.state.jsonl"

    class Stopping(Executor):
        def submit(self, *arguments: Any, **keywords: Any) -> Future[Any]:
            raise KeyboardInterrupt

    assert {result.status for result in run_batch(jobs, State(state), executor=Stopping())} == {"cancelled"}
    assert {status for status, *_ in outcome(batch(folder)[1]).values()} == {"done"}


def test_without_stderr_the_lines_on_stdout_are_json_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with redirect_stdout(io.StringIO()) as out:
        assert main(["batch", str(folder / "jobs.toml"), "--dry-run"]) == 0
        out.truncate(0)
        assert main(["batch", str(folder / "jobs.toml"), "--json"]) == 0
    assert [json.loads(line.strip("\0"))["status"] for line in out.getvalue().splitlines()] == ["done", "done"]


def test_each_job_has_a_bound_of_its_own(folder: Path) -> None:
    (folder / "jobs.toml").write_text(JOBS.replace("models/*", "models/one") + 'max_memory = "20MiB"\n')
    with (folder / "jobs.toml").open("a") as file:
        file.write('[[job]]\nsource = "models/two"\nmax_memory = "80MiB"\n')
    code, lines, _ = batch(folder)
    assert (code, outcome(lines)) == (EXIT_SOME_FAILED, {"one": ("failed", 4, 1), "two": ("done", 0, 1)})
    assert next(line["report"]["peak_rss_nbytes"] for line in lines if "report" in line) < 80 << 20


def test_a_wrong_file_runs_nothing(folder: Path) -> None:
    (folder / "jobs.toml").write_text(JOBS + '[[job]]\nsource = "nowhere*"\n')
    code, lines, error = batch(folder)
    assert (code, lines) == (2, [])
    hint = "a glob matches folders and .safetensors files"
    assert error == f"streamconv: {folder}/jobs.toml: job 2: nothing matches nowhere* ({hint})\n"
    assert not (folder / "out").exists()


def test_a_dry_run_tells_sizes_and_writes_nothing(folder: Path) -> None:
    (folder / "models" / "bad").mkdir()
    before = sorted(folder.rglob("*"))
    code, (told,), _ = batch(folder, "--dry-run", "--json")
    assert code == EXIT_SOME_FAILED
    assert sorted(folder.rglob("*")) == before
    assert [(job["name"], job["action"]) for job in told["jobs"]] == [("bad", "fail"), ("one", "run"), ("two", "run")]
    assert told["jobs"][0]["error"].startswith(f"{folder}/models/bad: the directory is empty (")
    batch(folder)
    sizes = {path.name: path.stat().st_size for path in (folder / "out").iterdir()}
    assert [job["nbytes"] for job in told["jobs"]] == [0, sizes["one-q8_0.gguf"], sizes["two-q8_0.gguf"]]
    assert told["nbytes"] == sum(sizes.values())
    assert [job["action"] for job in batch(folder, "--dry-run", "--json")[1][0]["jobs"]] == ["fail", "skip", "skip"]
    (folder / "models" / "one" / "README.md").write_text("---\nlicense: mit\n---\n")
    told = batch(folder, "--dry-run", "--json")[1][0]["jobs"][1]
    assert (told["action"], told["nbytes"]) == ("fail", 0)
    assert told["error"].startswith(f"{folder}/out/one-q8_0.gguf exists already")
    (folder / "jobs.toml").write_text(JOBS + "force = true\n")
    assert [job["action"] for job in batch(folder, "--dry-run", "--json")[1][0]["jobs"]] == ["fail", "run", "skip"]


def test_lora_and_verify_jobs(folder: Path) -> None:
    tiny.peft_adapter(folder / "adapter", folder / "models" / "one")
    (folder / "jobs.toml").write_text(
        '[[job]]\nsource = "models/one"\noutput = "a.gguf"\n'
        '[[job]]\ncommand = "verify"\nsource = "models/one"\noutput = "a.gguf"\n'
        '[[job]]\ncommand = "verify"\nname = "wrong"\nsource = "models/two"\noutput = "a.gguf"\n'
        '[[job]]\ncommand = "lora"\nsource = "adapter"\nbase = "models/one"\noutput = "b.gguf"\n'
    )
    code, lines, _ = batch(folder, "--jobs", "1")
    assert code == EXIT_SOME_FAILED
    found = [(line["job"]["command"], line["name"], line["status"], line["exit_code"]) for line in lines]
    assert sorted(found) == [
        ("convert", "one", "done", 0),
        ("lora", "adapter", "done", 0),
        ("verify", "one", "done", 0),
        ("verify", "wrong", "failed", 6),
    ]


def test_an_adapter_is_merged(folder: Path) -> None:
    adapter = tiny.peft_adapter(folder / "adapter", folder / "models" / "one")
    entry = '[[job]]\nsource = "models/one"\noutput = "merged.gguf"\nadapter = "adapter=0.5"\n'
    (folder / "jobs.toml").write_text(entry + entry.replace("[[job]]", '[[job]]\ncommand = "verify"'))
    code, lines, _ = batch(folder, "--jobs", "1")
    assert (code, [line["status"] for line in lines]) == (0, ["done", "done"])
    streamconv.convert(folder / "models" / "one", folder / "expected.gguf", adapters=[(adapter, 0.5)])
    assert (folder / "merged.gguf").read_bytes() == (folder / "expected.gguf").read_bytes()
    (adapter / "adapter_config.json").touch()
    assert [line["status"] for line in batch(folder, "--jobs", "1")[1]] == ["failed", "done"]


def test_a_split_is_a_job_for_each_part(folder: Path) -> None:
    (folder / "jobs.toml").write_text('[[job]]\nsource = "models/one"\noutput = "s.gguf"\nsplit_max_size = "60K"\n')
    code, lines, _ = batch(folder, "--jobs", "2")
    whole = streamconv.convert(folder / "models" / "one", folder / "w.gguf", split=SplitOptions(60_000))
    names = [f"one part {k}" for k in range(1, len(whole.outputs) + 1)]
    assert len(names) > 2
    assert (code, sorted(outcome(lines))) == (0, names)
    for output in whole.outputs:
        assert (folder / output.path.name.replace("w-", "s-")).read_bytes() == output.path.read_bytes()
    assert {status for status, *_ in outcome(batch(folder)[1]).values()} == {"skipped"}


def test_an_array_shares_the_sorted_jobs(tmp_path: Path) -> None:
    jobs = [JobSpec(str(n), "convert", f"s{n}", f"o{n}") for n in range(7)]
    shares = [select_array(jobs, f"{i}/3") for i in (1, 2, 3)]
    assert [[job.name for job in share] for share in shares] == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    assert select_array(jobs, "9/9") == []
    for wrong in ("0/3", "4/3", "1", "a/b", "-1/3", "1/3/5", "²/3"):
        with raises(UsageError, code="array-range"):
            select_array(jobs, wrong)


def test_a_job_that_is_killed_is_tried_again_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in hold(folder, "kill").items():
        monkeypatch.setenv(name, value)
    code, lines, _ = batch(folder, "--jobs", "1")
    assert (folder / "held").exists()
    assert (code, outcome(lines)) == (0, {"one": ("done", 0, 2), "two": ("done", 0, 1)})
    assert [line["report"]["resumed"] for line in lines] == [True, False]
    assert_whole(folder, "one", "two")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_batch_that_is_stopped_leaves_what_can_be_resumed(folder: Path, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "streamconv", "batch", "jobs.toml", "--json"],
        cwd=folder,
        env=os.environ | hold(folder, "wait"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    job, parent = held_processes(folder)
    assert parent.pid == process.pid
    process.send_signal(number)
    out, error = process.communicate()
    assert process.returncode == code
    assert not job.is_running()
    lines = [json.loads(line) for line in out.splitlines()]
    assert outcome(lines) == {"one": ("cancelled", code, 1), "two": ("cancelled", code, 0)}
    assert error.splitlines()[-2:] == ["2 cancelled", "run the same command again to continue; --restart starts over"]
    (held,) = (line for line in error.splitlines() if line.startswith(f"cancelled  {code}  one"))
    part = Path("out", "one-q8_0.gguf.part")  # below the current folder
    assert f"{part} (130,464 bytes): 130,464 bytes of 130,464 bytes are kept" in held
    assert {path.name for path in (folder / "out").iterdir()} == {
        "one-q8_0.gguf.part",
        "one-q8_0.gguf.part.journal",
    }
    _, lines, _ = batch(folder, "--resume")
    assert {line["name"]: line["report"]["resumed"] for line in lines} == {"one": True, "two": False}
    assert_whole(folder, "one", "two")


@pytest.mark.parametrize("options", [[], ["--resume"], ["--restart"]], ids=" ".join)
def test_a_batch_goes_on_unless_it_is_to_restart(folder: Path, options: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "streamconv", "batch", "jobs.toml"], cwd=folder, env=os.environ | hold(folder, "wait")
    )
    job, _ = held_processes(folder)
    process.kill()  # which nothing can announce: its job notices by itself
    process.wait()
    await_end(job)
    assert (folder / "out" / "one-q8_0.gguf.part.journal").exists()
    code, lines, _ = batch(folder, *options)
    goes_on = options != ["--restart"]
    assert (code, outcome(lines)) == (0, {"one": ("done", 0, 1 + goes_on), "two": ("done", 0, 1)})
    assert {line["name"]: line["report"]["resumed"] for line in lines} == {"one": goes_on, "two": False}
    assert_whole(folder, "one", "two")


def test_a_try_waits_until_the_one_before_is_gone(folder: Path) -> None:
    (job,) = read_jobs(folder / "jobs.toml")[:1]
    process = subprocess.Popen(
        [sys.executable, "-m", "streamconv", "batch", "jobs.toml"], cwd=folder, env=os.environ | hold(folder, "wait")
    )
    held, _ = held_processes(folder)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run_job, job)  # as another worker would, before the lost one's job is gone
        process.kill()
        await_end(held)
        found = result.result()
    process.wait()
    assert (found.status, found.attempts) == ("done", 2)
    assert found.report is not None
    assert found.report["resumed"]


def test_what_another_program_writes_is_left_alone(folder: Path) -> None:
    (folder / "out").mkdir()
    with (folder / "out" / "one-q8_0.gguf.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, lines, _ = batch(folder)
    assert (code, outcome(lines)) == (EXIT_SOME_FAILED, {"one": ("failed", 5, 1), "two": ("done", 0, 1)})


class Losing(Executor):
    """Loses the worker of the first tasks, as a cluster may."""

    def __init__(self, n_lost: int) -> None:
        self.n_lost = n_lost

    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.n_lost > 0:
            self.n_lost -= 1
            future.set_exception(ConnectionError("worker gone"))
        else:
            future.set_result(function(*arguments, **keywords))
        return future


def run_with(folder: Path, executor: Executor) -> list[JobResult]:
    return run_batch(read_jobs(folder / "jobs.toml")[:1], State(folder / "state"), executor=executor)


def test_a_lost_worker_is_replaced(folder: Path) -> None:
    (result,) = run_with(folder, Losing(2))
    assert (result.status, result.attempts) == ("done", 3)


def test_a_job_that_loses_every_worker_fails(folder: Path) -> None:
    (result,) = run_with(folder, Losing(3))
    assert (result.status, result.exit_code, result.attempts) == ("failed", 1, 3)
    assert result.error is not None
    assert result.error["message"] == "its worker was lost 3 times: ConnectionError: worker gone"


def test_nothing_runs_on_when_the_listener_fails(folder: Path) -> None:
    def listener(result: JobResult) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_batch(read_jobs(folder / "jobs.toml"), State(folder / "state"), n_parallel=2, finished=listener)
    assert not [child for child in psutil.Process().children() if "batch-job" in child.cmdline()]
