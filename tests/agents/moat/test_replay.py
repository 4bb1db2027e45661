"""What replay is for: a grounder that learns one family's programs alone forgets the others."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from mobula.agents.moat.agents import Agents, Lengths, TaskWorker, solve
from mobula.agents.worlds import WorldSet
from mobula.models.causal import CausalModel
from mobula.models.finetune import MODEL, finetune
from mobula.models.sft import SftTask, write_pairs
from tests.agents.moat import small


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    small.trained(folder)
    return folder


def gold_plan_success(root: Path, grounder: Path) -> float:
    """Success with gold plans on the families that are not trained further."""
    tasks = [task for task in small.known_tasks() if task.family != "kb"]
    agents = Agents(root / "planner" / MODEL, grounder, WorldSet("tools", 0), "plan_only")
    items = [{"task": asdict(task), "plan": task.gold_plan} for task in tasks]
    rows = TaskWorker(agents, partial(solve, most=Lengths(48, 72))).process(items, 0)
    return sum(row["success"] for row in rows) / len(rows)


def test_without_replay_success_on_gold_plans_falls(root: Path) -> None:
    start = root / "grounder" / MODEL
    data = small.known_data()
    rows = [(task, str(task.gold_plan), str(task.gold_actions)) for task in small.known_tasks()]
    model = CausalModel.open(str(start))
    new = data.grounding(model, [row for row in rows if row[0].family == "kb"])
    success = {"start": gold_plan_success(root, start)}
    for name, pairs in (("without", new), ("with", new + data.grounding(model, rows))):
        path = root / name
        path.mkdir()
        write_pairs(path / "pairs.jsonl", pairs)
        config = replace(small.TRAINING, steps=40)
        finetune(SftTask(start, path / "pairs.jsonl"), config, path, seed=0, name=name, cluster=None)
        success[name] = gold_plan_success(root, path / MODEL)
    assert min(success["start"], success["with"]) > 0.8
    assert success["without"] < 0.6
