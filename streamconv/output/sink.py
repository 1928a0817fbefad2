"""The output file: a sibling part file that becomes the destination once every declared byte is in it and on the disk.

Owns: the order of steps that makes this hold at any moment, resuming, what stays behind after a failure. Does not own:
the bytes (engine/), system calls (directio.py), names and locks (destination.py), the journal's lines (journal.py).

Invariant: whatever stops a run, the destination is the old file or the complete new one (of a set: the old one, the
complete new one, or one without its first part, which nothing loads), and a journal never claims more than the disk
holds. The order is all there is to it:

    lock the part file > reserve its space > journal header          a power cut here: nothing to resume
    > chunks > sync them > journal record > ...                      a record follows the bytes that it speaks of
    > sync the file > "finished" record > rename > sync the directory > remove the journal

A part file is given up in the reverse order: its journal first, and the directory synced, so that no journal can ever
speak of another file's bytes.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from streamconv.errors import Caution, DestinationError, Interrupted, SourceError, SourceReadError, StreamconvError
from streamconv.output import journal as journals
from streamconv.output.destination import PartFile, Place, failures, lock_part, reserve_space
from streamconv.output.directio import ChunkFile, sync_directory
from streamconv.output.journal import Contents, Header, Journal, Record, Stamp

MIN_RECORD_STEP_NBYTES = 64 << 20  # the journal's disk space is reserved for records no closer than this


class Sink:
    """One output being written. A context manager: left before `publish`, it leaves the destination as it was.

    After KeyboardInterrupt and Interrupted, and after a failing disk on either side once there was a write, the part
    file and its journal stay, for `resume`; else they go. Leaving waits for the writes that other threads have begun.
    """

    def __init__(
        self,
        place: Place,
        nbytes: int,
        part: PartFile,
        journal: Journal,
        begun_with: Record,
        *,
        replaces: bool,
        is_published: bool,
        notes: tuple[Caution, ...],
    ) -> None:
        self.notes = notes
        self._place = place
        self._nbytes = nbytes
        self._part = part
        self._file = ChunkFile(part.fd, part.path)
        self._journal = journal
        self._begun_with = begun_with
        self._state = begun_with.state
        self._replaces = replaces
        self._is_published = is_published
        self._covered = Coverage(begun_with.prefix_nbytes)
        self._has_work = begun_with.prefix_nbytes > 0
        self._idle = Condition()
        self._n_writing = 0
        self._is_closed = False

    @classmethod
    def create(
        cls, place: Place, nbytes: int, *, identity: Mapping[str, str], force: bool = False, resume: bool = False
    ) -> Self:
        """A sink for the `nbytes` at `place`: its space is reserved, its journal begun or taken up.

        identity: every input and option that changes bytes, by name; a resumed run must have the same. force: an
        existing file may be replaced. resume: go on with what an earlier run left; without it, that is discarded with
        a note.
        Raises DestinationError where `place` cannot or must not be written, SourceError where `identity` is not that
        of the run to resume; then all is as it was before.
        """
        if nbytes <= 0:
            raise ValueError("an output has at least one byte")
        header = Header(nbytes, dict(identity))
        with failures(place.path), ExitStack() as undo:
            refuse_taken(place, force=force, resume=resume)
            part = _lock(place, undo)
            past = _find_past(place, header, part) if resume else None
            is_published = past is not None and _is_published(past, place)
            if not force and not is_published:
                place.refuse_existing()
            notes: tuple[Caution, ...] = ()
            if past is None:
                part, notes = _start_anew(place, part, undo)
            if past is None or past.record.finished is None:  # a finished file has its space, and its stamp to keep
                reserve_space(part.fd, nbytes, place.path)
            notes += _without_locks(part)
            journal = _open_journal(place, header, past, undo)
            record = Record() if past is None else past.record
            sink = cls(place, nbytes, part, journal, record, replaces=force, is_published=is_published, notes=notes)
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
        with failures(self._place.path):
            self._file.sync_data()
            self._journal.append(Record(prefix_nbytes, state))
        self._state = dict(state)

    def complete(self, state: Mapping[str, Any] | None = None) -> None:
        """The whole file is on the disk, still under its other name. state: by default that of the last record.

        Raises DestinationError; StreamconvError where a byte was never written.
        """
        if self._is_published:
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
                    "was changed by something else while it was written", file=self._place.part, code="output-changed"
                )
            self._journal.append(Record(self._nbytes, self._state if state is None else state, stamp))

    def publish(self) -> None:
        """The completed file takes the destination's name. Raises DestinationError.

        The journal stays until the context is left in peace: of several outputs published together, those that had
        their turn before an interrupt are known again when the rest is resumed.
        """
        if self._is_published:
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
            closing.callback(self._part.close)  # and with it the lock, last
            closing.callback(self._file.close)
            keeps = self._keeps(error)
            with suppress(OSError):  # what stays is discarded by the next run
                if keeps:
                    self._journal.close()
                else:
                    self._journal.remove()
                if self._is_published or not keeps:
                    self._part.remove()

    def _keeps(self, error: BaseException | None) -> bool:
        """Whether `error` lets the run go on later: its input and its program were right, and it had begun."""
        if isinstance(error, DestinationError | SourceReadError):  # perhaps of another output, before any work
            return self._has_work
        return isinstance(error, Interrupted | KeyboardInterrupt)


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


def refuse_taken(place: Place, *, force: bool, resume: bool) -> None:
    """DestinationError where there is a file that must stay; with a journal, `resume` may find that it is its own."""
    if not force and not (resume and os.path.lexists(place.journal)):
        place.refuse_existing()


def _without_locks(part: PartFile) -> tuple[Caution, ...]:
    if part.is_locked:
        return ()
    return (Caution("no-lock", f"{part.path.parent} has no file locks: run one conversion at a time"),)


def _lock(place: Place, undo: ExitStack) -> PartFile:
    part = lock_part(place.part)
    undo.callback(part.close)
    if part.is_new:
        undo.callback(part.remove)
    return part


def _find_past(place: Place, header: Header, part: PartFile) -> Contents | None:
    """What an earlier run left that this one can go on with. SourceError where that one was another conversion."""
    past = journals.read(place.journal)
    if past is None:
        return None
    difference = past.header.differences(header)
    if not difference and _is_published(past, place):
        return past
    if part.is_new:
        return None
    if difference:
        raise SourceError(
            f"the run to resume was another one: {difference}",
            file=part.path,
            hint="use what that one used, or leave out --resume to start anew",
            code="resume-mismatch",
        )
    status, finished = part.status(), past.record.finished
    is_its_own = status.st_size == header.nbytes and finished in (None, Stamp.of(status))
    return past if is_its_own else None


def _is_published(past: Contents, place: Place) -> bool:
    """Whether that run got as far as the rename, and only its journal was left."""
    with suppress(FileNotFoundError):
        return past.record.finished == Stamp.of(place.path.stat())
    return False


def _start_anew(place: Place, part: PartFile, undo: ExitStack) -> tuple[PartFile, tuple[Caution, ...]]:
    """An empty part file without a journal, and a note where an earlier run had left one."""
    notes: tuple[Caution, ...] = ()
    while True:
        if os.path.lexists(place.journal):
            place.journal.unlink()
            sync_directory(place.path.parent)  # or else, after a power cut, it could speak of the next part file
        if part.is_new:
            return part, notes
        notes = (Caution("stale-part", f"discarded {part.path}, left by a run that did not finish"),)
        part.remove()
        part.close()
        part = _lock(place, undo)


def _open_journal(place: Place, header: Header, past: Contents | None, undo: ExitStack) -> Journal:
    if past is not None:
        journal = Journal.reopen(place.journal, past)
        undo.callback(journal.close)
        return journal
    journal = Journal.create(place.journal, header, header.nbytes // MIN_RECORD_STEP_NBYTES + 2)
    undo.callback(journal.remove)
    sync_directory(place.path.parent)
    return journal
