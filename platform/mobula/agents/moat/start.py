"""Stage 0: tasks of a world, and planner and grounder trained apart on gold plans and actions."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mobula import alternation
from mobula.agents.moat.config import ARMS, INTEGRATED, Config, TasksConfig
from mobula.agents.moat.setting import MODEL, Setting, grounder_pairs, joint_pairs, planner_pairs
from mobula.agents.moat.stages import steps_for, tune
from mobula.agents.moat.templates import ACT, ground_text, plan_text
from mobula.agents.worlds import Task, World
from mobula.agents.worlds.world import STYLES
from mobula.artifacts import write_json
from mobula.locks import alone
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.sft import Pair, SftTask, write_pairs

TESTS = ("test_in", "test_out")
TOKENS = "tokens.json"  # target tokens that models learned from, written when they are there
PAIRS = {"planner": planner_pairs, "grounder": grounder_pairs}
log = logging.getLogger(__name__)


def world_tasks(config: TasksConfig) -> tuple[dict[str, World], dict[str, list[Task]]]:
    """The worlds, and the tasks of every split."""
    return config.worlds.build(), config.worlds.tasks(config.sizes)


def independent(
    config: Config, worlds: Mapping[str, World], tasks: Mapping[str, Sequence[Task]], directory: Path, seed: int
) -> Setting:
    """The independent agents in ``directory``, trained there unless they are; the setting of the first arm."""
    places = {name: directory / name for name in PAIRS}
    first = ARMS[config.arms[0]]
    setting = Setting(config, first, tasks, worlds, places["planner"] / MODEL, places["grounder"] / MODEL, seed)
    with alone(directory):
        _train(setting, places)
    return setting


def integrated(start: Setting, directory: Path, spent: int) -> Path:
    """One model that writes plan and program, trained in ``directory`` unless it is there.

    It learns from as many target tokens as the two agents of stage 0 and the ``spent`` ones of their alignment.
    """
    if not (directory / TOKENS).is_file():
        stage0 = json.loads((start.planner.parents[1] / TOKENS).read_text())
        task = fresh(start, joint_pairs, CausalModel.open(str(start.planner)).tokenizer, directory, INTEGRATED)
        config = start.config.stage0
        config = replace(config, steps=steps_for(sum(stage0.values()) + spent, task, config.batch))
        _, learned = tune(task, config, directory, alternation.seed_of(start.seed, INTEGRATED), INTEGRATED)
        write_json(directory / TOKENS, {INTEGRATED: learned})
    return directory / MODEL


def _train(setting: Setting, places: Mapping[str, Path]) -> None:
    root = setting.planner.parents[1]
    if (root / TOKENS).is_file():
        return
    tokenizer = word_tokenizer(world_texts(setting.worlds, setting.tasks))
    learned = {}
    for name, place in places.items():
        task = fresh(setting, PAIRS[name], tokenizer, place, name)
        log.info("seed %d: training the %s", setting.seed, name)
        _, learned[name] = tune(task, setting.config.stage0, place, alternation.seed_of(setting.seed, name), name)
    write_json(root / TOKENS, learned)


def fresh(
    setting: Setting, pairs: Callable[[Setting, CausalModel], list[Pair]], tokenizer: Any, place: Path, name: str
) -> SftTask:
    """An untrained model in ``place``, and what it is to learn."""
    shape, seed = setting.config.model, alternation.seed_of(setting.seed, name) % 2**31
    if shape.base:
        model = CausalModel.adapted(shape.base, shape.lora_rank, shape.lora_alpha, seed)
    else:
        small = SmallShape(shape.layers, shape.width, shape.heads, shape.positions)
        model = CausalModel.small(tokenizer, small, seed)
    model.save(place / "fresh")
    write_pairs(place / "pairs.jsonl", pairs(setting, model))
    return SftTask(place / "fresh", place / "pairs.jsonl")


def world_texts(worlds: Mapping[str, World], tasks: Mapping[str, Sequence[Task]]) -> list[str]:
    """Every word of the world: tasks, programs, plans of every style. Words, not what is done with them."""
    chance = random.Random(0)
    found = [ACT]
    for task in (task for split in tasks.values() for task in split):
        found.append(plan_text(task))
        if task.gold_actions is None:
            continue
        world = worlds[task.family]
        tools = world.offered(task)
        shares = [[float(i == s) for i in range(len(STYLES))] for s in range(len(STYLES))]
        plans = [world.annotated(task, styles, chance) for styles in shares]
        found += [task.gold_actions, *(ground_text(task, plan, tools, "full") for plan in plans)]
    return found


def start_identity(config: Config) -> list[object]:
    """What of a config decides the independent agents."""
    return [
        asdict(config.tasks),
        asdict(config.model),
        config.stage0.identity(),
        config.moat.grounder_view,
        config.seed,
    ]
