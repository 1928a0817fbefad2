"""The fuzzing loop: a mutant, one call, the oracle; and cases as folders of files.

The oracle: a call returns or raises a StreamconvError of one printable line, within MAX_SECONDS of CPU time, without
taking more than MAX_GROWTH_NBYTES of memory at once. Anything else is a finding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from streamconv.budget import resident_nbytes
from streamconv.errors import StreamconvError
from streamconv.report import error_to_json
from tests.attacks.gguf_files import FATAL, LISTED
from tests.fuzz.mutate import Blob, mutate
from tests.fuzz.targets import TARGETS, Call

CORPUS = Path(__file__).parent / "corpus"
MAX_SECONDS = 2.0
MAX_GROWTH_NBYTES = 96 << 20

Files = dict[str, Blob]


@dataclass
class Finding:
    """What a case did that no case may do."""

    files: Files
    what: str

    @property
    def name(self) -> str:
        return hashlib.sha256(self.what.encode()).hexdigest()[:12]


@dataclass
class Tally:
    """Of one target's executions."""

    n_values: int = 0
    n_errors: int = 0
    slowest: float = 0.0
    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def n_executions(self) -> int:
        return self.n_values + self.n_errors


def read_corpus(target: str) -> dict[str, Files]:
    """The cases of a target, by name."""
    folder = CORPUS / TARGETS[target][0]
    cases = {
        case.name: {str(path.relative_to(case)): Blob.of(path.read_bytes()) for path in sorted(case.rglob("*.*"))}
        for case in sorted(folder.iterdir())
    }
    if folder.name == "gguf":
        cases |= {name: {"x.gguf": Blob.of(content)} for name, (content, _) in (FATAL | LISTED).items()}
    return cases


def lay_out(directory: Path, files: Files) -> None:
    """The case's files, and nothing else, in `directory`."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, blob in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.write(blob.head)
            file.truncate(blob.nbytes)


def judge(call: Call, directory: Path) -> tuple[bool, float, str | None]:
    """(a StreamconvError?, seconds of processor time, what is wrong with how the call ended)."""
    before = _forget_peak()
    started = time.process_time()
    refused, wrong = False, None
    try:
        call(directory)
    except StreamconvError as error:
        refused = True
        if not str(error).isprintable() or error.exit_code == 1 or len(error.message) > 5_000:
            wrong = f"no error for people: {type(error).__name__}: {str(error)[:300]!r}"
        elif isinstance(error.__cause__, MemoryError):
            wrong = "asked for more memory than there is"
        else:
            json.dumps(error_to_json(error), allow_nan=False)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        wrong = f"{type(error).__name__} in {Path(last.filename).name}:{last.name}:{last.lineno}"
    seconds = time.process_time() - started
    growth = resident_nbytes()[1] - before
    if seconds > MAX_SECONDS:
        wrong = wrong or "took longer than any file may take"
    if growth > MAX_GROWTH_NBYTES:
        wrong = wrong or "took more memory than any file may take"
    return refused, seconds, wrong


def _forget_peak() -> int:
    """The peak of memory in bytes. Where the kernel takes it back (Linux) it becomes what is resident now, so that a
    case which takes much does not hide those after it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    return resident_nbytes()[1]


def fuzz(
    target: str, rng: random.Random, scratch: Path, *, seconds: float | None = None, executions: int | None = None
) -> Tally:
    """Executions of a target until the time or the number is reached, whichever is given; one finding of each kind."""
    corpus = list(read_corpus(target).values())
    call = TARGETS[target][1]
    tally = Tally()
    until = None if seconds is None else time.monotonic() + seconds
    for _ in _rounds(executions):
        if until is not None and time.monotonic() >= until:
            break
        files = mutate(rng.choice(corpus), rng, corpus)
        lay_out(scratch / "case", files)
        refused, took, wrong = judge(call, scratch / "case")
        tally.n_errors += refused
        tally.n_values += not refused
        tally.slowest = max(tally.slowest, took)
        if wrong is not None:
            finding = Finding(files, f"{target}: {wrong}")
            tally.findings.setdefault(finding.name, finding)
    return tally


def _rounds(executions: int | None) -> Iterable[int]:
    return range(executions) if executions is not None else iter(int, 1)
