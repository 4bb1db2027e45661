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
from mobula.agents.moat.agents import Agents, Lengths
from mobula.agents.moat.data import VERSIONS, TaskData
from mobula.agents.moat.stage import Checkpoint
from mobula.agents.worlds import Task, WorldSet
from mobula.alternation import Row
from mobula.artifacts import Artifact, write_json

KIND = "agents"
EXAMPLES = 5  # of each family, for people who want to try the agents


@dataclass(frozen=True)
class Solution:
    """A plan, the program for it, its calls, and their answer."""

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


def write(directory: Path, data: TaskData, checkpoint: Checkpoint, rows: Sequence[Row]) -> Artifact:
    """Write both agents, the tools that they know, the prompts' versions, the world, examples and the iterations."""
    config, worlds = data.config, asdict(data.config.tasks.worlds)
    tools = {
        family: [{"signature": tool.signature, "purpose": tool.purpose} for tool in world.tools().values()]
        for family, world in data.worlds.items()
    }
    examples: dict[str, list[str]] = {}
    for task in data.tasks["dev"]:
        examples.setdefault(task.family, []).append(task.text)
    files = {
        "tools": tools,
        "templates": {**VERSIONS, "view": data.view},
        "world": {**worlds, "digests": {family: world.digest for family, world in data.worlds.items()}},
        "examples": {family: texts[:EXAMPLES] for family, texts in examples.items()},
        "iterations": list(rows),
    }

    def fill(folder: Path) -> None:
        shutil.copytree(checkpoint.planner, folder / "planner")
        shutil.copytree(checkpoint.grounder, folder / "grounder")
        for name, content in files.items():
            write_json(folder / f"{name}.json", content)

    lengths = {"max_plan": config.moat.max_plan, "max_program": config.moat.max_program}
    meta = {"worlds": worlds, "view": data.view, **lengths, "model": asdict(config.model)}
    return artifacts.write(directory, kind=KIND, method="moat", meta=meta, fill=fill)


def load(artifact: Artifact) -> Predictor:
    """Open planner and grounder of an artifact."""
    meta, folder = artifact.meta, artifact.directory
    agents = Agents(folder / "planner", folder / "grounder", WorldSet(**meta["worlds"]), meta["view"])
    examples = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return Predictor(agents, Lengths(meta["max_plan"], meta["max_program"]), examples)
