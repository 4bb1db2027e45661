"""What each stage of an arm trains on.

A function prepares a training from what the phases before it left, or says why there is none. The tables at the end
name them as :class:`.Arm` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mobula.agents.moat.preference import DpoTask, read_preferences
from mobula.agents.moat.setting import (
    MODEL,
    Setting,
    State,
    grounder_pairs,
    grounding_pairs,
    planner_pairs,
    planning_pairs,
)
from mobula.alternation import Context, Row
from mobula.models.causal import CausalModel
from mobula.models.sft import Pair, SftTask, write_pairs
from mobula.training import FitResult, TrainingConfig, fit, load_weights

Trainable = DpoTask | SftTask


@dataclass(frozen=True)
class Prepared:
    """A training that can begin, and facts about its data."""

    task: Trainable
    config: TrainingConfig
    facts: Row = field(default_factory=dict)


Prepare = Callable[[Setting, Context, State], "Prepared | str"]


def tune(task: Trainable, config: TrainingConfig, directory: Path, seed: int, name: str) -> tuple[FitResult, int]:
    """Train from the model the task starts with, save what came of it in ``directory/model``; target tokens learned."""
    result = fit(task, config, directory / "fit", seed=seed % 2**31, name=name)
    model = CausalModel.open(str(task.start))
    load_weights(model.network, result.weights)
    model.save(directory / MODEL)
    return result, round(result.examples * task.target_tokens / task.examples)


def steps_for(tokens: int, task: Trainable, batch: int) -> int:
    """How many steps learn from about ``tokens`` target tokens, one at least."""
    return max(1, round(tokens * task.examples / (task.target_tokens * batch)))


def chosen_shift(task: DpoTask, directory: Path) -> float:
    """How much likelier chosen plans are under what came of a training than under the reference, in nats."""
    model = CausalModel.open(str(directory / MODEL))
    pairs = task.items
    now = [float(s.sum()) for s in model.log_probs([p.prompt for p in pairs], [p.chosen for p in pairs])]
    return float(np.mean([after - p.ref_chosen for after, p in zip(now, pairs, strict=True)]))


def _preferences(setting: Setting, context: Context, state: State) -> Prepared | str:
    """Chosen plans against rejected ones; nothing with too few pairs."""
    found = _pairs(setting, context)
    if isinstance(found, str):
        return found
    moat = setting.config.moat
    return Prepared(DpoTask(state.planner, found, moat.beta, moat.chosen_nll), setting.config.prefer)


def _best_plans(setting: Setting, context: Context, state: State) -> Prepared | str:
    """The chosen plans as targets, with nothing to reject."""
    found = _pairs(setting, context)
    if isinstance(found, str):
        return found
    return _sft(context, state.planner, setting, [(list(p.prompt), list(p.chosen)) for p in read_preferences(found)])


def _pairs(setting: Setting, context: Context) -> Path | str:
    count = context.history.facts("pair")["n_pairs"]
    directory = context.history.latest("pair")
    if directory is None or count < setting.config.moat.fewest_pairs:
        return f"{count} pairs"
    return directory / "preferences.jsonl"


def _solved_plans(setting: Setting, context: Context, state: State) -> Prepared | str:
    """Own plans whose programs were right, and the gold ones."""
    by_id = {task.id: task for task in setting.tasks["align"]}
    model = CausalModel.open(str(state.planner))
    solved = [(by_id[r["task_id"]], r["plan"]) for r in context.history.rows("ground") if r["verdict"] == "accept"]
    pairs = planning_pairs(setting, model, solved)
    gold = planner_pairs(setting, model) if setting.config.moat.replay else []
    return _sft(context, state.planner, setting, [*pairs, *gold], solved=len(pairs))


def _gold_plans(setting: Setting, context: Context, state: State) -> Prepared | str:
    return _sft(context, state.planner, setting, planner_pairs(setting, CausalModel.open(str(state.planner))))


def _kept_programs(setting: Setting, context: Context, state: State) -> Prepared | str:
    """What the critic left of the programs for the planner's own plans, and the gold ones."""
    by_id = {task.id: task for task in setting.tasks["align"]}
    rows = [row for row in context.history.rows("ground") if row["used_actions"] is not None]
    model = CausalModel.open(str(state.grounder))
    pairs = grounding_pairs(setting, model, [(by_id[r["task_id"]], r["plan"], r["used_actions"]) for r in rows])
    gold = grounder_pairs(setting, model) if setting.config.moat.replay else []
    return _sft(context, state.grounder, setting, [*pairs, *gold], from_critic=len(pairs))


def _gold_programs(setting: Setting, context: Context, state: State) -> Prepared | str:
    return _sft(context, state.grounder, setting, grounder_pairs(setting, CausalModel.open(str(state.grounder))))


def _sft(context: Context, start: Path, setting: Setting, pairs: list[Pair], **facts: int) -> Prepared | str:
    if not pairs:
        return "nothing to learn"
    write_pairs(context.directory / "pairs.jsonl", pairs)
    task = SftTask(start, context.directory / "pairs.jsonl")
    return Prepared(task, setting.config.improve, {"rows": len(pairs), **facts})


PLANNER: dict[str, Prepare] = {
    "preferred": _preferences,
    "random": _preferences,
    "best": _best_plans,
    "solved": _solved_plans,
    "gold": _gold_plans,
}
GROUNDER: dict[str, Prepare] = {"criticised": _kept_programs, "solved": _kept_programs, "gold": _gold_programs}
