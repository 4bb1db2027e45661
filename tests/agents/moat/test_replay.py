"""What replay is for: a grounder that learns one family's programs alone forgets the others."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mobula.agents.moat.config import ARMS, Config
from mobula.agents.moat.setting import MODEL, Setting, grounding_pairs
from mobula.agents.moat.stages import tune
from mobula.agents.moat.workers import Agents, Lengths, SolveWorker
from mobula.agents.worlds import WorldSet
from mobula.models.causal import CausalModel
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
    rows = SolveWorker(agents, Lengths(48, 72)).process(items, 0)
    return sum(row["success"] for row in rows) / len(rows)


def test_without_replay_success_on_gold_plans_falls(root: Path) -> None:
    start = root / "grounder" / MODEL
    setting = Setting(Config(), ARMS["moat"], {}, WorldSet("tools", 0).build(), root / "planner" / MODEL, start, 0)
    rows = [(task, str(task.gold_plan), str(task.gold_actions)) for task in small.known_tasks()]
    model = CausalModel.open(str(start))
    new = grounding_pairs(setting, model, [row for row in rows if row[0].family == "kb"])
    found = {"start": gold_plan_success(root, start)}
    for name, pairs in (("without", new), ("with", new + grounding_pairs(setting, model, rows))):
        place = root / name
        place.mkdir()
        write_pairs(place / "pairs.jsonl", pairs)
        config = replace(small.TRAINING, steps=40)
        tune(SftTask(start, place / "pairs.jsonl"), config, place, 0, name)
        found[name] = gold_plan_success(root, place / MODEL)
    assert min(found["start"], found["with"]) > 0.8
    assert found["without"] < 0.6
