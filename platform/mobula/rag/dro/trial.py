"""A sweep's trial: one alternation of the first arm, measured on dev questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobula import alternation
from mobula.alternation import Row
from mobula.config import digest
from mobula.locks import alone
from mobula.rag.dro.config import ARMS, COLD, Config
from mobula.rag.dro.loop import Setting, dro_loop
from mobula.rag.dro.sources import source_of
from mobula.rag.dro.start import cold_start
from mobula.threads import one_thread


def train_trial(config: Config, directory: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """Alternate, and report {iteration, dev_...} after each iteration, the start included.

    Trials that differ in the alternation alone share questions and cold start, in a folder beside theirs. Test
    questions are never looked at.
    """
    shared = directory.parent / "prepared" / digest(start_identity(config))[:16]
    source = source_of(config, shared)
    with one_thread():
        with alone(shared):
            source.prepare()
            start = cold_start(config, source, shared / COLD, config.seed)
        loop = dro_loop(Setting(config, ARMS[config.arms[0]], source, start, config.seed))
        alternation.report_iterations(loop, config.alternation, directory / "loop", config.seed, _told, report)


def start_identity(config: Config) -> list[object]:
    """What of a config decides questions and cold start."""
    names = ("data", "retrieve", "select", "model", "cold")
    return [*(asdict(getattr(config, name)) for name in names), config.fit.identity(), config.seed]


def _told(row: Row) -> Row:
    return {name: value for name, value in row.items() if name == "iteration" or name.startswith("dev_")}
