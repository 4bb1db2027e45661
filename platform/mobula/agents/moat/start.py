"""Stage 0: tasks of a world, and planner and grounder trained apart on gold plans and actions."""

from __future__ import annotations

import fcntl
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mobula import alternation
from mobula.agents.language import parse
from mobula.agents.moat.config import ARMS, Config, TasksConfig
from mobula.agents.moat.loop import MODEL, Setting, grounder_pairs, planner_pairs, tune
from mobula.agents.moat.templates import ground_text, plan_text
from mobula.agents.worlds import Task, World, build_worlds, generate
from mobula.agents.worlds.world import STYLES
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.sft import SftTask, write_pairs

TESTS = ("test_in", "test_out")
log = logging.getLogger(__name__)


def world_tasks(config: TasksConfig) -> tuple[dict[str, World], dict[str, list[Task]]]:
    """The worlds, and the tasks of every split."""
    worlds = build_worlds(config.seed)
    sizes = {"train": config.train, "align": config.align, "probe": config.probe, "dev": config.dev}
    sizes |= {"test_in": config.test_in, "test_out": config.test_out}
    return worlds, generate(worlds, sizes, config.seed)


def independent(
    config: Config, worlds: Mapping[str, World], tasks: Mapping[str, Sequence[Task]], directory: Path, seed: int
) -> Setting:
    """The independent agents in ``directory``, trained there unless they are; the setting of the first arm."""
    places = {name: directory / name for name in ("planner", "grounder")}
    first = ARMS[config.arms[0]]
    setting = Setting(config, first, tasks, worlds, places["planner"] / MODEL, places["grounder"] / MODEL, seed)
    directory.mkdir(parents=True, exist_ok=True)
    # Concurrent trials of a sweep share a folder; one of them fills it.
    with (directory / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        _train(setting, places)
    return setting


def _train(setting: Setting, places: Mapping[str, Path]) -> None:
    config = setting.config
    if all((place / MODEL / "config.json").is_file() for place in places.values()):
        return
    shape = SmallShape(config.model.layers, config.model.width, config.model.heads, config.model.positions)
    tokenizer = word_tokenizer(_texts(setting.worlds, setting.tasks))
    pairs = {"planner": planner_pairs, "grounder": grounder_pairs}
    for name, place in places.items():
        own = alternation.seed_of(setting.seed, name) % 2**31
        model = CausalModel.small(tokenizer, shape, own)
        model.save(place / "fresh")
        write_pairs(place / "pairs.jsonl", pairs[name](setting, model))
        log.info("seed %d: training the %s", setting.seed, name)
        tune(SftTask(place / "fresh", place / "pairs.jsonl"), config.stage0, place / "fresh", place, own, name)


def _texts(worlds: Mapping[str, World], tasks: Mapping[str, Sequence[Task]]) -> list[str]:
    """Every word of the world: tasks, programs, plans of every style. Words, not what is done with them."""
    chance = random.Random(0)
    found = []
    for task in (task for split in tasks.values() for task in split):
        world = worlds[task.family]
        program = parse(str(task.gold_actions))
        plans = [world.plan(program, [float(i == s) for i in range(len(STYLES))], chance) for s in range(len(STYLES))]
        tools = list(world.tools().values())
        found += [plan_text(task), str(task.gold_actions), *(ground_text(task, p, tools, "full") for p in plans)]
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
