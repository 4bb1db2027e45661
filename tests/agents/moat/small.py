"""Agents that have learned a few tasks by heart, as an artifact: small ones that do what large ones would."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mobula.agents.gate import Standing
from mobula.agents.moat import library
from mobula.agents.moat.config import ARMS, Config, TasksConfig
from mobula.agents.moat.setting import MODEL, Setting, State, grounding_pairs, planner_pairs
from mobula.agents.moat.stages import tune
from mobula.agents.moat.start import world_texts
from mobula.agents.worlds import Task, WorldSet
from mobula.agents.worlds.tool_world import generate
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.sft import SftTask, write_pairs
from mobula.running import run_experiment
from mobula.training import TrainingConfig

TRAINING = TrainingConfig(steps=150, batch=12, lr=5e-3, workers=0)


def run_in(directory: Path, config: dict[str, Any]) -> Path:
    """Run an experiment in a directory; the directory."""
    path = directory.with_name(f"{directory.name}.yaml")
    path.write_text(yaml.safe_dump(config))
    run_experiment(path, [], directory)
    return directory


@cache
def known_tasks() -> list[Task]:
    """The tasks that the agents know, of all families."""
    return generate(WorldSet("tools", 0).build(), {"train": 12}, seed=0)["train"]


def trained(root: Path) -> Path:
    """The artifact."""
    config = Config(method="moat", tasks=TasksConfig(seed=0))
    worlds, tasks = WorldSet("tools", 0).build(), {"train": known_tasks()}
    places = {name: root / name for name in ("planner", "grounder")}
    setting = Setting(
        config, ARMS["moat"], tasks, worlds, places["planner"] / MODEL, places["grounder"] / MODEL, seed=0
    )
    tokenizer = word_tokenizer(world_texts(worlds, tasks))
    for name, place in places.items():
        model = CausalModel.small(tokenizer, SmallShape(width=64, positions=192), seed=0)
        model.save(place / "fresh")
        known = [(task, str(task.gold_plan), str(task.gold_actions)) for task in known_tasks()]
        rows = planner_pairs(setting, model) if name == "planner" else grounding_pairs(setting, model, known)
        write_pairs(place / "pairs.jsonl", rows)
        tune(SftTask(place / "fresh", place / "pairs.jsonl"), TRAINING, place, 0, name)
    nothing = np.zeros(1)
    state = State(setting.planner, setting.grounder, Standing(nothing, nothing, 0.0, 1.0), nothing)
    examples = {task.family: [task.text] for task in known_tasks()}
    return library.write(root / "artifact", config, worlds, state, [], examples).directory
