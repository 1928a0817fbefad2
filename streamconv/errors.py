"""The errors that users see, each with its exit code, and the warnings that do not stop a run.

A message is one line that names the file and the tensor, if there is one, followed by a hint on what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

# An untrusted file may have names of megabytes.
MAX_MESSAGE_CHARS = 4000
MAX_NAME_CHARS = 400


def printable(text: str) -> str:
    """`text` on one line, with control characters escaped, so that untrusted text cannot affect a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _shortened(text: str, n_chars: int) -> str:
    return text if len(text) <= n_chars else f"{text[:n_chars]}..."


@dataclass(frozen=True, slots=True)
class RunWarning:
    """A warning of a run; the result is complete."""

    code: str
    message: str
    tensor: str | None = None


Caution = RunWarning  # the name up to 0.1, kept importable


class StreamconvError(Exception):
    """Base class of all errors that streamconv reports. The subclass defines `kind` and `exit_code`.

    Args:
        message: One line, which may change between versions.
        code: The cause in kebab-case, stable in all versions; docs/errors.md lists all codes.
        file: The file that the error is about.
        tensor: The tensor in it.
        hint: What to do about it.
        problems: All problems that the message summarises, as `--json` prints them; each has a `code` and a
            `message`.
    """

    kind: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        code: str,
        file: object = None,
        tensor: str | None = None,
        hint: str | None = None,
        problems: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(message)
        self.message = _shortened(message, MAX_MESSAGE_CHARS)
        self.file = None if file is None else str(file)
        self.tensor = None if tensor is None else _shortened(tensor, MAX_NAME_CHARS)
        self.hint = hint
        self.problems = problems
        self.code = code

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.tensor) if part)
        line = f"{where}: {self.message}" if where else self.message
        return printable(f"{line} ({self.hint})" if self.hint else line)


class UsageError(StreamconvError):
    """The call itself is wrong: an option, a combination of options, a name that does not exist."""

    kind = "usage"
    exit_code = 2


class SourceError(StreamconvError):
    """A problem with the files that are read: missing, malformed, unsupported, changed during the run."""

    kind = "source"
    exit_code = 3


class SourceReadError(SourceError):
    """A read failed; the source may be intact, so the partial output is kept for resuming."""


class ResumeError(SourceError):
    """An unfinished output was made with other sources, options or versions; it is kept."""


class BudgetError(StreamconvError):
    """The memory limit is too small (the hint has a sufficient one), or the system refused memory or threads."""

    kind = "memory"
    exit_code = 4


def no_memory() -> BudgetError:
    """The error when the system refuses memory within the limit."""
    return BudgetError(
        "the system gives this process no more memory or threads",
        hint="raise its limits (ulimit -v, ulimit -u, the container's), or try --threads 1",
        code="memory-refused",
    )


class DestinationError(StreamconvError):
    """A problem with the file to be written: it exists, is locked, or the disk is full or fails."""

    kind = "destination"
    exit_code = 5


class VerifyError(StreamconvError):
    """A file differs from the result of converting its source."""

    kind = "verify"
    exit_code = 6


class Interrupted(StreamconvError):
    """The run was asked to stop: SIGINT (exit 130), or SIGTERM (exit 143, `InterruptedByTerm`), or `cancel`."""

    kind = "interrupted"
    exit_code = 130


def with_notes(error: Interrupted, noted: BaseException) -> Interrupted:
    """`error`, with the notes of the exception that stopped the run appended: they say what unfinished work it left."""
    error.message = "; ".join((error.message, *getattr(noted, "__notes__", ())))
    return error


class InterruptedByTerm(Interrupted):
    """The run was stopped by SIGTERM."""

    exit_code = 143
