"""What alignment starts from: planner and grounder trained apart on gold plans and gold actions (stage 0)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mobula.agents.moat.config import ARMS, INTEGRATED, Config
from mobula.agents.moat.data import TaskData
from mobula.agents.moat.stage import ArmContext, learned_tokens, steps_for
from mobula.alternation import seed_of
from mobula.artifacts import write_json
from mobula.cluster.spec import ClusterSpec
from mobula.locks import alone
from mobula.models.causal import CausalModel, SmallShape
from mobula.models.finetune import MODEL, finetune
from mobula.models.sft import Pair, SftTask, write_pairs

TOKENS = "tokens.json"  # target tokens that models learned from, written when they are there
Rows = Callable[[CausalModel], list[Pair]]
log = logging.getLogger(__name__)


def independent(data: TaskData, directory: Path, seed: int, cluster: ClusterSpec | None) -> ArmContext:
    """The context of the first arm, with independent agents in ``directory``, trained there unless they are."""
    config, paths = data.config, {name: directory / name for name in ("planner", "grounder")}
    gold = {"planner": data.gold_plans, "grounder": data.gold_programs}
    with alone(directory):
        if not (directory / TOKENS).is_file():
            tokenizer, learned = data.tokenizer(), {}
            for name, path in paths.items():
                task = fresh(config, gold[name], tokenizer, path, seed_of(seed, name))
                log.info("seed %d: training the %s", seed, name)
                result = finetune(task, config.sft, path, seed=seed_of(seed, name), name=name, cluster=cluster)
                learned[name] = learned_tokens(task, result)
            write_json(directory / TOKENS, learned)
    return ArmContext(config, ARMS[config.arms[0]], data, paths["planner"] / MODEL, paths["grounder"] / MODEL, seed)


def integrated(arm: ArmContext, directory: Path, spent: int, cluster: ClusterSpec | None) -> None:
    """One model that writes plan and program, trained in ``directory`` unless it is there.

    It learns from as many target tokens as the two independent agents and the ``spent`` ones of their alignment.
    """
    if (directory / TOKENS).is_file():
        return
    learned = json.loads((arm.planner.parents[1] / TOKENS).read_text())
    seed, tokenizer = seed_of(arm.seed, INTEGRATED), CausalModel.open(str(arm.planner)).tokenizer
    task, config = fresh(arm.config, arm.data.gold_in_one, tokenizer, directory, seed), arm.config.sft
    config = replace(config, steps=steps_for(sum(learned.values()) + spent, task, config.batch))
    result = finetune(task, config, directory, seed=seed, name=INTEGRATED, cluster=cluster)
    write_json(directory / TOKENS, {INTEGRATED: learned_tokens(task, result)})


def fresh(config: Config, rows: Rows, tokenizer: Any, directory: Path, seed: int) -> SftTask:
    """An untrained model in ``directory``, and what it is to learn."""
    shape = config.model
    if shape.base:
        model = shape.start(seed % 2**31)
    else:
        small = SmallShape(shape.layers, shape.width, shape.heads, shape.positions)
        model = CausalModel.small(tokenizer, small, seed % 2**31)
    model.save(directory / "fresh")
    write_pairs(directory / "pairs.jsonl", rows(model))
    return SftTask(directory / "fresh", directory / "pairs.jsonl")


def start_identity(config: Config) -> list[object]:
    """The part of a config that decides the independent agents."""
    parts = [asdict(config.tasks), asdict(config.model), config.sft.identity()]
    return [*parts, config.moat.grounder_view, config.seed]
