"""The output file: a part file next to the destination, which it becomes once all its bytes are on the disk.

Whatever stops a run, the destination is either the old file or the complete new one (for a set: the old set, the
complete new one, or one without its first part, which no program loads), and a journal never claims more than is on the
disk. This follows from the order of steps:

    lock the journal > its header, synced > part file, its space     a power cut here: nothing to resume
    > chunks > sync them > journal record > ...                      a record follows the bytes that it describes
    > sync the file > "finished" record > rename > sync the directory > remove the journal

So a part file without a journal does not belong to a run, and is never touched. For the same reason, a part file is
removed before its journal, with the directory synced in between. A journal without a part file is rewritten before a
new part file is created, so that it never describes another file's bytes.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamconv.errors import (
    DestinationError,
    Interrupted,
    ResumeError,
    RunWarning,
    SourceError,
    SourceReadError,
    StreamconvError,
    VerifyError,
)
from streamconv.output import journal as journals
from streamconv.output.destination import (
    OpenFile,
    Place,
    create_part,
    failures,
    foreign,
    open_locked,
    open_part,
    reserve_space,
)
from streamconv.output.directio import ChunkFile, sync_directory
from streamconv.output.journal import Contents, Header, Journal, Record, Stamp

MIN_RECORD_STEP_NBYTES = 64 << 20  # disk space for the journal is reserved for one record per this many bytes

_Begun: TypeAlias = tuple[OpenFile, Journal]


class Sink:
    """One output being written. A context manager: if it is left before `publish`, the destination is as before.

    After the first write, the part file and its journal are kept whatever ends the run, so that the next run can
    continue. They are removed if the bytes are known to be wrong, as after a SourceError or a VerifyError. Leaving
    waits for writes that other threads have started.
    """

    def __init__(
        self,
        place: Place,
        nbytes: int,
        part: OpenFile | None,
        journal: Journal,
        begun_with: Record,
        *,
        replaces: bool,
        notes: tuple[RunWarning, ...],
    ) -> None:
        self.notes = notes
        self._place = place
        self._nbytes = nbytes
        self._part = part
        self._file = None if part is None else ChunkFile(part.fd, part.path)
        self._journal = journal
        self._begun_with = begun_with
        self.recorded_nbytes = begun_with.prefix_nbytes  # kept whatever stops the run
        self._state = begun_with.state
        self._replaces = replaces
        self._is_published = part is None  # by an earlier run, which left only its journal
        self._covered = Coverage(begun_with.prefix_nbytes)
        self._has_work = begun_with.prefix_nbytes > 0
        self._idle = Condition()
        self._n_writing = 0
        self._is_closed = False

    @classmethod
    def create(
        cls, place: Place, nbytes: int, *, identity: Mapping[str, str], force: bool = False, restart: bool = False
    ) -> Self:
        """A sink for an output, with its space reserved and its journal started or continued.

        The unfinished work of an earlier run of the same conversion is continued.

        Args:
            place: The names of the output.
            nbytes: The size of the output.
            identity: The value of every input and option that affects the bytes, by name.
            force: Whether an existing file may be replaced.
            restart: Whether unfinished work is discarded.

        Raises:
            DestinationError: `place` cannot or must not be written; nothing was changed.
            ResumeError: There is unfinished work of another conversion; nothing was changed.
        """
        if nbytes <= 0:
            raise ValueError("an output has at least one byte")
        header = Header(nbytes, dict(identity))
        with failures(place.path), ExitStack() as undo:
            refuse_taken(place, force=force)
            lock = _lock(place, undo)
            past = journals.read(place.journal)
            is_published = not restart and _is_published(place, header, past)
            left = None if is_published else open_part(place.part)
            if left is not None:
                undo.callback(left.close)
            if not force and not is_published:
                place.refuse_existing()
            if not is_published:
                _refuse_foreign(place, past)
            notes = _without_locks(lock)
            taken_up = past if is_published else None if restart else _find_past(header, past, left)
            if taken_up is not None:
                part, journal = None if is_published else left, Journal.reopen(place.journal, lock.fd, taken_up)
            else:
                if left is not None and not restart:
                    what = f"{place.part} was changed since its run, so it was started over"
                    notes += (RunWarning("stale-part", what),)
                part, journal = _begin(place, header, lock, left, undo)
            record = Record() if taken_up is None else taken_up.record
            if part is not None and record.finished is None:  # a finished file has its space, and must keep its stamp
                reserve_space(part.fd, nbytes, place.path)
                journal.reserve(nbytes // MIN_RECORD_STEP_NBYTES + 2)
            sink = cls(place, nbytes, part, journal, record, replaces=force, notes=notes)
            undo.pop_all()
        return sink

    @property
    def resumed_nbytes(self) -> int:
        """How many bytes from the start of the file an earlier run has written. They must not be written again."""
        return self._begun_with.prefix_nbytes

    @property
    def resumed_state(self) -> Mapping[str, Any]:
        """The state that the earlier run recorded with these bytes."""
        return self._begun_with.state

    @property
    def readable_path(self) -> Path:
        """The path from which the bytes can be read back: the part file until `publish`, then the destination."""
        return self._place.path if self._is_published else self._place.part

    def write(self, offset: int, view: NDArray[np.uint8]) -> None:
        """Write all of `view` at `offset`. Any thread may call this, in any order; each byte is written once.

        Args:
            offset: From the start of the file; a multiple of the page size is fastest.
            view: The bytes, fastest if they start on a page. The caller may reuse the memory afterwards.

        Raises:
            DestinationError: The system refuses the write.
        """
        if offset < 0 or offset + view.nbytes > self._nbytes:
            raise ValueError(f"{view.nbytes} bytes at {offset} lie outside a file of {self._nbytes}")
        with self._idle:
            if self._is_closed:
                raise ValueError("written after the sink was left")
            self._has_work = True
            self._n_writing += 1
        try:
            if self._file is None:
                raise ValueError(f"bytes {offset} to {offset + view.nbytes} were written twice")
            with failures(self._place.path):
                self._file.write(view, offset)
            with self._idle:
                self._covered.add(offset, offset + view.nbytes)
        finally:
            with self._idle:
                self._n_writing -= 1
                self._idle.notify_all()

    def record(self, prefix_nbytes: int, state: Mapping[str, Any]) -> None:
        """Record that the first `prefix_nbytes` are complete, so that a later run can continue from there.

        This flushes the disk (about 10 ms). Call it in steps of MIN_RECORD_STEP_NBYTES or more, always from the same
        thread; that thread need not write.

        Args:
            prefix_nbytes: All these bytes must have been written.
            state: The caller's data about these bytes, kept as JSON.

        Raises:
            DestinationError: The disk fails.
        """
        if prefix_nbytes > self._covered.prefix:
            raise ValueError(f"a record of {prefix_nbytes} bytes, of which {self._covered.prefix} were written")
        assert self._file is not None
        with failures(self._place.path):
            self._file.sync_data()
            self._journal.append(Record(prefix_nbytes, state))
        self._state, self.recorded_nbytes = dict(state), prefix_nbytes

    def complete(self, state: Mapping[str, Any] | None = None) -> None:
        """Put the whole file on the disk, still under the part file's name.

        Args:
            state: As in `record`; by default that of the last record.

        Raises:
            DestinationError: The disk fails, or another program changed the file.
            StreamconvError: Some bytes were never written, which is a bug.
        """
        if self._is_published or self._part is None or self._file is None:
            return
        if self._covered.prefix != self._nbytes:
            raise StreamconvError(
                f"{self._covered.prefix} of {self._nbytes} bytes were written",
                file=self._place.path,
                code="internal-error",
            )
        with failures(self._place.path):
            self._file.sync()
            stamp = Stamp.of(self._part.status())
            if stamp.nbytes != self._nbytes:
                raise DestinationError(
                    "was changed by another program while it was written", file=self._place.part, code="output-changed"
                )
            self._journal.append(Record(self._nbytes, self._state if state is None else state, stamp))
        self.recorded_nbytes = self._nbytes

    def publish(self) -> None:
        """Rename the complete file to the destination.

        The journal stays until the context is left without an error. If an interrupt stops a run between several
        outputs, a resumed run recognises those that were published already by their journals.

        Raises:
            DestinationError: The destination exists and must not be replaced, or the system refuses.
        """
        if self._is_published or self._part is None:
            return
        with failures(self._place.path):
            self._part.take_name(self._place.path, replaces=self._replaces)
        self._is_published = True

    def withdraw_old(self) -> None:
        """Remove the old file that this one replaces, so that parts of an old and a new set are never mixed.

        Raises:
            DestinationError: The system refuses.
        """
        if self._is_published or not self._replaces:
            return
        with failures(self._place.path), suppress(FileNotFoundError):
            self._place.path.unlink()
            sync_directory(self._place.path.parent)

    def seal(self, state: Mapping[str, Any] | None = None) -> Path:
        """`complete` and `publish`; returns the destination's path."""
        self.complete(state)
        self.publish()
        return self._place.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._idle:
            self._is_closed = True
            # If a descriptor were closed during a write, its number could already belong to another file.
            self._idle.wait_for(lambda: self._n_writing == 0)
        with ExitStack() as closing:
            closing.callback(self._journal.close)  # and with it the lock, last
            if self._part is not None and self._file is not None:
                closing.callback(self._part.close)
                closing.callback(self._file.close)
            if not self._keeps(error):
                _forget(None if self._is_published else self._part, self._journal, self._place)

    def _keeps(self, error: BaseException | None) -> bool:
        """Whether to keep the unfinished work after `error`: yes, unless the bytes are known to be wrong."""
        if isinstance(error, Interrupted | KeyboardInterrupt):
            return True
        if isinstance(error, VerifyError | SourceError) and not isinstance(error, SourceReadError | ResumeError):
            return False
        return error is not None and self._has_work  # the error may concern another output, before any work on this one


class Coverage:
    """Which bytes of a file were written, as disjoint ranges; there are few while writing proceeds forward."""

    def __init__(self, prefix: int) -> None:
        self._starts = [0]
        self._ends = [prefix]

    @property
    def prefix(self) -> int:
        """The offset of the first missing byte."""
        return self._ends[0]

    def add(self, start: int, end: int) -> None:
        """Add a range.

        Raises:
            ValueError: Some of it was added before.
        """
        index = bisect_right(self._starts, start)
        if self._ends[index - 1] > start or (index < len(self._starts) and self._starts[index] < end):
            raise ValueError(f"bytes {start} to {end} were written twice")
        self._starts.insert(index, start)
        self._ends.insert(index, end)
        for left in (index, index - 1):
            if left + 1 < len(self._starts) and self._ends[left] == self._starts[left + 1]:
                self._ends[left] = self._ends.pop(left + 1)
                self._starts.pop(left + 1)


def refuse_taken(place: Place, *, force: bool) -> None:
    """Refuse an existing destination, unless there is a journal: then the file may be that run's own, finished.

    Raises:
        DestinationError: The destination exists and must not be replaced.
    """
    if not force and not os.path.lexists(place.journal):
        place.refuse_existing()


def is_begun(place: Place) -> bool:
    """Whether an earlier run left a journal for this output."""
    with failures(place.path):
        return journals.read(place.journal) is not None


def _lock(place: Place, undo: ExitStack) -> OpenFile:
    """The journal's file, created if necessary and locked."""
    lock = open_locked(place.journal)
    undo.callback(lock.close)
    if lock.is_new:
        undo.callback(lock.remove)
    return lock


def refuse_foreign(place: Place) -> None:
    """Refuse files with the name of the part file or the journal that streamconv did not write.

    Raises:
        DestinationError: There is such a file.
    """
    with failures(place.path):
        _refuse_foreign(place, journals.read(place.journal))


def _refuse_foreign(place: Place, past: Contents | None) -> None:
    """As `refuse_foreign`: a run writes its journal before its part file, and removes it after the rename."""
    if (past is None or _was_renamed(place, past)) and os.path.lexists(place.part):
        raise foreign(place.part)
    if past is None and os.path.lexists(place.journal) and not journals.is_torn(place.journal):
        raise foreign(place.journal)


def _without_locks(lock: OpenFile) -> tuple[RunWarning, ...]:
    if lock.is_locked:
        return ()
    return (RunWarning("no-lock", f"{lock.path.parent} has no file locks: run one conversion at a time"),)


def _find_past(header: Header, past: Contents | None, part: OpenFile | None) -> Contents | None:
    """The journal of an earlier run that this run can continue; ResumeError if that was another conversion."""
    if past is None or part is None:
        return None
    if difference := past.header.differences(header):
        raise ResumeError(
            f"belongs to another conversion: {difference}",
            file=part.path,
            hint="use the same inputs and options, or discard the unfinished work: --restart",
            code="resume-mismatch",
        )
    status, finished = part.status(), past.record.finished
    is_its_own = status.st_size == header.nbytes and finished in (None, Stamp.of(status))
    return past if is_its_own else None


def _is_published(place: Place, header: Header, past: Contents | None) -> bool:
    """Whether a run of the same conversion has already renamed its file, and left only its journal."""
    return past is not None and not past.header.differences(header) and _was_renamed(place, past)


def _was_renamed(place: Place, past: Contents) -> bool:
    with suppress(FileNotFoundError):
        return past.record.finished == Stamp.of(place.path.stat())
    return False


def _begin(place: Place, header: Header, lock: OpenFile, old: OpenFile | None, undo: ExitStack) -> _Begun:
    """A new journal, on the disk, then an empty part file; the part file of an earlier run is removed first."""
    if old is not None:
        old.remove()
        old.close()
        sync_directory(place.path.parent)  # else, after a power cut, the new journal could describe the old file
    with ExitStack() as failing:
        failing.callback(lock.remove)
        journal = Journal.begin(place.journal, lock.fd, header)
        sync_directory(place.path.parent)
        part = create_part(place.part)
        failing.pop_all()
    undo.callback(part.close)
    undo.callback(_forget, part, journal, place)
    sync_directory(place.path.parent)  # records will describe the file of this name
    return part, journal


def _forget(part: OpenFile | None, journal: Journal, place: Place) -> None:
    """Remove the part file, and its journal once that is on the disk: alone, a part file would count as foreign."""
    with suppress(OSError):  # the next run finds what is left
        if part is not None:
            part.remove()
            sync_directory(place.path.parent)
        journal.remove()
