"""Jobs of a pool, in this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from mobula.cluster.pool import pool
from mobula.errors import MobulaError


@dataclass
class Notes:
    """Leaves a file of every job, with the process that did it."""

    directory: Path

    def write(self, name: str, seed: int) -> None:
        if name == "broken":
            raise MobulaError("broken: no such arm")
        (self.directory / f"{name}-{seed}").write_text(str(os.getpid()))


def test_every_name_meets_every_seed(tmp_path):
    with pool(0, None) as workers:
        workers.map(Notes(tmp_path).write, ["a", "b"], range(3, 5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-3", "a-4", "b-3", "b-4"]
    assert {p.read_text() for p in tmp_path.iterdir()} == {str(os.getpid())}


def test_an_error_of_a_job_is_not_lost(tmp_path):
    with pool(0, None) as workers, pytest.raises(MobulaError, match="no such arm"):
        workers.map(Notes(tmp_path).write, ["a", "broken"], [0])
    assert [p.name for p in tmp_path.iterdir()] == ["a-0"]
