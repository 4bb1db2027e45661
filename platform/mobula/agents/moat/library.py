"""The artifact of a `moat` run: planner and grounder as one version, and the predictor that serves them.

The predictor is built from the artifact alone: it knows no task's gold plan, actions or answer, and no critic.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mobula import artifacts
from mobula.agents.language import Called, execute, show
from mobula.agents.moat.config import Config
from mobula.agents.moat.setting import State
from mobula.agents.moat.templates import VERSIONS
from mobula.agents.moat.workers import Agents, Lengths
from mobula.agents.worlds import Task, World, WorldSet
from mobula.alternation import Row
from mobula.artifacts import Artifact, write_json

KIND = "agents"


@dataclass(frozen=True)
class Solution:
    """What the agents did about a task."""

    plan: str
    program: str
    calls: list[Called]
    answer: str | None
    status: str
    reason: str


class Predictor:
    """Planner and grounder, greedy and free-running. ``examples``: words of tasks by family."""

    def __init__(self, agents: Agents, most: Lengths, examples: Mapping[str, Sequence[str]]) -> None:
        self.agents = agents
        self.most = most
        self.examples = examples

    def solve(self, text: str, family: str) -> Solution:
        """Plan, act and answer with the tools of a family.

        Raises:
            KeyError: for a family that the world does not have.
        """
        world = self.agents.worlds[family]
        task = Task("", family, "served", text, None, tuple(world.tools()), None, None, "")
        ((plan, program),) = self.agents.solve([task], [None], self.most)
        done = execute(program, world.tools())
        answer = None if done.answer is None else show(done.answer)
        return Solution(plan, program, done.calls, answer, done.status, done.reason)


def write(
    directory: Path,
    config: Config,
    worlds: Mapping[str, World],
    state: State,
    rows: Sequence[Row],
    examples: Mapping[str, Sequence[str]],
) -> Artifact:
    """Write both agents, the tools that they know, the prompts' versions, the world, examples and the iterations."""

    def fill(folder: Path) -> None:
        shutil.copytree(state.planner, folder / "planner")
        shutil.copytree(state.grounder, folder / "grounder")
        tools = {
            family: [{"signature": tool.signature, "purpose": tool.purpose} for tool in world.tools().values()]
            for family, world in worlds.items()
        }
        write_json(folder / "tools.json", tools)
        write_json(folder / "templates.json", {**VERSIONS, "view": config.moat.grounder_view})
        write_json(
            folder / "world.json", {**asdict(config.tasks.worlds), "digests": {f: w.digest for f, w in worlds.items()}}
        )
        write_json(folder / "examples.json", examples)
        write_json(folder / "iterations.json", list(rows))

    meta = {
        "worlds": asdict(config.tasks.worlds),
        "view": config.moat.grounder_view,
        "max_plan": config.moat.max_plan,
        "max_program": config.moat.max_program,
        "model": asdict(config.model),
    }
    return artifacts.write(directory, kind=KIND, method="moat", meta=meta, fill=fill)


def load(artifact: Artifact) -> Predictor:
    """Open planner and grounder of an artifact."""
    meta, folder = artifact.meta, artifact.directory
    agents = Agents(folder / "planner", folder / "grounder", WorldSet(**meta["worlds"]), meta["view"])
    examples = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return Predictor(agents, Lengths(meta["max_plan"], meta["max_program"]), examples)
