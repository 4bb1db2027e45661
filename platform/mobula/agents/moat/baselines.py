"""What the arms that MOAT is compared with learn from, in place of its own pairs and programs."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mobula.agents.moat.candidates import PlanSample
from mobula.agents.moat.stage import ArmContext, Checkpoint, Prepare, Training, preferences_file, sft
from mobula.alternation import Context
from mobula.artifacts import read_jsonl
from mobula.models.causal import CausalModel


def random_ranks(samples: Sequence[PlanSample], seed: int) -> dict[tuple[str, int], float]:
    """Ranks in place of scores by task and plan: which plan is chosen and which is rejected is drawn."""
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    return {(sample.task_id, sample.j): float(rank) for sample, rank in zip(samples, order, strict=True)}


def _best_plans(arm: ArmContext, context: Context, checkpoint: Checkpoint) -> Training | str:
    """The chosen plans as targets, with nothing to reject."""
    path = preferences_file(arm, context)
    if isinstance(path, str):
        return path
    return sft(arm, context, checkpoint.planner, [(row["prompt"], row["chosen"]) for row in read_jsonl(path)])


def _solved_plans(arm: ArmContext, context: Context, checkpoint: Checkpoint) -> Training | str:
    """Own plans whose programs were right, and the gold ones: rejection-sampling fine-tuning."""
    tasks, model = arm.data.by_id("align"), CausalModel.open(str(checkpoint.planner))
    rows = [row for row in context.history.rows("ground") if row["verdict"] == "accept"]
    pairs = arm.data.planning(model, [(tasks[row["task_id"]], row["plan"]) for row in rows])
    gold = arm.data.gold_plans(model) if arm.config.moat.replay else []
    return sft(arm, context, checkpoint.planner, [*pairs, *gold], solved=len(pairs))


def _gold_plans(arm: ArmContext, context: Context, checkpoint: Checkpoint) -> Training | str:
    model = CausalModel.open(str(checkpoint.planner))
    return sft(arm, context, checkpoint.planner, arm.data.gold_plans(model))


def _gold_programs(arm: ArmContext, context: Context, checkpoint: Checkpoint) -> Training | str:
    model = CausalModel.open(str(checkpoint.grounder))
    return sft(arm, context, checkpoint.grounder, arm.data.gold_programs(model))


PLANNER: dict[str, Prepare] = {"best": _best_plans, "solved": _solved_plans, "gold": _gold_plans}
GROUNDER: dict[str, Prepare] = {"gold": _gold_programs}
