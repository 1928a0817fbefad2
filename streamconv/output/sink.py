"""The output file: a sibling part file that becomes the destination once every declared byte is in it and on the disk.

Whatever stops a run, the destination is the old file or the complete new one (for a set: the old one, the complete new
one, or one without its first part, which nothing loads), and a journal never claims more than the disk holds. This
follows from the order of steps:

    lock the journal > its header, synced > part file, its space     a power cut here: nothing to resume
    > chunks > sync them > journal record > ...                      a record follows the bytes that it describes
    > sync the file > "finished" record > rename > sync the directory > remove the journal

So a part file without a journal does not belong to a run, and is never touched. For the same reason a part file is
removed before its journal, with the directory synced in between. A journal without a part file is started over before
there is a part file again, so that it can never describe another file's bytes.
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

MIN_RECORD_STEP_NBYTES = 64 << 20  # the journal's disk space is reserved for records no closer than this

_Begun: TypeAlias = tuple[OpenFile, Journal]


class Sink:
    """One output being written. A context manager: left before `publish`, it leaves the destination as it was.

    Once there was a write the part file and its journal stay, whatever ended the run, and the next one goes on with
    them; unless what was written is known to be wrong, as it is after a SourceError or a VerifyError. Leaving waits for
    the writes that other threads have begun.
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
        self.recorded_nbytes = begun_with.prefix_nbytes  # that survive whatever stops the run
        self._state = begun_with.state
        self._replaces = replaces
        self._is_published = part is None  # by an earlier run, of which only the journal was left
        self._covered = Coverage(begun_with.prefix_nbytes)
        self._has_work = begun_with.prefix_nbytes > 0
        self._idle = Condition()
        self._n_writing = 0
        self._is_closed = False

    @classmethod
    def create(
        cls, place: Place, nbytes: int, *, identity: Mapping[str, str], force: bool = False, restart: bool = False
    ) -> Self:
        """A sink for the `nbytes` at `place`: its space is reserved, its journal begun or taken up.

        What an earlier run of the same conversion left is continued.

        Args:
            place: the names of the output.
            nbytes: the output's size.
            identity: every input and option that changes bytes, by name.
            force: an existing file may be replaced.
            restart: what an earlier run left is discarded.

        Raises:
            DestinationError: `place` cannot or must not be written; then all is as it was before.
            ResumeError: another conversion left its work there; then all is as it was before.
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
                    notes += (RunWarning("stale-part", f"{place.part} was changed since its run: it was started over"),)
                part, journal = _begin(place, header, lock, left, undo)
            record = Record() if taken_up is None else taken_up.record
            if part is not None and record.finished is None:  # a finished file has its space, and its stamp to keep
                reserve_space(part.fd, nbytes, place.path)
                journal.reserve(nbytes // MIN_RECORD_STEP_NBYTES + 2)
            sink = cls(place, nbytes, part, journal, record, replaces=force, notes=notes)
            undo.pop_all()
        return sink

    @property
    def resumed_nbytes(self) -> int:
        """Bytes from the file's beginning that an earlier run has put on the disk; what is written again is refused."""
        return self._begun_with.prefix_nbytes

    @property
    def resumed_state(self) -> Mapping[str, Any]:
        """What that run gave to `record` with these bytes."""
        return self._begun_with.state

    @property
    def readable_path(self) -> Path:
        """Where the bytes can be read back: under the part file's name until they are published."""
        return self._place.path if self._is_published else self._place.part

    def write(self, offset: int, view: NDArray[np.uint8]) -> None:
        """Puts all of `view` at `offset`. From any thread, in any order, each byte of the file once.

        Fastest where `view` starts on a page of memory and `offset` is a multiple of the page. `view` is free again
        afterwards. Raises DestinationError.
        """
        if offset < 0 or offset + view.nbytes > self._nbytes:
            raise ValueError(f"{view.nbytes} bytes at {offset} lie outside of a file of {self._nbytes}")
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
        """Makes the first `prefix_nbytes`, all written, and the caller's `state` of them survive anything from here on.

        Costs a flush of the disk (some 10 ms): call it in steps of MIN_RECORD_STEP_NBYTES or more, from one thread,
        which need not be one that writes. Raises DestinationError.
        """
        if prefix_nbytes > self._covered.prefix:
            raise ValueError(f"a record of {prefix_nbytes} bytes, of which {self._covered.prefix} were written")
        assert self._file is not None
        with failures(self._place.path):
            self._file.sync_data()
            self._journal.append(Record(prefix_nbytes, state))
        self._state, self.recorded_nbytes = dict(state), prefix_nbytes

    def complete(self, state: Mapping[str, Any] | None = None) -> None:
        """The whole file is on the disk, still under its other name. state: by default that of the last record.

        Raises DestinationError; StreamconvError where a byte was never written.
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
        """The completed file takes the destination's name. Raises DestinationError.

        The journal stays until the context is left in peace: of several outputs published together, those that had
        their turn before an interrupt are known again when the rest is resumed.
        """
        if self._is_published or self._part is None:
            return
        with failures(self._place.path):
            self._part.take_name(self._place.path, replaces=self._replaces)
        self._is_published = True

    def withdraw_old(self) -> None:
        """An old file that this one replaces goes first: of a set, no part of either may pass for the other's.

        Raises DestinationError.
        """
        if self._is_published or not self._replaces:
            return
        with failures(self._place.path), suppress(FileNotFoundError):
            self._place.path.unlink()
            sync_directory(self._place.path.parent)

    def seal(self, state: Mapping[str, Any] | None = None) -> Path:
        """The destination, complete: `complete` and `publish`."""
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
            # A descriptor closed under a write could be another file's by the time it is used.
            self._idle.wait_for(lambda: self._n_writing == 0)
        with ExitStack() as closing:
            closing.callback(self._journal.close)  # and with it the lock, last
            if self._part is not None and self._file is not None:
                closing.callback(self._part.close)
                closing.callback(self._file.close)
            if not self._keeps(error):
                _forget(None if self._is_published else self._part, self._journal, self._place)

    def _keeps(self, error: BaseException | None) -> bool:
        """Whether what was done is of use after `error`: all of it is, but for bytes that are known to be wrong."""
        if isinstance(error, Interrupted | KeyboardInterrupt):
            return True
        if isinstance(error, VerifyError | SourceError) and not isinstance(error, SourceReadError | ResumeError):
            return False
        return error is not None and self._has_work  # it may be of another output, before any work on this one


class Coverage:
    """Which bytes of a file were written: disjoint ranges, few of them as long as writing goes forward."""

    def __init__(self, prefix: int) -> None:
        self._starts = [0]
        self._ends = [prefix]

    @property
    def prefix(self) -> int:
        """The first byte that is missing."""
        return self._ends[0]

    def add(self, start: int, end: int) -> None:
        """ValueError where a byte of it was there already."""
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
    """DestinationError where there is a file that must stay; one beside a journal may be that run's own, finished."""
    if not force and not os.path.lexists(place.journal):
        place.refuse_existing()


def is_begun(place: Place) -> bool:
    """Whether an earlier run left a journal there."""
    with failures(place.path):
        return journals.read(place.journal) is not None


def _lock(place: Place, undo: ExitStack) -> OpenFile:
    """The journal's file, locked; empty where it is new."""
    lock = open_locked(place.journal)
    undo.callback(lock.close)
    if lock.is_new:
        undo.callback(lock.remove)
    return lock


def refuse_foreign(place: Place) -> None:
    """DestinationError where a file has the part file's name, or the journal's, that streamconv did not write."""
    with failures(place.path):
        _refuse_foreign(place, journals.read(place.journal))


def _refuse_foreign(place: Place, past: Contents | None) -> None:
    """A run makes its journal durable before it makes its part file, and renames that before the journal goes."""
    if (past is None or _was_renamed(place, past)) and os.path.lexists(place.part):
        raise foreign(place.part)
    if past is None and os.path.lexists(place.journal) and not journals.is_torn(place.journal):
        raise foreign(place.journal)


def _without_locks(lock: OpenFile) -> tuple[RunWarning, ...]:
    if lock.is_locked:
        return ()
    return (RunWarning("no-lock", f"{lock.path.parent} has no file locks: run one conversion at a time"),)


def _find_past(header: Header, past: Contents | None, part: OpenFile | None) -> Contents | None:
    """What an earlier run left that this one can go on with. ResumeError where that one was another conversion."""
    if past is None or part is None:
        return None
    if difference := past.header.differences(header):
        raise ResumeError(
            f"belongs to another conversion: {difference}",
            file=part.path,
            hint="use the same inputs and options, or discard the unfinished work with --restart",
            code="resume-mismatch",
        )
    status, finished = part.status(), past.record.finished
    is_its_own = status.st_size == header.nbytes and finished in (None, Stamp.of(status))
    return past if is_its_own else None


def _is_published(place: Place, header: Header, past: Contents | None) -> bool:
    """Whether a run of the same conversion got as far as the rename, and only its journal was left."""
    return past is not None and not past.header.differences(header) and _was_renamed(place, past)


def _was_renamed(place: Place, past: Contents) -> bool:
    with suppress(FileNotFoundError):
        return past.record.finished == Stamp.of(place.path.stat())
    return False


def _begin(place: Place, header: Header, lock: OpenFile, old: OpenFile | None, undo: ExitStack) -> _Begun:
    """An empty part file behind a durable journal; the part file of an earlier run goes before."""
    if old is not None:
        old.remove()
        old.close()
        sync_directory(place.path.parent)  # or else, after a power cut, the new journal could speak of the old file
    with ExitStack() as failing:
        failing.callback(lock.remove)
        journal = Journal.begin(place.journal, lock.fd, header)
        sync_directory(place.path.parent)
        part = create_part(place.part)
        failing.pop_all()
    undo.callback(part.close)
    undo.callback(_forget, part, journal, place)
    sync_directory(place.path.parent)  # a record will speak of what has this name
    return part, journal


def _forget(part: OpenFile | None, journal: Journal, place: Place) -> None:
    """Remove the part file, and its journal once that is durable: a part file alone would pass for a stranger's."""
    with suppress(OSError):  # what stays is found by the next run
        if part is not None:
            part.remove()
            sync_directory(place.path.parent)
        journal.remove()
