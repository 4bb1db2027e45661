"""A sweep's trial: one alternation of the first arm, measured on dev questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobula import alternation
from mobula.alternation import Row
from mobula.config import digest
from mobula.rag.exsearch.config import ARMS, Config
from mobula.rag.exsearch.loop import Setting, em_loop
from mobula.rag.exsearch.start import warmed_up
from mobula.threads import one_thread

TOLD = ("iteration", "dev_em", "dev_f1", "held_bound")


def train_trial(config: Config, directory: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """Alternate, and report {iteration, dev_em, dev_f1, held_bound} after each iteration, the start included.

    Trials that differ in the alternation alone share their warm-up, in a folder beside theirs. Test questions are never
    looked at.
    """
    arm = ARMS[config.arms[0]]
    shared = directory.parent / "prepared" / digest(start_identity(config))[:16]
    with one_thread():
        setting = Setting(config, arm, warmed_up(config, shared, config.seed, arm.mode), config.seed)
        alternation.report_iterations(
            em_loop(setting), config.alternation, directory / "loop", config.seed, _told, report
        )


def _told(row: Row) -> Row:
    return {name: row[name] for name in TOLD}


def start_identity(config: Config) -> list[object]:
    """What of a config decides the warm-up."""
    data = {name: value for name, value in asdict(config.data).items() if name not in ("train", "dev", "test")}
    shown = [config.rollout.k_show, config.rollout.k_candidates, config.rollout.max_passage_tokens]
    return [
        data,
        asdict(config.model),
        [config.retrieve.kind, config.retrieve.encoder],
        shown,
        config.skill.identity(),
        config.skill_questions,
        config.warm_up.identity(),
        config.skill_share,
        config.seed,
    ]
