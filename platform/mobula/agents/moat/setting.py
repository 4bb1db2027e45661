"""What the phases of one arm and seed share, the agents that stand, and what stage 0 and replay train on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mobula.agents.gate import GateConfig, Standing
from mobula.agents.moat.config import Arm, Config
from mobula.agents.moat.critic import CriticSettings
from mobula.agents.moat.templates import View, template_of
from mobula.agents.moat.workers import Agents, Lengths
from mobula.agents.worlds import GROUNDER_STYLES, PLANNER_STYLES, Task, World
from mobula.alternation import History
from mobula.artifacts import write_json
from mobula.environment import secret
from mobula.errors import ConfigError
from mobula.models.causal import CausalModel, Sampling
from mobula.models.sft import Pair

STATE, MODEL = "state.json", "model"


@dataclass(frozen=True)
class Setting:
    """What all phases of one arm and seed share: the tasks, the worlds, and the agents of stage 0."""

    config: Config
    arm: Arm
    tasks: Mapping[str, Sequence[Task]]
    worlds: Mapping[str, World]
    planner: Path
    grounder: Path
    seed: int
    budget: Path | None = None  # the alternation whose training this arm may spend as much as, iteration by iteration

    def agents(self, planner: Path, grounder: Path) -> Agents:
        """A planner and a grounder in these worlds."""
        return Agents(planner, grounder, self.config.tasks.worlds, self.view)

    @property
    def view(self) -> View:
        """What a grounder sees."""
        return self.config.moat.grounder_view  # type: ignore[return-value]

    @property
    def most(self) -> Lengths:
        """How long plans and programs can be."""
        return Lengths(self.config.moat.max_plan, self.config.moat.max_program)

    @property
    def gate(self) -> GateConfig:
        """The gate of this arm. A retry would spend the budget of an arm that has one twice."""
        gate = self.config.gate
        return replace(gate, enabled=gate.enabled and self.arm.gate, retries=0 if self.arm.matched else gate.retries)

    @property
    def critic(self) -> CriticSettings:
        """Who judges in this arm."""
        moat = self.config.moat
        kind, noise = (self.arm.critic, self.arm.noise) if self.arm.critic else (moat.critic, moat.noise)
        return CriticSettings(kind, noise, self.seed, moat.critic_url, moat.critic_model, self._critic_key())

    def _critic_key(self) -> str:
        variable = self.config.moat.critic_key
        key = secret(variable) if variable else ""
        if key is None:
            raise ConfigError([f"moat.critic_key: the environment variable {variable} is not set"], self.config.name)
        return key

    @property
    def proposing(self) -> Sampling:
        """How plans are proposed."""
        moat = self.config.moat
        return Sampling(moat.max_plan, moat.temperature, moat.top_p)


@dataclass(frozen=True)
class State:
    """The agents that stand, and how.

    ``gap`` f[P]: by probe task, how much likelier the gold actions are after the gold plan than after the planner's
    own, in nats per token.
    """

    planner: Path
    grounder: Path
    standing: Standing
    gap: np.ndarray

    @classmethod
    def latest(cls, history: History) -> State:
        """What the last gate left."""
        directory = next(d for _, _, d in reversed(history.finished) if (d / STATE).is_file())
        return cls.read(directory / STATE)

    @classmethod
    def read(cls, path: Path) -> State:
        """What :meth:`write` wrote."""
        row = json.loads(path.read_text())
        arrays = (np.array(row["surrogate"]), np.array(row["success"]))
        root = path.parent
        standing = Standing(*arrays, row["leak_rate"], row["parse_rate"])
        planner, grounder = ((root / row[name]).resolve() for name in ("planner", "grounder"))
        return cls(planner, grounder, standing, np.array(row["gap"]))

    def write(self, directory: Path) -> None:
        """Leave it in a phase's directory; paths are relative, so a run can be moved."""
        row = {
            "planner": _relative(self.planner, directory),
            "grounder": _relative(self.grounder, directory),
            "surrogate": self.standing.surrogate.tolist(),
            "success": self.standing.success.tolist(),
            "leak_rate": self.standing.leak_rate,
            "parse_rate": self.standing.parse_rate,
            "gap": self.gap.tolist(),
        }
        write_json(directory / STATE, row)


def planner_pairs(setting: Setting, model: CausalModel) -> list[Pair]:
    """Task to gold plan, of the train split."""
    return planning_pairs(setting, model, [(task, str(task.gold_plan)) for task in setting.tasks["train"]])


def planning_pairs(setting: Setting, model: CausalModel, rows: Sequence[tuple[Task, str]]) -> list[Pair]:
    """(task, plan) as the planner is trained on them."""
    template = template_of(model, setting.view)
    return [(template.plan(task), [*model.encode(plan), model.eos]) for task, plan in rows]


def joint_pairs(setting: Setting, model: CausalModel) -> list[Pair]:
    """Task to gold plan and gold actions in one text, of the train split: what an integrated agent learns."""
    template = template_of(model, setting.view)
    rows = [(task, template.joined(str(task.gold_plan), str(task.gold_actions))) for task in setting.tasks["train"]]
    return planning_pairs(setting, model, rows)


def grounder_pairs(setting: Setting, model: CausalModel) -> list[Pair]:
    """Gold plan to gold actions, of the train split, the plans in the words of the grounder's annotators."""
    styles = GROUNDER_STYLES if setting.config.tasks.style_mismatch else PLANNER_STYLES
    rows = []
    for task in setting.tasks["train"]:
        plan = setting.worlds[task.family].annotated(task, styles, random.Random(f"grounder {task.id}"))
        rows.append((task, plan, str(task.gold_actions)))
    return grounding_pairs(setting, model, rows)


def grounding_pairs(setting: Setting, model: CausalModel, rows: Sequence[tuple[Task, str, str]]) -> list[Pair]:
    """(task, plan, actions) as the grounder is trained on them."""
    template = template_of(model, setting.view)
    found = []
    for task, plan, actions in rows:
        tools = setting.worlds[task.family].offered(task)
        found.append((template.ground(task, plan, tools), [*model.encode(actions), model.eos]))
    return found


def _relative(path: Path, directory: Path) -> str:
    return os.path.relpath(path.resolve(), directory.resolve())
