"""Changes to what a served model searches, shared by its replicas and kept across restarts.

An append-only file of JSON lines, one record a line. Every replica takes the records in file order, so all reach the
same states; one that is killed reads the file again when it is replaced. A file lock lets one replica write at a time;
readers take none.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from mobula.cancellation import raise_if_cancelled
from mobula.errors import ArtifactError
from mobula.serving.errors import RequestRefused

T = TypeVar("T")
KINDS = ("add", "remove")
# Ends a line that a killed writer left without its end. JSON escapes this character, so no record ends like that; and
# cutting the file instead would pull the line away under a replica that is reading it.
VOID = b"\x18\n"


@dataclass(frozen=True)
class Record:
    """One change: documents added (``items`` are their fields) or removed (``items`` are their ids).

    ``time`` is the writer's clock, ISO 8601.
    """

    kind: str
    items: list[Any]
    time: str | None

    def line(self) -> bytes:
        """As it stands in the file."""
        return json.dumps(asdict(self), ensure_ascii=False).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Record:
        """The record of a line.

        Raises:
            ValueError: if it is none.
        """
        record = json.loads(line)
        if isinstance(record, list):  # as lines were before documents could be removed
            return cls("add", record, None)
        if not isinstance(record, dict) or record.get("kind") not in KINDS:
            raise ValueError(f"not a record of kind {' or '.join(KINDS)}")
        return cls(record["kind"], record["items"], record["time"])


class Journal(Generic[T]):
    """A journal file, and the state that its records lead to: ``state``, replaced as a whole.

    ``step(state, record)`` makes the next state and leaves the given one as it is, or raises; ``finish(state)`` is
    called before a state is shown. Any thread may use it.
    """

    def __init__(
        self, path: Path, state: T, step: Callable[[T, Record], T], finish: Callable[[T], None] = lambda state: None
    ) -> None:
        self.path, self.state, self.step, self.finish = path, state, step, finish
        self.damage: str | None = None
        self._offset = self._seen = 0
        self._reading = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def behind(self) -> bool:
        """Whether the file has changed since it was read; one ``stat``."""
        return self.damage is None and self._size() != self._seen

    def catch_up(self) -> None:
        """Take the records that other replicas have written.

        Raises:
            ArtifactError: if the file was damaged or shortened under us; this replica must be replaced.
        """
        with self._reading:
            self._catch_up()

    def append(self, record: Record) -> T:
        """Write a record after all others; the state it leads to, all or nothing.

        Raises:
            whatever ``step`` raises, and Cancelled if the caller has left: nothing is written then.
            RequestRefused: 507 if the file cannot be written; nothing has changed.
            ArtifactError: if it cannot be known whether the record was kept; this replica must be replaced.
        """
        try:
            stream = FileIO(self.path, "ab")
        except OSError as error:
            raise _not_kept(error) from error
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            # Taken after the file's lock: while that is another replica's, this one can still catch up.
            with self._reading:
                raise_if_cancelled()
                self._catch_up()
                state = self.step(self.state, record)
                self.finish(state)
                raise_if_cancelled()
                self._write(stream, record.line())
                self.state, self._seen = state, self._offset
                return state

    def _catch_up(self) -> None:
        if self.damage is not None:
            raise ArtifactError(self.damage)
        self._seen = self._size()
        if self._seen < self._offset:
            self._fail(f"{self.path}: was shortened while in use")
        if self._seen == self._offset:
            return
        state, offset = self.state, self._offset
        with self.path.open("rb") as stream:
            stream.seek(offset)
            # The last line may still be in the writing, or cut off by a crash: it counts once it is complete.
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                state = self._next(state, line, offset)
                offset += len(line)
        if state is not self.state:
            self.finish(state)
        self.state, self._offset = state, offset

    def _next(self, state: T, line: bytes, offset: int) -> T:
        if line.endswith(VOID):
            return state
        try:
            return self.step(state, Record.read(line))
        except Exception as error:
            self.damage = f"{self.path}: the line at byte {offset} cannot be applied ({error})"
            raise ArtifactError(self.damage) from error

    def _write(self, stream: FileIO, line: bytes) -> None:
        torn = self._size() - self._offset
        rest = memoryview((VOID if torn else b"") + line)
        end = self._offset + torn + len(rest)
        try:
            while rest:
                rest = rest[stream.write(rest) :]
        except OSError as error:
            # The line has no end, so nobody takes it for a record; the next writer voids it.
            raise _not_kept(error) from error
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            self._fail(f"{self.path}: cannot be written ({error.strerror}); a record may be kept or not")
        self._offset = end

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def _fail(self, reason: str) -> NoReturn:
        self.damage = reason
        raise ArtifactError(reason)


def _not_kept(error: OSError) -> RequestRefused:
    return RequestRefused(507, "not_kept", f"the change cannot be written ({error.strerror}); nothing has changed")
