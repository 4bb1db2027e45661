"""Agents that have learned a few tasks by heart, as an artifact: small ones that do what large ones would."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mobula.agents.gate import AgentScores
from mobula.agents.moat import artifact
from mobula.agents.moat.config import Config, TasksConfig
from mobula.agents.moat.data import TaskData
from mobula.agents.moat.stage import Checkpoint
from mobula.agents.worlds import Task, WorldSet
from mobula.agents.worlds.tool_world import generate
from mobula.models.causal import CausalModel, SmallShape
from mobula.models.finetune import MODEL, finetune
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


def known_data() -> TaskData:
    """The known tasks as training and dev tasks."""
    data = TaskData(Config(method="moat", tasks=TasksConfig(seed=0)))
    data.tasks = {"train": known_tasks(), "dev": known_tasks()}
    return data


def trained(root: Path) -> Path:
    """The artifact."""
    data = known_data()
    tokenizer = data.tokenizer()
    for name in ("planner", "grounder"):
        path = root / name
        model = CausalModel.small(tokenizer, SmallShape(width=64, positions=192), seed=0)
        model.save(path / "fresh")
        known = [(task, str(task.gold_plan), str(task.gold_actions)) for task in known_tasks()]
        write_pairs(path / "pairs.jsonl", data.gold_plans(model) if name == "planner" else data.grounding(model, known))
        finetune(SftTask(path / "fresh", path / "pairs.jsonl"), TRAINING, path, seed=0, name=name, cluster=None)
    nothing = np.zeros(1)
    scores = AgentScores(nothing, nothing, 0.0, 1.0)
    checkpoint = Checkpoint(root / "planner" / MODEL, root / "grounder" / MODEL, scores, nothing)
    return artifact.write(root / "artifact", data, checkpoint, []).directory
