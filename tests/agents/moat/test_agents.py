"""Agents at work: which tokens are scored, that gold never reaches an agent that solves, and that shards repeat."""

from __future__ import annotations

import pickle
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mobula.agents.moat.agents import Agents, Lengths, TaskWorker, ground, propose, score, solve
from mobula.agents.moat.config import Config
from mobula.agents.moat.critic import CriticSettings
from mobula.agents.moat.data import ground_text, plan_text
from mobula.agents.moat.start import fresh
from mobula.agents.worlds import Task, WorldSet
from mobula.agents.worlds.tool_world import generate
from mobula.config import build
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.finetune import MODEL
from mobula.models.finetune import finetune as run_finetune
from mobula.models.language_model import Sampling
from mobula.models.sft import SftTask, write_pairs
from mobula.training import TrainingConfig, fit, load_weights
from tests.models.tiny_llama import save_llama

RUN: dict[str, Any] = {"seed": 0, "name": "planner", "cluster": None}
SHAPE = SmallShape(layers=2, width=64, positions=192)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return generate(WorldSet("tools", 0).build(), {"train": 24}, seed=0)["train"]


@pytest.fixture(scope="module")
def agents(tasks: list[Task], tmp_path_factory: pytest.TempPathFactory) -> Agents:
    """A planner with fresh weights, and a grounder that has learned the programs of these tasks' plans."""
    folder = tmp_path_factory.mktemp("agents")
    worlds = WorldSet("tools", 0).build()
    texts = [ground_text(t, str(t.gold_plan), list(worlds[t.family].tools().values()), "full") for t in tasks]
    tokenizer = word_tokenizer([*texts, *map(plan_text, tasks), *(str(t.gold_actions) for t in tasks)])
    for name, seed in (("planner", 0), ("grounder", 1)):
        CausalModel.small(tokenizer, SHAPE, seed).save(folder / name)
    opened = Agents(folder / "planner", folder / "grounder", WorldSet("tools", 0), "plan_only")
    model, template = opened.grounding
    pairs = [
        (
            template.ground(t, str(t.gold_plan), list(worlds[t.family].tools().values())),
            [*model.encode(str(t.gold_actions)), model.eos],
        )
        for t in tasks
    ]
    write_pairs(folder / "pairs.jsonl", pairs)
    task = SftTask(folder / "grounder", folder / "pairs.jsonl")
    result = fit(task, TrainingConfig(steps=150, batch=24, lr=5e-3, workers=0), folder / "fit", seed=0, name="grounder")
    load_weights(model.network, result.weights)
    model.save(folder / "grounder")
    return Agents(folder / "planner", folder / "grounder", WorldSet("tools", 0), "plan_only")


@pytest.mark.parametrize("finetune", [False, True])
def test_agents_on_a_pretrained_model_start_as_it_is(tmp_path: Path, finetune: bool) -> None:
    """Under an adapter, or whole; then the model that is saved is one of its own."""
    base = save_llama(tmp_path / "base", word_tokenizer(["a", "b"]))
    config = build(Config, {"method": "moat", "model": {"base": str(base), "finetune": finetune}})
    task = fresh(config, lambda model: [([3, 4], [3, model.eos])], None, tmp_path / "planner", seed=0)
    finetuned = run_finetune(task, TrainingConfig(steps=2, batch=1, workers=0), tmp_path / "planner", **RUN)
    assert finetuned.weights.is_file()
    opened = CausalModel.open(str(tmp_path / "planner" / MODEL))
    assert (opened.base is None) == finetune
    assert (tmp_path / "planner" / MODEL / "model.safetensors").is_file() == finetune
    plain = dict(CausalModel.open(str(base)).network.named_parameters())
    changed = {n for n, p in opened.network.named_parameters() if n in plain and not torch.equal(p, plain[n])}
    assert bool(changed) == finetune


def items(tasks: list[Task], texts: list[str] | None = None) -> list[dict]:
    texts = texts or [str(task.gold_plan) for task in tasks]
    return [{"task": asdict(task), "j": 0, "text": text} for task, text in zip(tasks, texts, strict=True)]


def test_scored_are_the_gold_tokens_and_eos_alone(agents: Agents, tasks: list[Task]) -> None:
    model, _ = agents.grounding
    rows = TaskWorker(agents, score).process(items(tasks), 0)
    for row, task in zip(rows, tasks, strict=True):
        assert row["n_scored"] == len(model.encode(str(task.gold_actions))) + 1
        # Tokens of probability near one count as well: the mean is over all.
        assert row["nll_mean"] == pytest.approx(row["nll_sum"] / row["n_scored"])


def test_scores_do_not_depend_on_the_shard(agents: Agents, tasks: list[Task]) -> None:
    whole = TaskWorker(agents, score).process(items(tasks), 0)
    parts = [row for task in tasks for row in TaskWorker(agents, score).process(items([task]), 1)]
    assert [row["nll_mean"] for row in whole] == pytest.approx([row["nll_mean"] for row in parts], abs=1e-4)


def test_a_better_plan_makes_the_gold_program_likelier(agents: Agents, tasks: list[Task]) -> None:
    gold = TaskWorker(agents, score).process(items(tasks), 0)
    other = TaskWorker(agents, score).process(items(tasks, [str(tasks[i - 3].gold_plan) for i in range(len(tasks))]), 0)
    assert sum(row["nll_mean"] for row in gold) < sum(row["nll_mean"] for row in other) / 2


def test_the_program_scored_is_the_gold_one(agents: Agents, tasks: list[Task]) -> None:
    """A plan under which the grounder is sure of another program does not rank as if that were right."""
    task, other = tasks[0], tasks[3]
    own, others = TaskWorker(agents, score).process(items([task, task], [str(task.gold_plan), str(other.gold_plan)]), 0)
    assert own["nll_mean"] < others["nll_mean"]
    of_other = TaskWorker(agents, score).process(items([other], [str(other.gold_plan)]), 0)[0]
    assert of_other["nll_mean"] < others["nll_mean"]


def test_a_plan_counts_only_by_conditioning(agents: Agents, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    blind = Agents(agents.planner, agents.grounder, WorldSet("tools", 0), "plan_only")
    prompt = blind.grounding[0].encode("<act>")
    monkeypatch.setattr(blind, "program_prompts", lambda tasks, plans: [prompt] * len(plans))
    plans = ["S1: calc 1 + 2", "S1: buy it", "S1: query e5 r2\nS2: query R1 r3"]
    rows = TaskWorker(blind, score).process(items([tasks[0]] * 3, plans), 0)
    assert len({round(row["nll_mean"], 5) for row in rows}) == 1


def test_plans_are_drawn_by_seed_and_examined(agents: Agents, tasks: list[Task]) -> None:
    worker = TaskWorker(agents, partial(propose, samples=4, sampling=Sampling(12)))
    rows = worker.process(items(tasks[:5]), 7)
    assert [(row["task_id"], row["j"]) for row in rows] == [(t.id, j) for t in tasks[:5] for j in range(4)]
    assert rows == worker.process(items(tasks[:5]), 7)
    assert [r["text"] for r in rows] != [r["text"] for r in worker.process(items(tasks[:5]), 8)]
    assert len({row["text"] for row in rows}) > 10
    assert not any(row["parsed"] for row in rows if not row["text"].startswith("S1"))


def test_grounded_programs_are_run_and_judged(agents: Agents, tasks: list[Task]) -> None:
    job = partial(ground, sampling=Sampling(40, 0.1, 0.95), critic=CriticSettings("executable"))
    rows = TaskWorker(agents, job).process(items(tasks), 0)
    verdicts = [row["verdict"] for row in rows]
    assert verdicts.count("accept") > len(tasks) / 2
    assert "drop" not in verdicts  # the gold plan always means a right program
    for row, task in zip(rows, tasks, strict=True):
        assert row["used_actions"] == task.gold_actions or row["verdict"] == "accept"


def test_solving_never_reads_gold(agents: Agents, tasks: list[Task]) -> None:
    """The same plans, programs and statuses come of tasks whose gold has been taken away."""
    worker = TaskWorker(agents, partial(solve, most=Lengths(16, 40)))
    seen = worker.process([{"task": asdict(t), "plan": t.gold_plan} for t in tasks], 0)
    bare = [replace(t, gold_plan=None, gold_actions=None, answer="", meta={**t.meta, "wanted": ["x"]}) for t in tasks]
    blind = worker.process([{"task": asdict(t), "plan": p.gold_plan} for t, p in zip(bare, tasks, strict=True)], 0)
    same = ("plan", "program", "status", "valid")
    assert [[row[name] for name in same] for row in seen] == [[row[name] for name in same] for row in blind]
    assert sum(row["success"] for row in seen) > len(tasks) / 2
    assert sum(row["success"] for row in blind) == 0
    free = worker.process([{"task": asdict(t)} for t in tasks], 0)
    assert [row["plan"] for row in free] != [row["plan"] for row in seen]


def test_workers_travel_light(agents: Agents) -> None:
    opened = TaskWorker(agents, partial(propose, samples=2, sampling=Sampling(4)))
    assert agents.planning
    assert len(pickle.dumps(opened)) < 2000
    assert isinstance(pickle.loads(pickle.dumps(opened)).agents.planner, Path)
    assert torch.get_num_threads() >= 1
