"""A selector and a generator that stand together."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mobula.artifacts import sha256, write_json
from mobula.config import digest
from mobula.errors import MobulaError

STATE = "state.json"
KINDS = ("selector", "generator")


class SnapshotMismatch(MobulaError):
    """Samples or scores of other networks than those that stand."""


@dataclass(frozen=True)
class Pair:
    """The files of both networks' weights."""

    selector: Path
    generator: Path

    @cached_property
    def snapshot(self) -> str:
        """Identity of the weights of both."""
        return digest([sha256(self.selector), sha256(self.generator)])[:16]

    def write(self, directory: Path) -> None:
        """Name the weights in a phase's directory, with relative paths, so a run can be moved."""
        paths = {name: getattr(self, name).resolve() for name in KINDS}
        write_json(directory / STATE, {n: os.path.relpath(p, directory.resolve()) for n, p in paths.items()})

    @classmethod
    def read(cls, directory: Path) -> Pair:
        """What :meth:`write` wrote."""
        row = json.loads((directory / STATE).read_text())
        return cls(*((directory / row[name]).resolve() for name in KINDS))

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in KINDS}
