"""A sweep's trial: one alternation of the first arm, measured on the dev tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobula import alternation
from mobula.agents.moat.config import Config
from mobula.agents.moat.loop import moat_loop
from mobula.agents.moat.start import independent, start_identity, world_tasks
from mobula.alternation import Row
from mobula.config import digest


def train_trial(config: Config, directory: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """Alternate, and report {iteration, dev_success, J} after each iteration, the start included.

    Trials that differ in the alternation alone share their independent agents, in a folder beside theirs. Test tasks
    are never looked at.
    """
    worlds, tasks = world_tasks(config.tasks)
    shared = directory.parent / "prepared" / digest(start_identity(config))[:16]
    setting = independent(config, worlds, tasks, shared, config.seed)
    alternation.report_iterations(
        moat_loop(setting), config.alternation, directory / "loop", config.seed, _facts, report
    )


def _facts(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ("iteration", "dev_success", "J")}
