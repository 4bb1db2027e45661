"""Rows added to a served model, shared by its replicas and kept across restarts.

An append-only file of JSON lines. Every replica applies the lines in file order, so all reach the same state;
one that is killed reads the file again when it is replaced.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobula.errors import ArtifactError

Rows = list[dict[str, Any]]


class Journal:
    """A journal file and how its rows are applied. Use it from one thread."""

    def __init__(self, path: Path, apply: Callable[[Rows], None]) -> None:
        self.path, self.apply = path, apply
        self.offset = 0
        self.damage: str | None = None
        path.parent.mkdir(parents=True, exist_ok=True)

    def catch_up(self) -> None:
        """Apply the lines that other replicas have written; one ``stat`` when there are none.

        Raises:
            ArtifactError: if the file was damaged or shortened under us; this replica must be replaced.
        """
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            size = 0
        if size < self.offset:
            self._fail(f"{self.path}: was shortened while in use")
        if size == self.offset:
            return
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            # The last line may still be in the writing, or cut off by a crash: it counts once it is complete.
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                self._apply(line)
                self.offset += len(line)

    def append(self, rows: Rows, check: Callable[[Rows], None]) -> None:
        """Check, apply and write rows, all or nothing, after everything that was written before.

        Raises:
            whatever ``check`` or the first application raises; nothing is written then.
        """
        with self.path.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            self.catch_up()
            check(rows)
            self.apply(rows)
            line = json.dumps(rows, ensure_ascii=False).encode() + b"\n"
            try:
                os.ftruncate(stream.fileno(), self.offset)  # drops a line that a crash cut off
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            except OSError as error:
                self._fail(f"{self.path}: cannot be written ({error.strerror}); rows are applied but not kept")
            self.offset += len(line)

    def _apply(self, line: bytes) -> None:
        try:
            self.apply(json.loads(line))
        except Exception as error:
            self.damage = f"{self.path}: line at byte {self.offset} cannot be applied ({error})"
            raise ArtifactError(self.damage) from error

    def _fail(self, reason: str) -> None:
        self.damage = reason
        raise ArtifactError(reason)
